r"""The nearest point of a curve whose corners are codewords: inference of space-filling quantization.

.. math:: (i, t) = \arg\min_{k, s \in [0, 1]} \|z - (1 - s) E_k - s E_{k+1}\|, \qquad z_q = (1 - t) E_i + t E_{i+1}
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from diveq_core.arrays.checks import (
    check_codebook,
    check_floating,
    check_pair,
    check_shape,
    checked_indices,
    flat_rows,
    refuse_not_finite,
)
from diveq_core.arrays.registry import backend_of, quiet
from diveq_core.arrays.rows import Array, one_where, row_scale, within
from diveq_core.arrays.search import frame, framed, framed_rows, rows_per_chunk
from diveq_core.estimators.space_filling import on_segment

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend


class Projected(NamedTuple):
    """The nearest points of a curve."""

    z_q: Array
    """The points, (..., D)."""

    segments: Array
    """Index of the segment that holds each, (...), in [0, K - 1)."""

    positions: Array
    """Where on the segment, (...), in [0, 1]."""


@quiet
def project(z: Array, codebook: Array, /, *, check_finite: bool | None = None) -> Projected:
    r"""Nearest point of the whole curve through the codewords; no derivative flows through it.

    .. math:: z_q = (1 - t) E_i + t E_{i+1}, \qquad
              (i, t) = \arg\min_{k,\, s \in [0, 1]} \|z - (1 - s) E_k - s E_{k+1}\|

    Parameters
    ----------
    z : array (..., D)
    codebook : array (K, D)
        Corners of the curve, K >= 2. Neighbours may be equal.
    check_finite : bool, optional
        As in `nearest`.

    Returns
    -------
    Projected
        ``z_q`` and ``positions`` in the result dtype of both; `decode_curve` gives ``z_q`` exactly. A corner is the
        start of its segment, and only the last one the end of one. A vector that is
        not finite, where nothing was refused, gets segment -1 and NaN.

    Raises
    ------
    TypeError, ValueError
        As `nearest`, and if K < 2.

    Notes
    -----
    Computed in chunks of rows: no N x K array exists.

    References
    ----------
    Vali & Bäckström, arXiv:2410.20573 (space-filling VQ).

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> out = dq.project(np.array([[1.0, 3.0]]), np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 4.0]]))
    >>> out.segments, out.positions
    (array([0]), array([0.25]))
    """
    lib = backend_of("project", z=z, codebook=codebook)
    check_pair(lib, "project", z, codebook, at_least=2)
    refuse_not_finite(lib, "project", check_finite, z=z, codebook=codebook)
    xp = lib.xp
    out_dtype = lib.result_dtype(z, codebook)
    dtype = lib.compute_dtype(out_dtype)
    flat = flat_rows(lib, lib.stop_gradient(z))
    corners = lib.astype(lib.stop_gradient(codebook), dtype)
    centre, scale = frame(lib, corners)
    e = framed(lib, corners, centre, scale)
    start, step = e[:-1, :], e[1:, :] - e[:-1, :]
    # Row k of both: what is subtracted from a product with y, so that both begin at the segment's start.
    along_start = xp.sum(start * step, axis=1)[None, :]
    half = xp.sum(start * start, axis=1)[None, :] * 0.5
    squared = xp.sum(step * step, axis=1)[None, :]
    rows = max(rows_per_chunk(lib, *codebook.shape) // 4, 1)
    segments = [lib.as_indices(xp.arange(0, **lib.place(corners)))]
    positions = [xp.zeros((0,), dtype=dtype, **lib.place(corners))]
    for first in range(0, flat.shape[0], rows):
        chunk = lib.astype(flat[first : min(first + rows, flat.shape[0]), :], dtype)
        y, weight = framed_rows(lib, chunk, centre, scale)
        along = lib.matmul(y, xp.permute_dims(step, (1, 0))) - along_start * weight
        length = squared * weight
        at = within(lib, along / one_where(lib, length == 0, length), 0.0, 1.0)
        scores = half * weight - lib.matmul(y, xp.permute_dims(start, (1, 0))) - at * (along - at * length * 0.5)
        segment = lib.as_indices(xp.argmin(scores, axis=1))
        segments.append(xp.where(xp.isfinite(xp.min(scores, axis=1)), segment, xp.full_like(segment, -1)))
        # The position again from differences, which keep the digits that the expansion lost.
        positions.append(_position(lib, chunk, corners, segments[-1]))
    segment, position = xp.concat(segments), lib.astype(xp.concat(positions), out_dtype)
    # The end of one segment is the start of the next: rounding must not choose between the two.
    at_end = (position >= 1) & (segment < codebook.shape[0] - 2)
    segment, position = xp.where(at_end, segment + 1, segment), xp.where(at_end, xp.zeros_like(position), position)
    shape = tuple(z.shape[:-1])
    segment, position = xp.reshape(segment, shape), xp.reshape(position, shape)
    return Projected(decode_curve(segment, position, lib.astype(codebook, out_dtype)), segment, position)


@quiet
def decode_curve(segments: Array, positions: Array, codebook: Array, /) -> Array:
    r"""Points of a curve: exactly what `project` gave.

    .. math:: z_q = (1 - t) E_i + t E_{i+1}

    Parameters
    ----------
    segments : integer array (...)
        In [0, K - 1); -1, the mark of a vector that was not finite, gives NaN.
    positions : array (...)
        In [0, 1]; NaN gives NaN.
    codebook : array (K, D)
        Corners of the curve, K >= 2.

    Returns
    -------
    array (..., D)
        In the result dtype of ``positions`` and ``codebook``.

    Raises
    ------
    TypeError
        If libraries or dtypes do not fit.
    ValueError
        If shapes do not fit, or, in NumPy, a segment or position is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> dq.decode_curve(np.array([1]), np.array([0.5]), np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 4.0]]))
    array([[4., 2.]])
    """
    lib = backend_of("decode_curve", segments=segments, positions=positions, codebook=codebook)
    xp = lib.xp
    check_floating(lib, "decode_curve", positions=positions, codebook=codebook)
    check_codebook("decode_curve", tuple(codebook.shape), at_least=2)
    segments = checked_indices(lib, "decode_curve", segments, codebook.shape[0] - 1, name="segments", bound="K - 1")
    check_shape("decode_curve", "positions", positions, tuple(segments.shape), "segments")
    _check_positions(lib, positions)
    flat = xp.reshape(segments, (math.prod(segments.shape),))
    out_dtype = lib.result_dtype(positions, codebook)
    words = lib.astype(codebook, out_dtype)
    t = lib.astype(xp.reshape(positions, (flat.shape[0], 1)), out_dtype)
    ends = lib.take_rows(words, flat), lib.take_rows(words, xp.where(flat < 0, flat, flat + 1))
    return xp.reshape(on_segment(*ends, t), (*segments.shape, codebook.shape[1]))


def _position(lib: Backend, z: Array, corners: Array, segments: Array) -> Array:
    xp = lib.xp
    c_1 = lib.take_rows(corners, segments)
    c_2 = lib.take_rows(corners, xp.where(segments < 0, segments, segments + 1))
    # Each at a scale of its own, differences of large numbers by their quarters: nothing here overflows but t.
    large = xp.max(xp.abs(c_1), axis=-1, keepdims=True) > 1
    part = xp.where(large, xp.full_like(c_1[:, :1], 0.25), xp.ones_like(c_1[:, :1]))
    step, quarter = c_2 * part - c_1 * part, z * 0.25 - c_1 * 0.25
    k, own = row_scale(lib, step), row_scale(lib, quarter)
    step = step * k
    squared = lib.dot(step, step)
    t = lib.dot(quarter * own, step) / one_where(lib, squared == 0, squared)
    t = xp.where(t == 0, t, t * k * (4 * part) / own)
    return within(lib, t, 0.0, 1.0)[:, 0]


def _check_positions(lib: Backend, positions: Array) -> None:
    """Check the range where reading values is free; NaN, of a vector that is not finite, may stand."""
    xp = lib.xp
    if lib.checks_finite and math.prod(positions.shape) > 0:
        known = xp.where(xp.isnan(positions), xp.full_like(positions, 0.5), positions)
        lowest, highest = float(xp.min(known)), float(xp.max(known))
        if lowest < 0 or highest > 1:
            raise ValueError(
                f"decode_curve: positions must lie in [0, 1], or be NaN for a vector that is not finite, "
                f"got values from {lowest} to {highest}"
            )
