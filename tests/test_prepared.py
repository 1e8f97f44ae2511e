"""A call of a form that was seen before: the same bits, the same errors, and nothing of the call before it."""

import itertools
import sys
import threading
from types import ModuleType, SimpleNamespace

import host_machine
import numpy as np
import pytest
from host.build import missing

import cubn
from cubn import forms, functional, prepared
from cubn.forms import Reach, Remembered, form_of
from cubn.machines.cuda.machine import KernelMachine

if missing():
    pytest.skip(missing(), allow_module_level=True)

SHAPE = (3, 4, 5, 2)
CHANNELS = SHAPE[1]


@pytest.fixture
def machine(monkeypatch):
    """A machine of kernels that has prepared nothing, in a process that remembers nothing."""
    forget(monkeypatch)
    backend = host_machine.HostBackend(host_machine.BACKEND.device)
    backend._kernels = host_machine.BACKEND._kernels  # compiled once
    launch = backend.launch

    def aligned(plan, arguments):
        for name, value in arguments.items():
            assert not isinstance(value, np.ndarray) or value.flags.aligned, name
        launch(plan, arguments)

    monkeypatch.setattr(backend, "launch", aligned)
    machine = KernelMachine("fresh", backend)
    with serving(monkeypatch, machine):
        yield machine


def forget(monkeypatch):
    for remembered in (prepared.FORWARD, prepared.INFERENCE):
        monkeypatch.setattr(remembered, "_found", {})
    for table in (forms.FORMS, forms.ADDRESSES):
        monkeypatch.delitem(table, np.ndarray, raising=False)


def serving(monkeypatch, machine):
    """Compute on this machine; each has a name of its own, because names are looked up once."""
    name = f"machine {id(machine)}"
    monkeypatch.setitem(sys.modules, name, machine)
    monkeypatch.setitem(cubn.dispatch.MACHINES, name, name)
    return cubn.dispatch.use_machine(name)


def without_passes(machine):
    """The six functions of a machine, and no more: every call goes the long way."""
    verbs = ("moments", "normalize", "gradient_sums", "input_gradient", "forward", "backward")
    module = ModuleType("without_passes")
    vars(module).update({verb: getattr(machine, verb) for verb in verbs})
    return module


def normal(seed, shape=SHAPE, dtype="float32"):
    return np.random.default_rng(seed).normal(3, 2, shape).astype(dtype)


def channels_last(array):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)


def shifted(array):
    """The same values, one element further from a vector boundary."""
    memory = np.empty(array.size + 1, array.dtype)
    memory[1:] = array.reshape(-1)
    return memory[1:].reshape(array.shape)


