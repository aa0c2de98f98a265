r"""Sums over ranks, and draws on which all ranks agree.

Everything that several devices have to agree on goes through one function, a sum over ranks. A weighted draw from
vectors that lie on different ranks needs an order of the ranks besides; each finds its place in one by a hash of
its own vectors, so that neither a rank's number nor a further collective is needed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.draws import normal, pick, running_sums
from diveq_core.arrays.rows import describe, larger, power_of_two, within
from diveq_core.codebook.spread import each_block

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array

# Places for ranks. Two that hash to one place give the mean of their two vectors, which is rare and does no harm.
_PLACES = 1 << 14


class Ranks:
    """Sum over ranks, and weighted draws from the vectors of all.

    Parameters
    ----------
    lib : Backend
    function : str
        The public function at work, for error texts.
    all_reduce : callable or None
        Sum over ranks, array -> array of the same shape; None where there is one rank.
    """

    def __init__(self, lib: Backend, function: str, all_reduce: Callable[[Array], Array] | None) -> None:
        if all_reduce is not None and not callable(all_reduce):
            raise TypeError(
                f"{function}: all_reduce must be a function that sums an array over ranks, got {describe(all_reduce)}"
            )
        self.lib = lib
        self.function = function
        self.all_reduce = all_reduce

    def sum(self, x: Array) -> Array:
        """``x`` summed over ranks."""
        if self.all_reduce is None:
            return x
        lib, xp = self.lib, self.lib.xp
        # A copy: the function may sum in place, and x may be the caller's own array.
        total = self.all_reduce(lib.copy(x))
        if not lib.owns(total) or tuple(total.shape) != tuple(x.shape) or total.dtype != x.dtype:
            got = f"{total.dtype} {tuple(total.shape)}" if hasattr(total, "shape") else describe(total)
            if total is None:
                got = "None; one that sums in place must return its argument"
            raise ValueError(
                f"{self.function}: all_reduce must return an array like its argument, {x.dtype} {tuple(x.shape)}, "
                f"got {got}"
            )
        if lib.checks_finite and bool(xp.any(xp.isnan(total))) and bool(xp.all(xp.isfinite(x))):
            raise ValueError(f"{self.function}: all_reduce must return sums of what it is given, got NaN")
        return total

    def noise(self, like: Array, shape: tuple[int, ...], noise: Array | None, rng: Any) -> Array:
        """Noise as `normal` has it; where it is drawn all ranks get the same, whatever their seeds."""
        found = normal(self.lib, self.function, like, shape, noise, rng)
        return found if noise is not None else self.agreed(found)

    def agreed(self, noise: Array) -> Array:
        """Noise that each rank drew for itself, made one for all.

        It is the sum over ranks, as long as theirs are on average: normal again where the ranks drew different
        numbers, and what each drew, to rounding, where they drew the same.
        """
        if self.all_reduce is None:
            return noise
        xp = self.lib.xp
        flat = xp.reshape(noise, (math.prod(noise.shape),))
        own = xp.sum(flat * flat)
        total = self.sum(xp.concat([flat, xp.stack([own, xp.ones_like(own)])]))
        joined, mean_square = total[:-2], total[-2] / total[-1]
        square = xp.sum(joined * joined)
        length = xp.sqrt(mean_square / xp.where(square > 0, square, xp.ones_like(square)))
        return xp.reshape(joined * length, tuple(noise.shape))

    def same(self, names: str, *arrays: Array) -> None:
        """Refuse arrays that differ between ranks, where values can be read."""
        lib, xp = self.lib, self.lib.xp
        if self.all_reduce is None:
            return
        own = xp.concat([xp.reshape(x, (math.prod(x.shape),)) for x in arrays])
        if not lib.is_concrete(own):
            return
        info = xp.finfo(own.dtype)
        count = self.sum(xp.ones_like(own[:1]))
        mean = self.sum(own / count)
        # Every rank adds up the same numbers, rounded once a rank, and all come to one answer.
        rounding = 2 * (count + 2) * (float(info.eps) * xp.abs(mean) + float(info.smallest_normal))
        differs = xp.any(xp.abs(own - mean) > rounding)
        if float(self.sum(xp.astype(differs, own.dtype))) > 0:
            raise ValueError(f"{self.function}: {names} must be the same on all ranks, got different ones")

    def draw(self, z: Array, weights: Array, positions: Array) -> Array:
        """Vectors at ``positions`` (M,) in [0, 1) of the cumulative weights of all ranks, (M, D).

        ``weights`` (N,) must be at least 0, and 0 where ``z`` (N, D) is not finite. All ranks pass the same positions
        and get the same vectors, in the dtype of the weights; zeros if all weights are zero.
        """
        lib, xp = self.lib, self.lib.xp
        dtype = weights.dtype
        if z.shape[0] == 0:
            z = xp.zeros((1, z.shape[1]), dtype=dtype, **lib.place(z))
            weights = z[:, 0]
        if self.all_reduce is None:
            rows = lib.astype(xp.take(z, pick(lib, weights, positions), axis=0), dtype)
            return xp.where(xp.sum(weights) > 0, rows, xp.zeros_like(rows))
        mass = xp.sum(weights)
        here = xp.arange(_PLACES, **lib.place(z)) == self._place(z, weights)
        nothing = xp.zeros((_PLACES,), dtype=dtype, **lib.place(z))
        shared = xp.astype(mass > 0, dtype)
        both = self.sum(xp.stack([xp.where(here, mass, nothing), xp.where(here, shared, nothing)]))
        masses, sharers = both[0, :], both[1, :]
        owners = pick(lib, masses, positions)
        cumulative = running_sums(lib, masses)
        # Where in the owner's vectors; rounding may lead a little outside, from where `pick` returns.
        before = xp.take(cumulative - masses, owners)
        own = xp.take(masses, owners)
        inside = (positions * cumulative[-1] - before) / xp.where(own > 0, own, xp.ones_like(own))
        rows = lib.astype(xp.take(z, pick(lib, weights, inside), axis=0), dtype)
        sharing = xp.take(sharers, owners)
        share = xp.where(sharing > 0, 1 / xp.where(sharing > 0, sharing, xp.ones_like(sharing)), 0 * sharing)
        mine = xp.logical_and(xp.take(here, owners), mass > 0)
        return self.sum(xp.where(mine[:, None], rows * share[:, None], xp.zeros_like(rows)))

    def _place(self, z: Array, weights: Array) -> Array:
        """Hash of the vectors that weigh to a place, ()."""
        lib, xp = self.lib, self.lib.xp
        dtype = weights.dtype
        columns = xp.astype(xp.arange(1, z.shape[1] + 1, **lib.place(z)), dtype)
        rows = xp.astype(xp.arange(1, z.shape[0] + 1, **lib.place(z)), dtype)
        # Sines at incommensurable steps; the square root keeps the sum of any number of vectors of order one.
        columns, rows = xp.sin(columns * 12.9898)[None, :], 1.5 + xp.sin(rows * 78.233)
        size = total = xp.zeros((), dtype=dtype, **lib.place(z))

        def weighed(z: Array, weights: Array) -> Array:
            z = lib.astype(z, dtype)
            return xp.where(weights[:, None] > 0, z, xp.zeros_like(z))

        def look(z: Array, weights: Array) -> None:
            nonlocal size
            size = larger(lib, size, xp.max(xp.abs(weighed(z, weights))))

        def add(z: Array, weights: Array, rows: Array) -> None:
            nonlocal total
            y = weighed(z, weights) / unit
            total = total + xp.sum(xp.sum(y * columns, axis=1) * rows)

        each_block(lib, look, z, weights)
        unit = power_of_two(lib, size)
        each_block(lib, add, z, weights, rows)
        phase = total * (437.58 / math.sqrt(math.prod(z.shape)))
        # Ranks whose vectors are multiples of each other go apart by the exponent. All is whole from here on, since a
        # compiler may compute this twice, and round otherwise.
        place = within(lib, xp.floor((phase - xp.floor(phase)) * _PLACES), 0, _PLACES - 1)
        place = place + xp.round(xp.log2(unit)) * 7919
        place = place - xp.floor(place / _PLACES) * _PLACES
        return xp.astype(within(lib, place, 0, _PLACES - 1), xp.arange(1, **lib.place(z)).dtype)


def finite_rows(lib: Backend, z: Array) -> tuple[Array, Array]:
    """``z`` (N, D) with zeros for the rows that are not finite, and which rows are, (N,)."""
    xp = lib.xp
    # Where values can be read, most often in one pass.
    if lib.reads_free(z) and lib.all_finite(z):
        return z, xp.ones((z.shape[0],), dtype=xp.bool, **lib.place(z))
    finite = xp.all(xp.isfinite(z), axis=1)
    return xp.where(finite[:, None], z, xp.zeros_like(z)), finite
