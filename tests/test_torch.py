"""cubn.torch: PyTorch's own samples against exact arithmetic, and everything that a drop-in must not change."""

import copy
import importlib
import importlib.util
import io
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import oracle
import pytest

import cubn

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")

import ml_dtypes  # noqa: E402
from torch import nn  # noqa: E402

import cubn.torch  # noqa: E402
from cubn.torch import passes  # noqa: E402

ROOT = Path(cubn.__file__).parent.parent
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
LAYERS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def to_numpy(tensor):
    """By way of float64, which holds every smaller float: nothing of cubn.torch has a hand in it."""
    kind = ml_dtypes.bfloat16 if tensor.dtype is torch.bfloat16 else str(tensor.dtype).rpartition(".")[2]
    return tensor.detach().double().contiguous().numpy().astype(kind)


def name_of(dtype):
    return str(dtype).rpartition(".")[2]


def statistics_name(dtype):
    return "float64" if dtype is torch.float64 else "float32"


def requiring(*tensors):
    return [
        None if t is None else t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors
    ]


def check_pass(x, running_mean, running_var, weight, bias, *, training, momentum=0.1, eps=1e-5, **options):
    """y, all gradients and the running statistics against extended precision, to the oracle's bounds.

    Parameters' gradients are rounded to the statistics' dtype and then to the parameter's.  Running statistics are
    computed in the statistics' dtype, in three roundings of terms no larger than the sum of their sizes, and rounded
    once more to the buffer's.
    """
    old_mean, old_var = (None if t is None else to_numpy(t).astype(np.float64) for t in (running_mean, running_var))
    residual = options.get("residual")
    x, weight, bias, residual = requiring(x, weight, bias, residual)
    if residual is not None:
        options["residual"] = residual
    y = cubn.torch.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, **options)
    dy = torch.randn(x.shape).to(x.dtype)
    inputs = [t for t in (x, weight, bias, residual) if t is not None]
    gradients = dict(zip(map(id, inputs), torch.autograd.grad(y, inputs, dy), strict=True))

    exact = oracle.batch_norm(
        to_numpy(x), *(None if t is None else to_numpy(t) for t in (weight, bias)), eps=eps, dy=to_numpy(dy),
        activation=options.get("activation"), residual=None if residual is None else to_numpy(residual),
        statistics=None if training else (old_mean, old_var),
    )  # fmt: skip
    assert y.dtype == x.dtype
    assert y.stride() == torch.empty_like(x).stride()
    oracle.assert_within(to_numpy(y), exact.y.rounded_to(name(x)), "y")
    for what, tensor, wanted in (("x", x, exact.dx), ("residual", residual, exact.dresidual)):
        if tensor is not None:
            oracle.assert_within(to_numpy(gradients[id(tensor)]), wanted.rounded_to(name(x)), f"gradient of {what}")
    for what, tensor, wanted in (("weight", weight, exact.dgamma), ("bias", bias, exact.dbeta)):
        if tensor is not None:
            found = gradients[id(tensor)]
            assert found.dtype == tensor.dtype
            bound = wanted.rounded_to(statistics_name(x.dtype)).rounded_to(name(tensor))
            oracle.assert_within(to_numpy(found), bound, f"gradient of {what}")
    if training and running_mean is not None:
        samples = x.numel() // x.shape[1]
        u = oracle.ROUNDOFF[statistics_name(x.dtype)]
        for what, buffer, old, batch, factor in (
            ("running_mean", running_mean, old_mean, exact.mean, 1.0),
            ("running_var", running_var, old_var, exact.var, samples / (samples - 1)),
        ):
            value = (1 - momentum) * old + momentum * factor * batch.value
            terms = abs(1 - momentum) * np.abs(old) + abs(momentum * factor) * (np.abs(batch.value) + batch.bound)
            widened = oracle.Exact(value, abs(momentum * factor) * batch.bound + 4 * u * terms)
            oracle.assert_within(to_numpy(buffer), widened.rounded_to(name(buffer)), what)
    return y


def name(tensor):
    return ml_dtypes.bfloat16 if tensor.dtype is torch.bfloat16 else name_of(tensor.dtype)


# PyTorch's own samples


@pytest.fixture(scope="module")
def samples_of_pytorch():
    pytest.importorskip("expecttest", reason="PyTorch's own samples need expecttest, which is not installed")
    operators = importlib.import_module("torch.testing._internal.common_methods_invocations")
    modules = importlib.import_module("torch.testing._internal.common_modules")
    operator = next(one for one in operators.op_db if one.name == "nn.functional.batch_norm")
    return operator, {info.name.removeprefix("nn."): info for info in modules.module_db}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_sample_of_pytorch_is_right(samples_of_pytorch, dtype):
    operator, _ = samples_of_pytorch
    assert DTYPES[dtype] in operator.dtypes, "PyTorch has dropped a dtype"
    count = 0
    for sample in operator.sample_inputs("cpu", DTYPES[dtype], requires_grad=False):
        if sample.input.numel() == 0:
            continue
        options = {"training": False, **sample.kwargs}
        check_pass(sample.input, *(None if t is None else t.clone() for t in sample.args), **options)
        count += 1
    assert count >= 9


