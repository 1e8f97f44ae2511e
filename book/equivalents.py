"""Other libraries' batch normalisation and cubn's, call by call: the tables of coming-from.md and the tests of both.

The last line of `theirs` and of `ours` is an expression; both have the same value.  `SETUP` is what both find.
"""

from dataclasses import dataclass
from html import escape

COMMON = """
import numpy as np
import cubn
import cubn.interop
rng = np.random.default_rng(0)
C = 3
x = rng.normal(2.0, 3.0, size=(8, C, 4, 5)).astype("float32")      # (N, C, H, W)
x_last = np.ascontiguousarray(np.moveaxis(x, 1, -1))                 # (N, H, W, C)
dy = rng.normal(size=x.shape).astype("float32")
gamma, beta = rng.normal(size=(2, C)).astype("float32")
mean, var = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))
W = rng.normal(size=(C, 2, 3, 3)).astype("float32")                  # of the convolution before
b = rng.normal(size=C).astype("float32")
"""

SETUP = {
    "PyTorch": COMMON
    + """
import torch
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights
import cubn.torch
t = {name: torch.from_numpy(value) for name, value in
     dict(x=x, dy=dy, gamma=gamma, beta=beta, mean=mean, var=var, W=W, b=b).items()}
""",
    "Keras": COMMON
    + """
import keras
from keras.layers import BatchNormalization
""",
    "TensorFlow": COMMON + "\nimport tensorflow as tf\n",
    "Flax and JAX": COMMON
    + """
import jax
import flax.linen as nn
key = jax.random.key(0)
""",
    "ONNX": COMMON
    + """
import onnx
from onnx.reference import ReferenceEvaluator

def run(outputs, **attributes):
    node = onnx.helper.make_node("BatchNormalization", ["x", "scale", "B", "mean", "var"],
                                 ["y", "running_mean", "running_var"][:outputs], **attributes)
    values = dict(x=x, scale=gamma, B=beta, mean=mean, var=var)
    made = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([node], "bn", [made(k, 1, v.shape) for k, v in values.items()],
                                   [made(k, 1, None) for k in node.output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)])
    return ReferenceEvaluator(model).run(None, values)
""",
    "CuPy and NumPy": COMMON + "\nxp = np\n",
}

NEEDS = {
    "PyTorch": "torch",
    "Keras": "keras",
    "TensorFlow": "tensorflow",
    "Flax and JAX": "flax",
    "ONNX": "onnx",
    "CuPy and NumPy": "numpy",
}


@dataclass(frozen=True)
class Row:
    """One line of a table: the same thing, said twice."""

    library: str
    what: str
    theirs: str
    ours: str


