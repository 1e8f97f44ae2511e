"""Compiling ahead: what is called for which device.  tests/test_cpu_machine.py sees the CPU's kernels compiled."""

import sys

import numpy as np
import pytest

import cubn
from cubn.namespace import why_no_cuda

module = sys.modules["cubn.warmup"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dtypes": "int32"}, cubn.DTypeError, "dtypes has 'int32'"),
        ({"device": "tpu"}, ValueError, "device is 'tpu'"),
        ({"device": "cuda"}, ValueError, "shapes is empty"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_words(options, error, words):
    with pytest.raises(error, match=words):
        cubn.warmup(**options)


@pytest.mark.skipif(why_no_cuda() is None, reason="there is a CUDA device here")
def test_without_a_device_the_error_says_what_is_missing():
    with pytest.raises(cubn.DeviceError, match="CuPy"):
        cubn.warmup(device="cuda", shapes=[(4, 3, 5)])


def test_every_call_of_a_training_step_and_of_inference_is_made_for_every_shape_and_dtype(monkeypatch):
    made = []

    def recording(function):
        def call(x, *rest, **options):
            made.append((function.__name__, x.shape, x.dtype.name, options.get("residual") is not None))
            return function(x, *rest, **options)

        return call

    for name in ("batch_norm", "batch_norm_backward", "batch_norm_inference"):
        monkeypatch.setattr(module, name, recording(getattr(cubn, name)))
    monkeypatch.setattr(module, "namespace", {"cuda": np}.__getitem__)
    shapes = [(4, 6, 5, 3), (8, 3)]
    with cubn.dispatch.use_machine("reference"):
        cubn.warmup(
            ["float16", "float64"], device="cuda", shapes=shapes, channel_axis=-1, activation="relu", residual=True
        )
    assert {call[1:3] for call in made} == {(shape, dtype) for shape in shapes for dtype in ("float16", "float64")}
    assert {call[0] for call in made} == {"batch_norm", "batch_norm_backward", "batch_norm_inference"}
    assert all(has == (name != "batch_norm_backward") for name, _, _, has in made)
