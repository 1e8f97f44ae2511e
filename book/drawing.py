"""The look of the book's figures: vector drawings whose ink and colours follow the page, light or dark.

    fig, ax = canvas(6.4, 3.0)
    ax.plot(x, y, color=BLUE)
    show(fig, "What the figure says, for those who do not see it.")

In the SVG each of the colours below becomes a CSS variable, with a fallback that can be read on light and dark
ground alike.  The five hues can be told apart with every kind of colour blindness (after Okabe & Ito).
"""

import io
import re
import zlib
from html import escape

import matplotlib
import matplotlib.patches
import numpy as np
from matplotlib.figure import Figure

INK, MUTED, FAINT, PAPER = "#15181c", "#62676f", "#dde0e5", "#fefefe"
BLUE, ORANGE, GREEN, PINK, YELLOW = "#0072b2", "#c65300", "#007a5c", "#a8447c", "#8f6b00"

VARIABLES = {
    INK: "currentColor",
    MUTED: "var(--bn-muted, #7d828c)",
    FAINT: "var(--bn-faint, #9aa0aa)",
    PAPER: "var(--bn-paper, transparent)",
    BLUE: "var(--bn-blue, #2f86c6)",
    ORANGE: "var(--bn-orange, #d9741a)",
    GREEN: "var(--bn-green, #15997a)",
    PINK: "var(--bn-pink, #c76a9d)",
    YELLOW: "var(--bn-yellow, #b8942a)",
}

STYLE = {
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.edgecolor": MUTED,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.prop_cycle": matplotlib.cycler(color=[BLUE, ORANGE, GREEN, PINK, YELLOW]),
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.axisbelow": True,
    "grid.color": FAINT, "grid.linewidth": 0.7, "lines.linewidth": 1.9, "lines.solid_capstyle": "round",
    "font.size": 10, "axes.titlesize": 10.5, "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "axes.titlelocation": "left", "legend.frameon": False, "legend.fontsize": 9.5, "legend.labelcolor": INK,
    "mathtext.fontset": "cm", "svg.fonttype": "path", "hatch.color": MUTED, "patch.linewidth": 0.8,
}  # fmt: skip
matplotlib.rcParams.update(STYLE)


def canvas(width=6.6, height=3.0, rows=1, columns=1, **options):
    """A figure, in inches, and its axes (an array of them if there are several)."""
    figure = Figure(figsize=(width, height), layout=options.pop("layout", "constrained"))
    return figure, figure.subplots(rows, columns, **options)


def bare(ax, *, equal=True):
    """Axes without axes: for diagrams."""
    ax.set_axis_off()
    if equal:
        ax.set_aspect("equal")
    return ax


class Picture:
    """SVG for pages and notebooks, PNG where SVG is not trusted, its meaning as text where neither is."""

    def __init__(self, figure, meaning):
        self.figure, self.meaning = figure, " ".join(meaning.split())

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"image/svg+xml": self._svg(), "image/png": self._png(), "text/plain": self.meaning}

    def _svg(self):
        text = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": self.meaning}):  # equal figures give equal files
            self.figure.savefig(
                text,
                format="svg",
                transparent=True,
                bbox_inches="tight",
                pad_inches=0.04,
                metadata={"Date": None, "Creator": None},
            )
        svg = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
        for colour, variable in VARIABLES.items():
            svg = svg.replace(colour, variable)
        key = f"p{zlib.crc32(self.meaning.encode()):x}-"  # no id twice on a page of many figures
        svg = re.sub(r'\bid="([^"]+)"', rf'id="{key}\1"', svg)
        svg = re.sub(r'href="#([^"]+)"', rf'href="#{key}\1"', svg)
        svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}\1)", svg)
        return svg.replace("<svg ", f'<svg style="color: #7d828c" role="img" aria-label="{escape(self.meaning)}" ', 1)

    def _png(self):
        png = io.BytesIO()
        self.figure.savefig(png, format="png", dpi=110, facecolor="white", bbox_inches="tight")
        return png.getvalue()


def show(figure, meaning):
    """Display a figure with its text alternative."""
    from IPython.display import display

    display(Picture(figure, meaning))


def tone(share, lightest=0.08):
    """Opacity for a share between 0 and 1, so that a hue shades on any ground."""
    return lightest + (1 - lightest) * float(np.clip(share, 0, 1))


def host(x):
    """The array on the host, wherever it lives."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


def maps(ax, shape, chosen, colour=BLUE, *, marked=None, labels=True, flat=False):
    """Feature maps (N, C, H, W) as stacks of tilted sheets, one stack for each sample; `chosen` cells in colour.

    `marked` is the index of one cell that gets an outline.
    """
    batch, channels, height, width = shape
    lean, squash, rise, gap = (0, 1, height * 1.25, 1.0) if flat else (0.42, 0.74, height * 0.98, 1.1)
    pitch = width + lean * height + gap

    def corners(n, c, h, w, tall=1, wide=1):
        def place(row, column):
            up = height - row
            return n * pitch + column + lean * up, (channels - 1 - c) * rise + squash * up

        return [place(h, w), place(h, w + wide), place(h + tall, w + wide), place(h + tall, w)]

    for n in range(batch):
        for c in reversed(range(channels)):
            sheet = matplotlib.patches.Polygon(corners(n, c, 0, 0, height, width), fc=PAPER, ec=MUTED, lw=1.0)
            ax.add_patch(sheet)
            for h in range(height):
                for w in range(width):
                    inside = bool(chosen[n, c, h, w])
                    ax.add_patch(
                        matplotlib.patches.Polygon(
                            corners(n, c, h, w), fc=colour if inside else FAINT, ec=PAPER, lw=0.7,
                            alpha=0.95 if inside else 0.55,
                        )
                    )  # fmt: skip
    if marked is not None:
        ax.add_patch(matplotlib.patches.Polygon(corners(*marked), fc="none", ec=INK, lw=1.8, zorder=5))
    if labels:
        for n in range(batch):
            ax.text(n * pitch + width / 2, -0.6, f"n = {n}", ha="center", va="top", fontsize=9)
        for c in range(channels):
            ax.text(-0.5, (channels - 1 - c) * rise + 0.5, f"c = {c}", ha="right", va="center", fontsize=9)
    ax.set_xlim(-2.6 if labels else -0.3, batch * pitch - gap + 0.3)
    ax.set_ylim(-2.0 if labels else -0.3, (channels - 1) * rise + squash * height + 0.4)
    return bare(ax)


def pixels(ax, image, *, limit, colours="RdBu_r", outline=True):
    """A small image on a scale from -limit to limit, one square a pixel."""
    ax.imshow(host(image), cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(outline)
        spine.set_color(MUTED)
    return ax
