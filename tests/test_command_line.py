"""`python -m cubn`: what it prints, what it writes, and what it says to arguments that cannot work."""

import argparse
import subprocess
import sys
import types
from importlib import metadata

import numpy as np
import pytest

import cubn
from cubn import __main__ as command_line
from cubn.demo import command, figure
from cubn.demo.training import History

QUICK = ["--steps", "20", "--rates", "0.3"]


@pytest.fixture
def libraries():
    for name, what in (("sklearn", "the digits"), ("tqdm", "the progress bar"), ("matplotlib", "the figure")):
        pytest.importorskip(name, reason=f"{what} of the demo: {name} is not installed")


@pytest.fixture
def no_training(monkeypatch):
    def train(**options):
        raise AssertionError("training began before everything was checked")

    monkeypatch.setattr(command, "train", train)


def refusal(capsys, *arguments):
    """The last line that the command line says before it exits with status 2."""
    with pytest.raises(SystemExit) as stop:
        command_line.main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.err.rstrip().splitlines()[-1]


# The commands


def test_no_subcommand_prints_the_help(capsys):
    assert command_line.main([]) == 0
    said = capsys.readouterr().out
    assert "usage: python -m cubn" in said
    for name in command_line.COMMANDS:
        assert name in said


def test_an_unknown_subcommand_is_refused_with_the_known_ones(capsys):
    message = refusal(capsys, "dmeo")
    assert "'dmeo'" in message
    assert "demo" in message
    assert "info" in message


def test_a_subcommand_is_one_row_of_the_table(capsys, monkeypatch):
    def add_options(parser):
        parser.add_argument("number", type=int)

    row = command_line.Command("double a number", add_options, lambda options: 2 * options.number)
    monkeypatch.setitem(command_line.COMMANDS, "double", row)
    assert command_line.main(["double", "21"]) == 42
    command_line.main([])
    assert "double a number" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["info", "--help"]])
