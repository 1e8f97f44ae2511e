"""`pytest -p driver.plugin` with tests/ on PYTHONPATH: the tests for a GPU over the stand-in, at sizes for the CPU.

Of test_gpu.py the tests that are about CuPy run; only their sizes change, and where their random numbers come from:
cuRAND is not there.
"""

from typing import Any

import numpy as np
import pytest

from driver import computed, under_cupy

cupy = computed.cupy
MOST_SAMPLES, MOST_LENGTH, MOST_ROWS = 3, 12, 40

OF_CUPY = {
    "test_a_captured_graph_replays_on_new_data",
    "test_a_capture_without_a_warm_up_is_refused_in_words",
    "test_after_warmup_a_capture_needs_no_call_before_it",
    "test_streams_do_not_disturb_one_another",
    "test_threads_compile_and_launch_at_once",
    "test_every_device_computes_its_own_arrays",
    "test_a_layer_trains_as_float64_does",
}
"""Tests of test_gpu.py that are about CuPy as much as about a device; the others are left to a GPU."""


class Generator:
    """Of the host's numbers."""

    def __init__(self, seed: int) -> None:
        self._host = np.random.default_rng(seed)

    def standard_normal(self, size: Any, dtype: str = "float64") -> Any:
        return cupy.asarray(self._host.standard_normal(size).astype(dtype))


def cut(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As many channels, and so few numbers in each that the executor can take them."""
    samples, channels, *lengths = shape
    most = MOST_SAMPLES if lengths else MOST_ROWS
    return (min(samples, most), channels, *(min(length, MOST_LENGTH) for length in lengths))


def pytest_configure() -> None:
    under_cupy.limits(MultiProcessorCount=4, MaxThreadsPerBlock=128)
    cupy.cuda.set_allocator(None)  # an allocation for every array, whose bounds are watched
    cupy.random.default_rng = Generator


def pytest_report_header() -> str:
    return f"CuPy {cupy.__version__} over a stand-in for the driver; kernels are executed on the CPU"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [
        item
        for item in items
        if isinstance(item, pytest.Function) and item.module.__name__ == "test_gpu" and item.originalname not in OF_CUPY
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        if module.__name__ == "test_gpu":
            module.randoms = _cutting(module.randoms)


def _cutting(randoms: Any) -> Any:
    def cut_randoms(cp: Any, shape: tuple[int, ...], dtype: Any, seed: int = 0) -> Any:
        return randoms(cp, cut(shape), dtype, seed)

    return cut_randoms
