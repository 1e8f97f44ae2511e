"""Hard cases for the numbers: cubn and whatever else is installed, against float64.

    python benchmarks/hard_cases.py            print the table
    python benchmarks/hard_cases.py --record   also write benchmarks/results/hard-cases.json
    python benchmarks/hard_cases.py --readme   also put the recorded table into README.md, between its markers

Every case is float32, shape (64, 2, 8, 8), training mode, eps 1e-5, no scale and shift.  The number shown is the
largest error of y against float64 arithmetic on the same float32 input; what is wrong by more than 1 % is no
rounding any more.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras asks for TensorFlow if nobody chooses

RESULTS = Path(__file__).parent / "results" / "hard-cases.json"
README = Path(__file__).parents[1] / "README.md"
MARKS = "<!-- hard cases -->", "<!-- /hard cases -->"
SHAPE = (64, 2, 8, 8)


def cases() -> dict[str, np.ndarray]:
    """Name -> x."""
    normal = np.random.default_rng(0).normal(size=SHAPE)
    return {
        "mean 0, std 1": normal.astype("float32"),
        "mean 1e4, std 1": (1e4 + normal).astype("float32"),
        "mean 1e6, std 1": (1e6 + normal).astype("float32"),
        "constant 1.23e8": np.full(SHAPE, 1.23e8, "float32"),
        "size 1e30": (1e30 * normal).astype("float32"),
    }


def exact(x: np.ndarray) -> np.ndarray:
    """Algorithm 1 in float64, distances first."""
    wide = x.astype("float64")
    distance = wide - wide.mean((0, 2, 3), keepdims=True)
    if np.ptp(x) == 0:
        distance = np.zeros_like(wide)
    return distance / np.sqrt((distance**2).mean((0, 2, 3), keepdims=True) + 1e-5)


def with_cubn(x: np.ndarray) -> np.ndarray:
    import cubn

    return cubn.batch_norm(x)[0]


def with_pytorch(x: np.ndarray) -> np.ndarray:
    import torch

    return torch.nn.functional.batch_norm(torch.from_numpy(x), None, None, training=True, eps=1e-5).numpy()


def with_keras(x: np.ndarray) -> np.ndarray:
    import keras

    layer = keras.layers.BatchNormalization(axis=1, epsilon=1e-5, center=False, scale=False)
    return np.asarray(keras.ops.convert_to_numpy(layer(x, training=True)))


def with_flax(x: np.ndarray) -> np.ndarray:
    import jax
    from flax import linen

    layer = linen.BatchNorm(use_running_average=False, axis=1, epsilon=1e-5, use_bias=False, use_scale=False)
    variables = layer.init(jax.random.PRNGKey(0), x)
    y, _ = layer.apply(variables, x, mutable=["batch_stats"])
    return np.asarray(y)


LIBRARIES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "cubn": ("cubn", with_cubn),
    "PyTorch": ("torch", with_pytorch),
    "Keras": ("keras", with_keras),
    "Flax": ("flax", with_flax),
}


def measure() -> dict[str, Any]:
    """One record: versions, and the largest error per library and case; None where the library is not installed."""
    import cubn

    record: dict[str, Any] = {
        "about": "largest error of y against float64, float32 input, CPU",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "versions": {},
        "errors": {},
    }
    for name, (package, run) in LIBRARIES.items():
        try:
            version = cubn.__version__ if package == "cubn" else importlib.metadata.version(package)
            if package == "keras":
                import keras

                version = f"{version} on {keras.backend.backend()}"
        except ImportError:
            continue
        record["versions"][name] = version
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            record["errors"][name] = {
                case: float(np.abs(run(x).astype("float64") - exact(x)).max()) for case, x in cases().items()
            }
    return record


def table(record: dict[str, Any]) -> str:
    """The record as a table in Markdown."""
    names = list(record["errors"])
    lines = [
        "| float32 input | " + " | ".join(f"{name} {record['versions'][name]}" for name in names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for case in cases():
        cells = []
        for name in names:
            error = record["errors"][name][case]
            text = "NaN" if error != error else "0" if error == 0 else f"{error:.1e}"
            cells.append(f"**{text}**" if not error <= 0.01 else text)
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def put_into_readme(text: str) -> None:
    """Replace what is between the markers."""
    before, rest = README.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    README.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the record")
    parser.add_argument("--readme", action="store_true", help="put the recorded table into README.md")
    arguments = parser.parse_args()
    recorded = arguments.readme and not arguments.record
    record = json.loads(RESULTS.read_text()) if recorded else measure()
    if arguments.record:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.readme:
        put_into_readme(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
