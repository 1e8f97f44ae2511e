"""Ranks as a grid: all-gathers along its sides, one after the other, merged in between."""

from collections.abc import Sequence
from math import prod

from cubn.namespace import Array, library_of
from cubn.sync.protocol import Sync, on_host


def grid(stages: Sequence[Sync]) -> "Grid":
    """One communicator out of those along the sides of a grid of ranks.

    P ranks that gather all at once receive P - 1 payloads each.  Laid out in R rows of C and gathering first along
    the row, then, what the row has merged, along the column, they receive R + C - 2: for 1,024 ranks in 32 rows
    62 instead of 1,023.  Merging pairs of pairs of pairs, sides of 2, receives log2 P payloads in log2 P rounds.
    Every rank does the same merges in the same order, so that all ranks hold the same bits in every grid.

    Parameters
    ----------
    stages : sequence of Sync
        The communicators of this rank's lines, that of its neighbours first: the GPUs of one machine, then the
        machines.  A rank has the number ``stages[0].rank + stages[0].size * (stages[1].rank + ...)``.

    Returns
    -------
    Grid
        A `Sync`.

    Raises
    ------
    ValueError
        If there are no stages.

    Examples
    --------
    >>> from concurrent.futures import ThreadPoolExecutor
    >>> import numpy as np, cubn
    >>> x = np.arange(12.0).reshape(12, 1)
    >>> ranks = cubn.sync.threads(6, shape=(3, 2))       # makes the grids: rows of three, two of them
    >>> with ThreadPoolExecutor(6) as pool:
    ...     parts = list(pool.map(lambda s, c: cubn.batch_norm(s, sync=c)[0], np.split(x, 6), ranks))
    >>> np.allclose(np.concatenate(parts), cubn.batch_norm(x)[0])
    True
    """
    return Grid(stages)


class Grid:
    """Communicators along the sides of a grid; see `grid`."""

    def __init__(self, stages: Sequence[Sync]) -> None:
        self.stages = tuple(stages)
        if not self.stages:
            raise ValueError("stages is empty, but a grid has one side at least; pass a communicator for each side.")
        self.size = prod(stage.size for stage in self.stages)
        self.rank = 0
        for stage in reversed(self.stages):
            self.rank = self.rank * stage.size + stage.rank

    def all_gather(self, payload: Array) -> Sequence[Array]:
        """The payloads of all ranks in rank order: nothing is merged, so every stage passes on all it has."""
        parts = [payload]
        for stage in self.stages:
            library = library_of(parts[0])
            front = [float(len(parts)), *(float(part.shape[0]) for part in parts)]
            rows = stage.all_gather(library.xp.concat([library.asarray(front, parts[0].dtype), *parts]))
            parts = [part for row in rows for part in _unpacked(row)]
        return parts

    def __repr__(self) -> str:
        sides = " x ".join(str(stage.size) for stage in self.stages)
        return f"<rank {self.rank} of {self.size} in a grid of {sides}>"


def _unpacked(row: Array) -> list[Array]:
    count = int(on_host(row[:1])[0])
    lengths = [int(length) for length in on_host(row[1 : 1 + count])]
    parts, start = [], 1 + count
    for length in lengths:
        parts.append(row[start : start + length])
        start += length
    return parts
