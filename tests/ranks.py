"""What each rank of a real cluster does in tests/test_ranks.py: `mpiexec -n 3 python ranks.py mpi FOLDER SCENARIO ...`.

Every rank writes what its scenarios returned, or the exceptions they raised, to FOLDER/RANK.pickle.  The tests read
that and compare; nothing is asserted here.
"""

import os
import pickle
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np

import cubn

CHANNELS, ROWS = 3, 12
SHARES = {1: (12,), 2: (1, 11), 3: (5, 0, 7), 4: (0, 3, 8, 1), 7: (1, 2, 0, 3, 1, 4, 1)}
GAMMA, BETA = np.array([1.5, -0.5, 2.0]), np.array([0.1, 0.2, -0.3])


def cut(values, shares):
    """The share of each rank, by rows."""
    return np.split(values, np.cumsum(shares)[:-1])


def whole_batch(dtype="float64", seed=1):
    rng = np.random.default_rng(seed)
    x, dy, residual = rng.normal(0.5, 1.5, (3, ROWS, CHANNELS, 5)).astype(dtype)
    return x, dy, residual, rng.random(x.shape) < 0.6


def values(sync, dtype, *, masked=False, convert=np.asarray, size=None):
    """y, the moments and every gradient of this rank's share."""
    x, dy, residual, where = (cut(part, SHARES[sync.size])[sync.rank] for part in whole_batch(dtype))
    gamma, beta = GAMMA.astype(dtype), BETA.astype(dtype)
    x, dy, residual, where, gamma, beta = map(convert, (x, dy, residual, where, gamma, beta))
    y, saved = cubn.batch_norm(
        x, gamma, beta, activation="relu", residual=residual, sync=sync,
        where=where if masked and sync.rank == sync.size - 1 else None,
    )  # fmt: skip
    grads = cubn.batch_norm_backward(dy, saved, sync=sync, reduce_parameters=True)
    m = saved.moments
    return {
        "y": np.asarray(y), "mean": np.asarray(m.mean), "var": np.asarray(m.var), "count": np.asarray(m.count),
        "wide_mean": np.asarray(m.wide_mean), "wide_m2": np.asarray(m.wide_m2), "rstd": np.asarray(saved.rstd),
        "dx": np.asarray(grads.dx), "dgamma": np.asarray(grads.dgamma), "dbeta": np.asarray(grads.dbeta),
        "dresidual": np.asarray(grads.dresidual),
    }  # fmt: skip


def by_torch(sync):
    import torch

    return values(sync, "float64", convert=lambda v: torch.from_numpy(np.ascontiguousarray(v)))


def by_jax(sync):
    import jax.numpy as jnp

    return values(sync, "float32", convert=jnp.asarray)


def raised(function):
    """(class, message) of what a function raises, and how long that took; None if nothing."""
    start = time.monotonic()
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return None


def refused(sync):
    """One call after the other in which the last rank differs; the ranks go on together after each."""
    odd = sync.rank == sync.size - 1
    x = np.random.default_rng(sync.rank).normal(size=(4, CHANNELS))
    wide = np.random.default_rng(sync.rank).normal(size=(4, 1000))
    layer = cubn.BatchNorm(CHANNELS, dtype="float64", sync=sync)

    def backward():
        _, saved = cubn.batch_norm(x, sync=sync)
        cubn.batch_norm_backward(x[:1] if odd else x, saved, sync=sync)

    found = {
        "channels": raised(lambda: cubn.batch_norm(wide if odd else x, sync=sync)),
        "eps": raised(lambda: cubn.batch_norm(x, eps=1e-3 if odd else 1e-5, sync=sync)),
        "dtype": raised(lambda: cubn.batch_norm(x.astype("float32") if odd else x, sync=sync)),
        "gamma": raised(lambda: cubn.batch_norm(x, np.ones(4 if odd else CHANNELS), sync=sync)),
        "layer": raised(lambda: layer(x[:, :2] if odd else x)),
        "one sample": raised(lambda: cubn.batch_norm(x[: int(odd)], sync=sync)),
        "empty": raised(lambda: cubn.batch_norm(x[:0], sync=sync)),
        "dy": raised(backward),
    }
    return found, (layer.num_batches_tracked, layer.running_mean.tolist()), values(sync, "float64")


