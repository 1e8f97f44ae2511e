"""Fixtures of the suite: one parametrised machine, so that every promise is tested on each of them."""

import importlib.util

import oracle
import pytest

import cubn
from cubn.namespace import why_no_cuda

MACHINES = ("reference", "cpu", "host", pytest.param("gpu", marks=pytest.mark.gpu))
"""Machines that serve NumPy arrays: `host` is the CUDA kernels' own text, executed on the CPU (tests/host), and `gpu`
the same kernels on a GPU, to which every argument is copied (tests/gpu_machine.py; `pytest -m gpu`)."""

KERNELS = {"host": "host_machine", "gpu": "gpu_machine"}
"""Machine of the CUDA kernels -> the module of the tests that it is."""


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The name of the machine that everything in the test is computed on."""
    name = request.param
    if name == "cpu" and importlib.util.find_spec("numba") is None:
        pytest.skip("the CPU machine needs Numba, which is not installed")
    if name == "gpu" and (reason := why_no_cuda()):
        pytest.skip(f"needs a GPU: {reason}")
    if name == "host":
        from host.build import missing

        if missing():
            pytest.skip(missing())
    if name == "reference":  # does everything as wide as its sums
        for dtype, unit in oracle.ARITHMETIC.items():
            monkeypatch.setitem(oracle.ELEMENTS, dtype, unit)
    if name in KERNELS:
        monkeypatch.setitem(cubn.dispatch.MACHINES, name, KERNELS[name])
        for dtype in ("float16", "bfloat16", "float32"):
            monkeypatch.setitem(oracle.ARITHMETIC, dtype, oracle.ROUNDOFF["float32"])
    with cubn.dispatch.use_machine(name):
        yield name
