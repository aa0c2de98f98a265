r"""Which codeword is nearest? Exact search by matrix products, never differentiated.

.. math:: i = \arg\min_k \|z - E_k\|^2 = \arg\min_k \tfrac12\|e_k\|^2 - \langle y, e_k\rangle,
          \qquad y = s (z - c),\ e_k = s (E_k - c)

The expansion is what makes the search a matrix product, and what loses every digit when codewords share
an offset that is large beside their spread. Subtracting one centre :math:`c` from both sides first
removes the offset; a power of two :math:`s` keeps squares in range.

Whatever computes it, a library's product or a fused kernel, keeps to one promise. With :math:`\epsilon` the spacing of
the compute dtype at 1, the chosen codeword a and the nearest b satisfy

.. math:: \|z - E_a\|^2 - \|z - E_b\|^2 \le (2\sqrt D + 12)\,\epsilon\,(\|z - c\| + l)\,l, \qquad
          l = \max(\|E_a - c\|, \|E_b - c\|)

The centre c is the mean of the codewords, without those far from the others. So the length of a vector far outside the
codebook costs one factor only, where a score with :math:`\|y\|^2` in it would
lose two. Equal codewords give the lowest index. Lengths below :math:`2^{-80}` of the longest may count as zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from diveq_core.arrays.rows import one_where, power_of_two, smaller, zero_rows

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array

# Codewords are brought to about 2^HEADROOM: squares of the shortest that matter stay normal numbers, and products
# with vectors up to 2^REACH stay finite.
_HEADROOM, REACH = 30, 60

# How many times as far from the mean as on average a codeword is left out of the centre.
_FAR = 4.0

# How often codewords are sorted whose keys meet by chance.
_ROUNDS = 64

# Scores of a chunk that a large cache holds, 8 MiB in float32; fewer rows would not fill the product.
_SCORES_IN_CACHE = 1 << 21


def rows_per_chunk(lib: Backend, count: int, width: int) -> int:
    """Rows of vectors to compare at a time with ``count`` codewords of ``width`` entries.

    Enough for the product to pay for its pass over the codebook, few enough for the scores to stay in
    cache; never more scores than ``lib.scores_per_chunk``.
    """
    wanted = min(max(4 * width, _SCORES_IN_CACHE // count, lib.rows_at_least), 32 * lib.rows_at_least)
    return max(min(wanted, lib.scores_per_chunk // count), 1)


def frame(lib: Backend, codebook: Array) -> tuple[Array, Array]:
    """Centre c (1, D) and power of two s () in which the codebook has zero mean and order 2^HEADROOM.

    The centre is the mean of all codewords but those far from the others, rounded to a multiple of the spread of these:
    then the subtraction is exact for codewords that share an offset, and data on a coarse grid keep their exact ties.
    A codeword far away would draw the mean to where there are no others.
    """
    xp, share = lib.xp, 1 / codebook.shape[0]
    # Divided first: the sum of large codewords may overflow.
    mean = xp.sum(codebook * share, axis=0, keepdims=True)
    apart = xp.max(xp.abs(codebook - mean), axis=1, keepdims=True)
    # In units of the largest, so that nothing leaves the range.
    reach = xp.max(apart)
    relative = apart / one_where(lib, reach == 0, reach)
    far = relative > _FAR * xp.sum(relative * share)
    # Where reading values is free, the usual case is spared a second look.
    if not lib.checks_finite or bool(xp.any(far)):
        kept = xp.sum(xp.astype(~far, codebook.dtype))
        mean = xp.sum(zero_rows(lib, far, codebook) * (1 / kept), axis=0, keepdims=True)
        apart = xp.max(xp.abs(codebook - mean), axis=1, keepdims=True)
    # A difference of large codewords may overflow.
    apart = smaller(lib, apart, xp.full_like(apart, float(xp.finfo(apart.dtype).max)))
    spread, near = power_of_two(lib, xp.max(apart)), power_of_two(lib, xp.max(zero_rows(lib, far, apart)))
    rounded = xp.round(mean / near) * near
    centre = xp.where(xp.isfinite(rounded), rounded, mean)
    # In two steps, neither of which leaves the normal numbers. The smallest spreads get less than HEADROOM.
    limit = xp.full_like(spread, 2.0**90 if spread.dtype == xp.float32 else 2.0**960)
    above, below = 1 / (xp.where(spread < 1, xp.ones_like(spread), spread) * 2.0**-_HEADROOM), 1 / spread
    return centre, xp.where(spread < 1, xp.where(below < limit, below, limit) * 2.0**_HEADROOM, above)


def framed(lib: Backend, x: Array, centre: Array, scale: Array) -> Array:
    """``s (x - c)`` for rows near a codebook; the difference of large numbers is taken of their quarters."""
    xp = lib.xp
    part = xp.where(scale < 1, xp.full_like(scale, 0.25), xp.ones_like(scale))
    return (x * part - centre * part) * (scale / part)


def framed_rows(lib: Backend, z: Array, centre: Array, scale: Array) -> tuple[Array, Array]:
    """Vectors in the frame of a codebook, y (N, D), and the weight w (N, 1) of ``|e|^2 / 2`` beside them.

    A vector whose products might overflow is brought to order one by a power of two of its own, which w is too: its
    scores are the same but for that factor. Finite vectors so give finite scores, and others none.
    """
    xp = lib.xp
    d = z * 0.25 - centre * 0.25
    size = xp.max(xp.abs(d), axis=1, keepdims=True)
    inside = size * scale <= 2.0 ** (REACH - 2)
    own = power_of_two(lib, size)
    y = xp.where(inside, framed(lib, z, centre, scale), d / own)
    return y, xp.where(inside, xp.ones_like(size), (0.25 / scale) / own)


def extended_codebook(lib: Backend, codebook: Array, centre: Array, scale: Array) -> Array:
    """Rows ``(-e_k, |e_k|^2 / 2)``, (K, D + 1): a product with ``(y, w)`` is the whole score."""
    xp = lib.xp
    e = framed(lib, codebook, centre, scale)
    half = xp.sum(e * e, axis=1, keepdims=True) * 0.5
    return xp.concat([-e, half], axis=1)


def first_copies(lib: Backend, codebook: Array) -> Array:
    """Lowest index of a codeword equal to codeword k, (K,).

    A matrix product may round equal columns differently, so equal codewords are found here, by sorting
    one key of each row: the first of its key is a row's first copy if it is equal to it. Others look again among
    those of their key that are left, where values can be read; elsewhere keys that meet by chance stay apart.
    """
    xp = lib.xp
    keys = lib.row_keys(codebook)
    own = lib.as_indices(xp.arange(codebook.shape[0], **lib.place(codebook)))
    found, left = own, own >= 0
    for _ in range(_ROUNDS):
        first = lib.as_indices(lib.first_equal(keys))
        equal = (first == own) | xp.all(xp.take(codebook, first, axis=0) == codebook, axis=1)
        found, left = xp.where(left & equal, first, found), left & ~equal
        if not lib.is_concrete(codebook) or not bool(xp.any(left)):
            break
        keys = xp.where(left, first, own + codebook.shape[0])
    return found


class Prepared(NamedTuple):
    """What a search reads of a codebook."""

    centre: Array
    """(1, D)."""

    scale: Array
    """()."""

    extended: Array
    """(D + 1, K), of `extended_codebook`."""

    canonical: Array
    """(K,), of `first_copies`."""


def prepared(lib: Backend, codebook: Array) -> Prepared:
    """A codebook in its compute dtype, prepared by the standard alone."""
    centre, scale = frame(lib, codebook)
    extended = lib.xp.permute_dims(extended_codebook(lib, codebook, centre, scale), (1, 0))
    return Prepared(centre, scale, extended, first_copies(lib, codebook))


def nearest_at_once(lib: Backend, z: Array, words: Prepared) -> Array:
    """Search of all vectors in one product, (N, D) in the dtype of what was prepared -> (N,)."""
    xp = lib.xp
    scores = lib.matmul(xp.concat(framed_rows(lib, z, words.centre, words.scale), axis=1), words.extended)
    chosen = xp.take(words.canonical, xp.astype(xp.argmin(scores, axis=1), words.canonical.dtype), axis=0)
    return xp.where(xp.isfinite(xp.min(scores, axis=1)), chosen, xp.full_like(chosen, -1))


def nearest_rows(lib: Backend, z: Array, codebook: Array) -> Array:
    """Search in chunks of rows by the standard alone.

    Parameters
    ----------
    z : array (N, D)
        In any real floating dtype; compared in at least float32.
    codebook : array (K, D)

    Returns
    -------
    integer array (N,)
        -1 for a row that is not finite, or for all rows if the codebook is not.
    """
    xp = lib.xp
    dtype = lib.compute_dtype(lib.result_dtype(z, codebook))
    codebook = lib.astype(codebook, dtype)
    words, rows = prepared(lib, codebook), rows_per_chunk(lib, *codebook.shape)
    found = [words.canonical[:0]]
    for start in range(0, z.shape[0], rows):
        stop = min(start + rows, z.shape[0])
        found.append(nearest_at_once(lib, lib.astype(z[start:stop, :], dtype), words))
    return xp.concat(found)
