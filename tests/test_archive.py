"""A layer in a file: all of it comes back, a damaged file is a clear error, and a failed write changes nothing."""

import contextlib
import io
import json
import pickle
import stat
import zipfile

import numpy as np
import pytest

import cubn
from cubn import archive

OPTIONS = [
    (3, {}),
    (0, {}),
    (3, {"channel_axis": -1, "eps": 1e-3, "momentum": 0.25, "dtype": "float64"}),
    (3, {"momentum": None, "activation": "relu", "eps": 0.0}),
    (3, {"affine": False}),
    (3, {"track_running_stats": False}),
    (3, {"affine": False, "track_running_stats": False}),
    ((3, 4), {"channel_axis": (1, -1), "dtype": "float64"}),
    ((3,), {"channel_axis": (1,)}),
    ((), {"channel_axis": ()}),
]


def trained(features=3, **options):
    """A layer whose every number is another."""
    bn = cubn.BatchNorm(features, **options)
    rng = np.random.default_rng(0)
    if bn.affine:
        bn.gamma, bn.beta = (rng.normal(size=bn.channel_shape).astype(bn.dtype) for _ in range(2))
    if bn.track_running_stats:
        bn.running_mean, bn.running_var = rng.normal(size=bn.channel_shape), rng.random(bn.channel_shape)
        bn._running = cubn.RunningStatistics(bn.running_mean, bn.running_var, 7)
    return bn


def assert_same_layer(a, b):
    assert repr(a) == repr(b)
    mine, other = a.state_dict(), b.state_dict()
    assert list(mine) == list(other)
    for key, values in mine.items():
        values, twin = np.asarray(values), np.asarray(other[key])
        assert (values.tobytes(), values.dtype, values.shape) == (twin.tobytes(), twin.dtype, twin.shape), key


@pytest.fixture
def path(tmp_path):
    return tmp_path / "layer.npz"


@pytest.fixture
def saved(path):
    """A good file, and the bytes in it."""
    trained().save(path)
    return path.read_bytes()


def refused(path, words=""):
    """Loading raises ValueError itself, in one sentence that names the path and holds the words."""
    with pytest.raises(ValueError, match=r"; .*\.$") as caught:
        cubn.BatchNorm.load(path)
    assert caught.type is ValueError
    message = str(caught.value)
    assert message.startswith(str(path))
    assert ", but " in message
    assert words in message


def test_a_file_that_loads_is_not_seen_as_refused(saved, path):
    with pytest.raises(pytest.fail.Exception):
        refused(path)


# There and back


@pytest.mark.parametrize(("features", "options"), OPTIONS, ids=str)
def test_every_option_and_every_bit_come_back(path, features, options):
    bn = trained(features, **options)
    bn.save(path)
    assert_same_layer(cubn.BatchNorm.load(path), bn)


def test_a_momentum_of_the_other_convention_comes_back_with_its_warning(path):
    with pytest.warns(UserWarning, match="weight of the new batch"):
        bn = cubn.BatchNorm(3, momentum=0.9)
    bn.save(path)
    with pytest.warns(UserWarning, match="weight of the new batch"):
        assert cubn.BatchNorm.load(path).momentum == 0.9


def test_a_loaded_layer_computes_the_same_and_trains_on(path):
    x = np.random.default_rng(1).normal(size=(6, 3, 4)).astype("float32")
    bn = cubn.BatchNorm(3)
    bn(x)
    bn.eval().save(path)
    again = cubn.BatchNorm.load(path)
    assert again.training
    assert np.array_equal(again.eval()(x), bn(x))
    assert np.array_equal(again.train()(x + 1), bn.train()(x + 1))
    assert_same_layer(again, bn)


@pytest.mark.parametrize("name", ["layer", "layer.npz", "layer.dat", "with space é.npz", ".hidden"])
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_the_file_is_written_exactly_there_and_nothing_beside_it(tmp_path, name, kind):
    trained().save(kind(tmp_path / name))
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert_same_layer(cubn.BatchNorm.load(kind(tmp_path / name)), trained())


def test_a_relative_path_is_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained().save("layer.npz")
    assert_same_layer(cubn.BatchNorm.load("layer.npz"), trained())