def gapped(array):
    """The same values in memory with a gap after each."""
    memory = np.empty((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    memory[..., ::2] = array
    return memory[..., ::2]


def cut(array):
    """The same values in rows of longer ones, which cannot be seen as one row."""
    memory = np.empty((*array.shape[:-1], array.shape[-1] + 1), array.dtype)
    memory[..., :-1] = array
    return memory[..., :-1]


def unaligned(array):
    """The same values at an odd address."""
    memory = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype)
    memory[:] = array
    return memory


def read_only(array):
    array.flags.writeable = False
    return array


class Own(np.ndarray):
    """A class that might have rules of its own."""


def train(x, dy, gamma=None, beta=None, out=None, into=None, **options):
    """All that a training step returns."""
    y, saved = cubn.batch_norm(x, gamma, beta, out=out, **options)
    grads = cubn.batch_norm_backward(dy, saved, out=into)
    return [y, *grads, saved.moments.mean, saved.moments.m2, np.asarray(saved.moments.count), saved.rstd]


def infer(x, mean, var, gamma=None, beta=None, **options):
    return [cubn.batch_norm_inference(x, mean, var, gamma, beta, **options)]


def outcome(call):
    """Bits with dtype, shape and strides; of an error its class and its words."""
    try:
        found = call()
    except Exception as error:
        return type(error), str(error)
    return [None if array is None else (array.dtype, array.shape, array.strides, array.tobytes()) for array in found]


GAMMA, BETA = normal(2, CHANNELS), normal(3, CHANNELS)

WAYS = {
    "plain": {},
    "affine": {"gamma": GAMMA, "beta": BETA},
    "gamma alone": {"gamma": GAMMA},
    "relu": {"gamma": GAMMA, "beta": BETA, "activation": "relu"},
    "residual": {"beta": BETA, "residual": normal(4)},
    "residual and relu": {"gamma": GAMMA, "beta": BETA, "residual": normal(4), "activation": "relu"},
}


@pytest.mark.parametrize(
    "memory", [np.copy, channels_last, shifted, lambda a: a[::-1]], ids=["C", "last", "shifted", "reversed"]
)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("into", [False, True], ids=["", "out"])
def test_a_call_gives_the_same_bits_the_first_time_the_next_time_and_the_long_way(
    machine, monkeypatch, way, memory, into
):
    options = {name: memory(value) if name == "residual" else value for name, value in WAYS[way].items()}
    x, dy = memory(normal(0)), memory(normal(1))

    def call():
        results = {"out": np.full_like(x, 7), "into": np.full_like(x, 7)} if into else {}
        return train(x, dy, **results, **options)

    first, again = outcome(call), outcome(call)
    assert prepared.FORWARD._found, "nothing was remembered, so nothing was tested"
    with serving(monkeypatch, without_passes(machine)):
        long_way = outcome(call)
    assert isinstance(first, list)
    assert again == first
    assert [found and found[-1] for found in long_way] == [found and found[-1] for found in first]
    assert [found and found[:-1] for found in long_way] == [found and found[:-1] for found in first]


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        *itertools.product(("x", "dy", "residual", "out", "into"), (gapped, cut)),
        ("gamma", gapped),
        ("gamma", unaligned),
    ],
)
def test_what_needs_a_copy_goes_the_long_way_every_time(machine, monkeypatch, name, memory):
    arrays = {"x": normal(0), "dy": normal(1), "residual": normal(4), "out": normal(5), "into": normal(6)}
    arrays["gamma"] = GAMMA
    arrays[name] = memory(arrays[name])
    with serving(monkeypatch, without_passes(machine)):
        expected = outcome(lambda: train(**arrays))
    for _ in range(2):
        assert outcome(lambda: train(**arrays)) == expected
    known = list(prepared.FORWARD._found.values())
    assert len(known) == (name in ("dy", "into"))
    assert not any(forward.backward._found for forward in known)


@pytest.mark.parametrize("way", WAYS)
def test_inference_gives_the_same_bits_every_time(machine, way):
    x, mean, var = normal(0), normal(5, CHANNELS), np.abs(normal(6, CHANNELS))
    first = outcome(lambda: infer(x, mean, var, **WAYS[way]))
    assert prepared.INFERENCE._found
    assert outcome(lambda: infer(x, mean, var, **WAYS[way])) == first
    exact = (x - mean[:, None, None].astype("float64")) / np.sqrt(var[:, None, None].astype("float64") + 1e-5)
    if way == "plain":
        np.testing.assert_allclose(infer(x, mean, var)[0], exact, rtol=4e-7, atol=1e-6)
    itself = x.copy()
    assert cubn.batch_norm_inference(itself, mean, var, **WAYS[way], out=itself) is itself
    assert itself.tobytes() == first[0][-1]


