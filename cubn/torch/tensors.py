"""Tensors as the arrays that cubn's machines compute on, in the same memory, and the stream they are computed on.

A CPU tensor is seen as a NumPy array and a CUDA tensor, by DLPack, as a CuPy array, bfloat16 by its bits.  Tensors
of any other device, and CUDA tensors where there is no CuPy, are computed as they are, by the reference.

Results go the other way: PyTorch allocates them, and a machine writes into them.  So all memory is PyTorch's, with
its allocator, its statistics and its rules for streams.
"""

import ctypes
import sys
import warnings
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache
from mmap import PAGESIZE
from typing import Any

import numpy as np
import torch

from cubn.errors import DTypeError, PerformanceWarning
from cubn.namespace import Array, namespace, why_no_cuda

NOTHING: AbstractContextManager[Any] = nullcontext()

HUGE, MADV_HUGEPAGE = 1 << 22, 14
"""Bytes from which on huge pages pay, and Linux's number for asking."""


def array_of(tensor: torch.Tensor) -> Array:
    """The memory of a tensor as an array; writing to one is writing to the other.

    Raises
    ------
    DTypeError
        If the tensor is sparse or of any other layout that is not strided memory, or is bfloat16 and `ml_dtypes`
        is missing.

    Examples
    --------
    >>> import torch
    >>> from cubn.torch.tensors import array_of
    >>> x = torch.zeros(2, requires_grad=True)
    >>> array_of(x)[0] = 5
    >>> x
    tensor([5., 0.], requires_grad=True)
    """
    tensor = tensor.detach()
    if tensor.is_cpu and tensor.dtype is not torch.bfloat16:
        try:
            return tensor.numpy()
        except (RuntimeError, TypeError):  # negated lazily, sparse or the like
            pass
    if tensor.layout is not torch.strided:
        raise DTypeError(
            f"a tensor has the layout {tensor.layout}, but batch normalisation reads every element of strided memory; "
            f"pass tensor.to_dense()."
        )
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    device = tensor.device.type
    if device == "cpu":
        if tensor.dtype is torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(_bfloat16())
        return tensor.numpy()
    if device == "cuda" and _cupy_is_there():
        cupy: Any = namespace("cuda")
        if tensor.dtype is torch.bfloat16:
            return cupy.from_dlpack(tensor.view(torch.int16)).view(_bfloat16())
        return cupy.from_dlpack(tensor)
    return tensor


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised memory of PyTorch's with the memory format of x, on huge pages where there are any.

    A large result is fresh memory, and touching it for the first time, 4 KiB after 4 KiB, takes longer than all
    arithmetic: 23 of the 42 ms of a forward pass over 103 MB on two cores.  So this asks Linux for huge pages from
    4 MiB on, as NumPy does for its arrays.  It is a hint, and changes nothing but time.
    """
    result = torch.empty_like(x)
    size = result.nbytes
    if size >= HUGE and result.is_cpu and not result.is_meta:
        advise = _madvise()
        if advise is not None:
            begin = -(-result.data_ptr() // PAGESIZE) * PAGESIZE
            advise(begin, (result.data_ptr() + size - begin) // PAGESIZE * PAGESIZE, MADV_HUGEPAGE)
    return result


def stream_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """PyTorch's current stream of the tensor's device, as the one that the kernels are launched on."""
    if tensor.device.type != "cuda" or not _cupy_is_there():
        return NOTHING
    cupy: Any = namespace("cuda")
    device = tensor.device.index
    both = ExitStack()
    both.enter_context(cupy.cuda.Device(device))
    both.enter_context(cupy.cuda.ExternalStream(torch.cuda.current_stream(tensor.device).cuda_stream, device))
    return both


def widest_dtype(device: torch.device) -> torch.dtype:
    """What means and reciprocal deviations are kept in between the passes: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def statistics_dtype(x: torch.Tensor) -> torch.dtype:
    """What gradients of parameters are in, and running statistics where they are not the buffers of a half layer."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


@lru_cache(maxsize=1)
def _madvise() -> Any:
    """Linux's `madvise`, None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function


@lru_cache(maxsize=1)
def _bfloat16() -> Any:
    try:
        import ml_dtypes
    except ImportError as error:
        raise DTypeError(
            f"a tensor has dtype bfloat16, but NumPy knows it through ml_dtypes alone, which is missing ({error}); "
            f"pip install 'cubn[torch]'."
        ) from error
    return np.dtype(ml_dtypes.bfloat16)


@lru_cache(maxsize=1)
def _cupy_is_there() -> bool:
    missing = why_no_cuda()
    if missing is not None:
        warnings.warn(
            f"CUDA tensors are computed by the reference, many times slower than need be, because {missing}.",
            PerformanceWarning,
            stacklevel=4,
        )
    return missing is None
