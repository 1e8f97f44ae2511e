"""Population statistics of a file, against the time that NumPy needs to read the same bytes once.

    python benchmarks/population.py                    1 GB, half a minute; writes benchmarks/results/population.json

The file is memory-mapped and in the page cache, so that no disk is measured.  NumPy reads it in one thread: as a sum
of every block, and as a copy of every block into the same memory.  All take turns, and a ratio is that of neighbours in
time; reported are medians.  The statistics are checked against float64 before the clock starts.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
BLOCK = 6  # samples that NumPy reads at a time: 15 MB, as cubn does
SHAPE = (400, 64, 100, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of cubn and Dask (default 2)")
    parser.add_argument("--turns", type=int, default=9, help="of each (default 9)")
    parser.add_argument("--file", type=Path, help="of an earlier run, or where to keep it for a later one")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "population.json")
    options = parser.parse_args()
    for variable in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[variable] = str(options.threads)
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    from run import provenance

    with tempfile.TemporaryDirectory() as folder:
        times, size = measure(options.file or Path(folder, "x.npy"), options.turns, options.threads)
    record = provenance(options.threads)
    record["about"] = "population of a memory-mapped float32 file in the page cache, in one pass"
    record["bytes"] = size
    sums = times["NumPy sum"]
    record["results"] = [
        {
            "what": name,
            "seconds": statistics.median(each),
            "against NumPy's sum": statistics.median(own / other for own, other in zip(each, sums, strict=True)),
        }
        for name, each in times.items()
    ]  # fmt: skip
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    for result in record["results"]:
        print("{:<26} {:.3f} s   {:.2f} of NumPy's sum".format(*result.values()))


def measure(file: Path, turns: int, threads: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of every turn."""
    import dask
    import dask.array as da
    import numpy as np

    import cubn

    if not file.exists():
        made = np.lib.format.open_memmap(file, mode="w+", dtype="float32", shape=SHAPE)
        for sample in range(SHAPE[0]):
            made[sample] = np.random.default_rng(sample).random(SHAPE[1:], dtype="float32")
        made.flush()
    x = np.load(file, mmap_mode="r")
    starts, memory = range(0, len(x), BLOCK), np.empty((BLOCK, *x.shape[1:]), x.dtype)
    lazy = da.from_array(x, chunks=(BLOCK, *x.shape[1:]))

    def copy() -> None:
        for start in starts:
            block = x[start : start + BLOCK]
            np.copyto(memory[: len(block)], block)

    ways = {
        "NumPy sum": lambda: sum(float(x[start : start + BLOCK].sum()) for start in starts),
        "NumPy copy": copy,
        "cubn.population": lambda: cubn.population(x),
        "cubn.population of Dask": lambda: cubn.population(lazy),
        "Dask sum": lambda: lazy.sum().compute(),
    }
    with dask.config.set(scheduler="threads", num_workers=threads):
        found = cubn.population(x)
        exact = x[:, 7].astype("float64")
        assert abs(found.wide_mean[7] / exact.mean() - 1) < 1e-12
        assert abs(found.wide_var[7] / exact.var() - 1) < 1e-12
        assert abs(cubn.population(lazy).wide_var[7] / exact.var() - 1) < 1e-12
        times: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            way()
        for _ in range(turns):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - began)
    return times, x.nbytes


if __name__ == "__main__":
    main()