def changes():
    """One property of a good call at a time: options of `train`, given x and dy, that differ in it."""
    x, dy, gamma, beta = normal(0), normal(1), normal(2, CHANNELS), normal(3, CHANNELS)
    memory = np.zeros(2 * x.size, np.float32)

    def part(start, shape):
        return memory[start : start + int(np.prod(shape))].reshape(shape)

    base = {
        "x": x,
        "dy": dy,
        "gamma": gamma,
        "beta": beta,
        "residual": None,
        "out": np.zeros_like(x),
        "into": np.zeros_like(x),
    }
    table = {
        "dtype": {"x": x.astype("float64"), "dy": dy.astype("float64"), "out": None, "into": None},
        "half": {"x": x.astype("float16"), "dy": dy.astype("float16"), "out": None, "into": None},
        "integers": {"x": x.astype("int32")},
        "byte order": {"x": x.astype(">f4")},
        "shape": {"x": x[:2].copy(), "dy": dy[:2].copy(), "out": None, "into": None},
        "one sample": {"x": x[:1, :, :1, :1].copy(), "dy": dy[:1, :, :1, :1].copy(), "out": None, "into": None},
        "memory order of x": {"x": channels_last(x)},
        "memory order of out": {"out": channels_last(np.zeros_like(x))},
        "memory order of dy": {"dy": channels_last(dy)},
        "gaps in x": {"x": gapped(x)},
        "gaps in dy": {"dy": gapped(dy)},
        "gaps in out": {"out": gapped(np.zeros_like(x))},
        "x cut out": {"x": cut(x)},
        "dy cut out": {"dy": cut(dy)},
        "out cut out": {"out": cut(np.zeros_like(x))},
        "residual cut out": {"residual": cut(normal(4))},
        "alignment of x": {"x": shifted(x)},
        "alignment of dy": {"dy": shifted(dy)},
        "alignment of out": {"out": shifted(np.zeros_like(x))},
        "masked x": {"x": np.ma.masked_array(x, x > 3)},
        "x of a class of its own": {"x": x.view(Own)},
        "list": {"x": x.tolist(), "dy": dy.astype("float64"), "out": None, "into": None},
        "other axis": {"channel_axis": 2},
        "axis out of range": {"channel_axis": 4},
        "axis True": {"channel_axis": True},
        "axes True": {"channel_axis": (True,)},
        "axis from behind": {"channel_axis": -3},
        "eps": {"eps": 0.5},
        "eps zero": {"eps": 0},
        "eps one": {"eps": 1},
        "eps True": {"eps": True},
        "eps negative": {"eps": -1.0},
        "eps an array": {"eps": np.ones(1)},
        "activation": {"activation": "relu"},
        "no activation": {"activation": "tanh"},
        "activation without a hash": {"activation": ["relu"]},
        "residual": {"residual": normal(4)},
        "residual of another dtype": {"residual": normal(4).astype("float64")},
        "mask": {"where": x > 2},
        "no gamma": {"gamma": None},
        "no beta": {"beta": None},
        "gamma of another shape": {"gamma": np.ones(5, "float32")},
        "gamma of another dtype": {"gamma": gamma.astype("float64")},
        "narrower gamma": {"gamma": gamma.astype("float16")},
        "gamma of a list": {"gamma": gamma.tolist()},
        "gamma with gaps": {"gamma": gapped(gamma)},
        "gamma at an odd address": {"gamma": unaligned(gamma)},
        "gamma backwards": {"gamma": gamma[::-1]},
        "masked gamma": {"gamma": np.ma.masked_array(gamma, gamma > 3)},
        "gamma of a class of its own": {"gamma": gamma.view(Own)},
        "a number for gamma": {"gamma": np.float32(2)},
        "no out": {"out": None},
        "no memory for dx": {"into": None},
        "dx over gamma": {"into": part(0, SHAPE), "gamma": part(8, (CHANNELS,))},
        "out is x": {"out": x},
        "out within x": {"x": part(0, SHAPE), "out": part(4, SHAPE)},
        "out over gamma": {"out": part(0, SHAPE), "gamma": part(8, (CHANNELS,))},
        "out is read-only": {"out": read_only(np.zeros_like(x))},
        "out of another shape": {"out": np.zeros((3, 4, 5, 3), "float32")},
        "out of another dtype": {"out": np.zeros(SHAPE)},
        "out a list": {"out": x.tolist()},
        "dx over dy": {"into": dy},
        "dx over x": {"into": x},
        "dx read-only": {"into": read_only(np.zeros_like(x))},
        "dy of another dtype": {"dy": dy.astype("float64")},
        "dy of another shape": {"dy": dy[:2]},
        "dy a list": {"dy": dy.tolist()},
    }  # fmt: skip
    return base, table


