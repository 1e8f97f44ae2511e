"""Tables and plots from records, so that no number in the README is typed.

    python benchmarks/report.py --readme README.md                 the table between its markers
    python benchmarks/report.py --targets benchmarks/README.md     what was aimed at and what was found, likewise
    python benchmarks/report.py --plot benchmarks/results/cpu.svg
    python benchmarks/report.py                                    both tables on the terminal

Without --record the newest full record in benchmarks/results/ is taken.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from math import log2
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent

PASSES = ("forward", "backward", "inference")
TITLES = {
    "torch out": "PyTorch, preallocated", "torch new": "PyTorch", "onnxruntime out": "ONNX Runtime",
    "jax new": "JAX", "numpy new": "NumPy written out", "reference new": "cubn's reference",
}  # fmt: skip
COLORS = {
    "numpy new": "#999999", "jax new": "#CC79A7", "onnxruntime out": "#E69F00", "torch out": "#D55E00",
    "cubn out": "#0072B2",
}  # fmt: skip
FLOOR = {"forward": 2, "backward": 3, "inference": 2}
"""Transfers of x that a pass cannot do without; a copy has two."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="a record that run.py wrote")
    parser.add_argument("--readme", type=Path, help="file to put the table into, between its markers")
    parser.add_argument("--targets", type=Path, help="file to put the targets into, between its markers")
    parser.add_argument("--plot", type=Path, help="picture to write, .svg or .png")
    options = parser.parse_args()
    record = json.loads((options.record or newest()).read_text())
    if options.readme:
        insert(options.readme, "benchmarks", table(record))
    if options.targets:
        insert(options.targets, "targets", targets(record))
    if options.plot:
        plot(record, options.plot)
    if not (options.readme or options.targets or options.plot):
        print(table(record), targets(record), sep="\n\n")


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
            times = ratio(entries, name)
            cells.append("" if times is None else f"{times:.1f}x")
        lines.append("| " + " | ".join(cells) + " |")
    versions = record["versions"]
    named = ", ".join(
        f"{name} {versions[name]}" for name in ("numba", "torch", "onnxruntime", "jax") if name in versions
    )
    lines += [
        "",
        f"{record['processor']}, {record['threads']} threads, {named}. A cell says how many times as long as cubn "
        f"the others take, both writing into preallocated memory or both allocating; the sum over ResNet-50's 53 "
        f"layers. Made by `benchmarks/report.py` from a record in `benchmarks/results/`.",
    ]
    return "\n".join(lines)


def total(entries: list[dict[str, Any]], competitor: str) -> float | None:
    """Seconds for all of ResNet-50's layers, each as often as the network has it."""
    chosen = [e for e in entries if e["competitor"] == competitor and e["family"] == "A ResNet-50"]
    return sum(e["seconds"][1] * e["count"] for e in chosen) if chosen else None


def ratio(entries: list[dict[str, Any]], competitor: str) -> float | None:
    """How many times as long as cubn a competitor takes for ResNet-50's layers, those that it was measured on."""
    cases = {e["case"] for e in entries if e["competitor"] == competitor}
    both = [e for e in entries if e["case"] in cases]
    other, own = total(both, competitor), total(both, "cubn new" if competitor.endswith("new") else "cubn out")
    return None if other is None or own is None else other / own


def targets(record: dict[str, Any]) -> str:
    """What the CPU machine was meant to reach, what this record says, and where it is furthest from it."""
    lines = ["| aim | found | furthest from it | |", "| --- | --- | --- | --- |"]
    for aim, found, worst, holds in _targets(record["results"]):
        lines.append(f"| {aim} | {found} | {worst} | {'holds' if holds else '**missed**'} |")
    versions = record["versions"]
    lines += ["", f"{record['date']}, {record['processor']}, {record['threads']} threads, PyTorch {versions['torch']}."]
    return "\n".join(lines)


