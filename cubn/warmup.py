"""Compile the kernels ahead of the first call."""

from collections.abc import Iterable, Sequence
from typing import Any

from cubn.errors import DTypeError
from cubn.functional import batch_norm, batch_norm_backward, batch_norm_inference
from cubn.namespace import STATISTICS_DTYPE, namespace


def warmup(
    dtypes: str | Iterable[str] = ("float32",),
    *,
    device: str = "cpu",
    shapes: Iterable[Sequence[int]] = (),
    channel_axis: int | Sequence[int] = 1,
    activation: str | None = None,
    residual: bool = False,
) -> None:
    """Compile the kernels now, so that no later call has to wait.

    Kernels are compiled when they are first needed and kept on disk.  For NumPy arrays: once per element type and
    memory order (planes or channels-last), a few seconds each, the first time on a machine (`NUMBA_CACHE_DIR`, or
    beside the package).  This does all of them for the given element types.

    For CuPy arrays the kernels depend on the shape too, and take under a second each (`CUPY_CACHE_DIR`).  This makes
    the calls of a training step and of inference once for every shape and element type, on the current device and
    stream, with memory that is given back.  After it these calls can be captured into a CUDA graph.

    Parameters
    ----------
    dtypes : str or iterable of str
        Of x: "float16", "bfloat16", "float32", "float64".
    device : {"cpu", "cuda"}
        Whose kernels.
    shapes : iterable of tuple of int
        Of x, for "cuda".  Channels-last memory is the shape as it lies there, with `channel_axis=-1`.
    channel_axis, activation
        As in `cubn.batch_norm`, for "cuda".
    residual : bool
        Whether the calls will have one, for "cuda".

    Raises
    ------
    ImportError
        If Numba is not installed, for "cpu".
    DeviceError, KernelError
        If there is no CUDA device, or the kernels do not compile for it.
    DTypeError, ShapeError
        If batch normalisation is not defined for one of the dtypes or shapes.
    ValueError
        If `device` is neither, or "cuda" is given no shape.

    Examples
    --------
    >>> import cubn
    >>> cubn.warmup("float32")
    >>> cubn.warmup(["float16"], device="cuda", shapes=[(32, 256, 56, 56)])     # doctest: +SKIP
    """
    names = (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)
    for name in names:
        if name not in STATISTICS_DTYPE:
            raise DTypeError(
                f"dtypes has {name!r}, but batch normalisation is defined for {', '.join(STATISTICS_DTYPE)}; "
                f"pass names of these."
            )
    if device not in ("cpu", "cuda"):
        raise ValueError(f'device is {device!r}, but there are kernels for "cpu" and "cuda"; pass one of these.')
    if device == "cpu":
        from cubn.machines import cpu

        for name in names:
            cpu.compile_ahead(name)
        return
    wanted = [tuple(shape) for shape in shapes]
    if not wanted:
        raise ValueError(
            "shapes is empty, but the CUDA kernels are chosen by the shape of x; pass those that you will call with, "
            "such as shapes=[(32, 256, 56, 56)]."
        )
    xp = namespace("cuda")
    for shape in wanted:
        for name in names:
            _train_and_infer(xp, shape, _element(name), channel_axis, activation, residual)


def _train_and_infer(
    xp: Any,
    shape: tuple[int, ...],
    dtype: Any,
    channel_axis: int | Sequence[int],
    activation: str | None,
    residual: bool,
) -> None:
    x = xp.zeros(shape, dtype)
    other = x if residual else None
    options: dict[str, Any] = {"channel_axis": channel_axis, "activation": activation}
    _, saved = batch_norm(x, residual=other, **options)
    mean, var = saved.moments.mean, saved.moments.var
    gamma, beta = xp.ones_like(mean), xp.zeros_like(mean)
    _, saved = batch_norm(x, gamma, beta, residual=other, **options)
    batch_norm_backward(x, saved)
    batch_norm_inference(x, mean, var, gamma, beta, residual=other, **options)


def _element(name: str) -> Any:
    if name != "bfloat16":
        return name
    import ml_dtypes

    return ml_dtypes.bfloat16