BASE, CHANGES = changes()


PRECEDING = {"eps True": {"eps": 1.0}, "axes True": {"channel_axis": (1,)}}
"""Calls to which a changed one is equal, so that it would be taken for them."""


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_after_a_call_counts_as_if_it_were_the_first(machine, monkeypatch, change):
    """Results and errors, and what an error leaves of its arrays."""

    def changed():
        return train(**{**BASE, **CHANGES[change]})

    held = [array for array in (BASE | CHANGES[change]).values() if isinstance(array, np.ndarray)]
    before = [array.copy() for array in held]

    def afresh():
        for array, values in zip(held, before, strict=True):
            if array.flags.writeable:
                array[...] = values

    with monkeypatch.context() as patch:
        forget(patch)
        fresh = KernelMachine("fresh", machine.backend)
        with serving(patch, fresh):
            expected = outcome(changed)
        left = [array.copy() for array in held]
    for _ in range(2):
        afresh()
        assert isinstance(outcome(lambda: train(**{**BASE, **PRECEDING.get(change, {})})), list)
    for _ in range(2):
        afresh()
        assert outcome(changed) == expected
        for array, values in zip(held, left, strict=True):
            np.testing.assert_array_equal(array, values)
    afresh()


def test_a_negative_variance_is_seen_in_a_form_that_is_known(machine):
    x, mean, var = normal(0), normal(5, CHANNELS), np.ones(CHANNELS, "float32")
    for _ in range(2):
        infer(x, mean, var)
    var[1] = -1
    with pytest.raises(ValueError, match="var has a negative entry"):
        infer(x, mean, var)


def test_inference_may_write_over_x_but_not_beside_it(machine):
    memory = np.zeros(2 * np.prod(SHAPE), "float32")
    x, beside = (memory[start : start + np.prod(SHAPE)].reshape(SHAPE) for start in (0, 4))
    mean, var = np.zeros(CHANNELS, "float32"), np.ones(CHANNELS, "float32")
    for out in (np.zeros_like(x), x, np.zeros_like(x), x):
        infer(x, mean, var, out=out)
    with pytest.raises(ValueError, match="out overlaps x"):
        infer(x, mean, var, out=beside)
    with pytest.raises(ValueError, match="out overlaps mean"):
        infer(np.zeros_like(x), memory[4:8], var, out=x)


@pytest.mark.parametrize("way", WAYS)
def test_a_known_call_is_one_launch_and_two_allocations_at_most(machine, monkeypatch, way):
    """y and the statistics, or dx and the sums; with ReLU after a residual also what it let pass, and dresidual."""
    backend, x, dy = machine.backend, normal(0), normal(1)
    y, dx = np.zeros_like(x), np.zeros_like(x)
    _, saved = cubn.batch_norm(x, **WAYS[way])
    expected = {
        "forward": (2, lambda: cubn.batch_norm(x, **WAYS[way])),
        "forward, out": (1, lambda: cubn.batch_norm(x, **WAYS[way], out=y)),
        "backward": (2, lambda: cubn.batch_norm_backward(dy, saved)),
        "backward, out": (1, lambda: cubn.batch_norm_backward(dy, saved, out=dx)),
    }
    for name, (allocations, call) in expected.items():
        call()
        backend.allocated.clear(), backend.launches.clear()
        with monkeypatch.context() as patch:
            for learn in ("learn_forward", "learn_backward"):
                patch.setattr(functional, learn, lambda *_: pytest.fail("it is known"))
            call()
        assert len(backend.allocated) == allocations + (way == "residual and relu"), name
        assert len(backend.launches) == 1, name