def test_help_exits_with_0(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        command_line.main(arguments)
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "usage: python -m cubn" in said
    if arguments[0] == "demo":
        assert "examples:" in said
        for option in ("--rates", "--steps", "--batch", "--seed", "--device", "--out", "--no-figure"):
            assert option in said


def test_ctrl_c_ends_it_without_a_traceback(capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    row = command_line.Command("wait", lambda parser: None, interrupted)
    monkeypatch.setitem(command_line.COMMANDS, "wait", row)
    assert command_line.main(["wait"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_command_line_loads_no_heavy_module_before_it_needs_one():
    heavy = ["matplotlib", "sklearn", "tqdm", "numba", "cupy"]
    code = f"import sys, cubn.__main__, cubn.demo; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


# info


def test_info_runs_as_a_module_and_names_versions_and_machines():
    run = subprocess.run([sys.executable, "-m", "cubn", "info"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"NumPy {np.__version__}" in run.stdout
    assert f"cubn {command_line.version()}" in run.stdout
    states = dict(line.split(maxsplit=1) for line in run.stdout.splitlines() if line)
    assert states["reference"].endswith("ready")
    assert {"reference", "cpu", "cuda"} <= set(states)


def test_info_says_that_a_machine_is_not_part_of_this_version(capsys, monkeypatch):
    monkeypatch.setattr(command_line, "MACHINES", {"reference": "cubn.machines.reference"})
    assert command_line.main(["info"]) == 0
    said = capsys.readouterr().out
    assert "the CUDA kernels are not part of this version; CuPy arrays go through the reference" in said
    assert "not part of this version; NumPy arrays go through the reference" in said


def test_info_says_why_a_machine_is_not_ready(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cubn.machines.missing", None)
    machines = {"cpu": "cubn.machines.missing", "cuda": "cubn.machines.reference"}
    monkeypatch.setattr(command_line, "MACHINES", machines)
    monkeypatch.setattr(command_line, "why_no_cuda", lambda: "CuPy 99 finds no CUDA device")
    assert command_line.main(["info"]) == 0
    said = capsys.readouterr().out
    assert "not ready: CuPy 99 finds no CUDA device" in said
    assert "pip install 'cubn[cpu]'" in said
    assert "are not part of this version" not in said


def test_info_counts_the_threads_of_the_cpu_machine(capsys, monkeypatch):
    numba = types.SimpleNamespace(__version__="9.9", get_num_threads=lambda: 3)
    monkeypatch.setitem(sys.modules, "numba", numba)
    monkeypatch.setattr(command_line, "MACHINES", {"cpu": "cubn.machines.reference"})
    command_line.main(["info"])
    assert "ready, 3 threads (Numba 9.9)" in capsys.readouterr().out


@pytest.fixture
def two_devices(monkeypatch):
    """A CuPy that sees two devices, and a machine that computes on them."""
    runtime = types.SimpleNamespace(
        getDeviceCount=lambda: 2,
        getDeviceProperties=lambda device: {"name": f"GPU {device}".encode()},
        driverGetVersion=lambda: 13010,
        runtimeGetVersion=lambda: 12090,
    )
    cupy = types.SimpleNamespace(__version__="14.0", cuda=types.SimpleNamespace(runtime=runtime))
    machine = types.SimpleNamespace(prove=lambda device: PROVED[device])
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "a_cuda_machine", machine)
    monkeypatch.setattr(command_line, "MACHINES", {"cuda": "a_cuda_machine"})
    return machine


class Limits(types.SimpleNamespace):
    def __str__(self):
        return self.name


PROVED = (
    Limits(name="GPU 0", shared_most=232448, cache_bytes=50 << 20, largest_cluster=8, cooperative=True),
    Limits(name="GPU 1", shared_most=65536, cache_bytes=4 << 20, largest_cluster=1, cooperative=False),
)


def test_info_names_the_devices_that_cupy_sees_and_what_came_out_right_on_them(capsys, two_devices):
    command_line.main(["info"])
    said = capsys.readouterr().out
    assert "CuPy: 14.0, GPU 0, GPU 1 (driver for CUDA 13.1, runtime of CUDA 12.9)" in said
    assert (
        "a small batch came out right on GPU 0, 227 KB of shared memory a block, 50 MB of second-level cache, "
        "clusters of 8, cooperative launches; GPU 1, 64 KB of shared memory a block, 4 MB of second-level cache, "
        "no clusters, no cooperative launches"
    ) in said


def test_info_does_not_call_a_device_ready_that_fails(capsys, two_devices):
    def refuse(device):
        raise RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU")

    two_devices.prove = refuse
    command_line.main(["info"])
    said = capsys.readouterr().out
    assert "not ready: CUDA_ERROR_NO_BINARY_FOR_GPU" in said
    assert "came out right" not in said


def test_the_version_is_known_without_an_installation(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(command_line.metadata, "version", missing)
    assert command_line.version() == cubn.__version__


# demo


def test_the_demo_prints_a_table_and_saves_a_figure(libraries, capsys, tmp_path):
    folder = tmp_path / "new" / "folder"
    assert command_line.main(["demo", *QUICK, "--rates", "1", "0.3", "1", "--out", str(folder)]) == 0
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines() if line.rstrip().endswith(" %")] == ["0.3", "1"]
    assert "95 % after" in said.out
    assert "4 sigmoid networks, 20 steps of 60 digits each, seed 0, numpy" in said.out
    assert str(folder / "digits.png") in said.out
    assert "rate 0.3 with batch norm" in said.err  # the progress bar

    from matplotlib import colors, image

    pixels = image.imread(folder / "digits.png")[:, :, :3]
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000
    for color in (figure.WITH, figure.WITHOUT):
        assert (np.abs(pixels - colors.to_rgb(color)).max(axis=2) < 0.01).sum() > 500


def test_the_demo_draws_no_figure_when_told_so(libraries, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert command_line.main(["demo", *QUICK, "--no-figure"]) == 0
    assert "95 % after" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "library", "advice"),
    [
        ("sklearn.datasets", "scikit-learn", "pip install 'cubn[demo]'."),
        ("tqdm", "tqdm", "pip install 'cubn[demo]'."),
        ("matplotlib.figure", "Matplotlib", "pip install 'cubn[demo]', or pass --no-figure."),
    ],
)
def test_a_missing_library_is_named_with_the_way_to_get_it(
    libraries, capsys, tmp_path, monkeypatch, no_training, module, library, advice
):
    monkeypatch.setitem(sys.modules, module, None)
    message = refusal(capsys, "demo", "--out", str(tmp_path / "figures"))
    assert f"{library} cannot be imported" in message
    assert message.endswith(advice)
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "0"], "a rate is '0', but it scales the gradient; pass finite numbers above 0"),
        (["--rates", "0.1", "-1"], "a rate is '-1', but"),
        (["--rates", "nan"], "a rate is 'nan', but"),
        (["--rates", "inf"], "a rate is 'inf', but"),
        (["--rates", "0.1,0.3"], "a rate is '0.1,0.3', but .* such as 0.1 1"),
        (["--rates"], "--rates: expected at least one argument"),
        (["--steps", "0"], "steps is '0', which is no whole number from 1; pass one, such as 600"),
        (["--steps", "1.5"], "steps is '1.5', which is no whole number"),
        (["--batch", "1"], "batch is '1', which is no whole number from 2 to 1437; pass one, such as 60"),
        (["--batch", "1438"], "batch is '1438', which is no whole number from 2 to 1437"),
        (["--seed", "-1"], "seed is '-1', which is no whole number from 0"),
        (["--seed", "x"], "seed is 'x', which is no whole number from 0"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_any_training(
    capsys, tmp_path, monkeypatch, no_training, arguments, message
):
    import re

    monkeypatch.chdir(tmp_path)
    assert re.search(message, refusal(capsys, "demo", *arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_device_is_refused_with_the_reason(capsys, tmp_path, monkeypatch, no_training):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "cupy", None)
    message = refusal(capsys, "demo", "--device", "cuda")
    assert "CuPy is not installed" in message
    assert 'pass "cpu"' in message
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(libraries, capsys, tmp_path, monkeypatch, no_training):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "taken" / "digits.png").mkdir(parents=True)
    for folder in ("file", "file/below", "taken"):
        message = refusal(capsys, "demo", "--out", str(tmp_path / folder))
        assert f"--out is {tmp_path / folder}, but no figure can be written there" in message
        assert "pass a folder that you may write to" in message
    assert (tmp_path / "file").read_text() == "in the way"

    def denied(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(command.tempfile, "TemporaryFile", denied)  # for root, every folder can be written
    assert "(Permission denied)" in refusal(capsys, "demo", "--out", str(tmp_path))


def runs(with_bn_ends_at, *, diverged=False):
    steps, nothing = np.array([0, 10]), np.zeros((2, 3, 32))
    return [
        History(with_bn, 1.0, steps, steps / 100, np.array([0.1, final]), nothing, diverged and not with_bn)
        for with_bn, final in ((False, 0.5), (True, with_bn_ends_at))
    ]


@pytest.mark.parametrize(
    ("accuracy", "options", "status"),
    [
        (0.96, ["--seed", "3"], 1),  # the promise holds for every seed
        (0.97, [], 0),
        (0.96, ["--steps", "20"], 0),  # and for these rates, steps and batch only
        (0.96, ["--rates", "1"], 0),
        (0.96, ["--batch", "10"], 0),
    ],
)
def test_the_demo_fails_if_batch_normalisation_does_not_reach_97_percent(
    libraries, capsys, monkeypatch, accuracy, options, status
):
    monkeypatch.setattr(command, "_train_all", lambda rates, options: runs(accuracy))
    assert command_line.main(["demo", "--no-figure", *options]) == status
    said = capsys.readouterr().err
    assert ("ended at 96.0%, but 97%" in said) == (status == 1)


def test_the_table_says_never_and_diverged():
    lines = command.table(runs(0.96, diverged=True)).splitlines()
    assert lines[-1].split() == ["1", "–", "diverged", "10", "steps", "96.0", "%"]
    assert len(set(map(len, lines[1:]))) == 1  # the columns line up


def test_the_conclusion_counts_the_rates():
    said = command.conclusion(runs(0.96))
    assert "Without batch normalisation the network reaches 95 % at 0 of 1 rates, and ends at 50.0 % at best." in said
    assert "With batch normalisation the network reaches 95 % at 1 of 1 rates, soonest after 10 steps (rate 1)" in said


def test_equal_options_give_equal_tables(libraries, capsys):
    options = argparse.Namespace(steps=10, batch=30, seed=2, device="cpu")
    tables = [command.table(command._train_all([0.3], options)) for _ in range(2)]
    capsys.readouterr()
    assert tables[0] == tables[1]


def test_plan_shows_the_kernels_of_a_tensor_without_a_gpu(capsys):
    assert command_line.main(["plan", "32,256,56,56", "--dtype", "float16"]) == 0
    text = capsys.readouterr().out
    assert "(32, 256, 3136)" in text
    assert "plane map" in text
    assert "3 S = 154.1 MB" in text  # 32 * 256 * 56 * 56 * 2 bytes, three times
    assert text.count("<<<") == 2
    assert "forward: 1 launch, 2 S = 102.8 MB; the floor is 2 S = 102.8 MB" in text
    assert "in registers" in text
    assert "rather than two kernels: 3 S" in text
    assert "not yet measured" in text
    assert command_line.main(["plan", "8192,512", "--device", "a100", "--relu", "--residual", "--where"]) == 0
    text = capsys.readouterr().out
    assert "column map" in text
    assert "meet at a counter" in text
    assert "S / 16: a bit for each element" in text
    assert "a byte of the mask" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["3,a"], "is no shape"), (["3,0"], "sizes of 1 and above"), (["3,4", "--channel-axis", "5"], "axes are 0 to 1")],
)
def test_plan_refuses_what_has_no_plan(capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["plan", *arguments])
    assert words in capsys.readouterr().err + str(stopped.value)
    assert stopped.value.code != 0
