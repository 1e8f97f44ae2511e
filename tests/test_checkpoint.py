"""Batch norms in safetensors files: which are folded, which are left alone, and that the network computes the same."""

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest

import cubn
from cubn.__main__ import main
from cubn.interop import fold_safetensors, plan_folding

ROOT = Path(cubn.__file__).parent.parent
KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def shapes_of(**layers):
    """Shapes of a state dict: a number is a batch norm of so many features, a tuple the weight of a layer."""
    found = {}
    for name, shape in layers.items():
        name = name.replace("__", ".")
        if isinstance(shape, int):
            found |= {f"{name}.{key}": (shape,) for key in KEYS[:4]} | {f"{name}.{KEYS[4]}": ()}
        else:
            found[f"{name}.weight"] = shape
    return found


def pairs(plan):
    return {pair.norm: pair.layer for pair in plan.pairs}


# Names and shapes


def test_torchvision_names_are_paired():
    plan = plan_folding(
        shapes_of(
            conv1=(64, 3, 7, 7), bn1=64, layer1__0__conv1=(64, 64, 3, 3), layer1__0__bn1=64,
            layer1__0__downsample__0=(256, 64, 1, 1), layer1__0__downsample__1=256, fc=(1000, 256),
            Mixed__conv=(192, 64, 1, 1), Mixed__bn=192, features__0__0=(32, 3, 3, 3), features__0__1=32,
        )
    )  # fmt: skip
    assert pairs(plan) == {
        "bn1": "conv1", "layer1.0.bn1": "layer1.0.conv1", "layer1.0.downsample.1": "layer1.0.downsample.0",
        "Mixed.bn": "Mixed.conv", "features.0.1": "features.0.0",
    }  # fmt: skip
    assert not plan.left


def test_pre_activation_networks_are_left_alone():
    """There bn1 comes before conv1, though most of their shapes would fit."""
    plan = plan_folding(
        shapes_of(
            conv1=(64, 3, 3, 3), layer1__0__bn1=64, layer1__0__conv1=(64, 64, 3, 3), layer1__0__bn2=64,
            layer1__0__conv2=(64, 64, 3, 3), layer2__0__bn1=64, layer2__0__conv1=(128, 64, 3, 3),
            layer2__0__bn2=128, layer2__0__conv2=(128, 128, 3, 3),
        )
    )  # fmt: skip
    assert not plan.pairs
    assert len(plan.left) == 4
    assert "layer2.0.bn1 has 64 features and layer2.0.conv1 128 outputs" in plan.left["layer1.0.bn1"]


def test_shapes_that_fit_on_both_sides_prove_nothing():
    plan = plan_folding(shapes_of(conv1=(64, 64, 3, 3), bn1=64, conv2=(64, 64, 3, 3), bn2=64))
    assert not plan.pairs
    assert "might as well come before it" in plan.left["bn1"]


def test_transposed_convolutions_are_left_alone():
    """Their outputs are the second axis, which no name says."""
    plan = plan_folding(shapes_of(main__0=(100, 512, 4, 4), main__1=512, main__3=(512, 512, 4, 4), main__4=512))
    assert not plan.pairs
    assert set(plan.left) == {"main.1", "main.4"}


def test_dense_layers_and_missing_parameters_are_paired():
    shapes = shapes_of(**{"0": (50, 784), "1": 50, "3": (10, 50)})
    del shapes["1.weight"], shapes["1.bias"], shapes["1.num_batches_tracked"]
    assert pairs(plan_folding(shapes)) == {"1": "0"}


@pytest.mark.parametrize(
    ("change", "norm", "why"),
    [
        ({"norm1.running_mean": (8,), "norm1.running_var": (8,)}, "norm1", "no name says"),
        ({"bn5.running_mean": (8,), "bn5.running_var": (8,)}, "bn5", "no name says"),
        ({"bn1.running_var": None}, "bn1", "no running_var"),
        ({"bn1.weight": (7,)}, "bn1", r"weight has shape (7,)"),
        ({"bn1.scale": (8,)}, "bn1", "it holds scale as well"),
        ({"conv1.weight_scale": (8,)}, "bn1", "conv1 is no plain layer"),
        ({"conv1.bias": (7,)}, "bn1", "conv1.bias has shape (7,)"),
    ],
    ids=["other name", "no layer", "no variance", "shape", "extra", "quantised", "bias"],
)
def test_what_is_unclear_is_left_alone_with_its_reason(change, norm, why):
    shapes = shapes_of(conv1=(8, 3, 3, 3), bn1=8)
    for name, shape in change.items():
        if shape is None:
            del shapes[name]
        else:
            shapes[name] = shape
    plan = plan_folding(shapes)
    assert norm not in pairs(plan)
    assert why in plan.left[norm]


