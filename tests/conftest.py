"""Fixtures of the suite: one parametrised machine, so that every promise is tested on each of them."""

import importlib.util

import oracle
import pytest

import cubn

MACHINES = ("reference", "cpu", "host")
"""Machines that serve NumPy arrays; `host` is the CUDA kernels' own text, executed on the CPU (tests/host)."""


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The name of the machine that everything in the test is computed on."""
    name = request.param
    if name == "cpu" and importlib.util.find_spec("numba") is None:
        pytest.skip("the CPU machine needs Numba, which is not installed")
    if name == "host":
        from host.build import missing

        if missing():
            pytest.skip(missing())
        monkeypatch.setitem(cubn.dispatch.MACHINES, "host", "host_machine")
        for dtype in ("float16", "bfloat16", "float32"):
            monkeypatch.setitem(oracle.ARITHMETIC, dtype, oracle.ROUNDOFF["float32"])
    with cubn.dispatch.use_machine(name):
        yield name
