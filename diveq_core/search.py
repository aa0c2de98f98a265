r"""Which codeword is nearest? Exact search by matrix products, never differentiated.

.. math:: i = \arg\min_k \|z - E_k\|^2 = \arg\min_k \tfrac12\|e_k\|^2 - \langle y, e_k\rangle,
          \qquad y = (z - c)/s,\ e_k = (E_k - c)/s

The expansion is what makes the search a matrix product, and what loses every digit when codewords share
an offset that is large beside their spread. Subtracting one centre :math:`c` from both sides first
removes the offset; dividing by a power of two :math:`s` keeps squares in range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diveq_core._array import power_of_two

if TYPE_CHECKING:
    from diveq_core._array import Array
    from diveq_core.backend import Backend

# Codewords are brought to about 2^-HEADROOM, leaving vectors room to lie far outside the codebook.
_HEADROOM = 24

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
    """Centre (D,) and inverse scale () in which the codebook has zero mean and order one.

    The centre is the mean rounded to a multiple of the spread: then the subtraction is exact for
    codewords that share an offset, and data on a coarse grid keep their exact ties.
    """
    xp = lib.xp
    # Divided first: the sum of large codewords may overflow.
    mean = xp.sum(codebook * (1 / codebook.shape[0]), axis=0)
    spread = power_of_two(lib, xp.max(xp.abs(codebook - mean)))
    rounded = xp.round(mean / spread) * spread
    centre = xp.where(xp.isfinite(rounded), rounded, mean)
    # Many devices take a subnormal number for zero.
    smallest = xp.full_like(spread, float(xp.finfo(spread.dtype).smallest_normal))
    inverse_scale = (1 / spread) * 2.0**-_HEADROOM
    return centre, xp.where(inverse_scale < smallest, smallest, inverse_scale)


def extended_codebook(lib: Backend, codebook: Array, centre: Array, inverse_scale: Array) -> Array:
    """Rows ``(-e_k, |e_k|^2 / 2)``, (K, D + 1): a product with ``(y, 1)`` is the whole score."""
    xp = lib.xp
    e = (codebook - centre) * inverse_scale
    half = xp.sum(e * e, axis=1, keepdims=True) * 0.5
    return xp.concat([-e, half], axis=1)


def first_copies(lib: Backend, codebook: Array) -> Array:
    """Lowest index of a codeword equal to codeword k, (K,).

    A matrix product may round equal columns differently, so equal codewords are found here, by sorting
    one key of each row and comparing neighbours.
    """
    xp = lib.xp
    positions = xp.arange(codebook.shape[0], **lib.place(codebook))
    order = xp.astype(lib.stable_argsort(lib.row_keys(codebook)), positions.dtype)
    rows = xp.take(codebook, order, axis=0)
    differs = xp.any(rows[1:, :] != rows[:-1, :], axis=1)
    group = xp.concat(
        [
            xp.zeros((1,), dtype=positions.dtype, **lib.place(codebook)),
            xp.cumulative_sum(xp.astype(differs, positions.dtype)),
        ]
    )
    first_in_group = xp.take(order, xp.searchsorted(group, group), axis=0)
    return xp.take(first_in_group, xp.argsort(order), axis=0)


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
    centre, inverse_scale = frame(lib, codebook)
    extended = xp.permute_dims(extended_codebook(lib, codebook, centre, inverse_scale), (1, 0))
    canonical = first_copies(lib, codebook)
    rows = rows_per_chunk(lib, *codebook.shape)
    found = [xp.zeros((0,), dtype=canonical.dtype, **lib.place(canonical))]
    for start in range(0, z.shape[0], rows):
        stop = min(start + rows, z.shape[0])
        y = (lib.astype(z[start:stop, :], dtype) - centre) * inverse_scale
        scores = lib.matmul(xp.concat([y, xp.ones_like(y[:, :1])], axis=1), extended)
        chosen = xp.take(canonical, xp.astype(xp.argmin(scores, axis=1), canonical.dtype), axis=0)
        finite = xp.isfinite(xp.min(scores, axis=1))
        found.append(xp.where(finite, chosen, xp.full_like(chosen, -1)))
    return xp.concat(found)
