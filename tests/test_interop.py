"""State of other libraries' layers in and out: exact round trips, and the same inference in the library itself."""

import copy
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cubn
from cubn import interop
from cubn.interop.conventions import complement

ROOT = Path(cubn.__file__).parent.parent
WITH_OPTIONS = {
    "torch": {"eps": 2e-3, "momentum": 0.3},
    "keras": {"epsilon": 2e-3, "momentum": 0.7, "axis": -1},
    "flax": {"epsilon": 2e-3, "momentum": 0.7, "axis": -1},
    "onnx": {"epsilon": 2e-3, "momentum": 0.7},
}


def library(name):
    os.environ.setdefault("KERAS_BACKEND", "jax")  # read when Keras is imported; the lightest of its backends here
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return importlib.import_module(name)


def trained(features=3, **options):
    """A layer with numbers of its own everywhere."""
    rng = np.random.default_rng(7)
    layer = cubn.BatchNorm(features, **{"eps": 2e-3, "momentum": 0.3, **options})
    state = layer.state_dict()
    for key in state:
        if key != "num_batches_tracked":
            state[key] = rng.uniform(0.5, 2.0, np.shape(state[key])).astype(layer.dtype)
    state["num_batches_tracked"] = 17
    layer.load_state_dict(state)
    return layer.eval()


def assert_same(first, second):
    """Bit for bit, options included."""
    one, other = first.state_dict(), second.state_dict()
    assert list(one) == list(other)
    for key in one:
        if key != "num_batches_tracked":
            assert one[key].dtype == other[key].dtype
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)
    assert (first.eps, first.momentum) == (second.eps, second.momentum)


def inference(layer, x, channel_axis=None):
    """What the layer must compute, in extended precision."""
    state = layer.state_dict()
    return oracle.batch_norm(
        x, state.get("gamma"), state.get("beta"), eps=layer.eps,
        statistics=(state["running_mean"], state["running_var"]),
        channel_axis=layer.channel_axis if channel_axis is None else channel_axis,
    ).y  # fmt: skip


def assert_infers(found, layer, x, channel_axis=None):
    """Another library may do it as scale * x + shift in float32, whose terms are larger than their sum: eight roundings
    of the largest of x, the mean and the shift, each times the scale."""
    exact, state = inference(layer, x, channel_axis), layer.state_dict()
    scale = state.get("gamma", np.ones(1)) / np.sqrt(state["running_var"] + layer.eps)
    reach = (np.abs(x).max() + np.abs(state["running_mean"]).max()) * np.abs(scale).max() + 2.0
    oracle.assert_within(np.asarray(found), oracle.Exact(exact.value, exact.bound + 8 * 2.0**-24 * reach))


# Dictionaries


