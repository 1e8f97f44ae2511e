"""The reference on every library of the array API standard that is installed, and what autodiff makes of it."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest

import cubn


def make_strict(values):
    return importlib.import_module("array_api_strict").asarray(values)


def make_torch(values):
    return importlib.import_module("torch").asarray(np.array(values))


def make_jax(values):
    return importlib.import_module("jax.numpy").asarray(values)


def make_dask(values):
    array = importlib.import_module("dask.array")
    return array.from_array(np.asarray(values), chunks=tuple(max(1, -(-size // 2)) for size in np.shape(values)))


LIBRARIES = {"array_api_strict": make_strict, "torch": make_torch, "jax": make_jax, "dask": make_dask}


@pytest.fixture(params=LIBRARIES)
def make(request):
    """A function from NumPy array to array of the library."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return LIBRARIES[request.param]


@pytest.fixture
def strictest():
    """array_api_strict with everything optional switched off."""
    strict = pytest.importorskip("array_api_strict", reason="array_api_strict is not installed")
    with strict.ArrayAPIStrictFlags(boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()):
        yield strict


def to_numpy(array):
    return np.asarray(array.detach() if hasattr(array, "detach") else array)


def roundoff(make):
    """JAX has no float64 unless asked, so its sums are float32."""
    return 2.0**-24 if make is make_jax else 2.0**-53


@pytest.mark.parametrize("channel_axis", [1, -1, (1, 2), (0, 2), ()], ids=str)
def test_the_whole_interface_runs_on_any_library(make, channel_axis):
    check_interface(make, channel_axis)


@pytest.mark.parametrize("channel_axis", [1, (0, 2)], ids=str)
def test_the_reference_keeps_to_the_standard_at_its_strictest(strictest, channel_axis):
    check_interface(make_strict, channel_axis)


def check_interface(make, channel_axis):
    """Forward, backward, inference, moments, fold with activation, residual and mask, in the library's own arrays."""
    rng = np.random.default_rng(30)
    x, dy, residual = rng.normal(1, 2, (3, 4, 3, 5)).astype("float32")
    kept = channel_axis if isinstance(channel_axis, tuple) else (channel_axis % 3,)
    channels = tuple(x.shape[axis] for axis in kept)
    gamma, beta = rng.uniform(0.5, 2, channels).astype("float32"), rng.normal(size=channels).astype("float32")
    where = rng.random(x.shape) < 0.8
    where[0] = True
    where[:, 0] = True
    assert where.any(tuple(axis for axis in range(3) if axis not in kept)).all(), "an empty channel has no variance"
    kind = type(make(x))

    y, saved = cubn.batch_norm(
        make(x), make(gamma), make(beta), channel_axis=channel_axis, activation="relu", residual=make(residual),
        where=make(where),
    )  # fmt: skip
    grads = cubn.batch_norm_backward(make(dy), saved)
    exact = oracle.batch_norm(
        x, gamma, beta, channel_axis=channel_axis, activation="relu", residual=residual, where=where, dy=dy,
        roundoff=roundoff(make),
    )  # fmt: skip
    for name, value, wanted in (
        ("y", y, exact.y), ("dx", grads.dx, exact.dx), ("dgamma", grads.dgamma, exact.dgamma),
        ("dbeta", grads.dbeta, exact.dbeta), ("dresidual", grads.dresidual, exact.dresidual),
        ("mean", saved.moments.mean, exact.mean), ("var", saved.moments.var, exact.var),
        ("rstd", saved.rstd, exact.rstd),
    ):  # fmt: skip
        assert isinstance(value, kind), name
        oracle.assert_within(to_numpy(value), wanted.rounded_to("float32"), name)

    mean, var = rng.normal(size=channels).astype("float32"), rng.uniform(0.5, 2, channels).astype("float32")
    z = cubn.batch_norm_inference(make(x), make(mean), make(var), make(gamma), make(beta), channel_axis=channel_axis)
    wanted = oracle.batch_norm(
        x, gamma, beta, channel_axis=channel_axis, statistics=(mean, var), roundoff=roundoff(make)
    )
    oracle.assert_within(to_numpy(z), wanted.y.rounded_to("float32"), "inference")
    halves = cubn.moments(make(x[:2]), channel_axis=channel_axis) if 0 not in kept else None
    if halves is not None:
        both = halves | cubn.moments(make(x[2:]), channel_axis=channel_axis)
        plain = oracle.batch_norm(x, channel_axis=channel_axis, roundoff=4 * roundoff(make))
        oracle.assert_within(to_numpy(both.var), plain.var.rounded_to("float32"), "union")
    scale, shift = cubn.fold(make(mean), make(var), make(gamma), make(beta))
    assert isinstance(scale, kind)
    assert isinstance(shift, kind)


