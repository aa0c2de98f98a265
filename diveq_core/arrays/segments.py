"""Segment sum by the standard alone, for libraries that offer nothing better."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array

# Entries of the one-hot matrix that exist at a time: 4 MiB in float32.
_ONE_HOT_ENTRIES = 1 << 20


def segment_sum(lib: Backend, values: Array, segments: Array, count: int) -> Array:
    r"""Sum the rows that share a segment.

    .. math:: s_k = \sum_{n : i_n = k} v_n

    Parameters
    ----------
    values : array (N, D)
    segments : integer array (N,)
        Rows with a segment outside ``[0, count)`` are dropped.
    count : int
        Number of segments.

    Returns
    -------
    array (count, D)

    Notes
    -----
    The standard has no scatter-add, and indexed assignment loses repeated indices; a product with the
    one-hot matrix, in chunks of rows, does not. A non-finite row makes its column of every segment NaN.
    """
    xp = lib.xp
    rows = max(1, _ONE_HOT_ENTRIES // count)
    numbers = xp.arange(count, dtype=segments.dtype, **lib.place(segments))
    total = xp.zeros((count, values.shape[1]), dtype=values.dtype, **lib.place(values))
    for start in range(0, values.shape[0], rows):
        stop = min(start + rows, values.shape[0])
        chosen = segments[start:stop]
        one_hot = xp.astype(xp.expand_dims(numbers, axis=1) == xp.expand_dims(chosen, axis=0), values.dtype)
        total = total + lib.matmul(one_hot, values[start:stop, :])
    return total
