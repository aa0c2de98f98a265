r"""Upkeep of a codebook outside of gradient steps: moving averages, and replacement of unused codewords.

Pure functions, state in and state out; no derivative flows through them. Sums over several devices come in through
``all_reduce``, a function that sums an array over ranks, and every rank ends with the same codebook. What is not
finite contributes nothing, and nothing that is not finite is ever written.
"""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any, NamedTuple

from diveq_core._array import Array, check_codebook, check_floating, check_pair, check_shape, describe
from diveq_core.ranks import Ranks, finite_rows, pick, uniform
from diveq_core.registry import backend_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.backend import Backend


class EMAState(NamedTuple):
    """Memory of `ema_update`."""

    counts: Array
    """Moving average of how many vectors a step chose each codeword, (K,), not bias-corrected."""

    means: Array
    """The codewords, (K, D), in at least float32: what a codebook of 16 bits would round away is kept here."""


class Replaced(NamedTuple):
    """What `replace_unused` gives."""

    codebook: Array
    """The new codebook, (K, D)."""

    state: EMAState | None
    """The new state of the moving averages, if one was given."""

    rows: Array
    """Which rows were replaced, boolean (K,): those whose optimizer moments are of the past."""


def ema_init(codebook: Array, /, *, weight: float = 0.0) -> EMAState:
    """State of the moving averages before the first step.

    Parameters
    ----------
    codebook : array (K, D)
    weight : float, default 0
        For how many vectors a step the initial value of each codeword counts. At 0 the first step that uses a
        codeword moves it to the mean of its vectors; more makes the beginning gentler.

    Returns
    -------
    EMAState

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
    check_codebook("ema_init", codebook)
    weight = _checked_number("ema_init", "weight", weight, 0.0, math.inf)
    means = lib.astype(lib.stop_gradient(codebook), lib.compute_dtype(codebook.dtype))
    return EMAState(lib.xp.full((codebook.shape[0],), weight, dtype=means.dtype, **lib.place(means)), means)


def ema_update(
    state: EMAState,
    codebook: Array,
    z: Array,
    indices: Array,
    /,
    *,
    decay: float = 0.99,
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
    codebook : array (K, D)
        Where it is not what the step before returned, a gradient step or a replacement say, it takes precedence.
    z : array (..., D)
        Vectors that chose; one that is not finite contributes nothing.
    indices : integer array (...)
        As `nearest` gives them; -1 contributes nothing.
    decay : float, default 0.99
        The :math:`m` in [0, 1).
    all_reduce : callable, optional
        Sum over ranks, array -> array of the same shape; called once, with an array (K, D + 1).

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
    >>> state, codebook = dq.ema_update(state, codebook, z, dq.nearest(z, codebook), decay=0.5)
    >>> codebook
    array([[1.],
           [3.]])
    """
    lib = backend_of("ema_update", codebook=codebook, z=z)
    check_pair(lib, "ema_update", z, codebook)
    _check_state(lib, "ema_update", state, codebook)
    segments = _flat_indices(lib, "ema_update", z, indices, codebook.shape[0])
    decay = _checked_number("ema_update", "decay", decay, 0.0, 1.0)
    ranks = Ranks(lib, "ema_update", all_reduce)
    xp = lib.xp

    codebook = lib.stop_gradient(codebook)
    means = _means(lib, state, codebook)
    rows = lib.astype(_rows(lib, z), means.dtype)
    rows, finite = finite_rows(lib, rows)
    chosen = finite & (segments >= 0)
    segments = xp.where(chosen, segments, xp.full_like(segments, -1))
    q = lib.take_rows(means, xp.where(chosen, segments, xp.zeros_like(segments)))
    # Sums of differences, not of vectors: an offset that all vectors share costs no digits.
    d = xp.where(chosen[:, None], rows - q, xp.zeros_like(rows))
    counted = xp.concat([d, xp.astype(chosen, d.dtype)[:, None]], axis=1)
    total = ranks.sum(lib.segment_sum(counted, segments, codebook.shape[0]))

    c = total[:, -1]
    used = c > 0
    n = decay * state.counts + (1 - decay) * c
    rate = xp.where(used, (1 - decay) / xp.where(used, n, xp.ones_like(n)), xp.zeros_like(n))
    moved = means + rate[:, None] * total[:, :-1]
    rounded = lib.astype(moved, codebook.dtype)
    written = (used & xp.all(xp.isfinite(rounded), axis=1))[:, None]
    return EMAState(n, xp.where(written, moved, means)), xp.where(written, rounded, codebook)


