"""Bad input: the right class, one sentence in three parts, before any work, and nothing half-changed."""

import importlib
import re
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

import cubn

# What every message must be, and how a refusal is seen


def assert_one_sentence(message: str) -> None:
    """What was given and what it disagrees with; then, behind a semicolon, what to pass instead.  One full stop."""
    diagnosis, semicolon, remedy = message.rpartition("; ")
    assert message.endswith("."), f"does not end in a full stop: {message}"
    assert not re.search(r"[.!?]\s", message), f"is more than one sentence: {message}"
    assert semicolon, f"has no semicolon before the remedy: {message}"
    assert re.search(r"\b(but|which)\b", diagnosis), f"does not say what is wrong with it: {message}"
    assert len(remedy.split()) >= 3, f"does not say what to pass instead: {message}"


@pytest.mark.parametrize(
    "message",
    [
        "gamma has shape (4,), but x has 3 channels; pass gamma with shape (3,)",
        "gamma has shape (4,), but x has 3 channels. Pass gamma with shape (3,).",
        "gamma has shape (4,), but x has 3 channels.",
        "gamma is wrong; pass gamma with shape (3,).",
        "gamma has shape (4,), but x has 3 channels; sorry.",
    ],
)
def test_a_message_that_lacks_a_part_is_seen(message):
    assert_one_sentence("gamma has shape (4,), but x has 3 channels; pass gamma with shape (3,).")
    with pytest.raises(AssertionError):
        assert_one_sentence(message)


@pytest.fixture
def no_machine(monkeypatch):
    """Computing anything at all is an error of another class than any that cubn raises."""

    def working(*_):
        raise AssertionError("a machine was asked to work before the input was found to be bad")

    monkeypatch.setattr("cubn.functional.machine_for", working)


def refused(error: type[Exception], words: str, call, *args, **options) -> None:
    """The call raises exactly this class, in one sentence that holds all of the words, a "|" between them."""
    with pytest.raises(error) as caught:
        call(*args, **options)
    assert caught.type is error, f"{caught.type.__name__} is a subclass of what was expected"
    message = str(caught.value)
    assert_one_sentence(message)
    for word in words.split("|"):
        assert word in message, f"{word!r} is not in: {message}"


def test_a_refusal_of_another_class_or_without_the_words_is_seen():
    def call():
        raise cubn.ShapeError("gamma has shape (4,), but x has 3 channels; pass gamma with shape (3,).")

    refused(cubn.ShapeError, "(4,)|(3,)", call)
    with pytest.raises(AssertionError, match="subclass"):
        refused(ValueError, "(4,)", call)
    with pytest.raises(AssertionError, match="is not in"):
        refused(cubn.ShapeError, "(5,)", call)
    with pytest.raises(pytest.fail.Exception):
        refused(cubn.ShapeError, "", lambda: None)


SHAPE = (6, 3, 4, 5)