def test_a_file_is_as_readable_as_any_other_new_one(saved, path, tmp_path):
    other = tmp_path / "other"
    other.write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_numpy_alone_can_read_the_arrays(saved, path):
    with np.load(path, allow_pickle=False) as arrays:
        assert np.array_equal(arrays["gamma"], trained().gamma)
        assert arrays["num_batches_tracked"] == 7


def test_an_older_file_is_replaced(saved, path):
    trained(5).save(path)
    assert cubn.BatchNorm.load(path).features == 5


# Damage


def test_a_truncated_file_is_refused_wherever_it_ends(saved, path):
    for length in range(0, len(saved), 16):
        path.write_bytes(saved[:length])
        refused(path)


def test_a_flipped_bit_is_refused_or_changes_nothing(saved, path):
    """Every 5th byte, one bit of each, all eight in turn: zip's checksums cover the data, not the time stamps."""
    unchanged, places = 0, range(0, len(saved), 5)
    for at in places:
        damaged = bytearray(saved)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            assert_same_layer(cubn.BatchNorm.load(path), trained())
            unchanged += 1
            continue
        refused(path)
    assert unchanged < len(places) / 2, "most of the damage went unseen"


def npy(values, **options):
    memory = io.BytesIO()
    np.save(memory, values, **options)
    return memory.getvalue()


def npz(**arrays):
    memory = io.BytesIO()
    np.savez(memory, **arrays)
    return memory.getvalue()


def zipped(**entries):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return memory.getvalue()


