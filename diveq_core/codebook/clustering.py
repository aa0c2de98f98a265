r"""k-means and k-means++: a first codebook from vectors, by the library's own search.

All of it happens in a frame in which the vectors have zero mean and order one, so that an offset or a scale
costs no digits, and with sums over ranks where there are several.
"""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any, NamedTuple

from diveq_core.arrays.checks import check_floating, check_pair, checked_count, flat_rows
from diveq_core.arrays.draws import uniform
from diveq_core.arrays.registry import backend_of, quiet
from diveq_core.arrays.rows import Array, power_of_two, smaller, within
from diveq_core.codebook.ranks import Ranks
from diveq_core.codebook.spread import each_block, reach_of, spread

if TYPE_CHECKING:
    from collections.abc import Callable


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
        Sum over ranks, array -> array of the same shape; it may sum in place. The draws are as from the joined vectors.

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
    frame = _Frame("kmeans_plus_plus", z, all_reduce)
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
    iterations = checked_count("kmeans", "iterations", iterations, at_least=0)
    frame = _Frame("kmeans", z, all_reduce)
    lib, xp = frame.lib, frame.lib.xp
    if isinstance(codebook, numbers.Integral):
        e = frame.spread_out(codebook, noise, rng)
        begin = None
    else:
        backend_of("kmeans", z=z, codebook=codebook)
        check_pair(lib, "kmeans", z, codebook)
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
    shaped = xp.reshape(indices, tuple(z.shape[:-1]))
    return KMeans(found, shaped, inertia * frame.size * frame.size * frame.inverse * frame.inverse)


