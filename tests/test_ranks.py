"""Statistics over ranks that are processes: MPI started by a real `mpiexec`, and torch.distributed with gloo.

One start of the ranks serves many tests: tests/ranks.py writes down what each rank saw, and here it is compared with
extended precision on the whole batch.
"""

import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import oracle
import pytest
import ranks
from test_sync import assert_same_bits, roundoff

SIZES = (1, 2, 3, 4, 7)
GLOO = (3, 4)


def launcher():
    """The mpiexec that belongs to this Python's MPI, or the first on the PATH."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def missing(engine):
    """Why ranks of this engine cannot be started here, or None."""
    if engine == "torch":
        return None if importlib.util.find_spec("torch") else "PyTorch is not installed"
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed (pip install 'cubn[sync]')"
    return None if launcher() else "there is no mpiexec (pip install mpich)"


@cache
def flavour():
    """Which MPI starts the ranks, and the options that it needs for more ranks than cores, and as root."""
    version = subprocess.run([launcher(), "--version"], capture_output=True, text=True, check=False).stdout
    if "Open MPI" in version or "OpenRTE" in version or "PRRTE" in version:
        return "Open MPI", ["--oversubscribe", *(["--allow-run-as-root"] if os.getuid() == 0 else [])]
    return ("MPICH", []) if "HYDRA" in version else ("another MPI", [])


OUTLIVING = ("sh", "-c", '"$@"; test $? -gt 128 && sleep 5; exit 0', "rank")
"""A shell around each rank, which outlives a killed one for a while: mpiexec would end the others if it knew."""


def start(engine, size, folder, *scenarios, wrapper=()):
    """Run the scenarios on that many ranks; what each rank wrote down."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(ranks.__file__).parents[1]), str(Path(ranks.__file__).parent)]),
    }  # fmt: skip
    program = [sys.executable, ranks.__file__, engine, str(folder), *scenarios]
    if engine == "mpi":
        commands = [([launcher(), *flavour()[1], "-n", str(size), *wrapper, *program], environment)]
    else:
        world = [{**environment, "RANK": str(rank), "WORLD_SIZE": str(size)} for rank in range(size)]
        commands = [(program, one) for one in world]
    log = folder / "log"
    with log.open("wb") as out:
        started = [subprocess.Popen(c, env=e, stdout=out, stderr=out, cwd=folder) for c, e in commands]
        deadline = time.monotonic() + 240
        try:
            for process in started:
                process.wait(max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            for process in started:
                process.kill()
            pytest.fail(f"{size} ranks of {engine} have not ended after 240 s:\n{log.read_text()[-3000:]}")
    found = {}
    for rank in range(size):
        file = folder / f"{rank}.pickle"
        found[rank] = pickle.loads(file.read_bytes()) if file.exists() else None
    assert any(found.values()), f"no rank wrote anything:\n{log.read_text()[-3000:]}"
    return found


USUAL = ("float64", "float32", "masked", "refused")
EXTRA = {1: (), 2: ("freed",), 3: ("1000 steps", "jax", "torch"), 4: ("grid",), 7: ()}
MPI_ONLY = ("freed", "1000 steps")
NEEDS = {"jax": "jax", "torch": "torch"}


def installed(scenario):
    return scenario not in NEEDS or importlib.util.find_spec(NEEDS[scenario]) is not None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(engine, size): what every rank wrote of the usual scenarios, started once."""
    kept = {}

    def once(engine, size):
        if missing(engine):
            pytest.skip(missing(engine))
        if (engine, size) not in kept:
            extra = [name for name in EXTRA[size] if installed(name) and (engine == "mpi" or name not in MPI_ONLY)]
            kept[engine, size] = start(engine, size, tmp_path_factory.mktemp(f"{engine}{size}"), *USUAL, *extra)
        return kept[engine, size]

    return once


CASES = [("mpi", size) for size in SIZES] + [("torch", size) for size in GLOO]


def parts(found, scenario):
    """What the ranks returned, in rank order; none of them may have failed."""
    each = [found[rank][scenario] for rank in sorted(found)]
    failed = {rank: one for rank, one in enumerate(each) if isinstance(one, Exception)}
    assert not failed, f"{scenario}: {failed}"
    return each


def assert_one_process(each, dtype, *, masked=False):
    """Against extended precision on the whole batch, with the u that merging so many shares has."""
    x, dy, residual, where = ranks.whole_batch(dtype)
    if masked:
        last = (np.arange(ranks.ROWS) >= ranks.ROWS - ranks.SHARES[len(each)][-1])[:, None, None]
        where = where | ~last
    exact = oracle.batch_norm(
        x, ranks.GAMMA.astype(dtype), ranks.BETA.astype(dtype), activation="relu", residual=residual,
        where=where if masked else None, dy=dy, roundoff=roundoff(x, len(each)),
    )  # fmt: skip
    for name in ("y", "dx"):
        oracle.assert_within(np.concatenate([one[name] for one in each]), getattr(exact, name).rounded_to(dtype), name)
    for one in each:
        for name in ("mean", "var", "rstd", "dgamma", "dbeta"):
            oracle.assert_within(one[name], getattr(exact, name).rounded_to(dtype), name)
    for name in ("wide_mean", "wide_m2", "count", "rstd", "dgamma", "dbeta"):
        assert_same_bits([one[name] for one in each])


@pytest.mark.parametrize("scenario", ["float64", "float32", "masked"])
@pytest.mark.parametrize(("engine", "size"), CASES)
def test_processes_compute_what_one_does_on_the_whole_batch(run, engine, size, scenario):
    dtype = "float32" if scenario == "float32" else "float64"
    assert_one_process(parts(run(engine, size), scenario), dtype, masked=scenario == "masked")


def test_a_process_that_computes_by_itself_is_seen(run):
    """The teeth: the same comparison fails if one rank's values are not of all ranks."""
    each = [dict(one) for one in parts(run("mpi", 3), "float64")]
    each[0]["wide_mean"] = np.nextafter(each[0]["wide_mean"], 9)
    with pytest.raises(AssertionError):
        assert_one_process(each, "float64")
    each[0] = each[2]
    with pytest.raises(AssertionError):
        assert_one_process(each, "float64")


def test_all_adapters_give_the_same_bits(run):
    """Equal frames merged in equal order: over MPI and over gloo."""
    for one, other in zip(parts(run("mpi", 3), "float64"), parts(run("torch", 3), "float64"), strict=True):
        for name in one:
            assert_same_bits([one[name], other[name]])


@pytest.mark.parametrize(("library", "dtype"), [("torch", "float64"), ("jax", "float32")])
@pytest.mark.parametrize("engine", ["mpi", "torch"])
def test_arrays_of_other_libraries_go_over_it_too(run, engine, library, dtype):
    if not installed(library):
        pytest.skip(f"{library} is not installed")
    each = parts(run(engine, 3), library)
    if library == "torch":
        assert_one_process(each, dtype)
    else:  # JAX has no float64, so that its sums are float32's: 60 samples, 8 roundings each at most
        wanted = parts(run(engine, 3), "float32")
        for one, other in zip(each, wanted, strict=True):
            np.testing.assert_allclose(one["y"], other["y"], rtol=500 * 2.0**-24, atol=500 * 2.0**-24)
            np.testing.assert_allclose(one["dx"], other["dx"], rtol=500 * 2.0**-24, atol=500 * 2.0**-24)
        for name in ("mean", "var", "dgamma"):
            assert_same_bits([one[name] for one in each])


REFUSALS = {
    "channels": ("SyncError", "another channels than rank 0 (1000 against 3)"),
    "eps": ("SyncError", "another eps than rank 0 (0.001 against 1e-05)"),
    "dtype": ("SyncError", "another dtype than rank 0 (float32 against float64)"),
    "gamma": ("ShapeError", "gamma has shape (4,)"),
    "layer": ("ShapeError", "3"),
    "one sample": ("ShapeError", "one sample per channel"),
    "empty": ("ShapeError", "empty batch"),
    "dy": ("ShapeError", "dy has shape (1, 3)"),
}


@pytest.mark.parametrize("call", REFUSALS)
@pytest.mark.parametrize(("engine", "size"), CASES)
def test_what_is_wrong_on_one_process_is_raised_on_all_at_once(run, engine, size, call):
    """All within a fraction of the 60 s that a rank would wait for another."""
    each = [found[call] for found, _, _ in parts(run(engine, size), "refused")]
    error, words = REFUSALS[call]
    if size == 1 and error == "SyncError":  # nobody to disagree with
        assert each == [None]
        return
    for raised in each:
        assert raised is not None
        assert raised[0] == error
        assert words in raised[1]
        assert raised[2] < 20
    if error == "SyncError":
        assert len({message for _, message, _ in each}) == 1
        assert each[0][1].startswith(f"rank {size - 1} has another")


@pytest.mark.parametrize(("engine", "size"), CASES)
def test_the_processes_go_on_together_after_errors(run, engine, size):
    found = parts(run(engine, size), "refused")
    assert [state for _, state, _ in found] == [(0, [0.0] * ranks.CHANNELS)] * size
    assert_one_process([after for _, _, after in found], "float64")


def test_a_thousand_steps_neither_drift_nor_leak(run):
    """The same batch 1,000 times: every gradient the same bits, and the average of 1,000 equal numbers, each step of
    which rounds three times.  Memory may grow by what the allocator takes at once; 900 steps that lost one message
    of 4 KiB each would lose 3,600 KiB."""
    x, *_ = ranks.whole_batch()
    mean, var = x.mean(axis=(0, 2)), x.var(axis=(0, 2), ddof=1)
    each = parts(run("mpi", 3), "1000 steps")
    for one in each:
        assert one["same"]
        assert one["steps"] == 1000
        np.testing.assert_allclose(one["mean"], mean, rtol=3000 * 2.0**-53)
        np.testing.assert_allclose(one["var"], var, rtol=3000 * 2.0**-53)
        assert one["kilobytes"] < 3000
    for name in ("mean", "var"):
        assert_same_bits([one[name] for one in each])


@pytest.mark.parametrize("engine", ["mpi", "torch"])
def test_a_grid_of_processes_computes_what_one_does(run, engine):
    assert_one_process(parts(run(engine, 4), "grid"), "float64")


def test_a_communicator_that_is_gone_or_none_is_refused_in_a_sentence(run):
    for found in parts(run("mpi", 2), "freed"):
        classes, messages = zip(*[(one[0], one[1]) for one in found], strict=True)
        assert classes == ("SyncError", "ValueError", "ValueError", "TypeError", "ValueError", "ValueError")
        assert "was freed, but the ranks meet in it; free it after the last use" in messages[0]
        assert "MPI.COMM_NULL" in messages[1]
        assert messages[1] == messages[2]
        assert "comm is a str" in messages[3]
        assert "2 ranks are laid out" in messages[4]
        assert "timeout is 0" in messages[5]


@pytest.mark.parametrize("scenario", ["late", "killed"])
@pytest.mark.parametrize(("engine", "size"), [("mpi", 3), ("torch", 3)])
def test_a_lost_process_is_missed_in_time_and_changes_nothing(engine, size, scenario, tmp_path):
    if missing(engine):
        pytest.skip(missing(engine))
    if engine == "mpi" and scenario == "killed" and flavour()[0] != "MPICH":
        pytest.skip(f"{flavour()[0]} ends all ranks when one dies")
    found = start(engine, size, tmp_path, scenario, wrapper=OUTLIVING if engine == "mpi" else ())
    for rank in range(size - 1):
        first, unchanged, second = found[rank][scenario]
        assert first[0] == second[0] == "SyncError"
        assert first[2] < 10
        assert second[2] < 1
        assert "make new communicators" in first[1]
        if scenario == "late":
            assert f"rank {rank} waited for 3 ranks" in first[1]
            assert "within 0.5 s" in first[1]
        assert "has lost another rank of this communicator before" in second[1]
        assert unchanged


def test_without_mpi4py_the_error_says_what_to_install(monkeypatch):
    import cubn

    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=r"needs mpi4py and an MPI library.*pip install 'cubn\[sync\]'"):
        cubn.sync.mpi()


def test_without_pytorch_the_error_says_what_to_install(monkeypatch):
    import cubn

    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"needs PyTorch, but it cannot be imported.*pip install torch"):
        cubn.sync.torch()


def test_without_a_process_group_the_error_says_what_to_call():
    import cubn

    pytest.importorskip("torch", reason="PyTorch is not installed")
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group first"):
        cubn.sync.torch()


def test_without_a_device_nccl_is_refused(monkeypatch):
    import cubn

    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match="CuPy is not installed"):
        cubn.sync.nccl(None)
