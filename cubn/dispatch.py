"""Array library -> machine: one table, imported when first needed, no silent fallback."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import import_module
from typing import cast

from cubn.errors import PerformanceWarning
from cubn.machines import Machine
from cubn.namespace import Library

MACHINES = {
    "reference": "cubn.machines.reference",
    "cpu": "cubn.machines.cpu",
    "cuda": "cubn.machines.cuda.launch",
}
"""Name of a machine -> the module that is it."""

LIBRARIES = {
    "numpy": "cpu",
    "cupy": "cuda",
}
"""Array library -> the machine that computes on its arrays.  The reference computes on all others."""

_forced: ContextVar[str | None] = ContextVar("cubn_machine", default=None)


def machine_for(library: Library) -> Machine:
    """The machine that computes on arrays of this library."""
    return chosen() or _machine_of(library.name)


def chosen() -> Machine | None:
    """The machine that `use_machine` has named; None where each library has its own."""
    name = _forced.get()
    return None if name is None else _load(name)


@contextmanager
def use_machine(name: str) -> Iterator[None]:
    """Compute everything inside the `with` block on the named machine.  For tests and comparisons.

    Examples
    --------
    >>> import numpy as np, cubn
    >>> with cubn.dispatch.use_machine("reference"):
    ...     y, _ = cubn.batch_norm(np.array([[1.0], [3.0]]), eps=0.0)
    >>> y.tolist()
    [[-1.0], [1.0]]
    """
    if name not in MACHINES:
        raise ValueError(f"machine is {name!r}, but cubn has {', '.join(MACHINES)}; pass one of these.")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@lru_cache(maxsize=64)
def _machine_of(library: str) -> Machine:
    name = LIBRARIES.get(library, "reference")
    if name == "cpu":
        try:
            return _load(name)
        except ImportError as error:
            if error.name is None or error.name.partition(".")[0] not in ("numba", "llvmlite"):
                raise
            warnings.warn(
                f"NumPy arrays are computed by the reference, many times slower than need be, because Numba is "
                f"missing ({error}); pip install 'cubn[cpu]'.",
                PerformanceWarning,
                stacklevel=4,
            )
            name = "reference"
    return _load(name)


@lru_cache(maxsize=8)
def _load(name: str) -> Machine:
    return cast(Machine, import_module(MACHINES[name]))
