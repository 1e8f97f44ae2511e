"""Which axes are averaged, how many samples that makes, and what gets how many numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import prod
from typing import Any

from cubn.errors import ShapeError
from cubn.layout import normalise_axes
from cubn.namespace import is_array


@dataclass(frozen=True)
class Explanation:
    """What batch normalisation does to an array of one shape.  Prints as text; in a notebook, as a table.

    Attributes
    ----------
    shape : tuple of int
        Of x.
    channel_axes, averaged_axes : tuple of int
        The axes that keep their own statistics, and all others.
    channels : int
        C, the number of channels: the product of the sizes of the kept axes.
    samples_per_channel : int
        M, the number of values behind each mean and variance.
    parameter_shape : tuple of int
        Shape of gamma, beta, mean and var.
    learned, tracked : int
        Numbers in gamma and beta, and in the running mean and variance.

    Examples
    --------
    >>> import cubn
    >>> per_map, per_activation = cubn.explain((8, 3, 4)), cubn.explain((8, 3, 4), channel_axis=(1, 2))
    >>> per_map.samples_per_channel, per_activation.samples_per_channel
    (32, 8)
    >>> per_map.numpy
    'mean = x.mean(axis=(0, 2), keepdims=True); var = x.var(axis=(0, 2), keepdims=True)'
    """

    shape: tuple[int, ...]
    channel_axes: tuple[int, ...]

    @property
    def averaged_axes(self) -> tuple[int, ...]:
        """The axes that are averaged over."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.channel_axes)

    @property
    def channels(self) -> int:
        """C: the product of the sizes of the kept axes."""
        return prod(self.parameter_shape)

    @property
    def samples_per_channel(self) -> int:
        """M: how many values are behind each mean and variance."""
        return prod(self.shape[axis] for axis in self.averaged_axes)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of gamma, beta, mean and var."""
        return tuple(self.shape[axis] for axis in self.channel_axes)

    @property
    def learned(self) -> int:
        """Numbers in gamma and beta."""
        return 2 * self.channels

    @property
    def tracked(self) -> int:
        """Numbers in the running mean and variance."""
        return 2 * self.channels

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self._rows())
        lines = [f"Batch normalisation of x {self.shape}, channel_axis={_axes(self.channel_axes)}", ""]
        lines += [f"  {label:<{width}}  {text}" for label, text in self._rows()]
        lines += ["", f"  NumPy:  {self.numpy}"]
        if self._choices():
            lines += ["", "  The candidates for this shape:"]
            table = [("", "channel_axis", "averaged over", "M", "gamma, beta", "what it means")]
            for axes, meaning in self._choices():
                other = Explanation(self.shape, axes)
                table.append((
                    "->" if axes == self.channel_axes else "", _axes(axes), str(other.averaged_axes),
                    str(other.samples_per_channel), str(other.parameter_shape), meaning,
                ))  # fmt: skip
            widths = [max(len(row[column]) for row in table) for column in range(6)]
            lines += [
                "  " + "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()
                for row in table
            ]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        left = "style='text-align:left'"
        rows = "".join(f"<tr><th {left}>{escape(a)}</th><td {left}>{escape(b)}</td></tr>" for a, b in self._rows())
        html = (
            f"<div><strong>Batch normalisation of x {self.shape}, "
            f"channel_axis={_axes(self.channel_axes)}</strong><table><tbody>{rows}</tbody></table>"
            f"<p><code>{escape(self.numpy)}</code></p>"
        )
        if self._choices():
            head = "".join(
                f"<th {left}>{title}</th>"
                for title in ("channel_axis", "averaged over", "M", "gamma, beta", "what it means")
            )
            body = ""
            for axes, meaning in self._choices():
                other = Explanation(self.shape, axes)
                cells = (
                    _axes(axes), other.averaged_axes, other.samples_per_channel, other.parameter_shape, meaning
                )  # fmt: skip
                mark = "strong" if axes == self.channel_axes else "span"
                body += "<tr>" + "".join(f"<td {left}><{mark}>{c}</{mark}></td>" for c in cells) + "</tr>"
            html += (
                f"<p>The candidates for this shape, the chosen one in bold:</p>"
                f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            )
        return html + "</div>"

    @property
    def numpy(self) -> str:
        """The statistics, written out in NumPy."""
        return (
            f"mean = x.mean(axis={self.averaged_axes}, keepdims=True); "
            f"var = x.var(axis={self.averaged_axes}, keepdims=True)"
        )

    def _rows(self) -> list[tuple[str, str]]:
        samples = _product([self.shape[axis] for axis in self.averaged_axes])
        training = "" if self.samples_per_channel > 1 else "  (training needs two at least)"
        return [
            ("averaged over", f"axes {self.averaged_axes} of sizes {tuple(self.shape[a] for a in self.averaged_axes)}"),
            ("kept", f"axes {self.channel_axes}: each index has its own mean, variance, gamma and beta"),
            ("samples M", f"{samples} behind each mean and variance{training}"),
            ("channels C", _product(self.parameter_shape)),
            ("shapes", f"gamma, beta, mean, var: {self.parameter_shape}"),
            (
                "numbers",
                f"4 * {self.channels} = {self.learned + self.tracked}: {self.learned} learned (gamma, beta), "
                f"{self.tracked} tracked (running mean, running variance)",
            ),
        ]

    def _choices(self) -> list[tuple[tuple[int, ...], str]]:
        """What people consider for feature maps (N, C, *S), or (N, *S, C) where the last axis is kept."""
        rank = len(self.shape)
        if rank < 3:
            return []
        last = self.channel_axes == (rank - 1,)
        spatial = tuple(range(1, rank - 1)) if last else tuple(range(2, rank))
        feature = rank - 1 if last else 1
        return [
            (spatial, "per location: one mean for all channels at a place"),
            (tuple(range(1, rank)), "per activation: as for a dense layer"),
            ((feature,), "per feature map: the paper's choice for convolutions"),
        ]


def explain(x_or_shape: Any, *, channel_axis: int | Sequence[int] = 1) -> Explanation:
    """Explain which axes of an array are averaged, and why a layer has as many numbers as it has.

    Parameters
    ----------
    x_or_shape : array, or tuple of int
        What is to be normalised, or just its shape.
    channel_axis : int or tuple of int
        The axis, or axes, that keep their own statistics.

    Returns
    -------
    Explanation
        Prints as text, and shows as a table in a notebook.

    Raises
    ------
    ShapeError
        If the shape is none, or an axis is out of range or repeated.

    Examples
    --------
    >>> import cubn
    >>> e = cubn.explain((32, 30, 28, 28))
    >>> e.averaged_axes, e.samples_per_channel, e.parameter_shape, e.learned + e.tracked
    ((0, 2, 3), 25088, (30,), 120)
    """
    if is_array(x_or_shape):
        shape = tuple(x_or_shape.shape)
    elif isinstance(x_or_shape, Sequence) and all(
        hasattr(size, "__index__") and not isinstance(size, bool) and size >= 0 for size in x_or_shape
    ):
        shape = tuple(int(size) for size in x_or_shape)
    else:
        raise ShapeError(
            f"x_or_shape is {x_or_shape!r}, but it is an array or the shape of one; pass such as (32, 64, 28, 28)."
        )
    return Explanation(shape, normalise_axes(channel_axis, shape))


def _axes(axes: tuple[int, ...]) -> str:
    return str(axes[0]) if len(axes) == 1 else str(axes)


def _product(sizes: Sequence[int]) -> str:
    """The product, and what it is made of if that is more than itself."""
    factors = " * ".join(map(str, sizes))
    return f"{factors} = {prod(sizes)}" if len(sizes) > 1 else str(prod(sizes))