def replace_unused(
    codebook: Array,
    counts: Array,
    /,
    *,
    z: Array | None = None,
    threshold: float = 0.0,
    jitter: float = 0.01,
    noise: Array | None = None,
    rng: Any = None,
    state: EMAState | None = None,
    all_reduce: Callable[[Array], Array] | None = None,
) -> Replaced:
    r"""Replace unused codewords, by used ones in proportion to their use or by vectors of the batch.

    .. math::
        E_k \leftarrow x + \text{jitter} \cdot \bar d \cdot \epsilon \quad\text{where}\quad
        n_k \le \text{threshold} \cdot \tfrac1K \textstyle\sum_j n_j

    with :math:`x` a used codeword or a vector, and :math:`\bar d` the mean absolute deviation of what it is drawn from.

    Parameters
    ----------
    codebook : array (K, D)
        A codeword that is not finite counts as unused.
    counts : array (K,)
        Use of each codeword: `usage` of one or several batches, or `EMAState.counts`. Only proportions matter.
    z : array (..., D), optional
        Vectors to draw from instead of used codewords; those that are not finite are left out.
    threshold : float, default 0
        Share in [0, 1) of the mean use up to which a codeword counts as unused.
    jitter : float, default 0.01
        Standard deviation of what is added, in parts of the data's mean absolute deviation. 0 only with ``z``.
    noise : array (K, D + 2), optional
        Standard normal numbers: the jitter, and two columns whose angle is the draw. The same noise gives the same
        codebook in every library.
    rng : optional
        The library's own generator to draw noise from, as in `quantize`. **All ranks must use the same seed.**
    state : EMAState, optional
        Moving averages, whose replaced rows are to begin anew.
    all_reduce : callable, optional
        Sum over ranks, array -> array of the same shape. Counts that are the same on all ranks may be summed too.

    Returns
    -------
    Replaced
        ``codebook``, ``state`` and the boolean mask ``rows`` (K,) of what was replaced. Used codewords are as they
        were; if there is nothing to draw from, all are.

    Raises
    ------
    TypeError
        If libraries or dtypes do not agree.
    ValueError
        If shapes do not fit or an option is out of range.

    Notes
    -----
    With M codewords to replace, the j-th is drawn from the j-th of M equal parts of the cumulative use: each source
    is drawn in proportion to its use, and none much more often. Each coordinate of a copy is moved by at least a few
    units in its last place, so that no copy equals its source, as it does where a fixed jitter of 1e-9 vanishes in
    float32. On several ranks ``z`` is drawn as from the joined batch: one rank has the vector, the others add zeros.

    References
    ----------
    Vali, Bäckström, "NSVQ: Noise Substitution in Vector Quantization for Machine Learning", IEEE Access 10:13598,
    section III.B, for the draw by use.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> codebook = np.array([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    >>> replaced = dq.replace_unused(codebook, np.array([3.0, 1.0, 0.0]), rng=np.random.default_rng(0))
    >>> replaced.rows
    array([False, False,  True])
    >>> bool(np.abs(replaced.codebook[2]).max() < 1.1)
    True
    """
    lib = backend_of("replace_unused", codebook=codebook, counts=counts)
    check_floating(lib, "replace_unused", codebook=codebook, counts=counts)
    check_codebook("replace_unused", codebook)
    count, width = codebook.shape
    check_shape("replace_unused", "counts", counts, (count,), "codebook without its last axis")
    if z is not None:
        backend_of("replace_unused", codebook=codebook, z=z)
        check_pair(lib, "replace_unused", z, codebook)
    if state is not None:
        _check_state(lib, "replace_unused", state, codebook)
    threshold = _checked_number("replace_unused", "threshold", threshold, 0.0, 1.0)
    jitter = _checked_number("replace_unused", "jitter", jitter, 0.0, math.inf)
    if jitter == 0 and z is None:
        raise ValueError("replace_unused: jitter must be > 0 without z, since exact copies are never chosen, got 0")
    ranks = Ranks(lib, "replace_unused", all_reduce)
    xp, dtype = lib.xp, lib.compute_dtype(codebook.dtype)
    noise = drawn_noise(lib, "replace_unused", codebook, (count, width + 2), noise, rng)

    codebook = lib.stop_gradient(codebook)
    words, finite = finite_rows(lib, lib.astype(codebook, dtype))
    n = ranks.sum(lib.astype(lib.stop_gradient(counts), dtype))
    n = xp.where(finite & xp.isfinite(n) & (n > 0), n, xp.zeros_like(n))
    unused = n <= threshold * xp.sum(n) / count
    number = xp.astype(unused, dtype)
    order = xp.cumulative_sum(number)
    positions = (order - number + uniform(lib, noise[:, width:])) / _at_least_one(lib, number)

    if z is None:
        weights = xp.where(unused, xp.zeros_like(n), n)
        sources = xp.take(words, pick(lib, weights, positions), axis=0)
        total, deviation = _deviation(Ranks(lib, "replace_unused", None), words, weights)
    else:
        rows, valid = finite_rows(lib, lib.astype(lib.stop_gradient(_rows(lib, z)), dtype))
        weights = xp.astype(valid, dtype)
        sources = ranks.draw(rows, weights, positions)
        total, deviation = _deviation(ranks, rows, weights)

    e = noise[:, :width]
    # At least four units in the last place of the largest entry, so that the move survives rounding; four more for
    # each replacement, so that two of the same source differ.
    unit = 4 * float(xp.finfo(codebook.dtype).eps) * xp.max(xp.abs(sources), axis=1, keepdims=True) * order[:, None]
    step = jitter * deviation * e + xp.where(e < 0, -unit, unit) if jitter > 0 else xp.zeros_like(e)
    new = lib.astype(sources + step, codebook.dtype)
    replaced = unused & (total > 0) & xp.all(xp.isfinite(new), axis=1)
    at = replaced[:, None]
    if state is not None:
        counts = xp.where(replaced, xp.zeros_like(state.counts), state.counts)
        state = EMAState(counts, xp.where(at, lib.astype(new, dtype), state.means))
    return Replaced(xp.where(at, new, codebook), state, replaced)