@pytest.mark.parametrize("name", WITH_OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dictionaries_go_round_without_a_changed_bit(name, dtype):
    axis = 1 if name in ("torch", "onnx") else -1
    layer = trained(dtype=dtype, channel_axis=axis)
    arrays, options = getattr(interop, f"to_{name}")(layer)
    assert options == WITH_OPTIONS[name]
    back = getattr(interop, f"from_{name}")(arrays, **options)
    assert_same(layer, back)
    assert back.channel_axis == axis
    assert back.num_batches_tracked == (17 if name == "torch" else 0)


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_every_library_has_the_names_that_the_table_says(name):
    """The table itself, against what is known of the libraries."""
    known = {
        "torch": ("weight", "bias", "running_mean", "running_var"),
        "keras": ("gamma", "beta", "moving_mean", "moving_variance"),
        "flax": ("scale", "bias", "mean", "var"),
        "onnx": ("scale", "B", "input_mean", "input_var"),
    }
    assert tuple(path[-1] for path in interop.CONVENTIONS[name].arrays.values()) == known[name]


@pytest.mark.parametrize("name", ["torch", "keras", "flax", "onnx"])
@pytest.mark.parametrize("missing", [{"gamma"}, {"beta"}, {"gamma", "beta"}], ids=lambda m: "+".join(sorted(m)))
def test_a_missing_parameter_is_one_or_zero(name, missing):
    convention, full = interop.CONVENTIONS[name], trained(channel_axis=-1)
    arrays = getattr(interop, f"to_{name}")(full).arrays
    for own in missing:
        inner = arrays
        for key in convention.arrays[own][:-1]:
            inner = inner[key]
        del inner[convention.arrays[own][-1]]
    layer = getattr(interop, f"from_{name}")(arrays, **{convention.eps: 2e-3}).eval()
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    state = full.state_dict()
    exact = oracle.batch_norm(
        x, *(None if own in missing else state[own] for own in ("gamma", "beta")), eps=2e-3,
        statistics=(state["running_mean"], state["running_var"]),
    )  # fmt: skip
    oracle.assert_within(layer(x), exact.y.rounded_to("float32"))
    assert layer.affine == (len(missing) < 2)


@given(st.integers(0, 10**15))
def test_the_complement_of_a_momentum_goes_round(digits):
    """Every number of up to fifteen decimal places."""
    momentum = digits / 10**15
    assert complement(complement(momentum)) == momentum


def test_defaults_are_the_librarys_own():
    """A dictionary without options means the library's defaults: Keras' epsilon is a hundred times PyTorch's."""
    arrays = interop.to_keras(trained()).arrays
    assert interop.from_keras(arrays).eps == 1e-3
    assert interop.from_keras(arrays).momentum == 0.01
    assert interop.from_torch(interop.to_torch(trained()).arrays).eps == 1e-5
    assert interop.from_onnx(interop.to_onnx(trained()).arrays).momentum == 0.1
    assert interop.from_flax(interop.to_flax(trained()).arrays).momentum == 0.01


@pytest.mark.parametrize(
    ("arrays", "options", "kind", "text"),
    [
        ({"weight": np.ones(3)}, {}, ValueError, "no running_mean"),
        ({"running_mean": np.ones(3), "running_var": np.ones(4)}, {}, cubn.ShapeError, r"running_var has shape \(4,\)"),
        ({"running_mean": np.ones(3), "running_var": np.ones(3), "wait": np.ones(3)}, {}, ValueError, "has wait"),
        ({"running_mean": np.ones(3), "running_var": -np.ones(3)}, {}, ValueError, "negative"),
        ({"running_mean": np.ones(3, int), "running_var": np.ones(3)}, {}, cubn.DTypeError, "int64"),
        ({"running_mean": np.ones(3), "running_var": np.ones(3)}, {"epsilon": 1}, TypeError, "epsilon is no option"),
        ({"running_mean": np.ones(3), "running_var": np.ones(3)}, {"momentum": 1.5}, ValueError, "momentum is 1.5"),
    ],
    ids=["no statistics", "shapes", "extra", "negative", "integers", "option", "momentum"],
)
def test_a_state_that_is_none_is_refused_in_one_sentence(arrays, options, kind, text):
    with pytest.raises(kind, match=text):
        interop.from_torch(arrays, **options)


def test_a_layer_without_statistics_and_no_layer_are_refused():
    with pytest.raises(ValueError, match="track_running_stats=False"):
        interop.to_torch(cubn.BatchNorm(3, track_running_stats=False))
    with pytest.raises(TypeError, match="layer is a dict"):
        interop.to_keras({})
    with pytest.raises(ValueError, match="keeps one axis"):
        interop.to_torch(trained((3, 4), channel_axis=(1, 2)))
    for name in WITH_OPTIONS:
        with pytest.raises(TypeError, match="object"):
            getattr(interop, f"from_{name}")(object())


def test_no_library_is_imported():
    code = "import sys, cubn.interop; print(sorted({'torch', 'keras', 'flax', 'onnx', 'jax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# PyTorch


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_pytorch(options, dtype):
    torch = library("torch")
    theirs = torch.nn.BatchNorm2d(3, eps=2e-3, momentum=0.3, dtype=getattr(torch, dtype), **options)
    torch.manual_seed(0)
    for tensor in (*theirs.parameters(), theirs.running_mean, theirs.running_var):
        tensor.data.uniform_(0.5, 2.0)
    theirs.num_batches_tracked.fill_(5)
    theirs.eval()
    own = interop.from_torch(theirs)
    assert not own.training
    assert (own.eps, own.momentum, own.num_batches_tracked) == (2e-3, 0.3, 5)
    x = torch.randn(4, 3, 5, 5)
    if dtype in ("float32", "float64"):
        x = x.to(getattr(torch, dtype))
        assert_infers(theirs(x).detach(), own, x.numpy())
    oracle.assert_within(own(x.numpy()), inference(own, x.numpy()).rounded_to(str(x.dtype)[6:]))
    back = torch.nn.BatchNorm2d(3, dtype=getattr(torch, dtype), **options)
    assert interop.to_torch(own, into=back) is back
    assert (back.eps, back.momentum, back.training) == (2e-3, 0.3, False)
    for key, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    assert_same(own, interop.from_torch(theirs.state_dict(), eps=2e-3, momentum=0.3))


def test_pytorch_averages_without_momentum():
    torch = library("torch")
    assert interop.from_torch(torch.nn.BatchNorm1d(3, momentum=None)).momentum is None
    assert interop.to_torch(cubn.BatchNorm(3, momentum=None), into=torch.nn.BatchNorm1d(3)).momentum is None
    assert "momentum" not in interop.to_keras(cubn.BatchNorm(3, momentum=None)).options


@pytest.mark.parametrize(
    ("layer", "into", "kind", "text"),
    [
        (lambda: trained(4), lambda nn: nn.BatchNorm2d(3), cubn.ShapeError, r"gamma has shape \(4,\)"),
        (lambda: trained(dtype="float64"), lambda nn: nn.BatchNorm2d(3), cubn.DTypeError, "float32 cannot hold"),
        (lambda: trained(), lambda nn: nn.BatchNorm2d(3, affine=False), ValueError, "gamma is not 1 throughout"),
        (lambda: trained(), lambda nn: nn.BatchNorm2d(3, track_running_stats=False), ValueError, "no running_mean"),
        (lambda: trained(), lambda nn: nn.Conv2d(3, 3, 1), TypeError, "Conv2d is no batch norm"),
        (
            lambda: trained(),
            lambda nn: nn.InstanceNorm2d(3, track_running_stats=True),
            TypeError,
            "InstanceNorm2d is no",
        ),
    ],
    ids=["shape", "dtype", "no gamma", "no statistics", "convolution", "instance norm"],
)
def test_what_has_no_place_changes_nothing(layer, into, kind, text):
    torch = library("torch")
    target = into(torch.nn)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(kind, match=text):
        interop.to_torch(layer(), into=target)
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


def test_pytorch_layers_without_statistics_are_refused():
    torch = library("torch")
    with pytest.raises(ValueError, match="no running_mean"):
        interop.from_torch(torch.nn.BatchNorm1d(3, track_running_stats=False))


# Keras


OF_KERAS = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
"""Keras' own variables, when NumPy reads them."""


@OF_KERAS
@pytest.mark.parametrize(
    "options", [{}, {"scale": False}, {"center": False}, {"scale": False, "center": False}], ids=str
)
@pytest.mark.parametrize("axis", [-1, 1])
def test_keras(options, axis):
    keras = library("keras")
    theirs = keras.layers.BatchNormalization(axis=axis, epsilon=2e-3, momentum=0.9, **options)
    x = np.random.default_rng(0).normal(1, 2, (4, 3, 5, 3)).astype("float32")
    theirs.build(x.shape)
    rng = np.random.default_rng(1)
    theirs.set_weights([rng.uniform(0.5, 2, values.shape).astype("float32") for values in theirs.get_weights()])
    own = interop.from_keras(theirs).eval()
    assert (own.eps, own.momentum, own.channel_axis) == (2e-3, 0.1, axis)
    assert_infers(theirs(x, training=False), own, x)
    oracle.assert_within(own(x), inference(own, x).rounded_to("float32"))
    back = keras.layers.BatchNormalization(axis=axis, **options)
    back.build(x.shape)
    assert interop.to_keras(own, into=back) is back
    for one, other in zip(back.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (back.epsilon, back.momentum) == (2e-3, 0.9)
    if not options:  # the dictionary's order is that of set_weights
        back.set_weights(list(interop.to_keras(own).arrays.values()))
        assert_infers(back(x, training=False), own, x)
        constructed = keras.layers.BatchNormalization(**interop.to_keras(own).options)
        assert (constructed.epsilon, constructed.momentum, constructed.axis) == (2e-3, 0.9, axis)


@OF_KERAS
def test_keras_to_pytorch():
    """Channels last there, axis 1 here: the numbers are the same."""
    keras, torch = library("keras"), library("torch")
    theirs = keras.layers.BatchNormalization()
    x = np.random.default_rng(0).normal(size=(4, 5, 5, 3)).astype("float32")
    theirs.build(x.shape)
    theirs.set_weights([np.random.default_rng(1).uniform(0.5, 2, 3).astype("float32") for _ in range(4)])
    layer = interop.to_torch(interop.from_keras(theirs).eval(), into=torch.nn.BatchNorm2d(3))
    found = layer(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).detach().numpy()
    assert_infers(np.moveaxis(found, 1, -1), interop.from_keras(theirs), x)


def test_keras_layers_without_weights_or_with_others_are_refused():
    keras = library("keras")
    with pytest.raises(ValueError, match="not built"):
        interop.from_keras(keras.layers.BatchNormalization())
    with pytest.raises(TypeError, match="Dense is no batch norm"):
        interop.from_keras(keras.layers.Dense(3))


# Flax


@pytest.mark.parametrize("options", [{}, {"use_scale": False}, {"use_bias": False}], ids=str)
def test_flax_linen(options):
    library("flax")
    linen, jax = importlib.import_module("flax.linen"), library("jax")
    x = np.random.default_rng(0).normal(1, 2, (4, 5, 5, 3)).astype("float32")
    module = linen.BatchNorm(use_running_average=True, epsilon=2e-3, momentum=0.9, **options)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda values: jax.numpy.asarray(rng.uniform(0.5, 2, values.shape), "float32"),
        module.init(jax.random.key(0), x),
    )
    own = interop.from_flax(variables, epsilon=module.epsilon, momentum=module.momentum, axis=module.axis).eval()
    assert (own.eps, own.momentum, own.channel_axis) == (2e-3, 0.1, -1)
    assert_infers(module.apply(variables, x), own, x)
    oracle.assert_within(own(x), inference(own, x).rounded_to("float32"))
    arrays, taken = interop.to_flax(own)
    assert taken == {"epsilon": 2e-3, "momentum": 0.9, "axis": -1}
    if not options:
        again = linen.BatchNorm(use_running_average=True, **taken).apply(arrays, x)
        np.testing.assert_array_equal(again, module.apply(variables, x))


@pytest.mark.parametrize("options", [{}, {"use_scale": False}, {"use_bias": False}], ids=str)
def test_flax_nnx(options):
    library("flax")
    nnx, jax = importlib.import_module("flax.nnx"), library("jax")
    x = np.random.default_rng(0).normal(1, 2, (4, 5, 5, 3)).astype("float32")

    def make(**more):
        return nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0), **options, **more)

    theirs, rng = make(epsilon=2e-3, momentum=0.9), np.random.default_rng(1)
    for variable in (theirs.mean, theirs.var, theirs.scale, theirs.bias):
        if variable is not None and variable.get_value() is not None:
            variable.set_value(jax.numpy.asarray(rng.uniform(0.5, 2, 3), "float32"))
    own = interop.from_flax(theirs).eval()
    assert (own.eps, own.momentum) == (2e-3, 0.1)
    assert_infers(theirs(x), own, x)
    back = make()
    assert interop.to_flax(own, into=back) is back
    np.testing.assert_array_equal(back(x), theirs(x))
    assert (back.epsilon, back.momentum) == (2e-3, 0.9)