def test_samples_without_elements_get_pytorchs_answer(samples_of_pytorch):
    operator, _ = samples_of_pytorch
    empty = [s for s in operator.sample_inputs("cpu", torch.float32, requires_grad=True) if s.input.numel() == 0]
    assert empty
    for sample in empty:
        y = cubn.torch.batch_norm(sample.input, *sample.args, **sample.kwargs)
        assert torch.equal(y, torch.nn.functional.batch_norm(sample.input, *sample.args, **sample.kwargs))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_module_sample_of_pytorch_is_right(samples_of_pytorch, layer, training, dtype):
    """Values against exact arithmetic; buffers and their names against PyTorch's layer."""
    _, modules = samples_of_pytorch
    info = modules[layer]
    inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training)
    count = 0
    for one in inputs:
        arguments = one.constructor_input
        own, theirs = (
            kind(*arguments.args, **arguments.kwargs) for kind in (getattr(cubn.torch, layer), getattr(nn, layer))
        )
        own, theirs = own.to(dtype).train(training), theirs.to(dtype).train(training)
        x = one.forward_input.args[0]
        y = own(x)
        theirs(x)
        by_batch = training or own.running_mean is None
        exact = oracle.batch_norm(
            to_numpy(x), eps=own.eps, statistics=None if by_batch else (np.zeros(x.shape[1]), np.ones(x.shape[1]))
        )
        oracle.assert_within(to_numpy(y), exact.y.rounded_to(name(x)), str(arguments))
        assert list(own.state_dict()) == list(theirs.state_dict())
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(own.state_dict()[key], value, rtol=1e-5, atol=1e-6, msg=f"{arguments}, {key}")
        count += 1
    assert count >= 3


