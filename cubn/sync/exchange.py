"""One all-gather for a forward pass and one for a backward pass: what is sent, what is agreed upon, what is merged.

A *frame* is what one rank sends: a header that says which call it is in, and the numbers.  A rank that cannot
take part sends a *failure* in its place.  Ranks raise what the frames say and nothing else, so that all of them
raise the same error or none does.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from cubn.errors import DeviceError, DTypeError, ShapeError, SyncError
from cubn.machines import GradientSums
from cubn.moments import Moments
from cubn.namespace import NOTHING, Array, Library, integer_dtype, is_static_count, library_of, widest_float
from cubn.problem import Call
from cubn.sync.protocol import Sync, on_host

PASSES = ("batch_norm", "batch_norm_backward")
DTYPES = ("float16", "bfloat16", "float32", "float64")
ERRORS: tuple[type[Exception], ...] = (SyncError, ShapeError, DTypeError, DeviceError, ValueError, TypeError)
"""What all ranks raise as it is; anything else that happens on one rank is a `SyncError` on the others."""

FAILED = -1.0
HEADER = 8
LOW = 1 << 20
"""A count travels as count // LOW and count % LOW, exact to 2**44 even where the library has nothing wider
than float32."""


@dataclass(frozen=True)
class Frame:
    """What one rank says, or several that have merged what they said; `rank` is the first of them.

    `count` is None where counts differ from channel to channel; then they are the first third of `body`.
    """

    call: str
    rank: int
    channels: int
    dtype: str
    eps: float
    count: int | None
    body: Array


@dataclass(frozen=True)
class Failure:
    """Why a rank cannot take part."""

    rank: int
    error: type[Exception]
    text: str


Said: TypeAlias = Frame | Failure


def together(sync: Sync | None) -> AbstractContextManager[None]:
    """Tell the other ranks if the block raises: they are waiting in an all-gather."""
    return NOTHING if sync is None else _announcing(sync)


@contextmanager
def _announcing(sync: Sync) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _announce(sync, error)
        raise


def gather_moments(sync: Sync, call: Call, own: Moments) -> Moments:
    """The moments of all ranks together: equal bits on every rank."""
    xp, wide = call.library.xp, widest_float(call.library)
    with call.library.here():
        capturing = _capturing(call.library)
        parts = [_in_user_order(call, xp.astype(part, wide)) for part in (own.wide_mean, own.wide_m2)]
        count = own.count if is_static_count(own.count) else None
        if count is None:
            parts.insert(0, _in_user_order(call, xp.astype(own.count, wide)))
        elif capturing:  # the other ranks' counts cannot be read, so they stay where they are
            parts.insert(0, xp.full_like(parts[0], float(count)))
            count = None
        frame = _frame(call, PASSES[0], sync.rank, count, xp.concat(parts))
        found = _exchange(sync, frame, call.library, _merge_moments, capturing)
        if found.count == 0:
            return Moments(0, own.wide_mean, own.wide_m2, own.dtype)
        counts, *wide_parts = _parts(_moments(found, integer_dtype(xp)))
        mean, m2 = (_in_canonical_order(call, part) for part in wide_parts)
        count = found.count if found.count is not None else _in_canonical_order(call, counts)
        return Moments(count, mean, m2, own.dtype)


def gather_sums(sync: Sync, call: Call, own: GradientSums) -> GradientSums:
    """The gradient sums of all ranks, added in rank order: equal bits on every rank."""
    xp, wide = call.library.xp, widest_float(call.library)
    with call.library.here():
        body = xp.concat([_in_user_order(call, xp.astype(sums, wide)) for sums in own])
        frame = _frame(call, PASSES[1], sync.rank, 0, body)
        total = _exchange(sync, frame, call.library, _add_sums, _capturing(call.library)).body
        halves = xp.reshape(xp.astype(total, own.dy.dtype), (2, call.problem.channels))
        return GradientSums(*(_in_canonical_order(call, halves[half, :]) for half in range(2)))


# The exchange


def _exchange(
    sync: Sync,
    said: Said,
    library: Library,
    merge: Callable[[Sequence[Frame], Library], Frame],
    capturing: bool = False,
) -> Frame:
    """What all ranks say together; raises where that is a failure."""
    stages: Sequence[Sync] = getattr(sync, "stages", (sync,))
    for side, stage in enumerate(stages):
        try:
            if capturing:
                assert isinstance(said, Frame)
                found: list[Said] = [replace(said, body=row) for row in _gather_blindly(stage, said.body)]
            else:
                found = [_decode(row, library) for row in stage.all_gather(_encode(said, library))]
            said = _agreed(found, merge, library)
        except SyncError as error:  # has lost a rank of this stage; those of the next shall hear of it
            where = "" if len(stages) == 1 else f"on side {side} of the grid around rank {sync.rank}, "
            if isinstance(said, Frame):
                said = Failure(sync.rank, SyncError, f"{where}{error}")
    if isinstance(said, Failure):
        raise said.error(said.text)
    return said


def _announce(sync: Sync, error: Exception) -> None:
    kind = type(error) if type(error) in ERRORS else SyncError
    text = str(error) if kind is not SyncError else f"it met a {type(error).__name__} ({error}) and is out of step"
    try:
        _exchange(sync, Failure(sync.rank, kind, f"rank {sync.rank}: {text}"), library_of(np.zeros(0)), _add_sums)
    except Exception:  # what this rank has met itself says more than what it hears back
        return


def _agreed(found: Sequence[Said], merge: Callable[[Sequence[Frame], Library], Frame], library: Library) -> Said:
    """The frames merged, or the first failure, or the first disagreement as one."""
    frames = []
    for said in found:
        if isinstance(said, Failure):
            return said
        frames.append(said)
    first = frames[0]
    for frame in frames[1:]:
        for name in ("call", "channels", "dtype", "eps"):
            mine, theirs = getattr(first, name), getattr(frame, name)
            if mine != theirs:
                return Failure(frame.rank, SyncError, _disagreement(name, frame, first))
    return merge(frames, library)


def _disagreement(name: str, frame: Frame, first: Frame) -> str:
    if name == "call":
        return (
            f"rank {frame.rank} is in {frame.call} while rank {first.rank} is in {first.call}, but they compute one "
            f"batch together; call the same layers in the same order on all ranks."
        )
    mine, theirs = (
        f"{value:g}" if name == "eps" else str(value) for value in (getattr(first, name), getattr(frame, name))
    )
    return (
        f"rank {frame.rank} has another {name} than rank {first.rank} ({theirs} against {mine}), but they normalise "
        f"one batch together; call {first.call} with the same {name} on all ranks."
    )  # fmt: skip


# Frames as numbers


def _frame(call: Call, name: str, rank: int, count: int | None, body: Array) -> Frame:
    problem = call.problem
    return Frame(name, rank, problem.channels, problem.dtype, problem.eps, count, body)


def _encode(said: Said, library: Library) -> Array:
    """One-dimensional, in the widest float of the library."""
    wide = widest_float(library)
    if isinstance(said, Failure):
        body = library.asarray(list(map(float, said.text.encode())), wide)
        header = [FAILED, said.rank, ERRORS.index(said.error), 0, 0, 0, 0, 0]
    else:
        body, count = said.body, said.count
        header = [
            PASSES.index(said.call), said.rank, said.channels, DTYPES.index(said.dtype), said.eps, count is None,
            0 if count is None else count // LOW, 0 if count is None else count % LOW,
        ]  # fmt: skip
    return library.xp.concat([library.asarray(list(map(float, header)), wide), body])


def _decode(row: Array, library: Library) -> Said:
    header = on_host(row[:HEADER])
    rank = int(header[1])
    if header[0] == FAILED:
        text = bytes(int(byte) for byte in on_host(row[HEADER:])).decode()
        return Failure(rank, ERRORS[int(header[2])], text)
    body, wide = row[HEADER:], widest_float(library)
    if library_of(body) != library:
        body = library.asarray(on_host(body), wide)
    elif body.dtype != wide:
        body = library.xp.astype(body, wide)
    count = None if header[5] else int(header[6]) * LOW + int(header[7])
    return Frame(PASSES[int(header[0])], rank, int(header[2]), DTYPES[int(header[3])], float(header[4]), count, body)


# Merging, in rank order


def _merge_moments(frames: Sequence[Frame], library: Library) -> Frame:
    """Neighbours in pairs, the pairs in pairs, and so on: one union takes a whole level of this tree."""
    if len(frames) == 1:
        return frames[0]
    xp, masked = library.xp, any(frame.count is None for frame in frames)
    stack = _stacked([_moments(frame, integer_dtype(xp), per_channel=masked) for frame in frames], xp)
    while (ranks := int(stack.wide_mean.shape[0])) > 1:
        paired = ranks // 2 * 2
        left, right, rest = (
            Moments(*(part[rows, ...] for part in _parts(stack)))
            for rows in (slice(0, paired, 2), slice(1, paired, 2), slice(paired, None))
        )
        stack = _stacked([left | right, rest], xp)
    counts, mean, m2 = (part[0, ...] for part in _parts(stack))
    body = [xp.astype(counts, mean.dtype), mean, m2] if masked else [mean, m2]
    count = None if masked else sum(frame.count or 0 for frame in frames)
    return replace(frames[0], count=count, body=xp.concat(body))


def _moments(frame: Frame, integer: Any, *, per_channel: bool = False) -> Moments:
    """The numbers of a frame as a stack of one: mean and m2 of (1, C), counts of (1, 1) or (1, C)."""
    library = library_of(frame.body)
    xp, parts = library.xp, 2 if frame.count is not None else 3
    rows = xp.reshape(frame.body, (parts, 1, frame.channels))
    if frame.count is None:
        counts = xp.astype(rows[0, ...], integer)
    else:
        counts = library.asarray([[frame.count]], integer)
        if per_channel:
            counts = xp.broadcast_to(counts, (1, frame.channels))
    return Moments(counts, rows[-2, ...], rows[-1, ...])


def _stacked(stacks: Sequence[Moments], xp: Any) -> Moments:
    return Moments(*(xp.concat(parts) for parts in zip(*map(_parts, stacks), strict=True)))


def _parts(moments: Moments) -> tuple[Any, Array, Array]:
    return moments.count, moments.wide_mean, moments.wide_m2


def _add_sums(frames: Sequence[Frame], library: Library) -> Frame:
    """The same tree."""
    bodies = [frame.body for frame in frames]
    while len(bodies) > 1:
        pairs = zip(bodies[0::2], bodies[1::2], strict=False)
        bodies = [left + right for left, right in pairs] + (bodies[-1:] if len(bodies) % 2 else [])
    return replace(frames[0], body=bodies[0])


# CUDA graphs


def _capturing(library: Library) -> bool:
    """True while the current stream records a CUDA graph: then nothing can be read back, and nothing agreed upon."""
    return library.name == "cupy" and bool(sys.modules["cupy"].cuda.get_current_stream().is_capturing())


def _gather_blindly(stage: Sync, body: Array) -> Sequence[Array]:
    gather = getattr(stage, "_gather_blindly", None)
    if gather is None:
        raise SyncError(
            f"{stage!r} cannot be recorded into a CUDA graph, because its messages pass through the host; "
            f"record with cubn.sync.nccl."
        )
    return gather(body)  # type: ignore[no-any-return]


def _in_user_order(call: Call, values: Array) -> Array:
    """Per-channel values in the order of the channel axes: x may lie differently in memory on each rank."""
    xp = call.library.xp
    return xp.reshape(call.layout.unflatten(values, xp), (-1,))


def _in_canonical_order(call: Call, values: Array) -> Array:
    xp = call.library.xp
    return call.layout.flatten(xp.reshape(values, call.layout.channel_shape), xp)