def test_two_batch_norms_of_one_layer_are_left_alone():
    plan = plan_folding({**shapes_of(block__conv=(8, 3, 3, 3), block__bn=8), **shapes_of(**{"a.0": (8, 3), "a.1": 8})})
    assert len(plan.pairs) == 2
    both = shapes_of(**{"a.conv1": (8, 3, 3, 3), "a.bn1": 8, "a.2": (8, 3), "a.3": 8})
    assert len(plan_folding(both).pairs) == 2


def test_element_types_that_are_no_floats_are_left_alone():
    shapes = shapes_of(conv1=(8, 3, 3, 3), bn1=8)
    kinds = dict.fromkeys(shapes, "F32") | {"conv1.weight": "I8"}
    assert "stored as I8" in plan_folding(shapes, kinds).left["bn1"]
    kinds = dict.fromkeys(shapes, "F32") | {"bn1.running_mean": "F8_E4M3"}
    assert "stored as F8_E4M3" in plan_folding(shapes, kinds).left["bn1"]


def test_layers_are_listed_as_people_count():
    shapes = {}
    for place in (10, 2, 1):
        shapes |= shapes_of(**{f"b.{place}.conv": (8, 3, 3, 3), f"b.{place}.bn": 8})
    assert [pair.norm for pair in plan_folding(shapes).pairs] == ["b.1.bn", "b.2.bn", "b.10.bn"]


# Files


@pytest.fixture
def save():
    return pytest.importorskip("safetensors.numpy", reason="safetensors is not installed").save_file


