"""Tables and plots from records, so that no number in the README is typed.

    python benchmarks/report.py --readme README.md      the table between its markers
    python benchmarks/report.py --plot benchmarks/results/cpu.svg
    python benchmarks/report.py                         the table on the terminal

Without --record the newest full record in benchmarks/results/ is taken.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"

PASSES = ("forward", "backward", "inference")
TITLES = {
    "torch out": "PyTorch, preallocated", "torch new": "PyTorch", "onnxruntime out": "ONNX Runtime",
    "jax new": "JAX", "numpy new": "NumPy written out", "reference new": "cubn's reference",
}  # fmt: skip
FLOOR = {"forward": 2, "backward": 3, "inference": 2}
"""Transfers of x that a pass cannot do without; a copy has two."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="a record that run.py wrote")
    parser.add_argument("--readme", type=Path, help="file to put the table into, between its markers")
    parser.add_argument("--plot", type=Path, help="picture to write, .svg or .png")
    options = parser.parse_args()
    record = json.loads((options.record or newest()).read_text())
    if options.readme:
        insert(options.readme, table(record))
    if options.plot:
        plot(record, options.plot)
    if not (options.readme or options.plot):
        print(table(record))


def newest() -> Path:
    """The last full record."""
    found = sorted((HERE / "results").glob("cpu-full-*.json"))
    if not found:
        raise SystemExit("there is no full record yet; make one with: python benchmarks/run.py --full")
    return found[-1]


def table(record: dict[str, Any]) -> str:
    """How many times as long as cubn others take: ResNet-50's layers summed, and the least of all cases."""
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = defaultdict(list)
    for entry in record["results"]:
        if entry["pass"] in PASSES and entry["dtype"] == "float32":
            groups[entry["pass"], entry["channels_last"]].append(entry)
    names = [name for name in TITLES if any(e["competitor"] == name for group in groups.values() for e in group)]
    lines = [
        "| ResNet-50, batch 32, float32 | cubn | over a copy | " + " | ".join(TITLES[name] for name in names) + " |",
        "| --- " * (len(names) + 3) + "|",
    ]
    for (which, last), entries in sorted(groups.items(), key=lambda item: (item[0][1], PASSES.index(item[0][0]))):
        own, floor = total(entries, "cubn out"), total(entries, "copy")
        if own is None or floor is None:
            continue
        cells = [f"{'training ' * (which == 'forward')}{which}{', channels-last' * last}"]
        cells += [f"{own * 1e3:.1f} ms", f"{own / floor:.2f}x"]
        for name in names:
            other, same = total(entries, name), total(entries, "cubn new" if name.endswith("new") else "cubn out")
            cells.append("" if other is None or same is None else f"{other / same:.1f}x")
        lines.append("| " + " | ".join(cells) + " |")
    versions = record["versions"]
    named = ", ".join(
        f"{name} {versions[name]}" for name in ("numba", "torch", "onnxruntime", "jax") if name in versions
    )
    lines += [
        "",
        f"{record['processor']}, {record['threads']} threads, {named}. A cell says how many times as long as cubn "
        f"the others take, both writing into preallocated memory or both allocating; the sum over ResNet-50's 53 "
        f"layers. Made from `benchmarks/results/` by `make bench`.",
    ]
    return "\n".join(lines)


def total(entries: list[dict[str, Any]], competitor: str) -> float | None:
    """Seconds for all of ResNet-50's layers, each as often as the network has it."""
    chosen = [e for e in entries if e["competitor"] == competitor and e["family"] == "A ResNet-50"]
    return sum(e["seconds"][1] * e["count"] for e in chosen) if chosen else None


def insert(path: Path, text: str) -> None:
    """Replace what is between the markers."""
    before, found, rest = path.read_text().partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise SystemExit(f"{path} has no place for the table; give it a line {BEGIN} and a line {END}.")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def plot(record: dict[str, Any], path: Path) -> None:
    """Time over the floor against size, one line for each competitor, one panel for each pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = ("cubn out", "torch out", "onnxruntime out", "jax new", "numpy new")
    figure, panels = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    for panel, which in zip(panels, PASSES, strict=True):
        for name in names:
            points = sorted(
                (entry["bytes"] / 1e6, entry["over_copy"][1] * 2 / FLOOR[which])
                for entry in record["results"]
                if entry["pass"] == which and entry["competitor"] == name
                and entry["dtype"] == "float32" and not entry["channels_last"]
            )  # fmt: skip
            if points:
                title = "cubn" if name == "cubn out" else TITLES[name]
                panel.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, label=title)
        panel.axhline(1, color="black", linewidth=0.8, linestyle=":")
        panel.set(xscale="log", yscale="log", title=which, xlabel="x in MB")
    panels[0].set_ylabel("time over that of moving the data once")
    panels[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