@pytest.fixture
def given():
    """One good call's arrays; after the test, every byte of them must be what it was."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    arrays = SimpleNamespace(
        x=normal(*SHAPE), dy=normal(*SHAPE), residual=normal(*SHAPE), out=normal(*SHAPE), gamma=normal(3),
        beta=normal(3), mean=normal(3), var=normal(3) ** 2, where=normal(*SHAPE) > 0,
    )  # fmt: skip
    before = {name: values.tobytes() for name, values in vars(arrays).items()}
    yield arrays
    for name, values in vars(arrays).items():
        assert values.tobytes() == before[name], f"{name} was changed by a call that was refused"


def forward(given, **options):
    return cubn.batch_norm(options.pop("x", given.x), **options)


def backward(given, *, dy=None, out=None, **options):
    _, saved = cubn.batch_norm(given.x, **options)
    return cubn.batch_norm_backward(given.dy if dy is None else dy, saved, out=out)


def inference(given, **options):
    x, mean, var = (options.pop(name, getattr(given, name)) for name in ("x", "mean", "var"))
    return cubn.batch_norm_inference(x, mean, var, **options)


def inference_backward(given, **options):
    dy, x, mean, var = (options.pop(name, getattr(given, name)) for name in ("dy", "x", "mean", "var"))
    return cubn.batch_norm_inference_backward(dy, x, mean, var, **options)


def moments(given, **options):
    return cubn.moments(options.pop("x", given.x), **options)


def population(given, **options):
    return cubn.population(iter([options.pop("x", given.x)]), **options)


def layer(given, **options):
    call = {name: options.pop(name) for name in ("residual", "where", "out") if name in options}
    return cubn.BatchNorm(3)(options.pop("x", given.x), **call)


ONE_PASS = (forward, inference, inference_backward)


# x, and the axes


@pytest.mark.parametrize("entry", [*ONE_PASS, moments, population, layer])
@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        ("int64", "int64|float32|x.astype('float32')"),
        ("uint8", "uint8|x.astype('float32')"),
        ("bool", "bool|x.astype('float32')"),
        ("complex64", "complex64|real and imaginary"),
        ("object", "object|float64"),
        ("U4", "str|float64"),
    ],
)
def test_an_array_that_is_not_floating_is_refused_by_name(given, no_machine, entry, dtype, words):
    refused(cubn.DTypeError, f"x has dtype|{words}", entry, given, x=np.ones(SHAPE, dtype))


@pytest.mark.parametrize("entry", [*ONE_PASS, moments, population, layer])
def test_a_masked_array_is_refused_and_where_is_named(given, no_machine, entry):
    masked = np.ma.masked_less(given.x, 0.0)
    refused(cubn.DTypeError, "MaskedArray|x.data|where=~numpy.ma.getmaskarray(x)", entry, given, x=masked)


@pytest.mark.parametrize("name", ["gamma", "beta", "mean", "var", "residual", "dy"])
def test_a_masked_operand_is_refused_without_talk_of_where(given, no_machine, name):
    masked = np.ma.masked_less(getattr(given, name), 0.0)
    with pytest.raises(cubn.DTypeError, match=f"{name} is a numpy.ma.MaskedArray") as caught:
        inference_backward(given, **{name: masked})
    assert_one_sentence(str(caught.value))
    assert "where" not in str(caught.value)


@pytest.mark.parametrize("x", [1.0, np.float32(1.0), np.array(1.0)])
def test_a_scalar_has_no_axis_to_average(no_machine, x):
    refused(cubn.ShapeError, "scalar|one axis", cubn.batch_norm, x, channel_axis=0)


def explain(given, **options):
    return cubn.explain(options.pop("x", given.x), **options)


@pytest.mark.parametrize("entry", [*ONE_PASS, moments, population, explain])
@pytest.mark.parametrize(
    ("channel_axis", "words"),
    [
        (4, "channel_axis is 4|(6, 3, 4, 5)|0 to 3|from -4 to 3"),
        (-5, "channel_axis is -5|from -4 to 3"),
        ((1, 9), "channel_axis is (1, 9)|from -4 to 3"),
        ((1, 1), "channel_axis is (1, 1)|twice|once"),
        ((1, -3), "channel_axis is (1, -3)|twice"),
        (1.0, "channel_axis is 1.0|integer"),
        ("1", "channel_axis is '1'|integer"),
        (True, "channel_axis is True|integer"),
        (None, "channel_axis is None|integer"),
        ((1, None), "channel_axis is (1, None)|integer"),
        (np.array([1, 2]), "channel_axis is array([1, 2])|integer"),
    ],
)
def test_an_axis_that_x_does_not_have_is_refused(given, no_machine, entry, channel_axis, words):
    refused(cubn.ShapeError, words, entry, given, channel_axis=channel_axis)


@pytest.mark.parametrize("axis", [1, -3, np.int64(1), np.array(1), (1,), [1], (np.int8(-3),)])
def test_everything_that_numpy_takes_as_an_axis_is_taken(axis):
    x = np.random.default_rng(0).normal(size=SHAPE)
    assert np.array_equal(cubn.batch_norm(x, channel_axis=axis)[0], cubn.batch_norm(x)[0])


def test_numpy_scalars_are_statistics_where_all_is_one_channel():
    x = np.array([[4.0, 0.0], [2.0, 6.0]])
    y = cubn.batch_norm_inference(x, np.float64(2), np.float64(4), np.float32(1), channel_axis=(), eps=0.0)
    assert y.tolist() == [[1.0, -1.0], [0.0, 2.0]]


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_a_subclass_with_rules_of_its_own_is_taken_as_an_array():
    values = np.random.default_rng(0).normal(size=(6, 3))
    y, saved = cubn.batch_norm(np.matrix(values))
    wanted, of_array = cubn.batch_norm(values)
    assert type(y) is np.ndarray
    assert np.array_equal(y, wanted)
    dx = cubn.batch_norm_backward(np.matrix(values), saved).dx
    assert np.array_equal(dx, cubn.batch_norm_backward(values, of_array).dx)


# Options


def folding(given, **options):
    return cubn.fold(given.mean, given.var, **options)


def folding_into(given, **options):
    return cubn.fold_into(np.ones((3, 2), np.float32), None, given.mean, given.var, **options)


def new_layer(given, **options):
    return cubn.BatchNorm(3, **options)


@pytest.mark.parametrize("entry", [*ONE_PASS, folding, folding_into, new_layer])
@pytest.mark.parametrize(
    ("eps", "error"),
    [
        (-1e-5, ValueError), (np.inf, ValueError), (np.nan, ValueError), (-np.inf, ValueError), (10**400, ValueError),
        ("1e-5", TypeError), (None, TypeError), (True, TypeError), (1e-5j, TypeError), (np.ones(3), TypeError),
    ],
)  # fmt: skip
def test_an_eps_that_no_variance_can_take_is_refused(given, no_machine, entry, eps, error):
    refused(error, f"eps is {eps!r}|variance|pass a", entry, given, eps=eps)


@pytest.mark.parametrize("entry", [*ONE_PASS, new_layer])
@pytest.mark.parametrize("activation", ["gelu", "ReLU", "", True, ["relu"]])
def test_an_unknown_activation_is_refused(given, no_machine, entry, activation):
    refused(ValueError, f'activation is {activation!r}|None|"relu"', entry, given, activation=activation)


# Arrays that go with x


def strict(values):
    return pytest.importorskip("array_api_strict").asarray(np.asarray(values))


def torch(values):
    return pytest.importorskip("torch").from_numpy(np.array(values))


PER_CHANNEL = [
    *((entry, name) for entry in ONE_PASS for name in ("gamma", "beta")),
    *((entry, name) for entry in (inference, inference_backward) for name in ("mean", "var")),
]
per_channel = pytest.mark.parametrize(
    ("entry", "name"), PER_CHANNEL, ids=[f"{entry.__name__}-{name}" for entry, name in PER_CHANNEL]
)


@per_channel
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((5,), "did you mean channel_axis=-1?"),
        ((4,), "did you mean channel_axis=2?"),
        ((6,), "did you mean channel_axis=0?"),
        ((7,), ""),
        ((3, 1), ""),
        ((1, 3, 1, 1), ""),
        ((), ""),
    ],
)
def test_a_parameter_of_the_wrong_shape_is_refused_and_a_fitting_axis_named(
    given, no_machine, entry, name, shape, words
):
    every = f"{name} has shape {shape}|(6, 3, 4, 5)|channel_axis=1|pass {name} with shape (3,)"
    refused(cubn.ShapeError, f"{every}|{words}", entry, given, **{name: np.ones(shape, np.float32)})


def test_no_axis_is_suggested_where_none_fits():
    with pytest.raises(cubn.ShapeError) as caught:
        cubn.batch_norm(np.ones(SHAPE), np.ones(7))
    assert "did you mean" not in str(caught.value)


def test_images_with_the_channels_last_are_told_about_channel_axis():
    x = np.ones((8, 28, 28, 3), np.float32)
    gamma = np.ones(3, np.float32)
    with pytest.raises(cubn.ShapeError, match=r"28.*\(did you mean channel_axis=-1\?\)\.$"):
        cubn.batch_norm(x, gamma)
    with pytest.raises(cubn.ShapeError, match=r"28 channels.*features 3.*\(did you mean channel_axis=-1\?\)\.$"):
        cubn.BatchNorm(3)(x)
    cubn.batch_norm(x, gamma, channel_axis=-1)  # the advice is good


@per_channel
@pytest.mark.parametrize("dtype", ["float64", "int32", "bool", "complex64", "object"])
def test_a_parameter_that_would_have_to_be_narrowed_is_refused(given, no_machine, entry, name, dtype):
    words = f"{name} has dtype {dtype}|float32|pass {name} as float32"
    refused(cubn.DTypeError, words, entry, given, **{name: np.ones(3, dtype)})


@per_channel
@pytest.mark.parametrize("library", [strict, torch])
def test_a_parameter_from_another_library_is_refused(given, no_machine, entry, name, library):
    words = f"{name} is an array of {library.__name__ if library is torch else 'array_api_strict'}|numpy"
    refused(cubn.DeviceError, words, entry, given, **{name: library(getattr(given, name))})


@pytest.mark.parametrize("library", [strict, torch])
@pytest.mark.parametrize(
    ("entry", "name"),
    [
        (forward, "residual"), (forward, "where"), (forward, "out"),
        (inference, "residual"), (inference, "where"), (inference, "out"),
        (inference_backward, "dy"), (inference_backward, "out"), (layer, "residual"),
    ],
)  # fmt: skip
def test_arrays_of_two_libraries_in_one_call_are_refused(given, no_machine, entry, name, library):
    refused(cubn.DeviceError, f"{name} is an array of|numpy", entry, given, **{name: library(getattr(given, name))})


@pytest.mark.parametrize("library", [strict, torch])
def test_numpy_parameters_for_an_x_of_another_library_are_refused(given, no_machine, library):
    refused(cubn.DeviceError, "gamma is an array of numpy|but x is one of", forward, given, x=library(given.x),
            gamma=given.gamma)  # fmt: skip


@pytest.mark.parametrize("library", [strict, torch])
@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_in_numpy_refuses_an_x_of_another_library(given, no_machine, library, affine):
    bn = cubn.BatchNorm(3, affine=affine)
    refused(cubn.DeviceError, "x is an array of|numpy|cpu", bn, library(given.x))


@pytest.mark.parametrize("entry", [forward, inference, inference_backward, layer])
def test_a_residual_unlike_x_is_refused(given, no_machine, entry):
    refused(cubn.ShapeError, "residual has shape (6, 3)|(6, 3, 4, 5)", entry, given, residual=given.residual[..., 0, 0])
    refused(cubn.DTypeError, "residual has dtype float64|float32", entry, given, residual=given.residual.astype(float))


@pytest.mark.parametrize("entry", [forward, inference, inference_backward, moments, layer])
def test_a_mask_that_says_no_element_of_x_is_refused(given, no_machine, entry):
    refused(
        cubn.DTypeError, "where has dtype int64|boolean|where != 0", entry, given, where=given.where.astype("int64")
    )
    refused(cubn.ShapeError, "where has shape (7,)|(6, 3, 4, 5)", entry, given, where=np.ones(7, bool))
    refused(cubn.ShapeError, "where has shape (1, 6, 3, 4, 5)", entry, given, where=given.where[None])


@pytest.mark.parametrize("entry", [inference, inference_backward, folding])
def test_a_negative_variance_is_refused(given, no_machine, entry):
    swapped = SimpleNamespace(**{**vars(given), "mean": given.var, "var": -np.abs(given.mean)})
    refused(ValueError, f"var has a negative entry ({swapped.var.min()})|mean and var", entry, swapped)


# Too few samples


@pytest.mark.parametrize(
    ("shape", "channel_axis"),
    [((1, 3), 1), ((1, 3, 1, 1), 1), ((5,), 0), ((2, 3, 4), (0, 1, 2)), ((1, 1, 1), -1)],
)
def test_one_sample_per_channel_is_refused_in_training_and_fine_in_inference(no_machine, shape, channel_axis):
    x = np.ones(shape)
    words = f"{shape}|one sample per channel|two samples|batch_norm_inference|eval()"
    refused(cubn.ShapeError, words, cubn.batch_norm, x, channel_axis=channel_axis)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (4, 3, 0, 5)])
def test_an_empty_batch_is_refused_in_training(no_machine, shape):
    words = f"{shape}|empty batch|two samples|batch_norm_inference"
    refused(cubn.ShapeError, words, cubn.batch_norm, np.ones(shape, np.float32))


def test_a_layer_refuses_one_sample_in_training_and_takes_it_in_evaluation():
    bn = cubn.BatchNorm(3)
    refused(cubn.ShapeError, "one sample per channel|eval()", bn, np.ones((1, 3), np.float32))
    assert bn.num_batches_tracked == 0
    assert bn.eval()(np.ones((1, 3), np.float32)).shape == (1, 3)


def test_two_samples_are_enough_and_no_samples_are_enough_for_inference():
    y, _ = cubn.batch_norm(np.array([[1.0], [3.0]]), eps=0.0)
    assert y.tolist() == [[-1.0], [1.0]]
    assert cubn.batch_norm_inference(np.ones((0, 3)), np.zeros(3), np.ones(3)).shape == (0, 3)


# dy and saved


def layer_backward(given, *, dy=None, out=None):
    bn = cubn.BatchNorm(3)
    bn(given.x)
    return bn.backward(given.dy if dy is None else dy, out=out)


@pytest.mark.parametrize("entry", [backward, inference_backward, layer_backward])
def test_a_dy_unlike_x_is_refused(given, entry):
    refused(cubn.ShapeError, "dy has shape (6, 3, 20)|(6, 3, 4, 5)", entry, given, dy=given.dy.reshape(6, 3, 20))
    refused(cubn.ShapeError, "dy has shape (6, 3, 1, 1)", entry, given, dy=given.dy[:, :, :1, :1])
    refused(cubn.DTypeError, "dy has dtype float64|x has dtype float32", entry, given, dy=given.dy.astype(float))
    refused(cubn.DTypeError, "dy has dtype int64", entry, given, dy=np.ones(SHAPE, int))
    refused(cubn.DTypeError, "dy is a numpy.ma.MaskedArray", entry, given, dy=np.ma.masked_less(given.dy, 0))
    refused(cubn.DeviceError, "dy is an array of array_api_strict|numpy", entry, given, dy=strict(given.dy))


@pytest.mark.parametrize("saved", [None, "y", np.ones(3), 5])
def test_a_backward_pass_without_what_the_forward_pass_kept_is_refused(given, saved):
    words = f"saved is a {type(saved).__name__}|second value|batch_norm"
    refused(TypeError, words, cubn.batch_norm_backward, given.dy, saved)


def test_backward_before_forward_is_refused(given):
    refused(RuntimeError, "backward|before forward|call the layer", cubn.BatchNorm(3).backward, given.dy)


# out


def layer_in_evaluation(given, **options):
    return cubn.BatchNorm(3).eval()(given.x, **options)


WITH_OUT = (forward, backward, inference, inference_backward, layer, layer_backward, layer_in_evaluation)


@pytest.mark.parametrize("entry", WITH_OUT)
def test_an_out_that_cannot_hold_the_result_is_refused(given, entry):
    refused(cubn.ShapeError, "out has shape (3, 6, 4, 5)|(6, 3, 4, 5)", entry, given, out=given.out.reshape(3, 6, 4, 5))
    refused(cubn.ShapeError, "out has shape (1, 6, 3, 4, 5)", entry, given, out=given.out[None])
    refused(cubn.DTypeError, "out has dtype float64|float32", entry, given, out=given.out.astype(float))
    refused(cubn.DeviceError, "out is an array of array_api_strict|numpy", entry, given, out=strict(given.out))
    refused(TypeError, "out is a list|array like x", entry, given, out=given.out.tolist())
    refused(TypeError, "out is a tuple|array like x", entry, given, out=(given.out,))


@pytest.mark.parametrize("entry", WITH_OUT)
def test_a_read_only_out_is_refused(given, entry):
    locked = given.out.copy()
    locked.flags.writeable = False
    refused(ValueError, "out is read-only|writeable", entry, given, out=locked)
    refused(ValueError, "out is read-only", entry, given, out=np.broadcast_to(np.float32(0), SHAPE))


OVERLAPS = [
    *((forward, name) for name in ("x", "residual")),
    *((backward, name) for name in ("x", "dy")),
    *((inference_backward, name) for name in ("x", "dy", "residual")),
    (layer, "x"),
    (layer_backward, "x"),
    (layer_backward, "dy"),
]


@pytest.mark.parametrize(("entry", "name"), OVERLAPS, ids=[f"{entry.__name__}-{name}" for entry, name in OVERLAPS])
@pytest.mark.parametrize("overlap", ["exact", "backwards", "transposed"])
def test_an_out_over_an_input_that_is_still_needed_is_refused(given, entry, name, overlap):
    array = getattr(given, name)
    views = {
        "exact": array,
        "backwards": array[::-1],
        "transposed": array.reshape(-1).reshape(5, 4, 3, 6).transpose(3, 2, 1, 0),
    }
    options = {"residual": array} if name == "residual" else {}
    refused(ValueError, f"out overlaps {name}|{name} is still needed|memory of its own", entry, given,
            out=views[overlap], **options)  # fmt: skip


@pytest.mark.parametrize("entry", [forward, inference])
@pytest.mark.parametrize("name", ["x", "residual"])
def test_an_out_that_is_shifted_against_an_input_is_refused(entry, name):
    memory = np.arange(7 * 60, dtype=np.float32)
    arrays = SimpleNamespace(x=np.ones(SHAPE, np.float32), mean=np.zeros(3), var=np.ones(3))
    shifted, out = memory[60:].reshape(SHAPE), memory[:-60].reshape(SHAPE)
    before = memory.copy()
    refused(ValueError, f"out overlaps {name}", entry, arrays, **{name: shifted}, out=out,
            **({"mean": [0, 0, 0], "var": [1, 1, 1]} if entry is inference else {}))  # fmt: skip
    assert np.array_equal(memory, before)


@pytest.mark.parametrize(("entry", "name"), [
    *((entry, name) for entry in (forward, inference, inference_backward) for name in ("gamma", "beta", "where")),
    (inference, "mean"), (inference, "var"), (inference_backward, "mean"), (inference_backward, "var"),
    (backward, "gamma"), (backward, "beta"), (backward, "where"),
])  # fmt: skip
def test_an_out_over_the_parameters_or_the_mask_is_refused(given, entry, name):
    out = np.zeros(SHAPE, np.float32)
    if name == "where":
        view = out.view(bool)[..., ::4]
        view[...] = given.where
    else:
        view = out[0, :, 0, 0]
        view[...] = getattr(given, name)
    before = out.copy()
    refused(ValueError, f"out overlaps {name}", entry, given, out=out, **{name: view})
    assert out.tobytes() == before.tobytes()


@pytest.mark.parametrize("entry", [forward, backward, inference, inference_backward])
def test_views_that_interleave_with_x_and_share_no_element_are_allowed(entry):
    """The bounds of the two views in memory overlap, their elements do not: so the answer must be exact."""
    memory = np.random.default_rng(2).normal(size=(6, 6, 4, 10))
    arrays = SimpleNamespace(
        x=memory[:, ::2, :, ::2], dy=memory[:, 1::2, :, ::2].copy(), mean=np.arange(3.0), var=np.ones(3)
    )
    x_before, out = arrays.x.copy(), memory[:, 1::2, :, 1::2]
    apart = SimpleNamespace(**{**vars(arrays), "x": x_before})
    wanted = entry(apart)
    given_back = entry(arrays, out=out)
    first = (lambda r: r) if entry is inference else (lambda r: r[0])
    assert first(given_back) is out
    assert np.array_equal(first(wanted), out)
    assert np.array_equal(arrays.x, x_before)


@pytest.mark.parametrize("layout", ["itself", "a view of itself", "channels last", "every second"])
def test_inference_may_write_over_its_own_input(layout):
    """y = (x - mean) / sqrt(var + eps): one subtraction, one product with a reciprocal root, 4 roundings in all."""
    values = np.random.default_rng(3).normal(size=(6, 3, 4, 5))
    x = {
        "itself": values.copy(),
        "a view of itself": values.copy(),
        "channels last": np.ascontiguousarray(values.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        "every second": np.repeat(values, 2, axis=-1)[..., ::2],
    }[layout]
    mean, var = np.array([1.0, -2.0, 0.5]), np.array([4.0, 0.25, 1.0])
    out = x[:] if layout == "a view of itself" else x
    y = cubn.batch_norm_inference(x, mean, var, out=out)
    wanted = (values - mean[:, None, None]) / np.sqrt(var[:, None, None] + 1e-5)
    assert y is out
    np.testing.assert_allclose(x, wanted, rtol=4 * 2.0**-52, atol=0)


def test_inference_may_write_over_its_residual():
    rng = np.random.default_rng(4)
    x, residual = rng.normal(size=(2, 6, 3))
    wanted = x / np.sqrt(1 + 1e-5) + residual
    y = cubn.batch_norm_inference(x, np.zeros(3), np.ones(3), residual=residual, out=residual)
    assert y is residual
    np.testing.assert_allclose(y, wanted, rtol=0, atol=8 * 2.0**-52 * np.abs(wanted).max())


def test_an_out_in_the_other_byte_order_is_written():
    x = np.random.default_rng(5).normal(size=(6, 3))
    out = np.empty(x.shape, x.dtype.newbyteorder())
    y, _ = cubn.batch_norm(x, out=out)
    assert y is out
    assert np.array_equal(y, cubn.batch_norm(x)[0])


def test_a_list_beside_an_out_of_another_library_is_taken():
    strict_x = strict(np.array([[4.0], [0.0]]))
    torch_x = torch(np.array([[4.0], [0.0]]))
    for x, out in ((strict_x, strict(np.zeros((2, 1)))), (torch_x, torch(np.zeros((2, 1))))):
        y = cubn.batch_norm_inference(x, [2.0], [4.0], eps=0.0, out=out)
        assert np.asarray(y).tolist() == [[1.0], [-1.0]]


# The layer's own options


@pytest.mark.parametrize("momentum", [-0.1, 1.1, np.nan, np.inf, 10**400])
def test_a_momentum_outside_the_unit_interval_is_refused(momentum):
    refused(
        ValueError, f"momentum is {momentum!r}|weight of the new batch|0 to 1", cubn.BatchNorm, 3, momentum=momentum
    )


@pytest.mark.parametrize("momentum", ["0.1", True, 1j, [0.1]])
def test_a_momentum_that_is_no_number_is_refused(momentum):
    refused(TypeError, f"momentum is {momentum!r}|weight of the new batch|None", cubn.BatchNorm, 3, momentum=momentum)


@pytest.mark.parametrize(("momentum", "theirs"), [(0.5, "0.5"), (0.9, "0.1"), (0.99, "0.01"), (1, "0")])
def test_a_momentum_from_one_half_up_warns_and_says_which_convention_this_is(momentum, theirs):
    with pytest.warns(UserWarning, match="weight of the new batch.*Keras") as caught:
        cubn.BatchNorm(3, momentum=momentum)
    (warning,) = caught
    assert str(warning.message).endswith(f"pass {theirs}.")
    assert warning.filename == __file__, "the warning does not point at the caller's line"


@pytest.mark.parametrize("momentum", [None, 0, 0.1, 0.4999])
def test_a_momentum_below_one_half_does_not_warn(momentum):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cubn.BatchNorm(3, momentum=momentum)


@pytest.mark.parametrize(
    ("features", "options", "words"),
    [
        (-1, {}, "features is -1|non-negative"),
        (1.5, {}, "features is 1.5|integer"),
        ("3", {}, "features is '3'|integer"),
        (True, {}, "features is True|integer"),
        (None, {}, "features is None|integer"),
        ((3, 4), {}, "features is (3, 4)|2 sizes|1 axes"),
        (3, {"channel_axis": (1, 2)}, "1 sizes|2 axes"),
        ((3, 4), {"channel_axis": (1, 1)}, "(1, 1)|twice"),
        ((3, 4), {"channel_axis": (2, 1)}, "(2, 1)|ascending"),
        (3, {"channel_axis": None}, "channel_axis is None|integer"),
        (3, {"channel_axis": 1.0}, "channel_axis is 1.0|integer"),
        (3, {"channel_axis": "1"}, "channel_axis is '1'|integer"),
        (3, {"channel_axis": True}, "channel_axis is True|integer"),
    ],
)
def test_features_and_axes_that_make_no_layer_are_refused(features, options, words):
    refused(cubn.ShapeError, words, cubn.BatchNorm, features, **options)


@pytest.mark.parametrize("dtype", ["float16", "int32", "bool", "complex64", None, object, "nonsense", {}])
def test_a_layer_dtype_other_than_float32_and_float64_is_refused(dtype):
    refused(cubn.DTypeError, 'dtype is|float32 or float64|pass "float32"', cubn.BatchNorm, 3, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", np.float64, np.dtype("float32"), ">f8"])
def test_a_layer_dtype_may_be_written_as_numpy_does(dtype):
    bn = cubn.BatchNorm(3, dtype=dtype)
    assert bn.gamma.dtype == bn.running_var.dtype == np.dtype(dtype).newbyteorder("=")


def test_a_float64_layer_refuses_a_narrower_x(given, no_machine):
    refused(cubn.DTypeError, 'float32|float64|dtype="float32"', cubn.BatchNorm(3, dtype="float64"), given.x)


@pytest.mark.parametrize("shape", [(6, 4, 3), (6, 4), (4, 5)])
def test_a_layer_refuses_other_channels_than_its_own(no_machine, shape):
    refused(cubn.ShapeError, f"{shape}|features 3", cubn.BatchNorm(3), np.ones(shape, np.float32))


def test_a_layer_refuses_an_x_without_its_axis(no_machine):
    refused(cubn.ShapeError, "channel_axis is 1|(6,)", cubn.BatchNorm(3), np.ones(6, np.float32))


STATE = {"gamma": np.ones(3), "beta": np.zeros(3), "running_mean": np.zeros(3), "running_var": np.ones(3),
         "num_batches_tracked": 4}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"gamma": ...}, ValueError, "lacks 'gamma'|gamma, beta, running_mean, running_var, num_batches_tracked"),
        ({"weight": np.ones(3)}, ValueError, "has 'weight'|exactly these keys"),
        ({"gamma": ..., "weight": np.ones(3)}, ValueError, "lacks 'gamma'|has 'weight'"),
        ({"gamma": np.ones(4)}, cubn.ShapeError, "gamma has shape (4,)|(3,)"),
        ({"running_var": np.ones((3, 1))}, cubn.ShapeError, "running_var has shape (3, 1)|(3,)"),
        ({"beta": np.ones(3, int)}, cubn.DTypeError, "beta has dtype int64|float32"),
        ({"beta": np.array([None] * 3)}, cubn.DTypeError, "beta has dtype object"),
        ({"running_var": np.array([1.0, -1.0, 1.0])}, ValueError, "running_var|negative|swapped"),
        ({"num_batches_tracked": -1}, ValueError, "num_batches_tracked is -1|non-negative"),
        ({"num_batches_tracked": 1.5}, ValueError, "num_batches_tracked is 1.5|integer"),
        ({"num_batches_tracked": None}, ValueError, "num_batches_tracked is None|integer"),
        ({"num_batches_tracked": True}, ValueError, "num_batches_tracked is True|integer"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(change, error, words):
    state = {key: values for key, values in {**STATE, **change}.items() if values is not ...}
    bn = cubn.BatchNorm(3)
    refused(error, words, bn.load_state_dict, state)
    assert all(np.array_equal(values, cubn.BatchNorm(3).state_dict()[key]) for key, values in bn.state_dict().items())


def test_assigning_running_statistics_that_do_not_fit_is_refused():
    bn = cubn.BatchNorm(3)
    for name in ("running_mean", "running_var"):
        with pytest.raises(cubn.ShapeError, match=f"{name} has shape"):
            setattr(bn, name, np.ones(4))
    untracked = cubn.BatchNorm(3, track_running_stats=False)
    refused(ValueError, "track_running_stats=False", setattr, untracked, "running_mean", np.ones(3))


# Devices


@pytest.mark.parametrize("call", [cubn.namespace, lambda device: cubn.BatchNorm(3, device=device),
                                  lambda device: cubn.BatchNorm(3).to(device)])  # fmt: skip
@pytest.mark.parametrize("device", ["gpu", "cuda:0", "", None, 0])
def test_an_unknown_device_is_refused(call, device):
    refused(ValueError, f'device is {device!r}|"auto"|"cpu"|"cuda"', call, device)


@pytest.fixture
def without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)


def test_cuda_without_cupy_is_refused_and_auto_is_numpy(without_cupy):
    words = 'device is "cuda"|CuPy is not installed|cubn[cuda12]|"cpu"'
    refused(cubn.DeviceError, words, cubn.namespace, "cuda")
    refused(cubn.DeviceError, words, cubn.BatchNorm, 3, device="cuda")
    assert cubn.namespace() is cubn.namespace("auto") is cubn.namespace("cpu") is np


def test_loading_to_a_device_that_is_not_there_does_not_blame_the_file(without_cupy, tmp_path):
    cubn.BatchNorm(3).save(tmp_path / "layer.npz")
    refused(cubn.DeviceError, "CuPy is not installed", cubn.BatchNorm.load, tmp_path / "layer.npz", device="cuda")
    refused(ValueError, "device is 'gpu'", cubn.BatchNorm.load, tmp_path / "layer.npz", device="gpu")


# Population, folding, explaining, machines, ranks


def test_a_population_that_has_no_answer_is_refused():
    batch = np.random.default_rng(0).normal(size=(4, 3))
    refused(ValueError, 'estimator is \'mean\'|"pooled"|"paper"', cubn.population, [batch], estimator="mean")
    refused(ValueError, "no sample|some data", cubn.population, [])
    refused(ValueError, "no sample|some data", cubn.population, iter([batch[:0], batch[:0]]))
    refused(cubn.ShapeError, "batch 2|(4,)|(3,)", cubn.population, [batch, batch[:0], np.ones((5, 4))])
    refused(cubn.ShapeError, "batch 1|one sample|pooled", cubn.population, [batch, batch[:1]], estimator="paper")
    refused(cubn.DTypeError, "x has dtype int64", cubn.population, [batch, np.ones((4, 3), int)])
    refused(cubn.DeviceError, "batch 1|array_api_strict|numpy", cubn.population, [batch, strict(batch)])


@pytest.mark.parametrize(
    ("error", "change", "words"),
    [
        (cubn.ShapeError, {"var": np.ones(4)}, "var has shape (4,)|mean has shape (3,)"),
        (cubn.ShapeError, {"gamma": np.ones(4)}, "gamma has shape (4,)|mean has shape (3,)"),
        (cubn.ShapeError, {"beta": np.ones((3, 1))}, "beta has shape (3, 1)"),
        (cubn.DTypeError, {"mean": np.zeros(3, int)}, "mean has dtype int64|floating"),
        (cubn.DTypeError, {"var": np.ones(3, complex)}, "var has dtype complex128"),
        (cubn.DTypeError, {"gamma": np.array([None] * 3)}, "gamma has dtype object"),
        (cubn.DTypeError, {"var": np.ma.masked_less(np.ones(3), 0)}, "var is a numpy.ma.MaskedArray"),
    ],
)
def test_statistics_that_do_not_go_together_cannot_be_folded(error, change, words):
    arrays = {"mean": np.zeros(3), "var": np.ones(3), **change}
    refused(error, words, cubn.fold, **arrays)
    refused(error, words, cubn.fold_into, np.ones((3, 2)), None, **arrays)


@pytest.mark.parametrize("library", [strict, torch])
def test_folding_arrays_of_two_libraries_is_refused(library):
    mean, var = np.zeros(3), np.ones(3)
    refused(cubn.DeviceError, "var is an array of|but mean is one of numpy", cubn.fold, mean, library(var))
    refused(cubn.DeviceError, "mean is an array of numpy|but weight is one of", cubn.fold_into,
            library(np.ones((3, 2))), None, mean, var)  # fmt: skip


@pytest.mark.parametrize(
    ("error", "weight", "options", "words"),
    [
        (cubn.DTypeError, np.ones((3, 2), int), {}, "weight has dtype int64|floating"),
        (cubn.ShapeError, np.ones((3, 2)), {"out_axis": 2}, "out_axis is 2|(3, 2)|from -2 to 1"),
        (cubn.ShapeError, np.ones((3, 2)), {"out_axis": -3}, "out_axis is -3|from -2 to 1"),
        (cubn.ShapeError, np.ones((3, 2)), {"out_axis": "0"}, "out_axis is '0'"),
        (cubn.ShapeError, np.ones((3, 2)), {"out_axis": None}, "out_axis is None"),
        (cubn.ShapeError, np.ones((2, 3)), {}, "mean has shape (3,)|(2, 3)|2 output features|another out_axis"),
        (cubn.ShapeError, np.ones((3, 2)), {"bias": np.ones(2)}, "bias has shape (2,)|(3,)"),
        (cubn.DTypeError, np.ma.masked_less(np.ones((3, 2)), 0), {}, "weight is a numpy.ma.MaskedArray"),
    ],
)
def test_a_weight_that_does_not_go_with_the_statistics_is_refused(error, weight, options, words):
    options = {"bias": None, "mean": np.zeros(3), "var": np.ones(3), **options}
    refused(error, words, cubn.fold_into, weight, **options)


@pytest.mark.parametrize("shape", [5, "abc", (3, -1), (3, 2.5), {3, 4}, None, (True, 3), [[1.0, 2.0]]])
def test_what_is_no_shape_cannot_be_explained(shape):
    refused(cubn.ShapeError, f"x_or_shape is {shape!r}|shape of one", cubn.explain, shape)


def test_the_shape_of_a_scalar_cannot_be_explained():
    refused(cubn.ShapeError, "scalar", cubn.explain, ())


def test_an_unknown_machine_is_refused():
    refused(ValueError, "machine is 'gpu'|reference", cubn.dispatch.use_machine("gpu").__enter__)


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "2", None])
def test_a_number_of_ranks_that_cannot_be_is_refused(size):
    refused(ValueError, f"size is {size!r}|positive integer", cubn.sync.threads, size)


@pytest.mark.parametrize("timeout", [0, -1.0, np.nan, None, "1"])
def test_a_timeout_that_no_rank_can_meet_is_refused(timeout):
    refused(ValueError, f"timeout is {timeout!r}|above zero", cubn.sync.threads, 2, timeout=timeout)


# The classes


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("ShapeError", ValueError), ("DTypeError", TypeError), ("DeviceError", TypeError),
        ("KernelError", RuntimeError), ("SyncError", RuntimeError), ("PerformanceWarning", UserWarning),
    ],
)  # fmt: skip
def test_every_class_can_be_caught_as_python_names_such_errors(name, base):
    error = getattr(cubn, name)
    assert issubclass(error, base)
    assert error is getattr(importlib.import_module("cubn.errors"), name)