def thousand_steps(sync):
    """A layer on the same batch 1,000 times: its running statistics, the first and last gradients, and the memory."""
    x, dy, *_ = (cut(part, SHARES[sync.size])[sync.rank] for part in whole_batch())
    layer = cubn.BatchNorm(CHANNELS, dtype="float64", momentum=None, sync=sync)
    first, resident = None, []
    for step in range(1000):
        layer(x)
        dx = layer.backward(dy)
        first = dx if first is None else first
        if step in (100, 999):
            resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return {
        "same": first.tobytes() == dx.tobytes(), "mean": layer.running_mean, "var": layer.running_var,
        "steps": layer.num_batches_tracked, "kilobytes": resident[1] - resident[0],
    }  # fmt: skip


def late(sync):
    """The last rank sleeps through a step.  The others miss it in time, and their layers stay as they were."""
    sync._timeout = 0.5
    layer = cubn.BatchNorm(CHANNELS, dtype="float64", sync=sync)
    x = np.random.default_rng(sync.rank).normal(size=(4, CHANNELS))
    layer(x)
    if sync.rank == sync.size - 1:
        time.sleep(2.5)
        return None
    state = layer.state_dict()
    return raised(lambda: layer(x)), unchanged(layer, state), raised(lambda: layer(x))


def killed(sync):
    """The last rank dies in a step, as by `kill -9`."""
    sync._timeout = 1.5
    layer = cubn.BatchNorm(CHANNELS, dtype="float64", sync=sync)
    x = np.random.default_rng(sync.rank).normal(size=(4, CHANNELS))
    layer(x)
    if sync.rank == sync.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    state = layer.state_dict()
    return raised(lambda: layer(x)), unchanged(layer, state), raised(lambda: layer(x))


def unchanged(layer, state):
    return all(np.array_equal(state[key], now) for key, now in layer.state_dict().items())


def freed(sync):
    """A communicator that is gone, and those that are none."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Dup()
    mine = cubn.sync.mpi(comm)
    cubn.batch_norm(np.ones((2, 3)), sync=mine)
    comm.Free()
    return [
        raised(lambda: cubn.batch_norm(np.ones((2, 3)), sync=mine)),
        raised(lambda: cubn.sync.mpi(comm)),
        raised(lambda: cubn.sync.mpi(MPI.COMM_NULL)),
        raised(lambda: cubn.sync.mpi("COMM_WORLD")),
        raised(lambda: cubn.sync.mpi(shape=(sync.size, 2))),
        raised(lambda: cubn.sync.mpi(timeout=0)),
    ]


def in_a_grid(sync):
    """Four ranks as two rows of two."""
    grid = getattr(cubn.sync, ENGINE)(shape=(2, 2))
    assert (grid.rank, grid.size) == (sync.rank, sync.size)
    return values(grid, "float64")


SCENARIOS = {
    "float64": lambda sync: values(sync, "float64"),
    "float32": lambda sync: values(sync, "float32"),
    "masked": lambda sync: values(sync, "float64", masked=True),
    "torch": by_torch,
    "jax": by_jax,
    "refused": refused,
    "1000 steps": thousand_steps,
    "late": late,
    "killed": killed,
    "freed": freed,
    "grid": in_a_grid,
}

ENGINE = ""


def main(engine, folder, *scenarios):
    global ENGINE
    ENGINE = engine
    if engine == "torch":
        import torch.distributed

        rendezvous = f"file://{folder}/rendezvous"
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    sync = getattr(cubn.sync, engine)()
    found = {}
    for name in scenarios:
        try:
            found[name] = SCENARIOS[name](sync)
        except Exception as error:
            traceback.print_exc()
            found[name] = error
    file = Path(folder, f"{sync.rank}.pickle")
    file.with_suffix(".part").write_bytes(pickle.dumps(found))
    file.with_suffix(".part").rename(file)
    if {"late", "killed"}.intersection(scenarios):  # a lost rank keeps MPI_Finalize waiting
        deadline = time.monotonic() + 20
        while sync.rank == 0 and len(list(Path(folder).glob("*.pickle"))) < sync.size - ("killed" in scenarios):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
