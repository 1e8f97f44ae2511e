"""Fixtures of the suite: one parametrised machine, so that every promise is tested on each of them."""

import importlib.util

import pytest

import cubn

MACHINES = ("reference", "cpu")
"""Machines that serve NumPy arrays.  The executed kernels and the GPU join by adding a name."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "reference_only: about the array API, where other machines have no part")


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest):
    """The name of the machine that everything in the test is computed on."""
    name = request.param
    if name not in cubn.dispatch.MACHINES:
        pytest.skip(f"this version has no machine {name!r}")
    if name == "cpu" and importlib.util.find_spec("numba") is None:
        pytest.skip("the CPU machine needs Numba, which is not installed")
    with cubn.dispatch.use_machine(name):
        yield name