def _targets(entries: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, bool]]:
    def some(which: str, last: bool = False, dtype: str = "float32", **also: Any) -> list[dict[str, Any]]:
        wanted = {"pass": which, "channels_last": last, "dtype": dtype, **also}
        return [e for e in entries if all(e[key] == value for key, value in wanted.items())]

    def weighted(which: str, last: bool, name: str) -> float:
        return ratio(some(which, last), name) or 0.0

    def least(chosen: list[dict[str, Any]]) -> tuple[float, str]:
        worst = min(chosen, key=lambda e: e["over_cubn"][1])
        return worst["over_cubn"][1], f"{worst['over_cubn'][1]:.2f}x {worst['competitor']}, {worst['case']}"

    def peers(chosen: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
        return [e for e in chosen if e["competitor"] in names and e["family"] not in ("dtypes", "F small")]

    for last, by_torch, by_onnx in ((False, 3.0, 1.8), (True, 1.15, None)):
        order = "channels-last" if last else "contiguous"
        names = ["torch out"] + ([] if by_onnx is None else ["onnxruntime out"])
        for name, aim in zip(names, (by_torch, by_onnx), strict=False):
            found = weighted("forward", last, name)
            smallest, worst = least(peers(some("forward", last), name))
            yield f"forward, {order}, {aim}x {TITLES[name]}, ResNet-50", f"{found:.2f}x", worst, found >= aim
        rivals = peers(some("forward", last), "torch out", "torch new", "onnxruntime out", "onnxruntime new", "jax new")
        smallest, worst = least(rivals)
        yield f"forward, {order}, no peer faster on any case", f"{smallest:.2f}x", worst, smallest >= 1
    large = [e for e in some("forward", competitor="cubn out") if e["bytes"] >= 25e6]
    slowest = max(large, key=lambda e: e["over_copy"][1])
    value = slowest["over_copy"][1]
    yield "forward, from 25 MB, 1.3 copies at most", f"{value:.2f} copies", slowest["case"], value <= 1.3
    for which, aim in (("backward", 1.5), ("inference", 1.0)):
        for last in (False, True):
            for name in ("torch out", "torch new"):
                found = weighted(which, last, name)
                worst = least(peers(some(which, last), name))[1]
                order = "channels-last" if last else "contiguous"
                yield f"{which}, {order}, {aim}x {TITLES[name]}, ResNet-50", f"{found:.2f}x", worst, found >= aim
    for which in PASSES:
        chosen = [e for last in (False, True) for e in some(which, last) if e["family"][0] in "FG"]
        smallest, worst = least(peers(chosen, "torch out", "torch new"))
        yield f"{which}, dense and odd channels, PyTorch never faster", f"{smallest:.2f}x", worst, smallest >= 1
    small = {e["competitor"]: e["seconds"][1] * 1e6 for e in some("forward", family="F small")}
    yield (
        "forward of (32, 64), no longer than PyTorch and 20 us", f"{small['cubn new']:.0f} us",
        f"PyTorch {small['torch new']:.0f} us", small["cubn new"] <= min(20.0, small["torch new"]),
    )  # fmt: skip
    for dtype in ("float16", "bfloat16"):
        single = {e["case"]: e["seconds"][1] for e in some("forward", family="dtypes", competitor="cubn out")}
        found = {
            e["case"]: e["seconds"][1] / single[e["case"]]
            for e in some("forward", dtype=dtype, family="dtypes", competitor="cubn out")
        }
        worst = max(found, key=lambda case: found[case])
        yield (
            f"forward in {dtype}, 1.5x the time of float32 at most",
            f"{found[worst]:.2f}x",
            worst,
            found[worst] <= 1.5,
        )
    slowest = max(
        some("forward", dtype="float64", family="dtypes", competitor="cubn out"), key=lambda e: e["over_copy"][1]
    )
    value = slowest["over_copy"][1]
    yield "forward in float64, at the speed of a copy (1.3)", f"{value:.2f} copies", slowest["case"], value <= 1.3
    seconds: dict[str, dict[int, float]] = defaultdict(dict)
    for e in entries:
        if e["pass"] == "scaling":
            seconds[e["competitor"]][e["bytes"]] = e["seconds"][1]
    sizes = sorted(seconds["cubn, 1"])
    if sizes:
        at = min(sizes, key=lambda size: abs(size - 1e8))
        gain, copy = (seconds[f"{name}, 1"][at] / seconds[f"{name}, 2"][at] for name in ("cubn", "copy"))
        aim = min(1.7, copy)
        yield (
            f"two threads at {at / 1e6:.0f} MB, 1.7x one or as a copy",
            f"{gain:.2f}x",
            f"copy {copy:.2f}x",
            gain >= aim,
        )
        per_byte = {size: seconds["cubn, 2"][size] / size for size in sizes}
        steepest = max(b / a for a, b in zip(per_byte.values(), list(per_byte.values())[1:], strict=False))
        yield "time per byte, 1 MB to 1 GB, most it grows in a factor of four", f"{steepest:.2f}x", "", steepest <= 2
    smallest, worst = least([e for e in some("forward") if e["competitor"] == "numpy new" and e["family"] != "F small"])
    times = weighted("forward", False, "numpy new")
    yield "forward, 10x NumPy written out, ResNet-50", f"{times:.1f}x", worst, times >= 10


def insert(path: Path, mark: str, text: str) -> None:
    """Replace what is between the markers."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{path} has no place for the table; give it a line {begin} and a line {end}.")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def plot(record: dict[str, Any], path: Path) -> None:
    """Time over the floor against size, one line for each competitor, one panel for each pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), sharey=True, layout="constrained")
    for panel, which in zip(panels, PASSES, strict=True):
        for name, color in COLORS.items():
            points: dict[int, list[tuple[float, float]]] = defaultdict(list)  # by size in factors of two
            for entry in record["results"]:
                plain = entry["dtype"] == "float32" and not entry["channels_last"]
                if plain and entry["pass"] == which and entry["competitor"] == name:
                    over_floor = entry["over_copy"][1] * 2 / FLOOR[which]
                    points[round(log2(entry["bytes"]))].append((entry["bytes"] / 1e6, over_floor))
            if not points:
                continue
            everything = [point for group in points.values() for point in group]
            line = [[median(values) for values in zip(*points[size], strict=True)] for size in sorted(points)]
            title = "cubn" if name == "cubn out" else TITLES[name].removesuffix(", preallocated")
            panel.plot(*zip(*everything, strict=True), "o", color=color, markersize=2, alpha=0.5)
            width = 2.2 if name == "cubn out" else 1.2
            panel.plot(*zip(*line, strict=True), "-", color=color, linewidth=width, label=title)
        panel.axhline(1, color="black", linewidth=0.8, linestyle=":")
        panel.grid(True, which="major", color="0.9")
        panel.set_axisbelow(True)
        panel.set(xscale="log", yscale="log", title=which, xlabel="x in MB")
    panels[0].set_ylabel("time over that of moving the data once")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], fontsize="small", loc="outside lower center", ncols=len(labels), frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
