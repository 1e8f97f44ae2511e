"""Which library owns an array, and what that library can do.  Imports none that is not loaded already."""

import sys
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeAlias

import array_api_compat
import numpy as np

from cubn.errors import DeviceError, DTypeError

Array: TypeAlias = Any
"""An array of any library of the Python array API standard."""

STATISTICS_DTYPE = {
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float32",
    "float64": "float64",
}
"""Element type of x -> element type of statistics, gamma, beta and running state.  The only such table."""


NOTHING: AbstractContextManager[Any] = nullcontext()


@dataclass(frozen=True)
class Library:
    """An array library and the device of one array of it.

    Attributes
    ----------
    name : str
        "numpy", "cupy", "torch", "jax", "dask" or the top-level package of any other.
    xp : module
        Its namespace in the terms of the array API standard.
    place : hashable
        Where the array lives: CuPy's number of the device, NumPy's None, and what others call their device.
    device : object
        The same in the library's own terms.  CuPy's devices have no hash.
    """

    name: str
    xp: Any = field(compare=False)
    place: Hashable
    device: Any = field(compare=False)

    @property
    def is_numpy(self) -> bool:
        """True for NumPy itself."""
        return self.name == "numpy"

    @property
    def strided(self) -> bool:
        """True if arrays are writable memory with `strides` in bytes, as those of NumPy and CuPy are."""
        return self.name in ("numpy", "cupy")

    def asarray(self, values: Any, dtype: Any = None) -> Array:
        """`values` as an array of this library on this device."""
        if self.is_numpy:
            return np.asarray(values, dtype)
        return self.xp.asarray(values, dtype=dtype, device=self.device)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Uninitialised memory, C-contiguous."""
        if self.is_numpy:
            return np.empty(shape, dtype)
        if self.name == "cupy":
            with self.here():  # the standard's namespace for CuPy takes a device and does not look at it
                return sys.modules["cupy"].empty(shape, dtype)
        return self.xp.empty(shape, dtype=dtype, device=self.device)

    def here(self) -> AbstractContextManager[Any]:
        """The device as the current one: CuPy allocates and computes there, wherever its arrays are."""
        if self.name == "cupy" and sys.modules["cupy"].cuda.runtime.getDevice() != self.place:
            return self.device  # type: ignore[no-any-return]
        return NOTHING

    def dtype(self, name: str) -> Any:
        """The library's dtype object of that name."""
        return np.dtype(name) if self.is_numpy else getattr(self.xp, name)

    def __str__(self) -> str:
        return self.name if self.is_numpy else f"{self.name} ({self.device})"


def library_of(x: Array) -> Library:
    """The library and device of an array; TypeError if it is no array of any."""
    if isinstance(x, np.ndarray):
        return _numpy()
    if _is_cupy(x):
        return _cupy(x.data.device_id)
    xp = array_api_compat.array_namespace(x)
    name = type(x).__module__.partition(".")[0]
    for known in ("torch", "jax", "dask"):
        if getattr(array_api_compat, f"is_{known}_array")(x):
            name = known
    device = array_api_compat.device(x)
    return Library(name, xp, device, device)


@lru_cache(maxsize=1)
def _numpy() -> Library:
    return Library("numpy", _numpy_namespace(), None, None)


def _is_cupy(x: Any) -> bool:
    cupy = sys.modules.get("cupy")  # faster than array_api_compat's, and asked many times in a call
    return cupy is not None and isinstance(x, cupy.ndarray)


@lru_cache(maxsize=64)
def _cupy(device: int) -> Library:
    import array_api_compat.cupy

    return Library("cupy", array_api_compat.cupy, device, sys.modules["cupy"].cuda.Device(device))


@lru_cache(maxsize=1)
def _numpy_namespace() -> Any:
    import array_api_compat.numpy

    return array_api_compat.numpy


def namespace_of(x: Array) -> Any:
    """The array API namespace of an array, or of the NumPy scalar that a reduction left behind."""
    if isinstance(x, np.ndarray | np.generic):
        return _numpy_namespace()
    return array_api_compat.array_namespace(x)


def adopt(x: Any, name: str = "x") -> tuple[Array, Library]:
    """An array as it is, anything else as NumPy takes it."""
    if isinstance(x, np.ma.MaskedArray):
        remedy = "x.data together with where=~numpy.ma.getmaskarray(x)"
        if name != "x":
            remedy = f"{name}.filled(value) or {name}.data"
        raise DTypeError(f"{name} is a numpy.ma.MaskedArray, but its mask would be ignored; pass {remedy}.")
    if not is_array(x) or (isinstance(x, np.ndarray) and type(x) is not np.ndarray):
        x = np.asarray(x)  # a subclass may have rules of its own: numpy.matrix never has three axes
    return x, library_of(x)