def test_flax_modules_without_state_are_refused():
    library("flax")
    linen = importlib.import_module("flax.linen")
    with pytest.raises(TypeError, match="whose variables are apart from it"):
        interop.from_flax(linen.BatchNorm(use_running_average=True))


# ONNX


def model(names=("bn",), shared=False, attributes=True):
    """A chain of batch norms with initializers."""
    onnx = library("onnx")
    rng, nodes, tensors = np.random.default_rng(3), [], []
    flow = ["x", *(f"y{place}" for place in range(len(names)))]
    for place, one in enumerate(names):
        inputs = [f"{'s' if shared else one}_{key}" for key in ("scale", "B", "mean", "var")]
        if not shared or place == 0:
            tensors += [onnx.numpy_helper.from_array(rng.uniform(0.5, 2, 3).astype("float32"), key) for key in inputs]
        chosen = {"epsilon": 2e-3, "momentum": 0.7} if attributes else {}
        nodes.append(
            onnx.helper.make_node("BatchNormalization", [flow[place], *inputs], [flow[place + 1]], name=one, **chosen)
        )
    ends = [onnx.helper.make_tensor_value_info(key, 1, [4, 3, 5]) for key in (flow[0], flow[-1])]
    graph = onnx.helper.make_graph(nodes, "graph", ends[:1], ends[1:], tensors)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)], ir_version=9)


