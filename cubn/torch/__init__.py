"""Batch normalisation for PyTorch: its functions and layers, computed by cubn's machines.

    import cubn.torch
    cubn.torch.convert(model)          # every batch norm of a model, in place; revert() undoes it

Layers are subclasses of PyTorch's own, with the same state, so that checkpoints, `isinstance`, `.eval()`, `.to()`
and optimisers notice nothing.

tensors       tensors as arrays of the machines, in the same memory
passes        the passes forward and backward, unseen by autograd
autograd      the same for code that runs as it is written
operators     the same for what compiles, traces and transforms
functional, layers, synchronised, conversion     what is used
"""

from cubn.torch.conversion import Report, convert, revert
from cubn.torch.functional import batch_norm
from cubn.torch.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAddReLU, BatchNormReLU
from cubn.torch.synchronised import SyncBatchNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAddReLU",
    "BatchNormReLU",
    "Report",
    "SyncBatchNorm",
    "batch_norm",
    "convert",
    "revert",
]