@pytest.mark.parametrize("layer", LAYERS)
def test_every_bad_module_sample_of_pytorch_is_refused_alike(samples_of_pytorch, layer):
    _, modules = samples_of_pytorch
    info = modules[layer]
    errors = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
    for error in errors:
        one = error.module_error_input
        own = getattr(cubn.torch, layer)(*one.constructor_input.args, **one.constructor_input.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            own(*one.forward_input.args)
        assert own.num_batches_tracked == 0


# Values of our own making


SHAPES = {"dense": (16, 5), "sequence": (4, 5, 7), "image": (4, 5, 6, 7), "volume": (2, 5, 3, 4, 5)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_rank_and_dtype_is_right(dtype, training, shape):
    x = (torch.randn(SHAPES[shape]) * 2 + 1).to(DTYPES[dtype])
    kind = torch.float64 if dtype == "float64" else torch.float32  # of half input, the usual mix
    weight, bias, mean = torch.randn(3, 5, dtype=kind)
    check_pass(x, mean, torch.rand(5, dtype=kind) + 0.5, weight, bias, training=training)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_layer_that_is_half_throughout_is_right(dtype, training):
    kind = DTYPES[dtype]
    x, weight, bias, mean = torch.randn(8, 5, 3, 3).to(kind), *torch.randn(3, 5).to(kind)
    check_pass(x, mean, (torch.rand(5) + 0.5).to(kind), weight, bias, training=training)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
def test_the_fused_variants_are_right(dtype, training, with_residual):
    kind = DTYPES[dtype]
    x, residual = torch.randn(2, 4, 5, 6, 7).to(kind)
    check_pass(
        x, torch.zeros(5), torch.ones(5), *torch.randn(2, 5), training=training, activation="relu",
        residual=residual if with_residual else None,
    )  # fmt: skip


def memories():
    """Tensors of shape (4, 5, 6, 7) in memory orders that occur."""
    plain = torch.randn(4, 5, 6, 7)
    return {
        "contiguous": plain,
        "channels_last": plain.to(memory_format=torch.channels_last),
        "transposed": torch.randn(5, 4, 7, 6).permute(1, 0, 3, 2),
        "every second": torch.randn(4, 5, 6, 14)[..., ::2],
        "part of the channels": torch.randn(4, 9, 6, 7)[:, 2:7],
        "expanded": torch.randn(1, 5, 6, 7).expand(4, 5, 6, 7),
        "offset": torch.randn(4 * 5 * 6 * 7 + 1)[1:].view(4, 5, 6, 7),
    }


@pytest.mark.parametrize("memory", memories())
@pytest.mark.parametrize("memory_of_dy", ["contiguous", "channels_last", "expanded"])
def test_the_memory_order_changes_nothing(memory, memory_of_dy):
    x, dy = memories()[memory], memories()[memory_of_dy]
    weight, bias = torch.randn(2, 5)
    found = []
    for values in (x, x.contiguous()):
        leaf, w, b = requiring(values, weight, bias)
        y = cubn.torch.batch_norm(leaf, None, None, w, b, training=True)
        assert y.stride() == torch.empty_like(leaf).stride()
        found.append((y.detach(), *torch.autograd.grad(y, (leaf, w, b), dy)))
    exact = oracle.batch_norm(to_numpy(x), to_numpy(weight), to_numpy(bias), dy=to_numpy(dy))
    for own, wanted in zip(found[0], (exact.y, exact.dx, exact.dgamma, exact.dbeta), strict=True):
        oracle.assert_within(to_numpy(own), wanted.rounded_to("float32"))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def test_channels_last_stays_channels_last():
    layer, x = cubn.torch.BatchNorm2d(5), memories()["channels_last"].requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_no_copy_is_made_of_the_input(monkeypatch):
    """The machine reads PyTorch's memory and writes into PyTorch's memory."""
    seen = {}

    class Spy:
        def __getattr__(self, verb):
            return lambda problem, x, *rest: seen.update(x=x, out=rest[4]) or real.forward(problem, x, *rest)

    real = cubn.dispatch.machine_for(cubn.namespace.__globals__["library_of"](np.zeros(1)))
    monkeypatch.setattr(passes, "machine_for", lambda library: Spy())
    x = torch.randn(4, 5, 6, 7)
    y = cubn.torch.batch_norm(x, None, None, training=True)
    assert seen["x"].__array_interface__["data"][0] == x.data_ptr()
    assert seen["out"].__array_interface__["data"][0] == y.data_ptr()


def test_large_results_are_put_on_huge_pages(monkeypatch):
    """Asked of whole pages inside of the result, and of large results alone."""
    asked = []
    monkeypatch.setattr(cubn.torch.tensors, "_madvise", lambda: lambda *given: asked.append(given))
    layer = cubn.torch.BatchNorm2d(4)
    layer(torch.randn(8, 4, 16, 16))
    assert not asked
    y = layer(torch.randn(8, 4, 256, 257))
    ((begin, size, _),) = asked
    assert y.data_ptr() <= begin < y.data_ptr() + 4096 * 16
    assert begin + size <= y.data_ptr() + y.nbytes
    assert size > y.nbytes - 2 * 4096 * 16


# Derivatives


CASES = [
    (training, activation, residual)
    for training in (True, False)
    for activation in (None, "relu")
    for residual in (True, False)
]


def function_of(training, activation):
    def function(x, weight, bias, residual=None):
        running = (
            (None, None) if training else (torch.full((3,), 0.1, dtype=x.dtype), torch.full((3,), 1.3, dtype=x.dtype))
        )
        return cubn.torch.batch_norm(
            x, *running, weight, bias, training, 0.1, 1e-3, activation=activation, residual=residual
        )

    return function


def doubles(residual):
    x, weight, bias = torch.randn(3, 3, 2, 2).double(), torch.randn(3).double(), torch.randn(3).double()
    return requiring(x, weight, bias, *([torch.randn_like(x)] if residual else []))


@pytest.mark.parametrize(("training", "activation", "residual"), CASES)
def test_first_and_second_derivatives_agree_with_differences(training, activation, residual):
    arguments = doubles(residual)
    assert torch.autograd.gradcheck(function_of(training, activation), arguments)
    assert torch.autograd.gradgradcheck(function_of(training, activation), arguments)


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_second_derivatives_of_a_part_are_right(asked, training):
    arguments = doubles(False)
    for place, tensor in enumerate(arguments):
        tensor.requires_grad_(place in asked)
    assert torch.autograd.gradcheck(function_of(training, None), arguments)
    assert torch.autograd.gradgradcheck(function_of(training, None), arguments)


def test_third_derivatives_agree_with_differences():
    arguments = doubles(False)

    def slope(x, weight, bias):
        y = function_of(True, None)(x, weight, bias)
        return torch.autograd.grad((y**3).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(slope, arguments)


def test_a_gradient_penalty_follows_the_loss_through_dy():
    """dy depends on x here: the alias at which the gradients are differentiated must not count that twice."""
    values = torch.randn(6, 3, 2, 2, dtype=torch.float64)
    found = []
    for function in (torch.nn.functional.batch_norm, cubn.torch.batch_norm):
        x = values.clone().requires_grad_()
        y = function(x, None, None, training=True)
        (slope,) = torch.autograd.grad(y.tanh().pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_many_vectors_go_back_at_once():
    """`is_grads_batched` runs the backward pass under vmap."""
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    y = cubn.torch.batch_norm(x, None, None, training=True, activation="relu")
    vectors = torch.randn(5, *y.shape, dtype=torch.float64)
    (batched,) = torch.autograd.grad(y, x, vectors, is_grads_batched=True, retain_graph=True)
    one_by_one = torch.stack([torch.autograd.grad(y, x, v, retain_graph=True)[0] for v in vectors])
    torch.testing.assert_close(batched, one_by_one)


# Only what is asked for


@pytest.fixture
def calls(monkeypatch):
    """The verbs that machines are asked for, in order."""
    seen, original = [], passes.machine_for

    def spying(library):
        machine = original(library)

        class Spy:
            def __getattr__(self, verb):
                seen.append(verb)
                return getattr(machine, verb)

        return Spy()

    monkeypatch.setattr(passes, "machine_for", spying)
    return seen


@pytest.mark.parametrize(
    ("training", "required", "verbs"),
    [
        (True, "x weight bias", ["backward"]),
        (True, "x", ["backward"]),
        (True, "weight bias", ["gradient_sums"]),
        (True, "bias", ["gradient_sums"]),
        (False, "x weight bias", ["backward"]),
        (False, "weight", ["gradient_sums"]),
        (False, "x", []),
    ],
)
def test_the_backward_pass_computes_what_is_required(calls, training, required, verbs):
    tensors = {"x": torch.randn(4, 3, 5), "weight": torch.randn(3), "bias": torch.randn(3)}
    for key in required.split():
        tensors[key].requires_grad_()
    y = cubn.torch.batch_norm(tensors["x"], torch.zeros(3), torch.ones(3), tensors["weight"], tensors["bias"], training)
    calls.clear()
    y.sum().backward()
    assert calls == verbs
    assert [key for key, tensor in tensors.items() if tensor.grad is not None] == required.split()


def test_a_frozen_layer_with_relu_computes_the_input_gradient_alone(calls):
    x = torch.randn(4, 3, 5, requires_grad=True)
    y = cubn.torch.batch_norm(x, torch.zeros(3), torch.ones(3), torch.randn(3), activation="relu")
    calls.clear()
    y.sum().backward()
    assert calls == ["input_gradient"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_nothing_is_recorded_where_nothing_is_learned(mode, training):
    layer = cubn.torch.BatchNorm2d(3).train(training)
    with mode():
        y = layer(torch.randn(2, 3, 4, 4))
    assert y.grad_fn is None
    assert not y.requires_grad
    assert layer.num_batches_tracked == int(training)
    assert bool((layer.running_mean != 0).any()) == training


def test_running_statistics_move_when_no_gradient_is_required():
    layer = cubn.torch.BatchNorm1d(3, affine=False)
    layer(torch.randn(8, 3) + 5)
    assert (layer.running_mean > 0.3).all()


def saved_bytes(function):
    seen = {}

    def pack(tensor):
        seen[tensor.data_ptr(), tensor.shape] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    assert y.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", ["plain", "relu", "add relu"])
def test_no_more_is_saved_than_pytorch_saves(dtype, training, kind):
    """In bytes.  cubn keeps mean and rstd in float64 and needs the bias again under ReLU, PyTorch both running buffers
    and, under ReLU, the output."""
    x, residual = torch.randn(2, 8, 16, 6, 6).to(DTYPES[dtype])
    parameters = torch.float64 if dtype == "float64" else torch.float32
    layers = [
        kind_of(16, dtype=parameters).train(training)
        for kind_of in (
            {
                "plain": cubn.torch.BatchNorm2d,
                "relu": cubn.torch.BatchNormReLU,
                "add relu": cubn.torch.BatchNormAddReLU,
            }[kind],
            nn.BatchNorm2d,
        )
    ]

    def theirs():
        y = layers[1](x)
        return y if kind == "plain" else torch.relu(y) if kind == "relu" else torch.relu(y + residual)

    x.requires_grad_()
    own = saved_bytes(lambda: layers[0](x, residual) if kind == "add relu" else layers[0](x))
    assert own <= saved_bytes(theirs)


def test_a_frozen_layer_saves_no_input():
    layer = cubn.torch.BatchNorm2d(16).eval().requires_grad_(False)
    x = torch.randn(8, 16, 6, 6, requires_grad=True)
    assert saved_bytes(lambda: layer(x)) <= 3 * 16 * 8


# Layers


def test_layers_are_instances_of_pytorchs():
    for layer in (*LAYERS, "SyncBatchNorm"):
        own = getattr(cubn.torch, layer)
        assert issubclass(own, getattr(nn, layer))
        assert own(3).extra_repr() == getattr(nn, layer)(3).extra_repr()


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"bias": False}], ids=str)
def test_state_goes_both_ways(options):
    own, theirs = cubn.torch.BatchNorm2d(3, **options), nn.BatchNorm2d(3, **options)
    own(torch.randn(4, 3, 5, 5))
    assert list(own.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(own.state_dict())
    back = cubn.torch.BatchNorm2d(3, **options)
    back.load_state_dict(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), back.state_dict().values(), strict=True))


def test_layers_are_copied_pickled_and_saved():
    layer = cubn.torch.BatchNormReLU(3)
    x = torch.randn(4, 3, 5, 5)
    layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert type(other) is cubn.torch.BatchNormReLU
        assert torch.equal(other.eval()(x), copy.deepcopy(layer).eval()(x))


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_running_statistics_are_averaged_as_pytorch_does(momentum):
    own, theirs = (kind(3, momentum=momentum, dtype=torch.float64) for kind in (cubn.torch.BatchNorm2d, nn.BatchNorm2d))
    places = [buffer.data_ptr() for buffer in own.buffers()]
    for _ in range(4):
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * 3 + 2
        own(x)
        theirs(x)
    assert [buffer.data_ptr() for buffer in own.buffers()] == places
    torch.testing.assert_close(own.state_dict(), theirs.state_dict(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", [cubn.torch.BatchNorm1d, cubn.torch.BatchNormReLU])
def test_one_sample_is_refused_before_anything_is_counted(kind):
    layer = kind(3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.randn(1, 3))
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert layer.eval()(torch.randn(1, 3)).shape == (1, 3)


def test_an_empty_batch_is_taken_as_pytorch_takes_it():
    own, theirs = cubn.torch.BatchNorm2d(3), nn.BatchNorm2d(3)
    for layer in (own, theirs):
        x = torch.zeros(0, 3, 4, 4, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == x.shape
    for a, b in zip(own.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(own.weight.grad, theirs.weight.grad)


def test_evaluation_gradients_are_of_the_statistics_it_was_evaluated_with():
    """PyTorch keeps the buffers themselves for the backward pass; a batch in between changes them, and its gradient."""
    layer = cubn.torch.BatchNorm1d(3, dtype=torch.float64)
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    y = layer.eval()(x)
    layer.train()(torch.randn(8, 3, dtype=torch.float64) * 100)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, (1 + 1e-5) ** -0.5), rtol=1e-14, atol=0)


def test_half_layers_hold_half_state():
    own, theirs = (kind(3).half() for kind in (cubn.torch.BatchNorm2d, nn.BatchNorm2d))
    x = torch.randn(4, 3, 5, 5).half()
    assert own(x).dtype is torch.float16
    theirs(x)
    assert own.running_var.dtype is torch.float16
    torch.testing.assert_close(own.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_batch_norm_as_pytorch_does(dtype):
    """On CPU it is in none of autocast's lists: the input decides."""
    x = torch.randn(4, 3, 5, 5).to(dtype)
    own, theirs = cubn.torch.BatchNorm2d(3), nn.BatchNorm2d(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = own(x), theirs(x)
    assert found.dtype == wanted.dtype == dtype
    oracle.assert_within(to_numpy(found), oracle.batch_norm(to_numpy(x)).y.rounded_to(name(x)))
    assert own.running_mean.dtype is torch.float32


def test_hooks_and_parametrisation_work():
    layer, seen = cubn.torch.BatchNorm1d(3), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    layer.register_full_backward_hook(lambda module, given, back: seen.append(given[0]))
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    x = torch.randn(8, 3, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert len(seen) == 2
    assert torch.equal(seen[0], y)
    assert layer.parametrizations.weight.original.grad is not None
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True))


# Errors


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ((torch.ones(4, 3, dtype=torch.int64), None, None, None, None, True), cubn.DTypeError, "int64"),
        ((torch.ones(4, 3), None, None, torch.ones(4), None, True), cubn.ShapeError, r"weight has shape \(4,\)"),
        ((torch.ones(4, 3), torch.ones(2), torch.ones(2)), cubn.ShapeError, r"running_mean has shape \(2,\)"),
        ((torch.ones(4, 3), None, None), cubn.ShapeError, "running_mean and running_var are missing"),
        (
            (torch.ones(4, 3), None, None, torch.ones(3).double(), None, True),
            cubn.DTypeError,
            "weight has dtype float64",
        ),
        ((torch.ones(4, 3).to_sparse(), None, None, None, None, True), cubn.DTypeError, "to_dense"),
        ((torch.ones(4, 3), None, None, None, None, True, 0.1, -1.0), ValueError, "eps must be positive"),
        ((torch.ones(4), None, None, None, None, True), cubn.ShapeError, "channel_axis is 1"),
    ],
    ids=["integers", "weight", "buffers", "no buffers", "wide weight", "sparse", "eps", "one axis"],
)
def test_bad_input_is_refused_in_one_sentence(arguments, kind, text):
    with pytest.raises(kind, match=text):
        cubn.torch.batch_norm(*arguments)


def test_a_residual_of_another_shape_is_refused():
    with pytest.raises(cubn.ShapeError, match=r"residual has shape \(4, 1\)"):
        cubn.torch.batch_norm(torch.ones(4, 3), None, None, training=True, residual=torch.ones(4, 1))


def test_what_stands_in_for_tensors_is_asked():
    """`__torch_function__`, as `torch.nn.functional` does."""

    class Logged(torch.Tensor):
        seen = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.randn(4, 3).as_subclass(Logged)
    assert type(cubn.torch.batch_norm(x, None, None, training=True)) is Logged
    assert cubn.torch.batch_norm in Logged.seen


# Compilers, tracers, transforms


ARGUMENTS = [
    pytest.param(training, relu, affine, id=f"training={training} relu={relu} affine={affine}")
    for training in (True, False) for relu in (True, False) for affine in (True, False)
]  # fmt: skip


@pytest.mark.parametrize(("training", "relu", "affine"), ARGUMENTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_operator_is_registered_as_pytorch_demands(training, relu, affine):
    """Schema, fake implementation, autograd registration and both together under AOT dispatch."""
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    parameters = requiring(*torch.randn(2, 3)) if affine else (None, None)
    torch.library.opcheck(
        torch.ops.cubn.batch_norm.default,
        (x, *parameters, torch.zeros(3), torch.ones(3), training, 0.1, 1e-5, relu),
    )
    if training:
        statistics = torch.ones(2, 3, dtype=torch.float64)
        torch.library.opcheck(
            torch.ops.cubn.batch_norm_backward.default,
            (
                x.detach(), x.detach(), *(None if p is None else p.detach() for p in parameters), statistics,
                True, 1e-5, relu, [True, affine, affine],
            ),
        )  # fmt: skip


class Net(nn.Module):
    """Every kind of layer once."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.plain, self.relu = cubn.torch.BatchNorm2d(4), cubn.torch.BatchNormReLU(4, momentum=None)
        self.add = cubn.torch.BatchNormAddReLU(4, affine=False)

    def forward(self, x):
        x = self.relu(self.first(x))
        return self.add(self.second(x), self.plain(x))


@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)], ids=str
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_network_compiles_without_a_graph_break(backend, dynamic):
    """Twice in training, so that buffers move, and once in evaluation: values, gradients and state as uncompiled."""
    torch._dynamo.reset()
    plain = Net()
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, fullgraph=True, backend=backend, dynamic=dynamic)
    for size in (8, 6) if dynamic else (8, 8):
        x = torch.randn(size, 3, 7, 7)
        results = []
        for network in (plain, compiled):
            y = network(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), list(network.parameters()))))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)
    assert other.relu.num_batches_tracked == 2
    plain.eval(), other.eval()
    x = torch.randn(8, 3, 7, 7)
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-5)


def test_fake_and_meta_tensors_have_shapes():
    fake = pytest.importorskip("torch._subclasses").FakeTensorMode()
    with fake:
        assert cubn.torch.BatchNorm2d(3)(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    x = torch.empty(2, 3, 4, 4, device="meta").to(memory_format=torch.channels_last)
    y = cubn.torch.BatchNorm2d(3, device="meta")(x)
    assert y.stride() == x.stride()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_an_exported_network_holds_the_operator_and_computes_the_same():
    net, x = Net().eval(), torch.randn(4, 3, 7, 7)
    exported = torch.export.export(net, (x,))
    assert "cubn.batch_norm" in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), net(x))


def test_vmap_is_a_batch_of_layers():
    """Exact for each: mapped over x and weight, with gradients inside and outside of the map."""
    function = torch.func.vmap(lambda x, w: cubn.torch.batch_norm(x, None, None, w, training=True))
    xs, weights = torch.randn(6, 4, 3, 5, requires_grad=True), torch.randn(6, 3)
    ys = function(xs, weights)
    dys = torch.randn(ys.shape)
    (dxs,) = torch.autograd.grad(ys, xs, dys)
    inner = torch.func.vmap(torch.func.grad(
        lambda x, w, dy: (cubn.torch.batch_norm(x, None, None, w, training=True) * dy).sum()
    ))(xs.detach(), weights, dys)  # fmt: skip
    for x, w, y, dy, dx, again in zip(xs, weights, ys, dys, dxs, inner, strict=True):
        exact = oracle.batch_norm(to_numpy(x), to_numpy(w), dy=to_numpy(dy))
        oracle.assert_within(to_numpy(y), exact.y.rounded_to("float32"))
        oracle.assert_within(to_numpy(dx), exact.dx.rounded_to("float32"))
        oracle.assert_within(to_numpy(again), exact.dx.rounded_to("float32"))


def test_vmap_over_buffers_is_an_ensemble():
    layers = [cubn.torch.BatchNorm1d(3) for _ in range(4)]
    params, buffers = torch.func.stack_module_state(layers)
    xs = torch.randn(4, 8, 3)
    ys = torch.func.vmap(lambda p, b, x: torch.func.functional_call(layers[0], (p, b), x))(params, buffers, xs)
    for place, layer in enumerate(layers):
        torch.testing.assert_close(ys[place], layer(xs[place]))
        torch.testing.assert_close(buffers["running_var"][place], layer.running_var)


def test_vmap_over_one_buffer_is_one_clear_error():
    with pytest.raises(RuntimeError, match="one buffer cannot hold the statistics of every batch"):
        torch.func.vmap(cubn.torch.BatchNorm1d(3))(torch.randn(2, 8, 3))
    assert torch.func.vmap(cubn.torch.BatchNorm1d(3).eval())(torch.randn(2, 8, 3)).shape == (2, 8, 3)


def test_functional_call_and_grad_work_in_training():
    layer = cubn.torch.BatchNorm1d(3, dtype=torch.float64)
    x = torch.randn(8, 3, dtype=torch.float64)
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())

    def loss(parameters, buffers):
        return torch.func.functional_call(layer, (parameters, buffers), x).pow(3).sum()

    found = torch.func.grad(loss)(parameters, buffers)
    wanted = torch.autograd.grad(
        cubn.torch.batch_norm(x, None, None, layer.weight, layer.bias, True).pow(3).sum(), layer.parameters()
    )
    torch.testing.assert_close(tuple(found.values()), wanted)
    assert buffers["num_batches_tracked"] == 1
    torch.testing.assert_close(buffers["running_mean"], 0.1 * x.mean(0))


def test_hessians_work():
    x = torch.randn(4, 2, dtype=torch.float64)

    def loss(function):
        return lambda x: function(x, None, None, training=True).pow(3).sum()

    jacobian = torch.func.jacrev(torch.func.jacrev(loss(cubn.torch.batch_norm)))(x)
    found = torch.func.jacrev(torch.func.jacrev(loss(torch.nn.functional.batch_norm)))(x)
    torch.testing.assert_close(jacobian, found, rtol=1e-9, atol=1e-9)


# Threads and processes


def test_two_threads_train_at_once():
    """Equal bits with one after the other."""

    def train(seed, found):
        generator = torch.Generator().manual_seed(seed)
        layer = cubn.torch.BatchNorm2d(16)
        for _ in range(20):
            x = torch.randn(8, 16, 12, 12, generator=generator).requires_grad_()
            layer(x).square().sum().backward()
        found[seed] = (x.grad, layer.weight.grad, layer.running_var)

    alone, at_once = {}, {}
    for number in (1, 2):
        train(number, alone)
    workers = [threading.Thread(target=train, args=(number, at_once)) for number in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number in (1, 2):
        for a, b in zip(alone[number], at_once[number], strict=True):
            assert torch.equal(a, b)


class Normalised(torch.utils.data.Dataset):
    """Items made by a layer in the worker's process."""

    def __init__(self):
        self.layer = cubn.torch.BatchNorm2d(3)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return self.layer(torch.randn(4, 3, 8, 8, generator=generator)).detach()


def test_workers_of_a_data_loader_normalise():
    items = Normalised()
    here = torch.stack([items[index] for index in range(len(items))])
    loader = torch.utils.data.DataLoader(items, batch_size=4, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), here)


RANKS = """
import sys
import torch, torch.distributed as distributed
import cubn.torch

convert = cubn.torch.SyncBatchNorm.convert_sync_batchnorm
rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
torch.manual_seed(0)
x, dy = torch.randn(2, 12, 3, 4, 4)
cuts = {2: (0, 5, 12), 3: (0, 1, 1, 12)}[size]
mine = slice(cuts[rank], cuts[rank + 1])
layer = cubn.torch.SyncBatchNorm(3)
with torch.no_grad():
    layer.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
share = x[mine].clone().requires_grad_(rank != 1 or size == 3)   # one rank has no gradient of its own to take
y = layer(share)
y.backward(dy[mine])
try:
    layer(torch.randn(2, 4, 3, 3) if rank == 0 else share)
    error = None
except ValueError as caught:
    error = str(caught)
torch.save({
    "y": y.detach(), "dx": share.grad, "dweight": layer.weight.grad, "dbias": layer.bias.grad, "error": error,
    "state": layer.state_dict(), "converted": type(convert(torch.nn.BatchNorm2d(3))).__module__,
}, f"{store}.{rank}")
distributed.destroy_process_group()
"""


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_normalise_one_batch_together(size, tmp_path):
    """Against exact arithmetic on the whole batch, whatever the shares, an empty one included."""
    store = tmp_path / "store"
    command = [sys.executable, "-W", "error::UserWarning", "-c", RANKS]
    workers = [
        subprocess.Popen([*command, str(rank), str(size), str(store)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    for worker in workers:
        _, complaints = worker.communicate(timeout=240)
        assert worker.returncode == 0, complaints
    found = [torch.load(f"{store}.{rank}") for rank in range(size)]
    torch.manual_seed(0)
    x, dy = torch.randn(2, 12, 3, 4, 4)
    weight = np.array([1.0, -2.0, 0.5], "float32")
    exact = oracle.batch_norm(to_numpy(x), weight, np.zeros(3, "float32"), dy=to_numpy(dy))
    oracle.assert_within(to_numpy(torch.cat([one["y"] for one in found])), exact.y.rounded_to("float32"), "y")
    cuts = {2: (0, 5, 12), 3: (0, 1, 1, 12)}[size]
    for rank, one in enumerate(found):
        assert (one["dx"] is None) == (size == 2 and rank == 1)
        if one["dx"] is not None:
            mine = slice(cuts[rank], cuts[rank + 1])
            part = oracle.Exact(exact.dx.value[mine], exact.dx.bound[mine])
            oracle.assert_within(to_numpy(one["dx"]), part.rounded_to("float32"), f"dx of rank {rank}")
        assert one["converted"] == "cubn.torch.synchronised"
        assert "x of shape (2, 4, 3, 3)" in one["error"], "an error of one rank is raised on all"
    for key, wanted in (("dweight", exact.dgamma), ("dbias", exact.dbeta)):
        parts = sum(to_numpy(one[key]).astype(np.float64) for one in found)
        each = sum(np.abs(to_numpy(one[key]).astype(np.float64)) for one in found)
        bound = oracle.Exact(wanted.value, wanted.bound + 2.0**-24 * each)  # every rank rounds its own part
        oracle.assert_within(parts, bound, key)
    for key in ("running_mean", "running_var"):
        assert all(torch.equal(one["state"][key], found[0]["state"][key]) for one in found)


# The whole of it


@pytest.fixture(scope="module")
def networks():
    spec = importlib.util.spec_from_file_location("networks", ROOT / "benchmarks" / "networks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_resnet_learns_the_digits_alike(networks):
    """ResNet-18 in plain PyTorch, 20 steps in float64 on the digits: the same losses to rounding.

    A step multiplies a difference by no more than a few; twenty bring 2**-53 to less than 1e-8 of the loss.
    """
    digits = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_digits()
    images = torch.tensor(digits.images / 16.0)[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)
    labels = torch.tensor(digits.target)
    theirs = networks.resnet18(channels=1, classes=10).double()
    own = copy.deepcopy(theirs)
    report = cubn.torch.convert(own)
    assert len(report.changed) == 20
    assert not report.left
    losses = []
    for network in (theirs, own):
        optimiser = torch.optim.SGD(network.parameters(), lr=0.005)
        losses.append([])
        for step in range(20):
            part = slice(16 * step, 16 * step + 16)
            loss = torch.nn.functional.cross_entropy(network(images[part]), labels[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert np.mean(losses[0][-3:]) < 0.7 * np.mean(losses[0][:3]), "it has learned"
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-8)
    theirs.load_state_dict(own.state_dict())
    torch.testing.assert_close(own.eval()(images[:50]), theirs.eval()(images[:50]), rtol=1e-9, atol=1e-9)


def test_conversion_keeps_everything_but_the_class(networks):
    model = networks.resnet18(classes=10)
    before, layer = copy.deepcopy(model.state_dict()), model.bn1
    seen = []
    layer.register_forward_hook(lambda *given: seen.append(type(given[0])))
    model.eval()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    report = cubn.torch.convert(model)
    assert model.bn1 is layer
    assert type(layer) is cubn.torch.BatchNorm2d
    assert not layer.training
    assert report.changed["stages.2.downsample.1"] == "BatchNorm2d"
    model(torch.randn(2, 3, 32, 32))
    assert seen == [cubn.torch.BatchNorm2d]
    assert {id(p) for group in optimiser.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert list(before) == list(model.state_dict())
    assert set(cubn.torch.revert(model).changed) == set(report.changed)
    assert type(model.bn1) is nn.BatchNorm2d
    assert not any(type(m).__module__.startswith("cubn") for m in model.modules())


class OfSomebody(nn.BatchNorm2d):
    pass


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_is_not_exactly_pytorchs_is_listed_and_left_alone():
    parametrised, patched = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    torch.nn.utils.parametrize.register_parametrization(parametrised, "weight", nn.Softplus())
    patched.forward = lambda x: x
    model = nn.ModuleDict({
        "subclass": OfSomebody(3), "parametrised": parametrised, "patched": patched, "lazy": nn.LazyBatchNorm2d(),
        "instance": nn.InstanceNorm2d(3), "sync": nn.SyncBatchNorm(3),
    })  # fmt: skip
    kinds = [type(module) for module in model.values()]
    report = cubn.torch.convert(model)
    assert report.changed == {"sync": "SyncBatchNorm"}
    assert set(report.left) == {"subclass", "parametrised", "patched", "lazy"}
    assert [type(module) for module in model.values()][:5] == kinds[:5]
    assert "parametrised" in report.left["parametrised"]
    assert "does not know its features" in report.left["lazy"]
    assert "OfSomebody is a subclass" in str(report)


def test_pairs_are_fused_on_request_and_taken_apart_again():
    def make():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.GELU(),
        )  # fmt: skip

    model, plain = make(), make()
    model[4].register_forward_hook(lambda *given: None)
    relu = model[2]
    keys = list(model.state_dict())
    report = cubn.torch.convert(model, fuse=True)
    assert report.fused == {"2": "1"}, "a layer with a hook and one before another activation stay"
    assert type(model[1]) is cubn.torch.BatchNormReLU
    assert list(model.state_dict()) == keys
    x = torch.randn(4, 3, 12, 12)
    torch.testing.assert_close(model(x), plain(x))
    model.eval()
    cubn.torch.revert(model)
    assert [type(m) for m in model] == [type(m) for m in plain]
    assert model[2] is relu
    assert not relu.training
    plain.eval()
    torch.testing.assert_close(model(x), plain(x))


def test_a_single_layer_and_no_layer():
    layer = nn.BatchNorm1d(3)
    assert cubn.torch.convert(layer).changed == {"": "BatchNorm1d"}
    assert type(layer) is cubn.torch.BatchNorm1d
    assert cubn.torch.revert(cubn.torch.BatchNormReLU(3)).left == {"": "PyTorch has no layer like BatchNormReLU"}
    with pytest.raises(TypeError, match="model is a dict"):
        cubn.torch.convert({})


def test_pytorchs_conversion_to_synchronised_layers_does_not_lose_an_activation():
    model = nn.Sequential(cubn.torch.BatchNorm2d(3), cubn.torch.BatchNormReLU(3))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[0]) is nn.SyncBatchNorm
    assert type(converted[1]) is cubn.torch.BatchNormReLU


def test_importing_cubn_does_not_import_torch():
    code = "import sys, cubn; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# On a GPU


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("cupy", reason="CuPy is not installed")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_cuda_tensors_are_computed_by_the_kernels(cuda, dtype, memory, training):
    kind = DTYPES[dtype]
    x = memories()[memory].to(cuda, kind)
    dy, parameters = torch.randn(x.shape).to(cuda, kind), torch.float64 if dtype == "float64" else torch.float32
    weight, bias, mean = torch.randn(3, 5, dtype=parameters).to(cuda)
    var = torch.rand(5, dtype=parameters).to(cuda) + 0.5
    exact = oracle.batch_norm(
        *(to_numpy(t.cpu()) for t in (x, weight, bias)), dy=to_numpy(dy.cpu()), roundoff=2.0**-24,
        statistics=None if training else (to_numpy(mean.cpu()), to_numpy(var.cpu())),
    )  # fmt: skip
    x, weight, bias = requiring(x, weight, bias)
    y = cubn.torch.batch_norm(x, mean, var, weight, bias, training)
    assert y.device == x.device
    assert y.stride() == x.stride()
    gradients = torch.autograd.grad(y, (x, weight, bias), dy)
    for own, wanted in zip((y, *gradients), (exact.y, exact.dx, exact.dgamma, exact.dbeta), strict=True):
        oracle.assert_within(to_numpy(own.cpu()), wanted.rounded_to(name(own)))


@pytest.mark.gpu
def test_cuda_kernels_run_on_the_current_stream(cuda):
    """A long fill on the stream comes first; a kernel on another stream would read before it."""
    layer = cubn.torch.BatchNorm2d(8, device=cuda)
    layer(torch.randn(4, 8, 16, 16, device=cuda))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.zeros(64, 8, 256, 256, device=cuda)
        for _ in range(50):
            x.copy_(torch.randn_like(x))
        y = layer(x)
        again = layer(x)
    stream.synchronize()
    assert torch.equal(y, again)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(8, device=cuda), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_cuda_layers_compile(cuda):
    layer = cubn.torch.BatchNorm2d(8, device=cuda)
    x = torch.randn(4, 8, 16, 16, device=cuda)
    torch.testing.assert_close(torch.compile(copy.deepcopy(layer), fullgraph=True)(x), layer(x))
