r"""Lloyd's iterations and greedy k-means++, over vectors of order one.

.. math:: i_n = \arg\min_k \|z_n - E_k\|, \qquad E_k \leftarrow \frac{1}{c_k} \sum_{n : i_n = k} z_n
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import check_floating, checked_count, flat_rows
from diveq_core.arrays.draws import uniform
from diveq_core.arrays.registry import backend_of
from diveq_core.arrays.rows import Array, power_of_two, smaller, within
from diveq_core.codebook.ranks import Ranks
from diveq_core.codebook.spread import reach_of, segment_totals, spread

if TYPE_CHECKING:
    import numbers
    from collections.abc import Callable


class Frame:
    """The vectors, (N, D), with zero mean and order one; what is not finite is zero and not ``valid``."""

    def __init__(self, function: str, z: Array, all_reduce: Callable[[Array], Array] | None) -> None:
        self.lib = lib = backend_of(function, z=z)
        check_floating(lib, function, z=z)
        # Of several ranks one may have none: the others would wait for it.
        empty = z.ndim > 0 and math.prod(z.shape[:-1]) == 0
        if z.ndim < 1 or z.shape[-1] < 1 or (empty and all_reduce is None):
            raise ValueError(
                f"{function}: z must have shape (..., D) with D >= 1 and at least one vector, got {tuple(z.shape)}"
            )
        xp = lib.xp
        self.function, self.dtype = function, z.dtype
        self.ranks = Ranks(lib, function, all_reduce)
        rows, dtype = flat_rows(lib, lib.stop_gradient(z)), lib.compute_dtype(z.dtype)
        if empty:
            # A row that is not finite stands for no vector at all.
            one = xp.ones((1, z.shape[-1]), dtype=z.dtype, **lib.place(z))
            rows = lib.nan_where(one > 0, one)
        self.valid = lib.by_rows(lambda z: xp.all(xp.isfinite(z), axis=1), rows)
        self.weights = xp.astype(self.valid, dtype)
        # Where values cannot be read there may be no vector: the codebook is then zeros rather than NaN.
        total, self.scale, mean, deviation, _ = spread(self.ranks, rows, self.weights, dtype)
        # Only an offset is taken away. A mean that a vector far away or two distant groups draw to where there are no
        # others would cost the digits of those near zero.
        offset = xp.max(xp.abs(mean)) > 4 * deviation
        self.mean = xp.where(offset, mean, xp.zeros_like(mean))
        if lib.is_concrete(total) and float(total) == 0:
            given = math.prod(z.shape[:-1])
            raise ValueError(f"{function}: z must have at least one finite vector, got none of {given}")
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

        def counted(y: Array, weights: Array, indices: Array) -> tuple[Array, Array]:
            return xp.concat([y, weights[:, None]], axis=1), indices

        total = self.ranks.sum(segment_totals(lib, e, counted, self.y, self.weights, indices))
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