ROWS = [
    Row("PyTorch", "normalise a batch", 'F.batch_norm(t["x"], None, None, t["gamma"], t["beta"], training=True)',
        "cubn.batch_norm(x, gamma, beta)[0]"),
    Row("PyTorch", "given statistics", 'F.batch_norm(t["x"], t["mean"], t["var"], t["gamma"], t["beta"])',
        "cubn.batch_norm_inference(x, mean, var, gamma, beta)"),
    Row("PyTorch", "a layer for images", 'torch.nn.BatchNorm2d(C)(t["x"])', "cubn.BatchNorm(C)(x)"),
    Row("PyTorch", "for features or sequences", 'torch.nn.BatchNorm1d(C)(t["x"].flatten(2))',
        "cubn.BatchNorm(C)(x.reshape(8, C, -1))"),
    Row("PyTorch", "for volumes", 'torch.nn.BatchNorm3d(C)(t["x"][..., None])', "cubn.BatchNorm(C)(x[..., None])"),
    Row("PyTorch", "epsilon", "torch.nn.BatchNorm2d(C).eps", "cubn.BatchNorm(C).eps"),
    Row("PyTorch", "momentum: weight of the new batch",
        "torch.nn.BatchNorm2d(C).momentum", "cubn.BatchNorm(C).momentum"),
    Row("PyTorch", "running variance: unbiased", 'bn = torch.nn.BatchNorm2d(C)\nbn(t["x"])\nbn.running_var',
        "bn = cubn.BatchNorm(C)\nbn(x)\nbn.running_var"),
    Row("PyTorch", "average over all batches",
        'bn = torch.nn.BatchNorm2d(C, momentum=None)\nbn(t["x"])\nbn.running_mean',
        "bn = cubn.BatchNorm(C, momentum=None)\nbn(x)\nbn.running_mean"),
    Row("PyTorch", "evaluation", 'torch.nn.BatchNorm2d(C).eval()(t["x"])', "cubn.BatchNorm(C).eval()(x)"),
    Row("PyTorch", "names of the parameters", "bn = torch.nn.BatchNorm2d(C)\n(bn.weight, bn.bias)",
        "bn = cubn.BatchNorm(C)\n(bn.gamma, bn.beta)"),
    Row("PyTorch", "backward",
        'leaf = t["x"].clone().requires_grad_()\n'
        'F.batch_norm(leaf, None, None, t["gamma"], t["beta"], training=True).backward(t["dy"])\nleaf.grad',
        "y, saved = cubn.batch_norm(x, gamma, beta)\ncubn.batch_norm_backward(dy, saved).dx"),
    Row("PyTorch", "fold into the convolution before",
        'fuse_conv_bn_weights(t["W"], t["b"], t["mean"], t["var"], 1e-5, t["gamma"], t["beta"])',
        "cubn.fold_into(W, b, mean, var, gamma, beta)"),
    Row("PyTorch", "tensors go in and come out", 'F.batch_norm(t["x"], None, None, training=True)',
        'cubn.batch_norm(t["x"])[0]'),
    Row("PyTorch", "the layer itself, computed by cubn", 'torch.nn.BatchNorm2d(C)(t["x"])',
        'cubn.torch.BatchNorm2d(C)(t["x"])'),
    Row("PyTorch", "a whole model: switch it, in place",
        'model = torch.nn.Sequential(torch.nn.BatchNorm2d(C), torch.nn.ReLU())\nmodel(t["x"])',
        "model = torch.nn.Sequential(torch.nn.BatchNorm2d(C), torch.nn.ReLU())\n"
        'cubn.torch.convert(model)\nmodel(t["x"])'),
    Row("PyTorch", "with ReLU, or a sum and ReLU, in one pass",
        'y = F.batch_norm(t["x"], None, None, training=True)\n(F.relu(y), F.relu(y + t["dy"]))',
        '(cubn.torch.BatchNormReLU(C)(t["x"]), cubn.torch.BatchNormAddReLU(C)(t["x"], t["dy"]))'),
    Row("PyTorch", "a trained layer, taken over",
        'bn = torch.nn.BatchNorm2d(C, eps=1e-3)\nbn(t["x"])\nbn.eval()(t["x"])',
        "bn = torch.nn.BatchNorm2d(C, eps=1e-3)\nbn(t[\"x\"])\ncubn.interop.from_torch(bn).eval()(x)"),
    Row("Keras", "normalise, channels last", "BatchNormalization()(x_last, training=True)",
        "cubn.batch_norm(x_last, channel_axis=-1, eps=1e-3)[0]"),
    Row("Keras", "axis: the one that is kept", "BatchNormalization(axis=1)(x, training=True)",
        "cubn.batch_norm(x, channel_axis=1, eps=1e-3)[0]"),
    Row("Keras", "epsilon: a hundred times larger", "BatchNormalization().epsilon", "1e-3"),
    Row("Keras", "momentum: weight of the old value", "BatchNormalization().momentum",
        "1 - cubn.BatchNorm(C, momentum=0.01).momentum"),
    Row("Keras", "moving mean",
        "bn = BatchNormalization(momentum=0.9)\nbn(x_last, training=True)\nbn.moving_mean",
        "bn = cubn.BatchNorm(C, momentum=0.1, channel_axis=-1)\nbn(x_last)\nbn.running_mean"),
    Row("Keras", "moving variance: biased",
        "bn = BatchNormalization(momentum=0.9)\nbn(x_last, training=True)\nbn.moving_variance",
        "0.9 * np.ones(C) + 0.1 * cubn.moments(x).var"),
    Row("Keras", "numbers in the layer: 200 = 4 · 50",
        "bn = BatchNormalization()\nbn.build((None, 50))\nbn.count_params()",
        "e = cubn.explain((32, 50))\ne.learned + e.tracked"),
    Row("Keras", "a trained layer, taken over",
        "bn = BatchNormalization()\nbn(x_last, training=True)\nbn(x_last)",
        "bn = BatchNormalization()\nbn(x_last, training=True)\ncubn.interop.from_keras(bn).eval()(x_last)"),
    Row("Keras", "and brought back",
        "bn = BatchNormalization(momentum=0.9)\nbn(x_last, training=True)\n(bn.moving_mean, bn.momentum)",
        "own = cubn.BatchNorm(C, channel_axis=-1, momentum=0.1)\nown(x_last)\nbn = BatchNormalization()\n"
        "bn.build(x_last.shape)\ncubn.interop.to_keras(own, into=bn)\n(bn.moving_mean, bn.momentum)"),
    Row("TensorFlow", "moments: here axes are averaged", "tf.nn.moments(x_last, axes=[0, 1, 2])",
        "m = cubn.moments(x_last, channel_axis=-1)\n(m.mean, m.var)"),
    Row("TensorFlow", "given statistics: offset, scale",
        "tf.nn.batch_normalization(x_last, mean, var, offset=beta, scale=gamma, variance_epsilon=1e-5)",
        "cubn.batch_norm_inference(x_last, mean, var, gamma, beta, channel_axis=-1)"),
    Row("TensorFlow", "fused, NHWC",
        "tf.compat.v1.nn.fused_batch_norm(x_last, gamma, beta, epsilon=1e-3)[0]",
        "cubn.batch_norm(x_last, gamma, beta, channel_axis=-1, eps=1e-3)[0]"),
    Row("TensorFlow", "its variance: unbiased",
        "tf.compat.v1.nn.fused_batch_norm(x_last, gamma, beta, epsilon=1e-3)[2]",
        "cubn.moments(x_last, channel_axis=-1).var_unbiased"),
    Row("Flax and JAX", "normalise, channels last",
        "nn.BatchNorm(use_running_average=False).init_with_output(key, x_last)[0]",
        "cubn.batch_norm(x_last, channel_axis=-1)[0]"),
    Row("Flax and JAX", "axis: kept, may be several",
        "nn.BatchNorm(use_running_average=False, axis=(1, 2, 3)).init_with_output(key, x)[0]",
        "cubn.batch_norm(x, channel_axis=(1, 2, 3))[0]"),
    Row("Flax and JAX", "momentum: weight of the old value", "nn.BatchNorm(use_running_average=False).momentum",
        "1 - cubn.BatchNorm(C, momentum=0.01).momentum"),
    Row("Flax and JAX", "running variance: biased",
        "bn = nn.BatchNorm(use_running_average=False, momentum=0.9)\nvariables = bn.init(key, x_last)\n"
        'bn.apply(variables, x_last, mutable="batch_stats")[1]["batch_stats"]["var"]',
        "0.9 * np.ones(C) + 0.1 * cubn.moments(x).var"),
    Row("Flax and JAX", "standardize: axes are averaged", "jax.nn.standardize(x, axis=(0, 2, 3), epsilon=1e-5)",
        "cubn.batch_norm(x)[0]"),
    Row("Flax and JAX", "trained variables, taken over",
        "bn = nn.BatchNorm(use_running_average=True, epsilon=1e-3)\n"
        'variables = {"params": dict(scale=gamma, bias=beta), "batch_stats": dict(mean=mean, var=var)}\n'
        "bn.apply(variables, x_last)",
        'variables = {"params": dict(scale=gamma, bias=beta), "batch_stats": dict(mean=mean, var=var)}\n'
        "cubn.interop.from_flax(variables, epsilon=1e-3).eval()(x_last)"),
    Row("Flax and JAX", "compiled, with its gradient",
        "def loss(x):\n    bn = nn.BatchNorm(use_running_average=False)\n"
        "    return (bn.init_with_output(key, x)[0] * jax.numpy.moveaxis(dy, 1, -1)).sum()\n"
        "jax.jit(jax.grad(loss))(jax.numpy.asarray(x_last))",
        "def loss(x):\n    y, _ = cubn.batch_norm(x, channel_axis=-1)\n"
        "    return (y * jax.numpy.moveaxis(dy, 1, -1)).sum()\njax.jit(jax.grad(loss))(jax.numpy.asarray(x_last))"),
    Row("ONNX", "a trained node, taken over", "run(1, epsilon=1e-3)[0]",
        "inputs = dict(scale=gamma, B=beta, input_mean=mean, input_var=var)\n"
        "cubn.interop.from_onnx(inputs, epsilon=1e-3).eval()(x)"),
    Row("ONNX", "inference: scale, B, input_mean, input_var", "run(1)[0]",
        "cubn.batch_norm_inference(x, mean, var, gamma, beta)"),
    Row("ONNX", "training_mode=1", "run(3, training_mode=1)[0]", "cubn.batch_norm(x, gamma, beta)[0]"),
    Row("ONNX", "momentum: weight of the old value", "run(3, training_mode=1, momentum=0.9)[1]",
        "0.9 * mean + 0.1 * cubn.moments(x).mean"),
    Row("ONNX", "running variance: biased", "run(3, training_mode=1, momentum=0.9)[2]",
        "0.9 * var + 0.1 * cubn.moments(x).var"),
    Row("CuPy and NumPy", "written out",
        "axes = (0, 2, 3)\ncentred = x - x.mean(axes, keepdims=True)\n"
        "x_hat = centred / xp.sqrt(x.var(axes, keepdims=True) + 1e-5)\n"
        "gamma[:, None, None] * x_hat + beta[:, None, None]",
        "cubn.batch_norm(x, gamma, beta)[0]"),
    Row("CuPy and NumPy", "axis: averaged there, kept here",
        "x.mean(axis=(0, 2, 3))", "cubn.moments(x, channel_axis=1).mean"),
    Row("CuPy and NumPy", "ddof", "x.var(axis=(0, 2, 3), ddof=1)", "cubn.moments(x).var_unbiased"),
    Row("CuPy and NumPy", "NumPy or CuPy", "np", 'cubn.namespace("cpu")'),
]  # fmt: skip


def value(code, names):
    """Run all lines, return what the last one is worth."""
    *statements, expression = code.split("\n")
    exec("\n".join(statements), names)
    return eval(expression, names)


def table(library):
    """The rows of one library as HTML."""

    def code(text):
        return f"<pre><code>{escape(text)}</code></pre>"

    body = "".join(
        f"<tr class='what'><th scope='rowgroup' colspan='2'>{escape(row.what)}</th></tr>"
        f"<tr><td>{code(row.theirs)}</td><td>{code(row.ours)}</td></tr>"
        for row in ROWS
        if row.library == library
    )
    return (
        f"<table class='bn equivalents'><thead><tr><th scope='col'>{escape(library)}</th>"
        f"<th scope='col'>cubn</th></tr></thead><tbody>{body}</tbody></table>"
    )