def network(dtype="float32"):
    rng = np.random.default_rng(0)
    arrays = {
        "conv1.weight": rng.normal(size=(8, 3, 3, 3)), "bn1.weight": rng.normal(size=8), "bn1.bias": rng.normal(size=8),
        "bn1.running_mean": rng.normal(size=8), "bn1.running_var": rng.uniform(0.5, 2, 8),
        "fc.weight": rng.normal(size=(2, 8)),
    }  # fmt: skip
    return {**{name: values.astype(dtype) for name, values in arrays.items()}, "bn1.num_batches_tracked": np.array(7)}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_folded_file_holds_what_fold_into_gives(save, tmp_path, dtype):
    """And everything else as it was, the notes of the file included."""
    kind = np.dtype(pytest.importorskip("ml_dtypes").bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    arrays = network(kind)
    save(arrays, tmp_path / "in.safetensors", metadata={"format": "pt"})
    before = (tmp_path / "in.safetensors").read_bytes()
    plan = fold_safetensors(tmp_path / "in.safetensors", tmp_path / "out.safetensors", eps=1e-3)
    assert pairs(plan) == {"bn1": "conv1"}
    assert (tmp_path / "in.safetensors").read_bytes() == before
    with importlib.import_module("safetensors").safe_open(tmp_path / "out.safetensors", framework="np") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    wanted = cubn.fold_into(
        arrays["conv1.weight"], None, arrays["bn1.running_mean"], arrays["bn1.running_var"], arrays["bn1.weight"],
        arrays["bn1.bias"], eps=1e-3,
    )  # fmt: skip
    assert set(found) == {"conv1.weight", "conv1.bias", "fc.weight"}
    assert found["conv1.weight"].dtype == kind
    np.testing.assert_array_equal(found["conv1.weight"], wanted.weight)
    np.testing.assert_array_equal(found["conv1.bias"], wanted.bias)
    np.testing.assert_array_equal(found["fc.weight"], arrays["fc.weight"])


def test_arrays_that_numpy_does_not_know_pass_through(tmp_path):
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    header, data = {}, b""
    for name, values in {"head.weight": np.frombuffer(b"abcd", np.uint8), **network()}.items():
        kind = {"float32": "F32", "int64": "I64", "uint8": "F8_E4M3"}[values.dtype.name]
        ends = [len(data), len(data) + values.nbytes]
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": ends}
        data += values.tobytes()
    text = json.dumps(header).encode()
    (tmp_path / "in.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    fold_safetensors(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    found = dict(safetensors.deserialize((tmp_path / "out.safetensors").read_bytes()))
    assert bytes(found["head.weight"]["data"]) == b"abcd"
    assert found["head.weight"]["dtype"] == "F8_E4M3"


def test_a_folded_resnet_computes_the_same(tmp_path):
    """ResNet-18 in float64, to a thousand roundings of the largest output: PyTorch runs both."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    spec = importlib.util.spec_from_file_location("networks", ROOT / "benchmarks" / "networks.py")
    networks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(networks)
    torch.manual_seed(0)
    network = networks.resnet18(classes=10).double().eval()
    for name, tensor in network.state_dict().items():
        if "running" in name or "bn" in name:
            tensor.data = tensor.double().uniform_(0.5, 1.5) if tensor.dtype.is_floating_point else tensor
            network.state_dict()[name].copy_(tensor)
    file = tmp_path / "resnet.safetensors"
    importlib.import_module("safetensors.torch").save_file(network.state_dict(), file)
    plan = fold_safetensors(file, tmp_path / "folded.safetensors")
    assert len(plan.pairs) == 20
    assert not plan.left

    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        wanted = network(x)
    weights = importlib.import_module("safetensors.torch").load_file(tmp_path / "folded.safetensors")
    for pair in plan.pairs:
        layer = network.get_submodule(pair.layer)
        layer.bias = torch.nn.Parameter(torch.empty(layer.out_channels, dtype=torch.float64))
        above, _, name = pair.norm.rpartition(".")
        setattr(network.get_submodule(above), name, torch.nn.Identity())
    network.load_state_dict(weights)
    with torch.no_grad():
        found = network(x)
    assert (found - wanted).abs().max() <= 1000 * 2.0**-53 * wanted.abs().max()


# The command


def test_the_command_lists_and_writes_nothing(save, tmp_path, capsys):
    save(network(), tmp_path / "in.safetensors")
    assert main(["fold", str(tmp_path / "in.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "1 batch norm: 1 to fold, 0 left alone" in said
    assert "bn1 into conv1" in said
    assert "nothing written" in said
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]


def test_the_command_writes_with_output(save, tmp_path, capsys):
    save(network(), tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    assert main(["fold", str(tmp_path / "in.safetensors"), "--output", str(out), "--eps", "0.001"]) == 0
    assert "with eps=0.001" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"in.safetensors", "out.safetensors"}


def damaged(data, how):
    if how == "cut in the header":
        return data[:30]
    if how == "cut at the end":
        return data[:-5]
    if how == "empty":
        return b""
    if how == "another kind":
        return b"PK\x03\x04" + bytes(100)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["bn1.weight"]["shape"] = [9]  # "a wrong shape"
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.mark.parametrize("how", ["cut in the header", "cut at the end", "empty", "another kind", "a wrong shape"])
def test_a_damaged_file_is_one_sentence(save, tmp_path, capsys, how):
    path = tmp_path / "in.safetensors"
    save(network(), path)
    path.write_bytes(damaged(path.read_bytes(), how))
    assert main(["fold", str(path), "--output", str(tmp_path / "out.safetensors")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1
    assert "cannot be read as safetensors" in said.err
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_missing_file_is_one_sentence(tmp_path, capsys):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    assert main(["fold", str(tmp_path / "none.safetensors")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_a_variance_that_is_none_is_refused_and_nothing_written(save, tmp_path, capsys):
    arrays = network()
    arrays["bn1.running_var"][3] = -1.0
    save(arrays, tmp_path / "in.safetensors")
    assert main(["fold", str(tmp_path / "in.safetensors"), "--output", str(tmp_path / "out.safetensors")]) == 1
    assert "bn1 cannot be folded into conv1 (var has a negative entry" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_weights_that_would_overflow_are_refused(save, tmp_path, capsys):
    arrays = {
        name: values.astype("float16") if values.dtype == np.float32 else values for name, values in network().items()
    }
    arrays["bn1.running_var"][:] = 0
    arrays["bn1.weight"][:] = 6e4
    save(arrays, tmp_path / "in.safetensors")
    assert main(["fold", str(tmp_path / "in.safetensors"), "--output", str(tmp_path / "out.safetensors")]) == 1
    assert "is not finite in float16" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
