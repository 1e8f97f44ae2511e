"""Small calls of every kind on a GPU, for compute-sanitizer: `compute-sanitizer --tool memcheck python gpu_calls.py`.

Every array has an allocation of its own, so that an access beside it is seen; CuPy's pool would hide it.
"""

import itertools
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import cupy as cp  # noqa: E402

import cubn  # noqa: E402

SHAPES = ((2, 3, 40, 40), (9, 5, 7, 7), (70, 24), (33, 8, 4, 4), (2, 2, 96, 101), (5, 3, 3))


def main() -> None:
    cp.cuda.set_allocator(None)
    for shape, dtype, last in itertools.product(SHAPES, ("float16", "float32"), (False, True)):
        x, dy, z = (cp.random.default_rng(i).standard_normal(shape, dtype="float32").astype(dtype) for i in range(3))
        if last:
            x, dy, z = (cp.moveaxis(cp.ascontiguousarray(cp.moveaxis(a, 1, -1)), -1, 1) for a in (x, dy, z))
        gamma, beta = cp.ones(shape[1], "float32"), cp.zeros(shape[1], "float32")
        for options in ({}, {"activation": "relu"}, {"activation": "relu", "residual": z}, {"where": z > -1}):
            y, saved = cubn.batch_norm(x, gamma, beta, **options)
            grads = cubn.batch_norm_backward(dy, saved)
            assert bool(cp.isfinite(y).all())
            assert bool(cp.isfinite(grads.dx).all())
        cubn.batch_norm_inference(x, beta, gamma, gamma, beta)
    print("calls done")


if __name__ == "__main__":
    main()