def test_a_device_without_float64_is_served_in_float32(strictest):
    """The constant channel is exact there too, because every distance is taken from a sample."""
    device = strictest.Device("no_float64")
    values = np.random.default_rng(31).normal(1e3, 1.0, (64, 3)).astype("float32")
    values[:, 1] = 0.1
    x = strictest.asarray(values, device=device)
    y, saved = cubn.batch_norm(x)
    assert y.device == device
    assert saved.moments.mean.device == device
    exact = oracle.batch_norm(values, roundoff=2.0**-24)
    oracle.assert_within(np.asarray(y.to_device(strictest.Device("CPU_DEVICE"))), exact.y.rounded_to("float32"))
    np.testing.assert_array_equal(np.asarray(y.to_device(strictest.Device("CPU_DEVICE")))[:, 1], 0)


def test_two_devices_of_one_library_are_not_mixed(strictest):
    x = strictest.ones((4, 3), device=strictest.Device("device1"))
    with pytest.raises(cubn.DeviceError, match="gamma"):
        cubn.batch_norm(x, strictest.ones(3, device=strictest.Device("device2")))


def test_dask_stays_lazy_until_asked():
    array = pytest.importorskip("dask.array", reason="dask is not installed")
    calls = []

    def block(values):
        calls.append(1)
        return values

    x = array.from_array(np.random.default_rng(0).normal(size=(8, 3)), chunks=(2, 3)).map_blocks(
        block, dtype=float, meta=np.empty((0, 0))
    )
    y, _ = cubn.batch_norm(x)
    assert not calls
    assert y.compute().shape == (8, 3)
    assert calls


def test_pytorch_differentiates_through_the_reference():
    """cubn's own backward pass and PyTorch's autodiff of the forward pass, both against the oracle."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rng = np.random.default_rng(32)
    x, dy = rng.normal(1, 2, (2, 6, 3, 4))
    gamma, beta = rng.uniform(0.5, 2, 3), rng.normal(size=3)
    tensors = [torch.tensor(values, requires_grad=True) for values in (x, gamma, beta)]
    y, saved = cubn.batch_norm(*tensors, activation="relu")
    y.backward(torch.tensor(dy))
    exact = oracle.batch_norm(x, gamma, beta, activation="relu", dy=dy)
    with torch.no_grad():
        grads = cubn.batch_norm_backward(torch.tensor(dy), saved)
    for name, tensor, own, wanted in zip(
        ("dx", "dgamma", "dbeta"), tensors, grads[:3], (exact.dx, exact.dgamma, exact.dbeta), strict=True
    ):
        # Autodiff takes other sums than the closed form: a hundred roundings of the largest term for its own.
        np.testing.assert_allclose(tensor.grad, wanted.value.astype(float), rtol=0, atol=1e-12, err_msg=name)
        oracle.assert_within(to_numpy(own), wanted.rounded_to("float64"), name)


def test_jax_compiles_and_differentiates_the_reference():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    rng = np.random.default_rng(33)
    x, dy = rng.normal(1, 2, (2, 6, 3, 4)).astype("float32")
    gamma, beta = rng.uniform(0.5, 2, 3).astype("float32"), rng.normal(size=3).astype("float32")

    def loss(x, gamma, beta):
        return (cubn.batch_norm(x, gamma, beta)[0] * dy).sum()

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(
        x_jax := jax.numpy.asarray(x), *map(jax.numpy.asarray, (gamma, beta))
    )
    exact = oracle.batch_norm(x, gamma, beta, dy=dy, roundoff=2.0**-24)
    for value, wanted in zip(found, (exact.dx, exact.dgamma, exact.dbeta), strict=True):
        widened = oracle.Exact(wanted.value, 8 * wanted.bound)  # autodiff's own sums, in float32
        oracle.assert_within(np.asarray(value), widened.rounded_to("float32"))
    mapped = jax.vmap(lambda x: cubn.batch_norm(x)[0])(jax.numpy.stack([x_jax, 2 * x_jax]))
    np.testing.assert_allclose(mapped[0], cubn.batch_norm(x_jax)[0], rtol=1e-5, atol=1e-6)


def test_jax_constant_channels_have_finite_gradients():
    """The guarded power stays out of autodiff's way: no 0 * infinity."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    x = jax.numpy.ones((4, 2))
    slopes = jax.grad(lambda x: (cubn.batch_norm(x, eps=0.0)[0] ** 2).sum())(x)
    assert bool(jax.numpy.isfinite(slopes).all())


