"""What a step of a layer gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from diveq_core.arrays.rows import Array


class Losses(NamedTuple):
    """The auxiliary losses of a step, each the mean over heads and stages."""

    total: Array
    """Their weighted sum, (), in at least float32."""

    codebook: Array | None
    """The codebook loss, (); None where its weight is 0."""

    commitment: Array | None
    """The commitment loss, (); None where its weight is 0."""


class Statistics(NamedTuple):
    """What `update` needs of a step; `added` makes one of those of several."""

    batches: Array
    """Number of steps, ()."""

    counts: Array | None
    """How many vectors chose each codeword, in the shape of the codebook without its last axis."""

    sums: Array | None
    """Sum of the differences of these vectors to their codeword, in the codebook's shape; of moving averages only."""

    sample: Array | None
    """A vector of the step for each codeword, that might replace it, in the codebook's shape; NaN for none."""


def added(before: Statistics | None, now: Statistics) -> Statistics:
    """Statistics of several steps: their sums, and the last sample."""
    if before is None:
        return now
    batches, counts, sums = (None if x is None else x + y for x, y in zip(before[:-1], now[:-1], strict=True))
    return Statistics(batches, counts, sums, now.sample)


class Forward(NamedTuple):
    """What `forward` gives."""

    z_q: Array
    """Quantized vectors, in the shape and dtype of ``z``."""

    indices: Any
    """Tokens, (...), with an axis for heads and one for stages at the end; on a curve, outside training, a `Point`."""

    losses: Losses

    statistics: Statistics | None
    """None outside training."""


class Point(NamedTuple):
    """A token of a curve."""

    segments: Array
    """Index of the segment, (...), in [0, K - 1)."""

    positions: Array
    """Where on it, (...), in [0, 1]."""