def is_array(x: Any) -> bool:
    """True for an array of some library, False for lists, scalars (NumPy's too) and everything else."""
    if isinstance(x, np.ndarray) or _is_cupy(x):
        return True
    return not isinstance(x, np.generic) and bool(array_api_compat.is_array_api_obj(x))


def require_same_library(name: str, array: Array, library: Library, leader: str = "x") -> None:
    """Raise `DeviceError` unless `array` lives in the library and on the device of `leader`."""
    other = library_of(array)
    traced = other.name == library.name == "jax" and None in (other.place, library.place)  # it has no device yet
    if other != library and not traced:
        raise DeviceError(
            f"{name} is an array of {other}, but {leader} is one of {library}; pass {name} as an array of {library}."
        )


def dtype_name(dtype: Any) -> str:
    """Name of a dtype of any library: "float32", "bfloat16", "int64", …"""
    if isinstance(dtype, np.dtype):
        return _numpy_dtype_name(dtype)
    return getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]


@lru_cache(maxsize=256)
def _numpy_dtype_name(dtype: Any) -> str:
    return str(dtype.name)  # NumPy makes it anew every time, in a microsecond


def widest_float(library: Library) -> Any:
    """float64, or float32 on a device that has nothing wider."""
    if library.is_numpy:
        return np.dtype(np.float64)
    return _widest_float(library)


@lru_cache(maxsize=64)
def _widest_float(library: Library) -> Any:
    floats = library.xp.__array_namespace_info__().dtypes(device=library.device, kind="real floating")
    return floats.get("float64", floats["float32"])


@lru_cache(maxsize=64)
def integer_dtype(xp: Any) -> Any:
    """What a library counts in: its default integer, int64 wherever it has one (JAX has it on request)."""
    return xp.__array_namespace_info__().default_dtypes()["integral"]


def is_static_count(count: Any) -> bool:
    """True for a count that is one Python integer, False for an array of counts per channel."""
    return isinstance(count, int)


def may_overlap(a: Array, b: Array) -> bool:
    """True if writing to `a` could change `b`.  Exact on NumPy; elsewhere, True where it cannot be told."""
    if a is b:
        return True
    if not is_array(b):  # a list or a number was copied
        return False
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if not np.may_share_memory(a, b):  # by their bounds
            return False
        try:
            return np.shares_memory(a, b, max_work=1000)  # type: ignore[arg-type]  # the stub knows 0 and -1 only
        except np.exceptions.TooHardError:
            return True
    if _is_cupy(a):
        return bool(sys.modules["cupy"].may_share_memory(a, b))
    if array_api_compat.is_torch_array(a):
        return bool(a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr())
    return False


def namespace(device: str = "auto") -> ModuleType:
    """NumPy or CuPy, so that one text runs on either.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        "cpu" is NumPy, "cuda" is CuPy, "auto" is CuPy where it is installed and sees a device, else NumPy.

    Returns
    -------
    module
        `numpy` or `cupy`.

    Raises
    ------
    DeviceError
        If "cuda" is asked for and CuPy or a device is missing; says which.
    ValueError
        If `device` is none of the three.

    Examples
    --------
    >>> import cubn
    >>> xp = cubn.namespace("cpu")
    >>> xp.__name__
    'numpy'
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device is {device!r}, but cubn knows "auto", "cpu" and "cuda"; pass one of these.')
    if device == "cpu":
        return np
    missing = why_no_cuda()
    if missing is None:
        import cupy

        return cupy  # type: ignore[no-any-return]
    if device == "auto":
        return np
    raise DeviceError(f'device is "cuda", but {missing}; pass "cpu", or "auto" to take what is there.')


def why_no_cuda() -> str | None:
    """None if CuPy is installed and sees a device, else what is missing and how to get it."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed (pip install 'cubn[cuda12]' or 'cubn[cuda13]', as the driver needs)"
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy raises several kinds, for a missing driver among others
        return f"CuPy {cupy.__version__} finds no usable CUDA driver ({error})"
    return None if devices else f"CuPy {cupy.__version__} finds no CUDA device"


def broadcastable(shape: Sequence[int], target: Sequence[int]) -> bool:
    """True if an array of `shape` broadcasts to `target` by NumPy's rules."""
    return len(shape) <= len(target) and all(
        size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(target), strict=False)
    )
