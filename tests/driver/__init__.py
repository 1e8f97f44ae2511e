"""A stand-in for the CUDA driver, over which the real CuPy runs on a machine without a GPU.

What launch.py asks of CuPy, and what CuPy asks of the driver, is tested with CuPy's own arrays, memory, compiler,
streams and launches; nothing is said about a GPU, and no time measured here is a GPU's.

    cubn ── launch.py ──> CuPy ──> driver.c ── under_cupy.py ──> nobody: launches that do nothing, for host times
                                                             └─> computed.py: the executor of tests/host, for tests

Importing `driver.under_cupy` puts it there, before CuPy is imported.  It refuses where there is a driver already, so
nothing that a GPU should do is ever done here by mistake.  `make test-cupy` runs the tests.

    driver.c       the driver and the runtime: memory, streams, graphs, counts, what a launch must satisfy
    under_cupy.py  builds it and redirects CuPy to it; counts, limits, refusals
    computed.py    computes launches, in memory that knows its bounds
    plugin.py      `pytest -p driver.plugin`: both, and smaller tensors
"""
