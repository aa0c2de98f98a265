r"""Upkeep of a codebook outside of gradient steps: moving averages.

Pure functions, state in and state out; no derivative flows through them. Sums over several devices come in through
``all_reduce``, a function that sums an array over ranks, and every rank ends with the same codebook. What is not
finite contributes nothing, and nothing that is not finite is ever written.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from diveq_core.arrays.checks import (
    check_floating,
    check_pair,
    check_shape,
    check_single,
    checked_indices,
    checked_number,
    flat,
    flat_rows,
)
from diveq_core.arrays.registry import backend_of, quiet
from diveq_core.arrays.rows import Array, describe, larger, smaller
from diveq_core.codebook.ranks import Ranks, finite_rows
from diveq_core.codebook.spread import each_block, segment_totals

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend


class EMAState(NamedTuple):
    """Memory of `ema_update`."""

    counts: Array
    """Moving average of how many vectors a step chose each codeword, (K,), not bias-corrected."""

    means: Array
    """The codewords, (K, D), in at least float32: what a codebook of 16 bits would round away is kept here."""


@quiet
def ema_init(codebook: Array, /, *, weight: float | Array = 0.0) -> EMAState:
    r"""State of the moving averages before the first step.

    .. math:: n_k = \text{weight}

    Parameters
    ----------
    codebook : array (K, D)
    weight : float or array (), default 0
        For how many vectors a step the initial value of each codeword counts. At 0 the first step that uses a
        codeword moves it to the mean of its vectors; more makes the beginning gentler.

    Returns
    -------
    EMAState
        In memory of its own.

    Raises
    ------
    TypeError, ValueError
        If the codebook is not (K, D) of a real floating dtype, or the weight is not a number >= 0.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> dq.ema_init(np.array([[1.0, 2.0]])).counts
    array([0.])
    """
    lib = backend_of("ema_init", codebook=codebook)
    check_floating(lib, "ema_init", codebook=codebook)
    check_single("ema_init", codebook)
    weight = checked_number("ema_init", "weight", weight, 0.0, math.inf, like=codebook)
    # A copy: one of the two may be changed in place, donated or saved.
    means = lib.astype(lib.copy(lib.stop_gradient(codebook)), lib.compute_dtype(codebook.dtype))
    return EMAState(lib.xp.ones((codebook.shape[0],), dtype=means.dtype, **lib.place(means)) * weight, means)


@quiet
def ema_update(
    state: EMAState,
    z: Array,
    codebook: Array,
    indices: Array,
    /,
    *,
    decay: float | Array = 0.99,
    all_reduce: Callable[[Array], Array] | None = None,
) -> tuple[EMAState, Array]:
    r"""Move each codeword to the moving average of the vectors that choose it.

    .. math::
        n_k \leftarrow m\,n_k + (1-m)\,c_k, \qquad
        E_k \leftarrow E_k + \frac{1-m}{n_k} \sum_{n : i_n = k} (z_n - E_k), \qquad c_k = |\{n : i_n = k\}|

    Parameters
    ----------
    state : EMAState
        From `ema_init` or the step before.
    z : array (..., D)
        Vectors that chose; one that is not finite contributes nothing.
    codebook : array (K, D)
        Where it is not what the step before returned, a gradient step or a replacement say, it takes precedence.
    indices : integer array (...)
        As `nearest` gives them; -1 contributes nothing.
    decay : float or array (), default 0.99
        The :math:`m` in [0, 1). An array may be traced, as that of a schedule is; its range is then not checked.
    all_reduce : callable, optional
        Sum over ranks, array -> array of the same shape; called twice, with an array (1, D) and one (K, D + 1), and may
        sum in place. State, codebook and decay must be the same on all ranks.

    Returns
    -------
    state : EMAState
    codebook : array (K, D)
        In the dtype of ``codebook``.

    Raises
    ------
    TypeError
        If libraries or dtypes do not agree.
    ValueError
        If shapes do not fit, the decay is out of range, or, in NumPy, an index is.

    Notes
    -----
    This is :math:`E_k = s_k / n_k` with :math:`s_k \leftarrow m s_k + (1-m)\sum z_n`, rearranged: both moving
    averages carry the same bias, which their quotient loses, and a codeword that was not chosen (:math:`c_k = 0`)
    keeps its value bit for bit, from the first step on. Nothing divides by a small count, so no smoothing is needed.
    A codeword over twice as long, in a coordinate, as every vector keeps its share apart from the sum, which it would
    round. Over several ranks, which know the sum of their longest alone, it does so from twice that sum on.

    It is also, exactly, a step of stochastic gradient descent on the codebook loss
    :math:`\tfrac12\sum_n \|E_{i_n} - \operatorname{sg}[z_n]\|^2` with learning rate :math:`(1-m)/n_k` for codeword
    k, :math:`n_k` taken after its own update; at most :math:`1/c_k`, where the step ends at the batch's mean.

    References
    ----------
    van den Oord et al., "Neural Discrete Representation Learning", arXiv:1711.00937, appendix A.1.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> codebook, z = np.array([[0.0], [5.0]]), np.array([[1.0], [3.0]])
    >>> state = dq.ema_init(codebook)
    >>> state, codebook = dq.ema_update(state, z, codebook, dq.nearest(z, codebook), decay=0.5)
    >>> codebook
    array([[1.],
           [3.]])
    """
    lib = backend_of("ema_update", codebook=codebook, z=z)
    check_single("ema_update", codebook)
    check_pair(lib, "ema_update", z, codebook)
    check_state(lib, "ema_update", state, codebook)
    backend_of("ema_update", z=z, indices=indices)
    indices = checked_indices(lib, "ema_update", indices, codebook.shape[0])
    check_shape("ema_update", "indices", indices, tuple(z.shape[:-1]), "z without its last axis")
    decay = checked_number("ema_update", "decay", decay, 0.0, 1.0, like=codebook)
    ranks = Ranks(lib, "ema_update", all_reduce)
    xp = lib.xp

    codebook = lib.stop_gradient(codebook)
    means = _means(lib, state, codebook)
    segments = flat(lib, indices)
    rows, dtype = flat_rows(lib, lib.stop_gradient(z)), means.dtype
    # Of ranks the sum, at least the largest of all and one for all: too large, it costs digits, never all of them.
    largest = ranks.sum(_largest(lib, rows, dtype))
    scale = _scale(lib, means, largest)
    scaled = means * scale
    centre = xp.where(xp.abs(scaled) > 2 * scale * largest, xp.zeros_like(means), scaled)

    def counted(z: Array, segments: Array) -> tuple[Array, Array]:
        rows, finite = finite_rows(lib, lib.astype(z, dtype))
        chosen = xp.logical_and(finite, segments >= 0)
        segments = xp.where(chosen, segments, xp.full_like(segments, -1))
        q = lib.take_rows(centre, xp.where(chosen, segments, xp.zeros_like(segments)))
        # Sums of differences, not of vectors: an offset that all vectors share costs no digits. From zero where the
        # codeword is far longer, which would cost them all.
        d = xp.where(chosen[:, None], rows * scale - q, xp.zeros_like(rows))
        return xp.concat([d, xp.astype(chosen, dtype)[:, None]], axis=1), segments

    total = ranks.sum(segment_totals(lib, means, counted, rows, segments))

    c = total[:, -1]
    used, old, n, rate = rates(lib, state.counts, c, decay)
    # What a codeword keeps of itself.
    share = xp.where(used, old / xp.where(used, n, xp.ones_like(n)), xp.ones_like(n))
    # Means of finite vectors pass the largest number by rounding only.
    limit = float(xp.finfo(dtype).max) * scale
    begin = centre + xp.where(centre == scaled, xp.zeros_like(scaled), share[:, None] * scaled)
    moved = begin + rate[:, None] * total[:, :-1]
    moved = xp.where(xp.isfinite(moved), smaller(lib, larger(lib, moved, -limit), limit), moved) / scale
    rounded = lib.astype(moved, codebook.dtype)
    written = xp.logical_and(used, xp.all(xp.isfinite(rounded), axis=1))[:, None]
    return EMAState(n, xp.where(written, moved, means)), xp.where(written, rounded, codebook)


def rates(lib: Backend, counts: Array, c: Array, decay: Any) -> tuple[Array, Array, Array, Array]:
    """What a step's counts make of moving averages, each (..., K).

    Which codewords were used, what is left of the old counts, :math:`m n_{old}`, the new ones :math:`n`, and the rate
    :math:`(1-m)/n` of a codeword's vectors.
    """
    xp, zeros, infinity = lib.xp, lib.xp.zeros_like(c), float("inf")
    used = (c > 0) & (c < infinity)
    old = decay * xp.where((counts > 0) & (counts < infinity), counts, zeros)
    n = old + (1 - decay) * xp.where(used, c, zeros)
    return used, old, n, xp.where(used, (1 - decay) / xp.where(used, n, xp.ones_like(n)), zeros)


def _largest(lib: Backend, z: Array, dtype: Any) -> Array:
    """Largest absolute value in each column of the finite vectors, (1, D)."""
    xp = lib.xp
    largest = xp.zeros((1, z.shape[1]), dtype=dtype, **lib.place(z))

    def look(z: Array) -> None:
        nonlocal largest
        rows = xp.abs(finite_rows(lib, lib.astype(z, dtype))[0])
        largest = larger(lib, largest, xp.max(rows, axis=0, keepdims=True))

    each_block(lib, look, z)
    return largest


def _scale(lib: Backend, means: Array, largest: Array) -> Array:
    """Power of two for each column, (1, D): below 1 only where sums of differences so large might overflow.

    What it makes vanish is smaller than a column's largest number by more than the digits of any sum.
    """
    xp = lib.xp
    largest = larger(lib, largest, xp.max(xp.abs(finite_rows(lib, means)[0]), axis=0, keepdims=True))
    one = xp.ones_like(largest)
    return xp.where(largest > float(xp.finfo(means.dtype).max) * 2.0**-42, one * 2.0**-40, one)


def _means(lib: Backend, state: EMAState, codebook: Array) -> Array:
    """The state's codewords, or the codebook's where that was changed since."""
    kept = lib.astype(state.means, codebook.dtype) == codebook
    return lib.xp.where(kept, state.means, lib.astype(codebook, state.means.dtype))


def check_state(lib: Backend, function: str, state: EMAState, codebook: Array) -> None:
    """Check that moving averages are those of a codebook."""
    if not isinstance(state, EMAState):
        raise TypeError(f"{function}: state must be an EMAState, as ema_init gives it, got {describe(state)}")
    backend_of(function, codebook=codebook, counts=state.counts, means=state.means)
    check_shape(function, "state.counts", state.counts, (codebook.shape[0],), "codebook without its last axis")
    check_shape(function, "state.means", state.means, tuple(codebook.shape), "codebook")
    wide = lib.compute_dtype(codebook.dtype)
    if state.counts.dtype != wide or state.means.dtype != wide:
        raise TypeError(
            f"{function}: state must have dtype {wide} for a codebook of {codebook.dtype}, "
            f"got {state.counts.dtype} and {state.means.dtype}"
        )