def of_jax(function, *arrays):
    """y and the gradients of sum(y * dy) with respect to x, gamma and beta, compiled by JAX."""
    jax = importlib.import_module("jax")

    def loss(x, gamma, beta, dy):
        y = function(x, gamma, beta)
        return (y * dy).sum(), y

    values = map(jax.numpy.asarray, arrays)
    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*values)
    return [np.asarray(value) for value in (y, *gradients)]


def operands_of_jax():
    rng = np.random.default_rng(34)
    x, dy = rng.normal(1, 2, (2, 6, 3, 4)).astype("float32")
    return x, rng.uniform(0.5, 2, 3).astype("float32"), rng.normal(size=3).astype("float32"), dy


def assert_right_in_jax(found, exact):
    """Autodiff takes other sums than the closed form, in float32: eight of the bounds of the closed form."""
    for value, wanted in zip(found, (exact.y, exact.dx, exact.dgamma, exact.dbeta), strict=True):
        oracle.assert_within(value, oracle.Exact(wanted.value, 8 * wanted.bound).rounded_to("float32"))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_jax_is_right_under_jit_and_grad(training, activation):
    pytest.importorskip("jax", reason="jax is not installed")
    x, gamma, beta, dy = operands_of_jax()
    statistics = None if training else (x.mean((0, 2)), x.var((0, 2)))

    def function(x, gamma, beta):
        if training:
            return cubn.batch_norm(x, gamma, beta, activation=activation)[0]
        # statistics that JAX does not trace are constants: they must be its own arrays all the same
        mean, var = map(importlib.import_module("jax.numpy").asarray, statistics)
        return cubn.batch_norm_inference(x, mean, var, gamma, beta, activation=activation)

    exact = oracle.batch_norm(x, gamma, beta, activation=activation, statistics=statistics, dy=dy, roundoff=2.0**-24)
    assert_right_in_jax(of_jax(function, x, gamma, beta, dy), exact)


def test_jax_is_right_under_vmap_in_either_order_with_grad():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    x, gamma, beta, dy = operands_of_jax()
    batches = np.stack([x, x[::-1] * 3, x + 5])

    def loss(x, gamma):
        return (cubn.batch_norm(x, gamma, beta_jax)[0] * dy).sum()

    beta_jax = jax.numpy.asarray(beta)
    inside = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(0, None)))(batches, jax.numpy.asarray(gamma))
    outside = jax.jit(jax.grad(lambda xs, g: jax.vmap(loss, in_axes=(0, None))(xs, g).sum(), argnums=(0, 1)))(
        jax.numpy.asarray(batches), jax.numpy.asarray(gamma)
    )
    total = 0.0
    for place, batch in enumerate(batches):
        exact = oracle.batch_norm(batch, gamma, beta, dy=dy, roundoff=2.0**-24)
        for found in (inside, outside):
            widened = oracle.Exact(exact.dx.value, 8 * exact.dx.bound)
            oracle.assert_within(np.asarray(found[0][place]), widened.rounded_to("float32"), "dx")
        widened = oracle.Exact(exact.dgamma.value, 8 * exact.dgamma.bound)
        oracle.assert_within(np.asarray(inside[1][place]), widened.rounded_to("float32"), "dgamma")
        total = total + exact.dgamma.value
    np.testing.assert_allclose(outside[1], total.astype(float), rtol=1e-4)


ON_TWO_DEVICES = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import cubn

assert len(jax.devices()) == 2
mesh = Mesh(np.array(jax.devices()), ("batch",))
given = np.load(sys.argv[1])
x, gamma, beta, dy = (jax.numpy.asarray(given[key]) for key in ("x", "gamma", "beta", "dy"))
shard_map = getattr(jax, "shard_map", None) or __import__("jax.experimental.shard_map", fromlist=["x"]).shard_map


