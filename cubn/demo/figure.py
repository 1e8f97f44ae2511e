"""The figure of the demo: accuracy against steps at every rate, and what enters one sigmoid."""

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np

from cubn.demo.training import PERCENTILES, History

WITHOUT, WITH = "#D55E00", "#0072B2"
"""Vermillion and blue of Okabe & Ito, which every eye tells apart."""

INK, FAINT = "#333333", "#BBBBBB"
STYLE = {
    "font.family": ["DejaVu Sans"],  # comes with Matplotlib
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
PANELS_PER_ROW = 5
WIDTH, PANEL_HEIGHT, SIGMOID_HEIGHT = 11.0, 2.75, 3.1  # inches, with titles


def draw(histories: Sequence[History], *, target: float = 0.95) -> Any:
    """Draw runs with and without batch normalisation.

    Above, test accuracy against steps, a panel for each rate, so that what is compared stands together.
    Below, as in Figure 1 of the paper, the 15th, 50th and 85th percentile of what enters one sigmoid of the
    last hidden layer, at the rate at which the network without batch normalisation ends best.

    Parameters
    ----------
    histories : sequence of History
        One with and one without batch normalisation for every rate.
    target : float
        Accuracy whose first reaching is marked with a dot.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ModuleNotFoundError
        If Matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    runs = {(history.with_bn, history.rate): history for history in histories}
    rates = sorted({history.rate for history in histories})
    shown, unit = typical_sigmoid(histories)
    rows = ceil(len(rates) / PANELS_PER_ROW)
    columns = ceil(len(rates) / rows)
    with matplotlib.rc_context(STYLE):
        figure: Any = Figure(figsize=(WIDTH, PANEL_HEIGHT * rows + SIGMOID_HEIGHT), dpi=150, layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[PANEL_HEIGHT * rows, SIGMOID_HEIGHT])

        _heading(above, "Test accuracy", f"a dot and the number of steps where it first reaches {target:.0%}")
        panels = list(above.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
        for panel, rate in zip(panels, rates, strict=False):
            _draw_accuracy(panel, [runs[False, rate], runs[True, rate]], target)
            panel.set_title(f"rate {rate:g}")
        for panel in panels[len(rates) :]:
            panel.set_axis_off()
        panels[0].set(ylim=(0, 1.12), yticks=[0, 0.25, 0.5, 0.75, 1.0])
        panels[0].yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")

        why = ", at which the network without ends best" if len(rates) > 1 else ""
        _heading(below, "What enters a typical sigmoid", f"last hidden layer, rate {shown:g}{why}")
        panels = below.subplots(1, 2, sharex=True, sharey=True)
        for panel, with_bn in zip(panels, (False, True), strict=True):
            _draw_percentiles(panel, runs[with_bn, shown], unit)
        for panel, with_bn in zip(panels, (False, True), strict=True):  # now that their common scale is known
            _label_percentiles(panel, runs[with_bn, shown], unit)
    return figure


def typical_sigmoid(histories: Sequence[History]) -> tuple[float, int]:
    """The rate and the unit of the last hidden layer that the figure shows, chosen by a rule and not by looks.

    Of the networks without batch normalisation, the one that ends best; of its units, the one whose median
    travels neither far nor little over the training: the middle one of all.
    """
    plain = sorted((history for history in histories if not history.with_bn), key=lambda history: history.rate)
    best = max(plain, key=lambda history: history.final_accuracy)
    medians = np.nan_to_num(best.percentiles[1:, 1])  # nothing has entered at step 0
    travelled = medians.max(axis=0) - medians.min(axis=0)
    return best.rate, int(travelled.argsort()[len(travelled) // 2])


def _heading(figure: Any, what: str, detail: str) -> None:
    """A line above the panels: what they show, the two colours by name, and a remark."""
    from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea

    pieces = [
        (what, {"weight": "bold"}),
        ("with", {"weight": "bold", "color": WITH}),
        ("and", {"weight": "bold"}),
        ("without", {"weight": "bold", "color": WITHOUT}),
        ("batch normalisation", {"weight": "bold"}),
        (f"({detail})", {}),
    ]
    words: list[Any] = [TextArea(text, textprops={"size": 10.5, "color": INK} | look) for text, look in pieces]
    line = HPacker(children=words, pad=0, sep=4)
    figure.suptitle(" ", fontsize=17)  # keeps the room
    figure.add_artist(
        AnchoredOffsetbox(
            "upper left", child=line, frameon=False, bbox_to_anchor=(0, 1), bbox_transform=figure.transSubfigure
        )
    )


def _draw_accuracy(panel: Any, histories: Sequence[History], target: float) -> None:
    panel.axhline(target, color=FAINT, linewidth=0.8)
    for history in histories:
        color = WITH if history.with_bn else WITHOUT
        panel.plot(history.steps, history.accuracy, color=color)
        first = history.steps_to(target)
        if first is not None:
            reached = history.accuracy[history.steps.searchsorted(first)]
            panel.plot(first, reached, "o", color=color, markersize=6, markeredgecolor="white", zorder=3)
            panel.annotate(
                f"{first}",
                (first, reached),
                xytext=(0, 6) if history.with_bn else (3, -7),
                textcoords="offset points",
                color=color,
                weight="bold",
                ha="center" if history.with_bn else "left",
                va="bottom" if history.with_bn else "top",
            )
    panel.set_xlabel("steps")
    panel.tick_params(labelbottom=True)
    panel.set_xmargin(0.02)


def _draw_percentiles(panel: Any, history: History, unit: int) -> None:
    color = WITH if history.with_bn else WITHOUT
    lines = _of_unit(history, unit)
    panel.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    panel.fill_between(history.steps, lines[0], lines[-1], color=color, alpha=0.12, linewidth=0)
    panel.plot(history.steps, lines.T, color=color)
    panel.set_title("with" if history.with_bn else "without", color=color, weight="bold")
    panel.set_xlabel("steps")
    panel.set_xlim(0, history.steps[-1])


def _label_percentiles(panel: Any, history: History, unit: int) -> None:
    """Name the lines at their right ends, no closer to each other than they can be read."""
    low, middle, high = _of_unit(history, unit)[:, -1]
    if not np.isfinite([low, middle, high]).all():
        return
    bottom, top = panel.get_ylim()
    gap = 0.07 * (top - bottom)
    heights = (min(low, middle - gap), middle, max(high, middle + gap))
    for percent, height in zip(PERCENTILES, heights, strict=True):
        panel.annotate(
            f"{percent}th percentile",
            (history.steps[-1], height),
            xytext=(5, 0),
            textcoords="offset points",
            color=WITH if history.with_bn else WITHOUT,
            va="center",
            annotation_clip=False,
        )


def _of_unit(history: History, unit: int) -> Any:
    """The three percentiles of one unit, (3, T), with gaps where a run that diverged has no finite one."""
    lines = history.percentiles[:, :, unit].T
    return np.where(np.isfinite(lines), lines, np.nan)
