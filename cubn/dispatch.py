"""Array library -> machine: one table, imported when first needed, no silent fallback."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import import_module
from typing import cast

from cubn.machines import Machine
from cubn.namespace import Library

MACHINES = {
    "reference": "cubn.machines.reference",
}
"""Name of a machine -> the module that is it."""

_forced: ContextVar[str | None] = ContextVar("cubn_machine", default=None)


def machine_for(library: Library) -> Machine:
    """The machine that computes on arrays of this library."""
    forced = _forced.get()
    return _load(forced if forced is not None else "reference")


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


@lru_cache(maxsize=8)
def _load(name: str) -> Machine:
    return cast(Machine, import_module(MACHINES[name]))