class _Frame:
    """The vectors, (N, D), with zero mean and order one; what is not finite is zero and not ``valid``."""

    def __init__(self, function: str, z: Array, all_reduce: Callable[[Array], Array] | None) -> None:
        self.lib = lib = backend_of(function, z=z)
        check_floating(lib, function, z=z)
        if z.ndim < 1 or z.shape[-1] < 1 or math.prod(z.shape) == 0:
            raise ValueError(
                f"{function}: z must have shape (..., D) with D >= 1 and at least one vector, got {tuple(z.shape)}"
            )
        xp = lib.xp
        self.function, self.dtype = function, z.dtype
        self.ranks = Ranks(lib, function, all_reduce)
        rows, dtype = flat_rows(lib, lib.stop_gradient(z)), lib.compute_dtype(z.dtype)
        self.valid = lib.by_rows(lambda z: xp.all(xp.isfinite(z), axis=1), rows)
        self.weights = xp.astype(self.valid, dtype)
        # Where values cannot be read there may be no vector: the codebook is then zeros rather than NaN.
        total, self.scale, mean, deviation, _ = spread(self.ranks, rows, self.weights, dtype)
        # Only an offset is taken away. A mean that a vector far away or two distant groups draw to where there are no
        # others would cost the digits of those near zero.
        offset = xp.max(xp.abs(mean)) > 4 * deviation
        self.mean = xp.where(offset, mean, xp.zeros_like(mean))
        if lib.is_concrete(total) and float(total) == 0:
            raise ValueError(f"{function}: z must have at least one finite vector, got none of {rows.shape[0]}")
        self.inverse, self.size = 1 / self.scale, power_of_two(lib, deviation)

        def entered(z: Array, valid: Array) -> Array:
            y = (lib.astype(z, dtype) * self.scale - self.mean) * (1 / self.size)
            return xp.where(valid[:, None], y, xp.zeros_like(y))

        self.y = lib.by_rows(entered, rows, self.valid)

    def enter(self, codebook: Array) -> Array:
        """A codebook in this frame."""
        lib, xp = self.lib, self.lib.xp
        words = lib.astype(codebook, self.y.dtype)
        e = (words * self.scale - self.mean) * (1 / self.size)
        # Far beyond all vectors, and squares of it do not overflow.
        limit = reach_of(lib, e.dtype) ** 1.5
        # A codeword that is not finite would take part in no comparison; as the mean it takes part in all.
        finite = xp.all(xp.isfinite(words), axis=1, keepdims=True)
        return xp.where(finite, within(lib, e, -limit, limit), xp.zeros_like(e))

    def restore(self, e: Array) -> Array:
        """A codebook in the frame of the vectors, in their dtype; means of finite vectors overflow by rounding only."""
        largest = float(self.lib.xp.finfo(self.dtype).max)
        words = (e * self.size + self.mean) * self.inverse
        return self.lib.astype(within(self.lib, words, -largest, largest), self.dtype)

    def nearest(self, e: Array) -> Array:
        """Index of the nearest codeword, (N,); -1 where not valid."""
        found = self.lib.search(self.y, e)
        return self.lib.xp.where(self.valid, found, self.lib.xp.full_like(found, -1))

    def squared_distances(self, e: Array, indices: Array) -> Array:
        """Squared distance of each vector to its codeword, (N,); 0 where not valid."""
        lib, xp = self.lib, self.lib.xp
        zeros = xp.zeros_like(indices)

        def rows(y: Array, indices: Array) -> Array:
            d = y - lib.take_rows(e, indices)
            return lib.dot(d, d)

        squares = lib.by_rows(rows, self.y, xp.where(self.valid, indices, zeros))[:, 0]
        return xp.where(self.valid, squares, xp.zeros_like(squares))

    def lloyd(self, e: Array) -> Array:
        """One iteration."""
        lib, xp = self.lib, self.lib.xp
        indices = self.nearest(e)
        total = xp.zeros((e.shape[0], e.shape[1] + 1), dtype=e.dtype, **lib.place(e))

        def add(y: Array, weights: Array, indices: Array) -> None:
            nonlocal total
            total = lib.segment_add(total, xp.concat([y, weights[:, None]], axis=1), indices)

        each_block(lib, add, self.y, self.weights, indices)
        total = self.ranks.sum(total)
        c = total[:, -1:]
        moved = xp.where(c > 0, total[:, :-1] / xp.where(c > 0, c, xp.ones_like(c)), e)
        empty = c[:, 0] == 0
        if lib.is_concrete(empty) and not bool(xp.any(empty)):
            return moved
        squares = self.squared_distances(e, indices)
        far = xp.astype(empty, e.dtype)
        number = xp.sum(far)
        positions = (lib.cumulative_sum(far) - 0.5) / xp.where(number > 0, number, xp.ones_like(number))
        seeds = self.ranks.draw(self.y, squares, positions)
        apart = self.ranks.sum(xp.sum(squares)) > 0
        return xp.where(xp.logical_and(empty, apart)[:, None], seeds, moved)

    def spread_out(self, count: int | numbers.Integral, noise: Array | None, rng: Any) -> Array:
        """Greedy k-means++ in this frame, (count, D)."""
        count = checked_count(self.function, "the size of the codebook", count)
        lib, xp, y = self.lib, self.lib.xp, self.y
        trials = 2 + int(math.log(count))
        positions = uniform(lib, self.ranks.noise(y, (count, trials, 2), noise, rng))
        rounding = 8 * float(xp.finfo(y.dtype).eps)
        squares = lib.by_rows(lambda y: lib.dot(y, y)[:, 0], y)

        def nearer(seeds: Array, closest: Array) -> tuple[Array, Array]:
            """Squared distance to the nearest so far or each seed, (N, T), 0 where rounding hides it; sums (T,)."""
            own = lib.dot(seeds, seeds)
            sums = xp.zeros((seeds.shape[0],), dtype=y.dtype, **lib.place(y))

            def rows(y: Array, squares: Array, closest: Array, valid: Array) -> Array:
                nonlocal sums
                # Seeds first: the long axis is the one that libraries add up fast.
                size = own + squares[None, :]
                d = size - 2 * lib.matmul(seeds, xp.permute_dims(y, (1, 0)))
                d = xp.where(xp.logical_and(d > rounding * size, valid[None, :]), d, xp.zeros_like(d))
                left = smaller(lib, d, closest[None, :])
                sums = sums + xp.sum(left, axis=1)
                return xp.permute_dims(left, (1, 0))

            return lib.by_rows(rows, y, squares, closest, self.valid), self.ranks.sum(sums)

        first = self.ranks.draw(y, self.weights, positions[0, :1])
        left, inertias = nearer(first, xp.full_like(self.weights, float(xp.finfo(self.weights.dtype).max)))
        chosen, closest, inertia = [first], left[:, 0], inertias[0]
        for k in range(1, count):
            seeds = self.ranks.draw(y, xp.where(inertia > 0, closest, self.weights), positions[k, :])
            left, inertias = nearer(seeds, closest)
            best = xp.argmin(inertias, keepdims=True)
            closest, inertia = xp.take(left, best, axis=1)[:, 0], xp.min(inertias)
            chosen.append(xp.take(seeds, best, axis=0))
        return xp.concat(chosen)
