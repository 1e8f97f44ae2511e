"""Compile a kernel once per element type, when it is first needed, and keep it on disk.

Kernels are called through the entry point of one compiled signature: choosing it here, once, saves Numba from
finding out the types of twenty arguments in every call.
"""

import os
import threading
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from numba import njit, types

STORED = {"float64": types.float64, "float32": types.float32, "float16": types.uint16, "bfloat16": types.int16}
"""Element type -> what `cubn.machines.cpu.simd` knows it as; only sizes are checked when a kernel is called."""

_compiling = threading.Lock()


def _forget() -> None:
    """A forked child must not wait for a thread that only its parent has."""
    global _compiling
    _compiling = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@lru_cache(maxsize=1)
def _source() -> str:
    """A digest of the text of all kernels."""
    digest = sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile without holding Python's lock while it runs, and cache on disk where there is a place for it."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        dispatcher = njit(cache=True, **options)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache directory can anything be written
        return njit(**options)(function)
    # Numba looks whether the file of the kernel has changed, but not whether those it imports have.
    file: Any = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if hasattr(file, "_source_stamp"):
        file._source_stamp = (file._source_stamp, _source())
    return dispatcher


def array(dtype: Any, rank: int = 3) -> Any:
    """Numba's type of an array with any strides."""
    return types.Array(dtype, rank, "A")


BOARD = array(types.int64, 1)


def compile_for(dispatcher: Any, *signature: Any) -> Callable[..., Any]:
    """The entry point of the kernel for arguments of these types."""
    with _compiling:
        try:
            return dispatcher.compile(signature)  # type: ignore[no-any-return]  # numba has no type hints
        except OSError:  # compiled, but the cache could not be written
            return dispatcher.compile(signature)  # type: ignore[no-any-return]  # numba has no type hints
