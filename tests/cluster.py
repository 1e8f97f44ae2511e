"""`python cluster.py FOLDER`: population statistics on two worker processes, more data than memory, and a dead worker.

Writes what it found and measured as JSON to standard output; tests/test_population.py compares.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

import cubn

PLANE = 128
CHANNELS = 64
ROWS = 8


def block_of_integers(number, folder=None):
    """(8, 64, 128, 128) float32, 33.5 MB: every residue of 1024 alike, plus the block's number, plus 1000 a channel."""
    if folder is not None:
        Path(folder, str(number)).touch()
    x = np.empty((ROWS, CHANNELS, PLANE, PLANE), np.float32)
    x[...] = (np.arange(PLANE * PLANE, dtype=np.float32) % 1024).reshape(PLANE, PLANE) + number
    x += 1000 * np.arange(CHANNELS, dtype=np.float32)[:, None, None]
    return x


def data(blocks, folder=None):
    import dask.array as da

    chunks = ((ROWS,) * blocks, (CHANNELS,), (PLANE,), (PLANE,))

    def chunk(block_id=None):
        return block_of_integers(block_id[0], folder)

    return da.map_blocks(chunk, chunks=chunks, dtype=np.float32, meta=np.empty((0,) * 4, np.float32))


def exact(blocks):
    """Means of two independent uniform choices, of 1024 and of `blocks` integers; the sum of their variances."""
    mean = 511.5 + (blocks - 1) / 2 + 1000 * np.arange(CHANNELS)
    return mean, (1024**2 - 1) / 12 + (blocks**2 - 1) / 12


def error(found, blocks):
    mean, var = exact(blocks)
    return {
        "count": found.count == blocks * ROWS * PLANE * PLANE,
        "mean": float(np.abs(found.wide_mean / mean - 1).max()),
        "var": float(np.abs(found.wide_var / var - 1).max()),
    }


def peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(folder):
    from distributed import Client, LocalCluster

    found = {}
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        x = data(128)
        found["gigabytes"] = x.nbytes / 1e9
        start = time.perf_counter()
        found["large"] = error(cubn.population(x), 128)
        found["seconds"] = time.perf_counter() - start
        found["megabytes"] = [peak_megabytes(), *client.run(peak_megabytes).values()]

        x = data(40, folder)
        result = []
        thread = threading.Thread(target=lambda: result.append(cubn.population(x)))
        thread.start()
        while len(os.listdir(folder)) < 8:
            time.sleep(0.01)
        before = client.run(os.getpid)
        os.kill(next(iter(before.values())), signal.SIGKILL)
        found["blocks before the death"] = len(os.listdir(folder))
        thread.join(60)
        found["after a death"] = error(result[0], 40)
        found["same bits"] = result[0].wide_m2.tobytes() == cubn.population(data(40)).wide_m2.tobytes()
        found["another worker"] = set(client.run(os.getpid).values()) != set(before.values())
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
