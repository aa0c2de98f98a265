r"""Replacement of unused codewords; like `diveq_core.codebook.averages`, pure and over ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from diveq_core.arrays.checks import check_floating, check_pair, check_shape, check_single, checked_number, flat_rows
from diveq_core.arrays.draws import uniform
from diveq_core.arrays.registry import backend_of, quiet
from diveq_core.arrays.rows import larger, power_of_two
from diveq_core.codebook.averages import EMAState, check_state
from diveq_core.codebook.ranks import Ranks, finite_rows
from diveq_core.codebook.spread import spread

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array


class Replaced(NamedTuple):
    """What `replace_unused` gives."""

    codebook: Array
    """The new codebook, (K, D)."""

    state: EMAState | None
    """The new state of the moving averages, if one was given."""

    rows: Array
    """Which rows were replaced, boolean (K,): those whose optimizer moments are of the past."""


@quiet
def replace_unused(
    codebook: Array,
    counts: Array,
    /,
    *,
    z: Array | None = None,
    threshold: float | Array = 0.0,
    jitter: float | Array = 0.01,
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
        Use of each codeword: `usage` of one or several batches, `EMAState.counts`, or integers as ``bincount`` gives
        them. Only proportions matter; NaN counts for nothing, and so does what is negative, which NumPy refuses.
    z : array (..., D), optional
        Vectors to draw from instead of used codewords; those that are not finite are left out.
    threshold : float or array (), default 0
        Share in [0, 1) of the mean use up to which a codeword counts as unused.
    jitter : float or array (), default 0.01
        Standard deviation of what is added, in parts of the data's mean absolute deviation. 0 only with ``z``.
    noise : array (K, D + 2), optional
        Standard normal numbers: the jitter, and two columns whose angle is the draw. The same noise gives the same
        codebook in every library.
    rng : optional
        The library's own generator to draw noise from, as in `quantize`. Ranks agree on what they draw, whatever
        their seeds.
    state : EMAState, optional
        Moving averages, whose replaced rows are to begin anew.
    all_reduce : callable, optional
        Sum over ranks, array -> array of the same shape; it may sum in place. Counts that are the same on all ranks
        may be summed too. Codebook, threshold, jitter and a given ``noise`` must be the same on all ranks.

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
        If shapes do not fit, an option is out of range, or, where values can be read, ranks differ in codebook,
        threshold or jitter.

    Notes
    -----
    With M codewords to replace, the j-th is drawn from the j-th of M equal parts of the cumulative use: each source
    is drawn in proportion to its use, and none much more often. On several ranks ``z`` is drawn as from the joined
    batch: one rank has the vector, the others add zeros.

    Beside the jitter each coordinate of a copy is moved by a few units in the last place of its largest one, so that
    no copy equals its source, nor another copy of it, as it does where a fixed jitter of 1e-9 vanishes in float32.
    With :math:`\epsilon` the spacing of the codebook's dtype at 1, and the digits of j in base B,

    .. math:: (4 + 2 \, \text{digit}) \, \epsilon \max_i |x_i|, \qquad j = \sum_i \text{digit}_i B^i, \qquad
              B = \lceil K^{1/D} \rceil

    which for D = 8 and K = 1024 is at most 8 units, whatever M. In one dimension all copies lie on one line, and M of
    them take up to 2 M + 2 units; in two, :math:`2 \sqrt K + 2`.

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
    check_floating(lib, "replace_unused", codebook=codebook)
    if not lib.is_integer(counts):
        check_floating(lib, "replace_unused", counts=counts)
    check_single("replace_unused", codebook)
    count, width = codebook.shape
    check_shape("replace_unused", "counts", counts, (count,), "codebook without its last axis")
    if lib.checks_finite and lib.any_negative(counts):
        raise ValueError("replace_unused: counts must be at least 0, got a negative one")
    if z is not None:
        backend_of("replace_unused", codebook=codebook, z=z)
        check_pair(lib, "replace_unused", z, codebook)
    if state is not None:
        check_state(lib, "replace_unused", state, codebook)
    threshold = checked_number("replace_unused", "threshold", threshold, 0.0, 1.0, like=codebook)
    jitter = checked_number("replace_unused", "jitter", jitter, 0.0, math.inf, like=codebook)
    if isinstance(jitter, float) and jitter == 0 and z is None:
        raise ValueError("replace_unused: jitter must be > 0 without z, since exact copies are never chosen, got 0")
    ranks = Ranks(lib, "replace_unused", all_reduce)
    xp, dtype = lib.xp, lib.compute_dtype(codebook.dtype)
    noise = ranks.noise(codebook, (count, width + 2), noise, rng)

    codebook = lib.stop_gradient(codebook)
    words, finite = finite_rows(lib, lib.astype(codebook, dtype))
    option = xp.zeros((1,), dtype=dtype, **lib.place(codebook))
    ranks.same("codebook, threshold and jitter", words, option + threshold, option + jitter)
    n = ranks.sum(_countable(lib, lib.astype(lib.stop_gradient(counts), dtype)))
    n = xp.where(finite, _countable(lib, n), xp.zeros_like(n))
    # Only proportions matter, and of order one their sums do not overflow.
    n = n / power_of_two(lib, xp.max(n))
    unused = n <= threshold * xp.sum(n) / count
    number = xp.astype(unused, dtype)
    order = lib.cumulative_sum(number)
    positions = (order - number + uniform(lib, noise[:, width:])) / _at_least_one(lib, number)

    if z is None:
        rows, weights = words, xp.where(unused, xp.zeros_like(n), n)
        ranks = Ranks(lib, "replace_unused", None)
    else:
        rows = flat_rows(lib, lib.stop_gradient(z))
        finite_in_it = lib.by_rows(lambda z: xp.all(xp.isfinite(lib.astype(z, dtype)), axis=1), rows)
        weights = xp.astype(finite_in_it, dtype)
    sources = ranks.draw(rows, weights, positions)
    among = spread(ranks, rows, weights, dtype)
    # Where all are equal, their size; where all are zero, 1.
    deviation = xp.where(among.deviation > 0, among.deviation, among.size) / among.scale
    deviation = xp.where(deviation > 0, deviation, xp.ones_like(deviation))

    e = noise[:, :width]
    # At least four units in the last place of the largest entry, so that the move survives rounding; two more for each
    # step of a digit, so that two of the same source differ also where the next binade's units are twice as long.
    info = xp.finfo(codebook.dtype)
    largest = xp.max(xp.abs(sources), axis=1, keepdims=True)
    smallest = xp.full_like(largest, float(info.smallest_normal))
    # A copy of zeros moves by the smallest normal number.
    unit = xp.where(largest == 0, smallest, float(info.eps) * larger(lib, largest, smallest))
    least = (4 + 2 * _digits(lib, order - number, width)) * unit
    step = jitter * deviation * e + xp.where(e < 0, -least, least)
    if not isinstance(jitter, float):
        step = xp.where(jitter > 0, step, xp.zeros_like(e))
    elif jitter == 0:
        step = xp.zeros_like(e)
    new, other = (lib.astype(moved, codebook.dtype) for moved in (sources + step, sources - step))
    # Next to the largest number there is room on one side only.
    new = xp.where(xp.isfinite(new), new, other)
    there = xp.logical_and(among.total > 0, xp.all(xp.isfinite(new), axis=1))
    replaced = xp.logical_and(unused, there)
    at = replaced[:, None]
    if state is not None:
        counts = xp.where(replaced, xp.zeros_like(state.counts), state.counts)
        state = EMAState(counts, xp.where(at, lib.astype(new, dtype), state.means))
    return Replaced(xp.where(at, new, codebook), state, replaced)


def _digits(lib: Backend, numbers: Array, width: int) -> Array:
    """So many digits of each of the whole numbers in [0, K), (K,), in the lowest base in which they differ, (K, D)."""
    xp, count = lib.xp, numbers.shape[0]
    base = max(math.ceil(count ** (1 / width)) - 1, 1)
    while base**width < count:
        base += 1
    # What stands above every number would leave the integers' range.
    places = [min(base**position, count) for position in range(width)]
    rows = xp.astype(numbers, xp.int32)[:, None]
    digits = rows // xp.asarray([places], dtype=rows.dtype, **lib.place(rows)) % base
    return lib.astype(digits, numbers.dtype)


def _countable(lib: Backend, n: Array) -> Array:
    """Counts that can be added: 0 for what is none, the largest number for infinity."""
    xp = lib.xp
    largest = xp.full_like(n, float(xp.finfo(n.dtype).max))
    return xp.where(n > 0, xp.where(n < largest, n, largest), xp.zeros_like(n))


def _at_least_one(lib: Backend, x: Array) -> Array:
    total = lib.xp.sum(x)
    return lib.xp.where(total > 0, total, lib.xp.ones_like(total))
