"""Measure cubn.torch against PyTorch: the batch-norm layers of ResNets, and whole training steps.

    python benchmarks/torch_layers.py                       all of it, about five minutes
    python benchmarks/torch_layers.py --only "resnet18 layers contiguous"

Layers: forward and backward of `torch.nn.BatchNorm2d` and `cubn.torch.BatchNorm2d` on every shape of the network, in
turns; the sum over the network's layers is of medians.  Steps: forward, loss, backward and optimiser of the network as
it is and converted, in turns.  Results are compared before the clock starts.  The record is added to, one entry per
measurement, so that it can be made in pieces.
"""

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NETWORKS, MEMORIES = ("resnet18", "resnet50"), ("contiguous", "channels_last")
LAYERS_BATCH, STEP_BATCH, EDGE = 32, 16, 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of both (default 2)")
    parser.add_argument("--only", default="", help="measurements whose name has this in it")
    parser.add_argument("--seconds", type=float, default=1.5, help="for the turns of one layer (default 1.5)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "torch-layers.json", help="the record")
    options = parser.parse_args()
    for variable in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(options.threads)  # read when the libraries are imported, so not before here
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    import torch

    torch.set_num_threads(options.threads)
    measures: dict[str, Callable[[], dict[str, Any]]] = {}
    for network in NETWORKS:
        for memory in MEMORIES:
            measures[f"{network} layers {memory}"] = lambda n=network, m=memory: layers(n, m, options.seconds)
            measures[f"{network} step {memory}"] = lambda n=network, m=memory: step(n, m)
    for name, measure in measures.items():
        if options.only in name:
            entry = measure()
            add(options.output, name, entry, options.threads)
            print(f"{name}: {entry['torch']:.4g} s, cubn {entry['cubn']:.4g} s, {entry['ratio']:.2f}x", flush=True)


def layers(name: str, memory: str, seconds: float) -> dict[str, Any]:
    """Forward and backward of all batch norms of a network, one shape after the other."""
    import networks
    import torch
    from run import quartiles, rounded, take_turns

    import cubn.torch

    shapes = networks.batch_norm_shapes(getattr(networks, name)(), (LAYERS_BATCH, 3, EDGE, EDGE))
    order = getattr(torch, f"{memory}_format" if memory == "contiguous" else memory)
    entries, totals = [], {"torch": 0.0, "cubn": 0.0}
    for shape, count in shapes.items():
        torch.manual_seed(0)
        x = torch.randn(shape).to(memory_format=order).requires_grad_()
        dy = torch.randn(shape).to(memory_format=order)
        functions, found = {}, {}
        for library, kind in (("torch", torch.nn.BatchNorm2d), ("cubn", cubn.torch.BatchNorm2d)):
            layer = kind(shape[1])

            def both(layer: Any = layer, x: Any = x, dy: Any = dy) -> Any:
                return torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), dy)

            functions[library], found[library] = both, both()
        for own, theirs in zip(found["cubn"], found["torch"], strict=True):
            torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
        times = take_turns(functions, seconds)
        found.clear()
        entry = {"shape": shape, "count": count}
        for library, own in times.items():
            entry[library] = rounded(quartiles(own))
            totals[library] += count * entry[library][1]
        entry["ratio"] = rounded(quartiles([a / b for a, b in zip(times["torch"], times["cubn"], strict=True)]))
        entries.append(entry)
        print(f"  {name} {memory} {shape}: {entry['ratio'][1]:.2f}x", flush=True)
    return {
        "batch": LAYERS_BATCH, "edge": EDGE, **{key: rounded([value])[0] for key, value in totals.items()},
        "ratio": rounded([totals["torch"] / totals["cubn"]])[0], "layers": entries,
    }  # fmt: skip


def step(name: str, memory: str) -> dict[str, Any]:
    """A training step of a network, as it is and converted."""
    import networks
    import torch
    from run import quartiles, rounded

    import cubn.torch

    torch.manual_seed(0)
    order = getattr(torch, f"{memory}_format" if memory == "contiguous" else memory)
    plain = getattr(networks, name)().to(memory_format=order)
    converted = copy.deepcopy(plain)
    cubn.torch.convert(converted)
    x = torch.randn(STEP_BATCH, 3, EDGE, EDGE).to(memory_format=order)
    labels = torch.randint(1000, (STEP_BATCH,))

    def step_of(network: Any) -> Callable[[], float]:
        optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

        def run() -> float:
            loss = torch.nn.functional.cross_entropy(network(x), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            return loss.item()

        return run

    functions = {"torch": step_of(plain), "cubn": step_of(converted)}
    losses = [function() for function in functions.values()]
    if abs(losses[0] - losses[1]) > 1e-3 * abs(losses[0]):
        raise AssertionError(f"{name}: the losses are {losses}")
    times: dict[str, list[float]] = {library: [] for library in functions}
    for _ in range(5 if name == "resnet18" else 3):
        for library, function in functions.items():
            begin = time.perf_counter()
            function()
            times[library].append(time.perf_counter() - begin)
    middle = {library: rounded(quartiles(own)) for library, own in times.items()}
    return {
        "batch": STEP_BATCH, "edge": EDGE, "torch": middle["torch"][1], "cubn": middle["cubn"][1],
        "ratio": rounded(quartiles([a / b for a, b in zip(times["torch"], times["cubn"], strict=True)]))[1],
        "quartiles": middle,
    }  # fmt: skip


def add(path: Path, name: str, entry: dict[str, Any], threads: int) -> None:
    """Put one measurement into the record, in the place of an older one."""
    from run import commit, processor, versions

    record = json.loads(path.read_text()) if path.exists() else {"results": {}}
    record |= {"processor": processor(), "cores": os.cpu_count(), "versions": versions()}
    made = datetime.now(timezone.utc).isoformat(timespec="minutes")
    record["results"][name] = {"made": made, "commit": commit(), "threads": threads, **entry}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