OTHER_FILES = {
    "empty": b"",
    "text": b"gamma = 1\n",
    "noise": bytes(range(256)) * 8,
    "one array": npy(np.ones(3)),
    "a pickle": pickle.dumps({"gamma": np.ones(3)}),
    "an array of pickles": npy(np.array([{}]), allow_pickle=True),
    "an empty archive": zipped(),
    "another archive": zipped(**{"readme.txt": b"hello"}),
    "other arrays": npz(gamma=np.ones(3), beta=np.ones(3)),
    "a header that is no array": zipped(**{"cubn.npy": b"hello"}),
    "a header of floats": npz(cubn=np.ones(3)),
    "a header of pickles": npz(cubn=np.array([None])),
    "a header that is not UTF-8": npz(cubn=np.array([255, 254, 0], np.uint8)),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_another_file_is_refused(path, kind):
    path.write_bytes(OTHER_FILES[kind])
    refused(path, "pass such a file, whole and undamaged")


def test_a_directory_is_refused(tmp_path):
    refused(tmp_path)


def test_a_pickle_is_not_run(path):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("the pickle was run",)

    for content in (pickle.dumps(Trap()), npy(np.array([Trap()], object), allow_pickle=True)):
        path.write_bytes(content)
        refused(path)


def test_a_file_that_is_not_there_keeps_its_class(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        cubn.BatchNorm.load(tmp_path / "nowhere.npz")


def test_a_file_that_may_not_be_read_keeps_its_class(saved, path, monkeypatch):
    def locked(self, *args, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(path), "open", locked)  # chmod stops nobody who is root
    with pytest.raises(PermissionError, match="layer"):
        cubn.BatchNorm.load(path)


@pytest.mark.parametrize("path", [None, 3, ["layer.npz"]])
def test_what_is_no_path_is_a_type_error(path):
    with pytest.raises(TypeError):
        cubn.BatchNorm.load(path)


# Headers and arrays that lie


def forge(path, *, header=..., drop=(), state=None, **options):
    """A file like that of `trained()`, with other options, another header or other arrays in it."""
    bn = trained()
    claimed = {key: value for key, value in {**bn._options(), **options}.items() if key not in drop}
    content = {"format": archive.FORMAT, "options": claimed} if header is ... else header
    arrays = {key: values for key, values in {**bn.state_dict(), **(state or {})}.items() if values is not None}
    path.write_bytes(npz(cubn=np.frombuffer(json.dumps(content).encode(), np.uint8), **arrays))


def test_a_forgery_without_a_lie_is_a_layer(path):
    forge(path)
    assert_same_layer(cubn.BatchNorm.load(path), trained())


@pytest.mark.parametrize(
    "lie",
    [
        {"features": -1}, {"features": 4}, {"features": 10**12}, {"features": 10**400}, {"features": 3.0},
        {"features": "3"}, {"features": None}, {"features": True}, {"features": [[3]]},
        {"features": {"a": 3}}, {"features": [1, 3], "channel_axis": [1, 2]},
        {"channel_axis": [1, 2]}, {"channel_axis": "1"}, {"channel_axis": None}, {"channel_axis": 1.5},
        {"channel_axis": {"a": 1}}, {"channel_axis": True}, {"channel_axis": [1, 1]},
        {"eps": -1.0}, {"eps": "1e-5"}, {"eps": None}, {"eps": 10**400}, {"eps": float("nan")},
        {"momentum": 2.0}, {"momentum": "0.1"}, {"momentum": [0.1]}, {"momentum": float("inf")},
        {"affine": "no"}, {"affine": False}, {"affine": None}, {"affine": 2},
        {"track_running_stats": False}, {"track_running_stats": "yes"},
        {"activation": "gelu"}, {"activation": []}, {"activation": {}}, {"activation": True},
        {"dtype": "float16"}, {"dtype": None}, {"dtype": {}}, {"dtype": "f8,f8"}, {"dtype": 3}, {"dtype": "O"},
        {"device": "cuda"}, {"sync": 5}, {"unknown": 1}, {"self": 1}, {"": 1},
    ],
    ids=lambda lie: str(lie)[:40],
)  # fmt: skip
def test_options_that_lie_are_refused(path, lie):
    forge(path, **lie)
    refused(path)


@pytest.mark.parametrize("option", ["features", "channel_axis", "eps", "momentum", "affine", "activation", "dtype"])
def test_an_option_that_is_missing_is_not_guessed(path, option):
    forge(path, drop=(option,))
    refused(path)


@pytest.mark.parametrize(
    "header",
    [[], "text", 3, None, {}, {"format": archive.FORMAT}, {"format": archive.FORMAT, "options": []},
     {"format": "cubn.BatchNorm 99", "options": {}}, {"options": {}}, {"format": [archive.FORMAT], "options": {}}],
    ids=str,
)  # fmt: skip
def test_a_header_of_another_format_is_refused(path, header):
    forge(path, header=header)
    refused(path, "another format than 'cubn.BatchNorm 1'")


def test_a_header_nested_beyond_measure_is_refused(path):
    path.write_bytes(npz(cubn=np.frombuffer(b"[" * 200_000, np.uint8)))
    refused(path)


@pytest.mark.parametrize(
    "state",
    [
        {"gamma": None}, {"extra": np.ones(3)}, {"gamma": np.ones(4)}, {"gamma": np.ones((3, 1))},
        {"gamma": np.ones(3, int)}, {"gamma": np.array(["a", "b", "c"])}, {"running_var": -np.ones(3)},
        {"num_batches_tracked": np.float64(1)}, {"num_batches_tracked": -1}, {"num_batches_tracked": np.ones(3, int)},
        {"num_batches_tracked": None}, {"running_mean": np.array([None] * 3)},
    ],
    ids=str,
)  # fmt: skip
def test_arrays_that_lie_are_refused(path, state):
    forge(path, state=state)
    refused(path)


def test_an_array_that_claims_to_be_larger_than_memory_is_refused(saved, path):
    """Its own header, inside a zip whose checksums are right."""
    header = npy(np.ones(3, np.float32))[:-12].replace(b"(3,), }" + b" " * 16, b"(3000000000000000,), }" + b" ")
    forge(path)
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    path.write_bytes(zipped(**{**entries, "gamma.npy": header + bytes(12)}))
    refused(path)


def test_an_entry_that_is_no_array_is_refused(saved, path):
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    path.write_bytes(zipped(**{**entries, "readme.txt": b"hello"}))
    refused(path, "'readme.txt' is no array")


# Writes that fail


class FullDiskError(OSError):
    pass


@pytest.mark.parametrize("place", ["numpy.savez", "os.fsync", "os.replace", "os.chmod"])
@pytest.mark.parametrize("error", [FullDiskError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(saved, path, tmp_path, monkeypatch, place, error):
    def failing(*args, **options):
        raise error

    monkeypatch.setattr(place, failing)
    with pytest.raises(error):
        trained(5).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == saved
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_write_that_fails_half_way_leaves_no_file_where_there_was_none(path, tmp_path, monkeypatch):
    def half(file, **arrays):
        file.write(b"PK\x03\x04 and no more")
        raise FullDiskError

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(FullDiskError):
        trained().save(path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        trained().save(tmp_path / "missing" / "layer.npz")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_not_overwritten(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        trained().save(tmp_path / "folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