def drawn_noise(
    lib: Backend, function: str, like: Array, shape: tuple[int, ...], noise: Array | None, rng: Any
) -> Array:
    """Standard normal noise of a shape, given or drawn, in the compute dtype and on the device of ``like``."""
    dtype = lib.compute_dtype(like.dtype)
    if noise is None:
        return lib.standard_normal(function, lib.xp.zeros(shape, dtype=dtype, **lib.place(like)), rng)
    backend_of(function, like=like, noise=noise)
    check_floating(lib, function, noise=noise)
    if tuple(noise.shape) != shape:
        raise ValueError(f"{function}: noise must have shape {shape}, got {tuple(noise.shape)}")
    return lib.astype(lib.stop_gradient(noise), dtype)


def _deviation(ranks: Ranks, rows: Array, weights: Array) -> tuple[Array, Array]:
    """Total weight and mean absolute deviation of weighted rows, both (); where that is 0, mean size, or 1."""
    xp = ranks.lib.xp
    total = ranks.sum(xp.sum(weights))
    share = (weights / xp.where(total > 0, total, xp.ones_like(total)))[:, None]
    mean = ranks.sum(xp.sum(rows * share, axis=0))
    both = xp.stack([xp.sum(xp.abs(rows - mean) * share), xp.sum(xp.abs(rows) * share)])
    both = ranks.sum(both) / rows.shape[1]
    deviation, size = both[0], both[1]
    return total, xp.where(deviation > 0, deviation, xp.where(size > 0, size, xp.ones_like(size)))


def _means(lib: Backend, state: EMAState, codebook: Array) -> Array:
    """The state's codewords, or the codebook's where that was changed since."""
    kept = lib.astype(state.means, codebook.dtype) == codebook
    return lib.xp.where(kept, state.means, lib.astype(codebook, state.means.dtype))


def _at_least_one(lib: Backend, x: Array) -> Array:
    total = lib.xp.sum(x)
    return lib.xp.where(total > 0, total, lib.xp.ones_like(total))


def _rows(lib: Backend, z: Array) -> Array:
    return lib.xp.reshape(lib.stop_gradient(z), (math.prod(z.shape[:-1]), z.shape[-1]))


def _flat_indices(lib: Backend, function: str, z: Array, indices: Array, count: int) -> Array:
    backend_of(function, z=z, indices=indices)
    if not lib.is_integer(indices):
        raise TypeError(f"{function}: indices must have an integer dtype, got {indices.dtype}")
    check_shape(function, "indices", indices, tuple(z.shape[:-1]), "z without its last axis")
    flat = lib.xp.reshape(lib.as_indices(indices), (math.prod(indices.shape),))
    if lib.checks_finite and flat.shape[0] > 0 and int(lib.xp.max(flat)) >= count:
        raise ValueError(f"{function}: indices must lie in [-1, K) with K = {count}, got {int(lib.xp.max(flat))}")
    return flat


def _check_state(lib: Backend, function: str, state: EMAState, codebook: Array) -> None:
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


def _checked_number(function: str, name: str, value: float, lowest: float, below: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{function}: {name} must be a real number, got {describe(value)}")
    if not lowest <= float(value) < below:
        raise ValueError(f"{function}: {name} must lie in [{lowest:g}, {below:g}), got {float(value)}")
    return float(value)
