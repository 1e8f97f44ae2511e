"""Compile the CPU machine's kernels ahead of the first call."""

from collections.abc import Iterable

from cubn.errors import DTypeError
from cubn.namespace import STATISTICS_DTYPE


def warmup(dtypes: str | Iterable[str] = ("float32",)) -> None:
    """Compile the kernels for NumPy arrays now, so that no later call has to wait.

    Kernels are compiled when they are first needed, once per element type and memory order (planes or
    channels-last), and are kept on disk (`NUMBA_CACHE_DIR`, or beside the package): a few seconds each, the
    first time on a machine.  This does all of them for the given element types.

    Parameters
    ----------
    dtypes : str or iterable of str
        Of x: "float16", "bfloat16", "float32", "float64".

    Raises
    ------
    ImportError
        If Numba is not installed.
    DTypeError
        If batch normalisation is not defined for one of the dtypes.

    Examples
    --------
    >>> import cubn
    >>> cubn.warmup("float32")
    """
    names = (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)
    for name in names:
        if name not in STATISTICS_DTYPE:
            raise DTypeError(
                f"dtypes has {name!r}, but batch normalisation is defined for {', '.join(STATISTICS_DTYPE)}; "
                f"pass names of these."
            )
    from cubn.machines import cpu

    for name in names:
        cpu.compile_ahead(name)