def test_inference_in_a_known_form_is_two_allocations(machine, monkeypatch):
    x, mean, var = normal(0), normal(5, CHANNELS), np.abs(normal(6, CHANNELS))
    for out, allocations in ((None, 2), (np.zeros_like(x), 1), (x, 1)):
        infer(x, mean, var, out=out)
        machine.backend.allocated.clear()
        with monkeypatch.context() as patch:
            patch.setattr(functional, "learn_inference", lambda *_: pytest.fail("it is known"))
            infer(x, mean, var, out=out)
        assert len(machine.backend.allocated) == allocations


def test_nothing_of_a_call_is_in_the_next(machine):
    """Other memory of the same form, values that changed, and results of earlier calls that are still in use."""
    batches = [(normal(seed), normal(seed + 50), np.zeros(SHAPE, "float32")) for seed in range(6)]
    found = []
    for x, dy, out in batches:
        y, saved = cubn.batch_norm(x, GAMMA, BETA, out=out)
        found.append((y, saved, cubn.batch_norm_backward(dy, saved)))
    assert len(prepared.FORWARD._found) <= 2, "not one form, so nothing was tested"
    for (x, dy, out), (y, saved, grads) in zip(batches, found, strict=True):
        assert y is out
        assert saved.x is x
        wide = x.astype("float64")
        mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3))
        np.testing.assert_allclose(saved.moments.mean, mean, rtol=1e-6)
        xhat = (wide - mean[:, None, None]) / np.sqrt(var + 1e-5)[:, None, None]
        np.testing.assert_allclose(y, xhat * GAMMA[:, None, None] + BETA[:, None, None], rtol=0, atol=1e-5)
        np.testing.assert_allclose(grads.dbeta, dy.astype("float64").sum((0, 2, 3)), rtol=1e-5)
        np.testing.assert_allclose(grads.dgamma, (dy * xhat).sum((0, 2, 3)), rtol=0, atol=1e-4)


def test_the_backward_pass_reads_x_as_it_is_then(machine):
    x, dy = normal(0), normal(1)
    for _ in range(2):
        _, saved = cubn.batch_norm(x)
        before = cubn.batch_norm_backward(dy, saved).dx.copy()
        x += 1
        assert not np.array_equal(cubn.batch_norm_backward(dy, saved).dx, before)


