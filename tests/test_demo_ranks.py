"""The demo on several ranks: the training of one process, digit for digit but for rounding."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from test_ranks import launcher, missing
from test_sync import results

import cubn
from cubn import __main__ as command_line
from cubn.demo import parallel, training
from cubn.demo.network import Network
from cubn.demo.training import History, share, train

SETTINGS = {"with_bn": True, "rate": 1.0, "steps": 25, "batch": 20, "seed": 3, "test_every": 5, "dtype": "float64"}


@pytest.fixture
def sklearn():
    return pytest.importorskip("sklearn", reason="the digits come with scikit-learn, which is not installed")


def assert_one_process(together, alone):
    """25 steps of float64: rounding begins at 1e-16 and has grown by less than a million."""
    assert together.steps.tolist() == alone.steps.tolist()
    assert together.accuracy.tolist() == alone.accuracy.tolist()
    np.testing.assert_allclose(together.loss, alone.loss, atol=1e-10)
    np.testing.assert_allclose(together.percentiles, alone.percentiles, atol=1e-9)


@pytest.mark.parametrize("size", [1, 3])
def test_the_training_of_several_ranks_is_that_of_one_process(sklearn, size):
    alone = train(**SETTINGS)
    for together in results(lambda _, sync: train(**SETTINGS, sync=sync), size, timeout=60):
        assert_one_process(together, alone)


def test_ranks_with_statistics_of_their_own_are_seen(sklearn, monkeypatch):
    """The teeth: gradients added up, but every rank normalises by itself."""

    def by_itself(*arguments, sync, **options):
        return Network(*arguments, **options)

    alone = train(**SETTINGS)
    monkeypatch.setattr(training, "Network", by_itself)
    together, *_ = results(lambda _, sync: train(**SETTINGS, sync=sync), 3, timeout=60)
    assert parallel.difference(alone, together) > 100 * parallel.AGREEMENT


def test_without_batch_normalisation_only_gradients_are_exchanged(sklearn):
    settings = {**SETTINGS, "with_bn": False}
    alone = train(**settings)
    for together in results(lambda _, sync: train(**settings, sync=sync), 2, timeout=60):
        assert_one_process(together, alone)


def test_a_batch_is_shared_out_without_a_rest():
    batch = np.arange(20)
    ranks = cubn.sync.threads(7)
    shares = [share(batch, sync) for sync in ranks]
    assert np.concatenate(shares).tolist() == batch.tolist()
    assert {len(one) for one in shares} == {2, 3}


def history(loss, accuracy, steps=(0, 10, 20)):
    nothing = np.zeros((len(loss), 3, 32))
    return History(True, 1.0, np.array(steps[: len(loss)]), np.array(loss), np.array(accuracy), nothing, False)


def test_the_difference_of_two_curves():
    one = history([np.nan, 0.5, 0.25], [0.1, 0.5, 0.9])
    assert parallel.difference(one, one) == 0
    assert parallel.difference(one, replace(one, loss=np.array([np.nan, 0.5, 0.5]))) == 0.25
    assert parallel.difference(one, replace(one, accuracy=np.array([0.1, 0.5, 0.8]))) == np.inf
    assert parallel.difference(one, history([np.nan, 0.5], [0.1, 0.5])) == np.inf
    assert "0.50000000" in parallel.table(one, one, 2)


def test_the_demo_trains_on_two_processes_and_shows_that_it_is_the_same(sklearn):
    if missing("mpi"):
        pytest.skip(missing("mpi"))
    command = [sys.executable, "-m", "cubn", "demo", "--ranks", "2", "--steps", "30", "--batch", "21"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr
    assert "2 ranks of MPI, 30 steps of 21 digits (11 + 10), rate 1, seed 0, float64" in run.stdout
    assert "The curve of 2 ranks is that of one process" in run.stdout
    assert len([line for line in run.stdout.splitlines() if line.strip()[:2].isdigit()]) >= 3


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        command_line.main(["demo", *arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err.rstrip().splitlines()[-1]


def test_ranks_that_cannot_be_are_refused(sklearn, capsys, monkeypatch):
    assert "--ranks is 30, but a batch has 20 images" in refusal(capsys, "--ranks", "30", "--batch", "20")
    assert "ranks" in refusal(capsys, "--ranks", "0")
    monkeypatch.setattr(parallel, "find_spec", lambda name: None)
    monkeypatch.setattr(parallel.shutil, "which", lambda name: None)
    monkeypatch.setattr(parallel.sys, "executable", "/nowhere/python")
    for name in parallel.STARTED:
        monkeypatch.delenv(name, raising=False)
    said = refusal(capsys, "--ranks", "2")
    assert "--ranks needs mpi4py and mpiexec, which are not there" in said
    assert "pip install 'cubn[sync]' mpich" in said


def test_another_number_of_ranks_than_mpi_has_started_is_refused(sklearn):
    if missing("mpi"):
        pytest.skip(missing("mpi"))
    command = [launcher(), "-n", "1", sys.executable, "-m", "cubn", "demo", "--ranks", "2"]
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert run.returncode != 0
    assert "--ranks is 2, but MPI has started 1" in run.stderr
