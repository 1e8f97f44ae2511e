"""Batch normalisation (Ioffe & Szegedy 2015) for people who work with arrays."""

from cubn import dispatch, sync
from cubn.errors import (
    DeviceError,
    DTypeError,
    KernelError,
    PerformanceWarning,
    ShapeError,
    SyncError,
)
from cubn.explain import Explanation, explain
from cubn.fold import fold, fold_into
from cubn.functional import (
    Gradients,
    Saved,
    batch_norm,
    batch_norm_backward,
    batch_norm_inference,
    batch_norm_inference_backward,
    moments,
)
from cubn.layer import BatchNorm
from cubn.moments import Moments
from cubn.namespace import namespace
from cubn.population import population
from cubn.state import RunningStatistics
from cubn.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "DTypeError",
    "DeviceError",
    "Explanation",
    "Gradients",
    "KernelError",
    "Moments",
    "PerformanceWarning",
    "RunningStatistics",
    "Saved",
    "ShapeError",
    "SyncError",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "dispatch",
    "explain",
    "fold",
    "fold_into",
    "moments",
    "namespace",
    "population",
    "sync",
    "warmup",
]