def test_what_a_pass_has_left_is_found_by_who_looks_for_it(machine):
    x = normal(0)
    for _ in range(2):
        _, saved = cubn.batch_norm(x, GAMMA)
        assert saved.moments is saved.moments
        wide = x.astype("float64")
        np.testing.assert_allclose(saved.moments.m2, x.size // CHANNELS * wide.var((0, 2, 3)), rtol=1e-6)
        np.testing.assert_allclose(saved.rstd, 1 / np.sqrt(wide.var((0, 2, 3)) + 1e-5), rtol=1e-6)
        with pytest.raises(AttributeError):
            saved.x = x


def test_one_machine_is_not_given_what_another_has_left(machine, monkeypatch):
    x, dy = normal(0), normal(1)
    for _ in range(2):
        _, saved = cubn.batch_norm(x, GAMMA, activation="relu")
        expected = cubn.batch_norm_backward(dy, saved)
        with cubn.dispatch.use_machine("reference"):
            found = cubn.batch_norm_backward(dy, saved)
        other = KernelMachine("other", machine.backend)
        monkeypatch.setattr(other, "prepare_backward", lambda *_: pytest.fail("it has left nothing"))
        with serving(monkeypatch, other):
            same = cubn.batch_norm_backward(dy, saved)
        for a, b, c in zip(expected[:2], found[:2], same[:2], strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(c, a)


def test_a_layer_moves_its_running_statistics_as_on_the_long_way(machine, monkeypatch):
    def state(machine):
        bn = cubn.BatchNorm(CHANNELS, momentum=None)
        with serving(monkeypatch, machine):
            for seed in range(4):
                bn(normal(seed))
                bn.backward(normal(seed + 50))
        return [values.tobytes() for values in (bn.running_mean, bn.running_var, bn.gamma_grad)], bn.num_batches_tracked

    assert state(machine) == state(without_passes(machine))
    assert any(form[-1] is not None for form in prepared.FORWARD._found), (
        "no form with running statistics was remembered"
    )


def test_calls_of_one_form_in_many_threads_keep_apart(machine, monkeypatch):
    """Each thread is stopped within its launch until all are there, so that every call is under way at once."""
    threads = 4
    batches = [normal(seed) for seed in range(threads)]
    expected = [cubn.batch_norm(x, GAMMA)[0].tobytes() for x in batches]
    meeting, lock, launch = threading.Barrier(threads), threading.Lock(), machine.backend.launch
    chosen = cubn.dispatch.chosen()

    def together(plan, arguments):
        meeting.wait(timeout=30)
        with lock:  # the executor runs one kernel at a time
            launch(plan, arguments)

    monkeypatch.setattr(machine.backend, "launch", together)
    found = [None] * threads

    def work(i):
        with cubn.dispatch.use_machine(f"machine {id(chosen)}"):
            found[i] = cubn.batch_norm(batches[i], GAMMA)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [y.tobytes() for y, _ in found] == expected
    for x, (_, saved) in zip(batches, found, strict=True):
        assert saved.x is x
        np.testing.assert_allclose(saved.moments.mean, x.astype("float64").mean((0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_other_machines_are_asked_for_no_form(machine, name):
    """Reading forms would only make their calls slower."""
    if name == "cpu":
        pytest.importorskip("numba")
    with cubn.dispatch.use_machine(name):
        train(normal(0), normal(1), GAMMA, BETA)
        infer(normal(0), BETA, np.ones(CHANNELS, "float32"))
    assert np.ndarray not in forms.FORMS


def test_no_more_is_remembered_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(forms, "MOST", 3)
    remembered = Remembered()
    for i in range(10):
        remembered.add((i,), i)
        assert remembered.get((i,)) == i
        assert len(remembered._found) <= 3
    assert remembered.get((0,)) is None
    assert remembered.get(([],)) is None


def test_arrays_are_apart_exactly_if_their_bounds_are(machine):
    forms.admits(memory := np.zeros(64, np.int16))
    starts, steps = (0, 3, 6, 7, 20), (-2, -1, 1, 2)
    views = [
        np.lib.stride_tricks.as_strided(memory[16 + start :], (2, 3), (6 * step, 2 * step))
        for start, step in itertools.product(starts, steps)
    ]
    seen = set()
    for written, read in itertools.product(views, views):
        form, addresses = form_of((), read, None, written)
        apart = Reach(form, 2, (0, 1)).apart(addresses)
        assert apart != np.may_share_memory(written, read)
        seen.add(apart)
    assert seen == {True, False}
    form, addresses = form_of((), memory, None)
    assert Reach(form, 1, (0,)).apart(addresses), "nothing is written to"


def test_the_form_of_a_cupy_array_is_all_but_its_address():
    def form(dtype="float32", shape=SHAPE, strides=(160, 40, 8, 4), device_id=0, ptr=512):
        memory = SimpleNamespace(ptr=ptr, device_id=device_id)
        array = SimpleNamespace(dtype=np.dtype(dtype), shape=shape, strides=strides, data=memory)
        return forms.form_of_cupy(("options",), (None, array))

    known, addresses = form()
    assert addresses == [512]
    assert form(ptr=1024) == (known, [1024])
    others = [
        form(dtype="int32"),
        form(shape=(3, 4, 6, 2)),
        form(strides=(200, 40, 8, 4)),
        form(device_id=1),
        form(ptr=516),
    ]
    assert len({known, *(other for other, _ in others)}) == 6
