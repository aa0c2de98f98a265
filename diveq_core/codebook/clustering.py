r"""k-means and k-means++: a first codebook from vectors, by the library's own search.

All of it happens in a frame in which the vectors have zero mean and order one, so that an offset or a scale
costs no digits, and with sums over ranks where there are several.
"""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any, NamedTuple

from diveq_core.arrays.checks import check_pair, checked_count
from diveq_core.arrays.registry import backend_of, quiet
from diveq_core.codebook.lloyd import Frame

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.rows import Array


class KMeans(NamedTuple):
    """What `kmeans` gives."""

    codebook: Array
    """Codewords, (K, D), in the dtype of the vectors."""

    indices: Array
    """Index of the codeword of each vector, (...); -1 for a vector that is not finite."""

    inertia: Array
    """Sum of squared distances of all ranks' vectors to their codewords, ()."""


@quiet
def kmeans_plus_plus(
    z: Array,
    count: int,
    /,
    *,
    noise: Array | None = None,
    rng: Any = None,
    all_reduce: Callable[[Array], Array] | None = None,
) -> Array:
    r"""Vectors that lie apart, as a first codebook: greedy k-means++.

    .. math:: P(z_n) \propto \min_{j < k} \|z_n - E_j\|^2

    Of :math:`T = 2 + \lfloor\ln K\rfloor` vectors drawn so, the one becomes :math:`E_k` that leaves the least inertia.

    Parameters
    ----------
    z : array (..., D)
        Vectors in any real floating dtype; those that are not finite are left out.
    count : int
        Size K of the codebook. More than there are distinct vectors gives repeated codewords.
    noise : array (K, T, 2), optional
        Standard normal numbers, whose angles are the draws. The same noise gives the same in every library, but
        for ties by rounding.
    rng : optional
        The library's own generator, as in `quantize`. Ranks agree on what they draw, whatever their seeds; a given
        ``noise`` must be the same on all.
    all_reduce : callable, optional
        Sum over ranks, array -> array of the same shape; it may sum in place. The draws are as from the joined vectors,
        of which a rank may have none.

    Returns
    -------
    array (K, D)
        In the dtype of ``z``.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit, or, where values can be read, no vector is finite.

    References
    ----------
    Arthur, Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007, section 2.2 and its conclusion.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> z = np.array([[0.0], [0.1], [10.0], [10.1]])
    >>> np.sort(np.round(dq.kmeans_plus_plus(z, 2, rng=np.random.default_rng(0)), -1).ravel())
    array([ 0., 10.])
    """
    frame = Frame("kmeans_plus_plus", z, all_reduce)
    return frame.restore(frame.spread_out(count, noise, rng))


@quiet
def kmeans(
    z: Array,
    codebook: int | Array,
    /,
    *,
    iterations: int = 25,
    noise: Array | None = None,
    rng: Any = None,
    all_reduce: Callable[[Array], Array] | None = None,
) -> KMeans:
    r"""Codebook of least squared error, by Lloyd's iterations.

    .. math:: i_n = \arg\min_k \|z_n - E_k\|, \qquad E_k \leftarrow \frac{1}{c_k} \sum_{n : i_n = k} z_n

    Parameters
    ----------
    z : array (..., D)
        Vectors in any real floating dtype; those that are not finite are left out.
    codebook : int or array (K, D)
        Size of the codebook, which then begins by `kmeans_plus_plus`, or the codebook to begin with.
    iterations : int, default 25
        At most so many; fewer if nothing changes any more.
    noise, rng, all_reduce
        As in `kmeans_plus_plus`; random numbers are drawn for the beginning only. A codebook to begin with must be
        the same on all ranks, and every rank must have a vector.

    Returns
    -------
    KMeans
        ``codebook`` (K, D), ``indices`` (...) and ``inertia`` (), of that codebook.

    Raises
    ------
    TypeError, ValueError
        If libraries, dtypes or shapes do not fit, or, where values can be read, no vector is finite.

    Notes
    -----
    A codeword without vectors goes to a vector far from its own codeword: the j-th of M to the middle of the j-th of
    M equal parts of the cumulative squared distance. With fewer distinct vectors than codewords, some stay unused.

    References
    ----------
    Lloyd, "Least squares quantization in PCM", IEEE Trans. Information Theory 28 (1982), section II.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> z = np.array([[0.0], [2.0], [10.0], [12.0]])
    >>> found = dq.kmeans(z, 2, rng=np.random.default_rng(0))
    >>> np.sort(found.codebook.ravel()), round(float(found.inertia), 6)
    (array([ 1., 11.]), 4.0)
    """
    return clustered("kmeans", z, codebook, iterations, noise, rng, all_reduce)


def clustered(
    function: str,
    z: Array,
    codebook: int | Array,
    iterations: int,
    noise: Array | None,
    rng: Any,
    all_reduce: Callable[[Array], Array] | None,
) -> KMeans:
    """`kmeans`, for a public function of another name."""
    iterations = checked_count(function, "iterations", iterations, at_least=0)
    frame = Frame(function, z, all_reduce)
    lib, xp = frame.lib, frame.lib.xp
    if isinstance(codebook, numbers.Integral):
        e = frame.spread_out(codebook, noise, rng)
        begin = None
    else:
        backend_of(function, z=z, codebook=codebook)
        check_pair(lib, function, z, codebook)
        begin = lib.stop_gradient(codebook)
        e = first = frame.enter(begin)
    number = xp.full((1,), iterations, dtype=e.dtype, **lib.place(e))
    frame.ranks.same("iterations and the codebook to begin with", e, number)
    for _ in range(iterations):
        moved = frame.lloyd(e)
        if lib.is_concrete(moved) and bool(xp.all(moved == e)):
            break
        e = moved
    found = frame.restore(e)
    if begin is not None:
        # A codeword that did not move is as it was, bit for bit.
        begin = lib.astype(begin, z.dtype)
        kept = xp.all(xp.logical_and(e == first, xp.isfinite(begin)), axis=1, keepdims=True)
        found = xp.where(kept, begin, found)
    # Of the codebook as 16 bits hold it.
    e = e if e.dtype == z.dtype else frame.enter(found)
    indices = frame.nearest(e)
    inertia = frame.ranks.sum(xp.sum(frame.squared_distances(e, indices)))
    # Of no vector there is a row that stands for none.
    shaped = xp.reshape(indices if math.prod(z.shape[:-1]) else indices[:0], tuple(z.shape[:-1]))
    return KMeans(found, shaped, inertia * frame.size * frame.size * frame.inverse * frame.inverse)
