"""Mean and size of vectors on all ranks, at a scale at which nothing overflows or vanishes, a block at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from diveq_core.arrays.rows import larger, one_where

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.codebook.ranks import Ranks

# Rows that are added up one by one.
_SUMMED_AT_ONCE = 1 << 12


class Spread(NamedTuple):
    """What `spread` gives; all but ``total`` of the vectors times ``scale``."""

    total: Array
    """Sum of the weights, ()."""

    scale: Array
    """Power of two, (): 1 unless the vectors are very large or very small."""

    mean: Array
    """Weighted mean, (1, D)."""

    deviation: Array
    """Weighted mean absolute deviation from the mean, over vectors and entries, ()."""

    size: Array
    """Weighted mean absolute value, ()."""


def spread(ranks: Ranks, z: Array, weights: Array, dtype: Any) -> Spread:
    """Where the vectors of all ranks lie.

    Parameters
    ----------
    ranks : Ranks
    z : array (N, D)
        One that is not finite must have weight 0.
    weights : array (N,)
        At least 0, and small enough to be added up.
    dtype : dtype
        Of the computation.
    """
    lib, xp = ranks.lib, ranks.lib.xp
    width = z.shape[1]
    zero = xp.zeros((), dtype=dtype, **lib.place(z))
    largest, total = zero, zero

    def weighed(z: Array, weights: Array) -> Array:
        z = lib.astype(z, dtype)
        return xp.where(weights[:, None] > 0, z, xp.zeros_like(z))

    def look(z: Array, weights: Array) -> None:
        nonlocal largest, total
        largest = larger(lib, largest, xp.max(xp.abs(weighed(z, weights))))
        total = total + xp.sum(weights)

    each_block(lib, look, z, weights)
    reach = reach_of(lib, dtype)
    large, there = (xp.astype(sign, dtype) for sign in (largest > reach, largest >= 1 / reach))
    sums = ranks.sum(xp.stack([total, large, there]))
    total, one = sums[0], xp.ones_like(sums[0])
    scale = xp.where(sums[1] > 0, one * reach**-2, xp.where(sums[2] > 0, one, one * reach**2))
    inverse = 1 / one_where(lib, total == 0, total)
    mean = xp.zeros((1, width), dtype=dtype, **lib.place(z))
    deviation, size = zero, zero

    # Divided first: the sum of large vectors may overflow.
    def add(z: Array, weights: Array) -> None:
        nonlocal mean
        share = (weights * inverse)[:, None]
        mean = mean + xp.sum(weighed(z, weights) * scale * share, axis=0, keepdims=True)

    each_block(lib, add, z, weights)
    mean = ranks.sum(mean)

    def measure(z: Array, weights: Array) -> None:
        nonlocal deviation, size
        share, y = (weights * (inverse / width))[:, None], weighed(z, weights) * scale
        deviation, size = deviation + xp.sum(xp.abs(y - mean) * share), size + xp.sum(xp.abs(y) * share)

    each_block(lib, measure, z, weights)
    both = ranks.sum(xp.stack([deviation, size]))
    return Spread(total, scale, mean, both[0], both[1])


def reach_of(lib: Backend, dtype: Any) -> float:
    """Sums of squares up to this, and down to its inverse, are far from overflow and underflow."""
    return 2.0 ** (40 if dtype == lib.xp.float32 else 300)


def each_block(lib: Backend, function: Callable[..., None], *arrays: Array) -> None:
    """Call ``function`` on blocks of rows of the arrays, for what it adds up; not at all if there are none."""
    if arrays[0].shape[0] == 0:
        return

    def rows(*blocks: Array) -> Array:
        function(*blocks)
        return blocks[0][:, :0]

    lib.by_rows(rows, *arrays)


def segment_totals(lib: Backend, model: Array, function: Callable[..., tuple[Array, Array]], *arrays: Array) -> Array:
    """Sums (K, D + 1) beside a codebook (K, D) of what ``function`` makes of blocks of rows: values, segments.

    The values of a row that has no segment, -1, must be zeros.

    In parts: of equal vectors half a million added one by one are off by half a percent in float32, and ones end at
    2^24.
    """
    xp, rows, (count, width) = lib.xp, arrays[0].shape[0], model.shape
    parts, part = 1, []
    # A number that is left open while a function is exported is not compared.
    if isinstance(rows, int) and lib.sums_in_parts(arrays[0]):
        parts = max(min(-(-rows // _SUMMED_AT_ONCE), rows // (4 * count)), 1)
    if parts > 1:
        # The part of each row.
        part = [lib.as_indices(xp.arange(rows, **lib.place(model))) // -(-rows // parts)]
    total = xp.zeros((parts * count, width + 1), dtype=model.dtype, **lib.place(model))

    def add(*block: Array) -> None:
        nonlocal total
        values, segments = function(*block[: len(arrays)])
        for number in block[len(arrays) :]:
            segments = segments + count * lib.astype(number, segments.dtype)
        total = lib.segment_add(total, values, segments)

    each_block(lib, add, *arrays, *part)
    return total if parts == 1 else xp.sum(xp.reshape(total, (parts, count, width + 1)), axis=0)
