"""The exceptions and warnings that users of cubn can meet.

Every message is one sentence in three parts: what was given, what it disagrees with, and what to pass
instead.  Errors are raised before any work is done, so nothing is half-changed when one arrives.
"""


class ShapeError(ValueError):
    """Shapes, axes or counts of samples that do not fit together."""


class DTypeError(TypeError):
    """An element type that batch normalisation is not defined for, or two that do not go together."""


class DeviceError(TypeError):
    """Arrays of two libraries or two devices in one call, or a device that is not there."""


class KernelError(RuntimeError):
    """A CUDA kernel that did not compile or launch; names the kernel, the plan and the device."""


class SyncError(RuntimeError):
    """Ranks that disagree about the call they are in, or a rank that did not arrive in time."""


class PerformanceWarning(UserWarning):
    """The result is right, but a faster way to it is not installed."""