def run(made, x):
    found = []
    if importlib.util.find_spec("onnxruntime"):
        runtime = importlib.import_module("onnxruntime")
        session = runtime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
        found.append(session.run(None, {"x": x})[0])
    found.append(importlib.import_module("onnx.reference").ReferenceEvaluator(made).run(None, {"x": x})[0])
    return found


def test_onnx():
    made = model()
    x = np.random.default_rng(0).normal(1, 2, (4, 3, 5)).astype("float32")
    own = interop.from_onnx(made).eval()
    assert (own.eps, own.momentum) == (2e-3, 0.3)
    for found in run(made, x):
        assert_infers(found, own, x)
    other = trained(eps=1e-4, momentum=0.2)
    interop.to_onnx(other, into=made)
    for found in run(made, x):
        assert_infers(found, other, x)
    assert_same(interop.from_onnx(made), other)
    library("onnx").checker.check_model(made)


def test_onnx_nodes_are_chosen_by_name():
    made = model(("first", "second"))
    first, second = (interop.from_onnx(made, node) for node in ("first", "second"))
    assert not np.array_equal(first.gamma, second.gamma)
    interop.to_onnx(first, into=made, node="second")
    assert_same(interop.from_onnx(made, "second"), first)
    with pytest.raises(ValueError, match="'first', 'second'"):
        interop.from_onnx(made)
    with pytest.raises(ValueError, match="input of several nodes"):
        interop.to_onnx(first, into=model(("first", "second"), shared=True), node="first")


def test_onnx_defaults_are_its_operators():
    own = interop.from_onnx(model(attributes=False))
    assert (own.eps, own.momentum) == (1e-5, 0.1)
