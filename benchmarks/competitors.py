"""What a user would pick instead, each as functions that run on the same numbers; absent where not installed.

A competitor is set up with the arrays of one case and gives, for a pass ("forward", "inference", "backward"),
functions to time: `out` writes into preallocated memory, `new` allocates its result.  Every function returns its
result, which is checked before the clock starts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

import cubn

EPS = 1e-5

Timed = tuple[str, Callable[[], Any]]


@dataclass
class Operands:
    """The arrays of one case, with the memory order that is measured."""

    x: np.ndarray
    dy: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    channels_last: bool

    def like_x(self) -> np.ndarray:
        """Memory for a result, touched, in the order of x."""
        memory = np.empty_like(self.x)
        memory.fill(0)
        return memory


def competitors(which: str, a: Operands, slow: bool) -> Iterator[Timed]:
    """Everything that can do this pass on these arrays; `slow` includes what takes ten times as long."""
    yield from _copy(a)
    yield from _cubn(which, a)
    if find_spec("torch") and a.x.dtype != np.float16:
        yield from _torch(which, a)
    single = a.x.dtype == np.float32
    if find_spec("onnxruntime") and find_spec("onnx") and single and which != "backward" and not a.channels_last:
        yield from _onnxruntime(which, a)
    if find_spec("jax"):
        yield from _jax(which, a)
    if slow:
        yield from _written_out(which, a)


def _copy(a: Operands) -> Iterator[Timed]:
    """The floor: x read and written once, by as many threads."""
    out = a.like_x()
    if find_spec("torch"):
        import torch

        whole = a.x.transpose(np.argsort([-step for step in a.x.strides]))  # as memory has it
        source = torch.from_numpy(whole.reshape(-1).view(f"i{whole.itemsize}"))
        target = torch.from_numpy(out.reshape(-1, order="A").view(f"i{whole.itemsize}"))
        yield "copy", lambda: target.copy_(source)
    else:
        yield "copy", lambda: np.copyto(out, a.x)


def _cubn(which: str, a: Operands) -> Iterator[Timed]:
    out = a.like_x()
    x, gamma, beta = a.x, a.gamma, a.beta
    if which == "forward":
        yield "cubn out", lambda: cubn.batch_norm(x, gamma, beta, eps=EPS, out=out)[0]
        yield "cubn new", lambda: cubn.batch_norm(x, gamma, beta, eps=EPS)[0]
    elif which == "inference":
        yield "cubn out", lambda: cubn.batch_norm_inference(x, a.mean, a.var, gamma, beta, eps=EPS, out=out)
        yield "cubn new", lambda: cubn.batch_norm_inference(x, a.mean, a.var, gamma, beta, eps=EPS)
    else:
        _, saved = cubn.batch_norm(x, gamma, beta, eps=EPS)
        yield "cubn out", lambda: cubn.batch_norm_backward(a.dy, saved, out=out).dx
        yield "cubn new", lambda: cubn.batch_norm_backward(a.dy, saved).dx


def _torch(which: str, a: Operands) -> Iterator[Timed]:
    import torch

    def tensor(values: np.ndarray) -> Any:
        if values.dtype.name == "bfloat16":  # by its bits: neither library knows the other's
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(values)

    def array(result: Any) -> np.ndarray:
        if result.dtype == torch.bfloat16:
            return result.view(torch.int16).numpy().view(a.x.dtype)
        return result.numpy()

    x, dy, gamma, beta, mean, var = (tensor(v) for v in (a.x, a.dy, a.gamma, a.beta, a.mean, a.var))
    channels = len(gamma)
    out, first, second = tensor(a.like_x()), torch.empty(channels), torch.empty(channels)
    aten = torch.ops.aten
    if which == "backward":
        _, save_mean, save_rstd = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)
        arguments = (dy, x, gamma, None, None, save_mean, save_rstd, True, EPS, [True, True, True])
        into = {"out0": out, "out1": first, "out2": second}
        yield "torch out", lambda: array(aten.native_batch_norm_backward.out(*arguments, **into)[0])
        yield "torch new", lambda: array(aten.native_batch_norm_backward(*arguments)[0])
        return
    training = which == "forward"
    running = (None, None) if training else (mean, var)
    arguments = (x, gamma, beta, *running, training, 0.1, EPS)
    yield "torch out", lambda: array(torch.native_batch_norm(*arguments, out=(out, first, second))[0])
    yield "torch new", lambda: array(torch.native_batch_norm(*arguments)[0])


def _onnxruntime(which: str, a: Operands) -> Iterator[Timed]:
    import onnxruntime
    from onnx import TensorProto, helper

    training = which == "forward"
    names = ["gamma", "beta", "mean", "var"]
    outputs = ["y", "running_mean", "running_var"] if training else ["y"]
    per_channel = [len(a.gamma)]
    node = helper.make_node(
        "BatchNormalization", ["x", *names], outputs, epsilon=EPS, momentum=0.9, training_mode=int(training)
    )
    graph = helper.make_graph(
        [node], "batch_norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, a.x.shape)]
        + [helper.make_tensor_value_info(n, TensorProto.FLOAT, per_channel) for n in names],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, a.x.shape)]
        + [helper.make_tensor_value_info(n, TensorProto.FLOAT, per_channel) for n in outputs[1:]],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = {"x": a.x, "gamma": a.gamma, "beta": a.beta, "mean": a.mean, "var": a.var}
    out = a.like_x()
    held = {n: onnxruntime.OrtValue.ortvalue_from_numpy(v) for n, v in values.items()}
    results = {n: onnxruntime.OrtValue.ortvalue_from_numpy(out if n == "y" else np.empty_like(a.mean)) for n in outputs}
    binding = session.io_binding()
    for n, value in held.items():
        binding.bind_ortvalue_input(n, value)
    for n, value in results.items():
        binding.bind_ortvalue_output(n, value)

    def call() -> np.ndarray:
        session.run_with_iobinding(binding)
        return out

    yield "onnxruntime out", call
    yield "onnxruntime new", lambda: session.run(["y"], values)[0]


def _jax(which: str, a: Operands) -> Iterator[Timed]:
    import jax
    import jax.numpy as jnp

    order = (0, *range(2, a.x.ndim), 1) if a.channels_last else tuple(range(a.x.ndim))
    kept = a.x.ndim - 1 if a.channels_last else 1
    axes = tuple(axis for axis in range(a.x.ndim) if axis != kept)
    aligned = tuple(-1 if axis == kept else 1 for axis in range(a.x.ndim))
    back = np.argsort(order)

    def forward(x: Any, gamma: Any, beta: Any) -> Any:
        mean = x.mean(axes, keepdims=True)
        var = ((x - mean) ** 2).mean(axes, keepdims=True)
        return gamma.reshape(aligned) * (x - mean) * jax.lax.rsqrt(var + EPS) + beta.reshape(aligned)

    def inference(x: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
        scale = gamma * jax.lax.rsqrt(var + EPS)
        return (x - mean.reshape(aligned)) * scale.reshape(aligned) + beta.reshape(aligned)

    def backward(x: Any, gamma: Any, mean: Any, rstd: Any, dy: Any) -> Any:
        xhat = (x - mean) * rstd
        s0, s1 = dy.sum(axes, keepdims=True), (dy * xhat).sum(axes, keepdims=True)
        m = x.size / gamma.size
        return gamma.reshape(aligned) * rstd * (dy - s0 / m - xhat * (s1 / m)), s1, s0

    x, dy = (jnp.asarray(v.transpose(order)) for v in (a.x, a.dy))
    gamma, beta, mean, var = (jnp.asarray(v) for v in (a.gamma, a.beta, a.mean, a.var))
    if which == "forward":
        compiled, arguments = jax.jit(forward), (x, gamma, beta)
    elif which == "inference":
        compiled, arguments = jax.jit(inference), (x, gamma, beta, mean, var)
    else:
        batch = x.mean(axes, keepdims=True)
        rstd = 1 / jnp.sqrt(((x - batch) ** 2).mean(axes, keepdims=True) + EPS)
        compiled, arguments = jax.jit(backward), (x, gamma, batch, rstd, dy)

    def call() -> np.ndarray:
        result = jax.block_until_ready(compiled(*arguments))
        return np.asarray(result[0] if which == "backward" else result).transpose(back)

    yield "jax new", call


def _written_out(which: str, a: Operands) -> Iterator[Timed]:
    """Plain NumPy, as one writes it, and cubn's own reference."""
    x, dy = a.x, a.dy
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    aligned = tuple(-1 if axis == 1 else 1 for axis in range(x.ndim))

    def forward() -> np.ndarray:
        mean = x.mean(axis=axes, keepdims=True)
        var = x.var(axis=axes, keepdims=True)
        return a.gamma.reshape(aligned) * ((x - mean) / np.sqrt(var + EPS)) + a.beta.reshape(aligned)

    def inference() -> np.ndarray:
        xhat = (x - a.mean.reshape(aligned)) / np.sqrt(a.var.reshape(aligned) + np.float32(EPS))
        return a.gamma.reshape(aligned) * xhat + a.beta.reshape(aligned)

    def backward() -> np.ndarray:
        mean = x.mean(axis=axes, keepdims=True)
        rstd = 1 / np.sqrt(x.var(axis=axes, keepdims=True) + EPS)
        xhat = (x - mean) * rstd
        s0, s1 = dy.mean(axis=axes, keepdims=True), (dy * xhat).mean(axis=axes, keepdims=True)
        return a.gamma.reshape(aligned) * rstd * (dy - s0 - xhat * s1)

    yield "numpy new", {"forward": forward, "inference": inference, "backward": backward}[which]

    with cubn.dispatch.use_machine("reference"):
        saved = cubn.batch_norm(x, a.gamma, a.beta, eps=EPS)[1] if which == "backward" else None

    def reference() -> np.ndarray:
        with cubn.dispatch.use_machine("reference"):
            if saved is not None:
                return cubn.batch_norm_backward(dy, saved).dx
            if which == "forward":
                return cubn.batch_norm(x, a.gamma, a.beta, eps=EPS)[0]
            return cubn.batch_norm_inference(x, a.mean, a.var, a.gamma, a.beta, eps=EPS)

    yield "reference new", reference


def threads() -> int:
    """Threads that every competitor may use; `run.py` sets them before anything is imported."""
    from numba import config

    return int(config.NUMBA_NUM_THREADS)