def gradients(function):
    def loss(x, gamma, beta):
        y = function(x, gamma, beta)
        return (y * dy).sum(), y
    (_, y), found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
        jax.device_put(x, NamedSharding(mesh, P("batch"))), gamma, beta
    )
    return dict(zip(("y", "dx", "dgamma", "dbeta"), (y, *found)))


def whole(x, gamma, beta):
    return cubn.batch_norm(x, gamma, beta)[0]


def together(x, gamma, beta):                      # statistics of the batch over all devices
    own = cubn.moments(x)
    means, squares = (jax.lax.all_gather(values, "batch") for values in (own.mean, own.m2))
    parts = [cubn.Moments(own.count, means[rank], squares[rank]) for rank in range(2)]
    batch = parts[0] | parts[1]
    return cubn.batch_norm_inference(x, batch.mean, batch.var, gamma, beta)


def mapped(function):
    return shard_map(function, mesh=mesh, in_specs=(P("batch"), P(), P()), out_specs=P("batch"))


results = {"sharded": gradients(whole), "apart": gradients(mapped(whole)), "together": gradients(mapped(together))}
assert len(results["sharded"]["y"].sharding.device_set) == 2
np.savez(sys.argv[2], **{f"{name} {key}": value for name, found in results.items() for key, value in found.items()})
"""


def test_jax_is_right_on_two_devices(tmp_path):
    """An array over two devices, and `shard_map` with statistics of each device's share and of all of them."""
    pytest.importorskip("jax", reason="jax is not installed")
    x, gamma, beta, dy = operands_of_jax()
    np.savez(tmp_path / "in.npz", x=x, gamma=gamma, beta=beta, dy=dy)
    environment = {
        **os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    command = [sys.executable, "-c", ON_TWO_DEVICES, str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    root = Path(cubn.__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npz")
    exact = oracle.batch_norm(x, gamma, beta, dy=dy, roundoff=2.0**-24)
    for name in ("sharded", "together"):
        assert_right_in_jax([found[f"{name} {key}"] for key in ("y", "dx", "dgamma", "dbeta")], exact)
    halves = [
        oracle.batch_norm(x[part], gamma, beta, dy=dy[part], roundoff=2.0**-24) for part in (slice(3), slice(3, 6))
    ]
    for key in ("y", "dx"):
        for half, part in zip(halves, (slice(3), slice(3, 6)), strict=True):
            wanted = getattr(half, key)
            oracle.assert_within(
                found[f"apart {key}"][part], oracle.Exact(wanted.value, 8 * wanted.bound).rounded_to("float32"), key
            )


def test_immutable_libraries_refuse_out():
    jnp = pytest.importorskip("jax.numpy", reason="jax is not installed")
    x = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="read-only"):
        cubn.batch_norm(x, out=jnp.zeros((4, 2)))


def test_out_of_another_library_is_filled():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch.arange(12.0).reshape(4, 3)
    out = torch.zeros(4, 3)
    y, _ = cubn.batch_norm(x, out=out)
    assert y is out
    torch.testing.assert_close(out, cubn.batch_norm(x)[0])
    with pytest.raises(ValueError, match="overlaps x"):
        cubn.batch_norm(x, out=x)


@pytest.mark.parametrize("values", [[[1.0], [3.0]], ((1.0,), (3.0,))], ids=["lists", "tuples"])
def test_lists_are_taken_as_numpy_takes_them(values):
    y, _ = cubn.batch_norm(values, [2.0], [1], eps=0.0)
    assert isinstance(y, np.ndarray)
    np.testing.assert_array_equal(y, [[-1.0], [3.0]])


def test_half_precision_of_pytorch_and_jax_is_served():
    for library, dtype in (("torch", "bfloat16"), ("torch", "float16"), ("jax", "bfloat16")):
        if importlib.util.find_spec(library) is None:
            continue
        xp = importlib.import_module("torch" if library == "torch" else "jax.numpy")
        x = xp.asarray(np.random.default_rng(0).normal(size=(8, 3)).astype("float32"))
        x = x.to(getattr(xp, dtype)) if library == "torch" else x.astype(dtype)
        y, saved = cubn.batch_norm(x)
        assert y.dtype == x.dtype
        assert str(saved.moments.mean.dtype).endswith("float32")
