"""Overflow-free row geometry and exact scales, in array API functions only."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend

Array = Any
"""An array of any supported library."""

# Far within the range of float32, and d over it too.
_LARGE = 1e15


def describe(x: object) -> str:
    """``module.type`` of an object, for error texts."""
    kind = type(x)
    return f"{kind.__module__}.{kind.__qualname__}"


def check_option(owner: object, name: str, *, above: float | None = None, at_least: float | None = None) -> None:
    """Check that a frozen dataclass's field is a finite real number in range, and make it a float.

    A plain float takes the dtype of the arrays it meets, which a NumPy scalar would not.
    """
    function, value = type(owner).__name__, getattr(owner, name)
    lowest = -math.inf if above is None else above
    if type(value) is float and lowest < value < math.inf and (at_least is None or value >= at_least):
        return
    bound = (
        "" if above is None and at_least is None else f" {'>' if at_least is None else '>='} {above or at_least or 0:g}"
    )
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{function}: {name} must be a real number{bound}, got {describe(value)}")
    number = float(value)
    too_low = (above is not None and number <= above) or (at_least is not None and number < at_least)
    if not math.isfinite(number) or too_low:
        raise ValueError(f"{function}: {name} must be finite{bound and ' and' + bound}, got {number}")
    object.__setattr__(owner, name, number)


def row_scale(lib: Backend, x: Array) -> Array:
    """Exact power of two, (N, 1), that makes the squares of a row's entries representable.

    Products of it round nothing, so scaling by it changes no digit of the result. 1 for a row of zeros.
    """
    xp = lib.xp
    half_range = 80.0 if x.dtype == xp.float32 else 600.0
    limit = 2.0 ** (half_range / 2)
    largest = xp.max(xp.abs(lib.stop_gradient(x)), axis=-1, keepdims=True)
    one = xp.ones_like(largest)
    small, large = (largest > 0) & (largest < 1 / limit), largest > limit
    return xp.where(small, one * 2.0**half_range, xp.where(large, one * 2.0**-half_range, one))


def derivative_scale(lib: Backend, x: Array) -> Array | float:
    """`row_scale` where derivatives are recorded, since theirs hold squares; 1 where only values are wanted."""
    return row_scale(lib, x) if lib.records(x) else 1.0


def one_where(lib: Backend, condition: Array, x: Array) -> Array:
    """``x`` with 1 where the condition holds: a divisor, or the argument of a root or logarithm."""
    return lib.xp.where(condition, lib.xp.ones_like(x), x)


def zero_rows(lib: Backend, condition: Array, x: Array) -> Array:
    """``x`` (N, D) with zero in the rows where the condition (N, 1) holds, its derivatives likewise."""
    return lib.xp.where(condition, lib.xp.zeros_like(x), x)


def side_by_side(lib: Backend, *arrays: Array) -> Array:
    """Arrays (N, D) as one, (N, k D); stacked, since torch's older vmap knows no concatenation."""
    count, width = arrays[0].shape
    return arrays[0] if len(arrays) == 1 else lib.xp.reshape(lib.xp.stack(arrays, axis=1), (count, len(arrays) * width))


def larger(lib: Backend, x: Array, y: Array) -> Array:
    """The larger of two arrays, entry by entry; the standard has ``maximum`` since 2023.12 only."""
    return lib.xp.where(x < y, y, x)


def smaller(lib: Backend, x: Array, y: Array) -> Array:
    """The smaller of two arrays, entry by entry."""
    return lib.xp.where(x > y, y, x)


def within(lib: Backend, x: Array, lowest: float, highest: float) -> Array:
    """``x`` in [lowest, highest]; NaN stays. The standard has ``clip`` since 2023.12 only."""
    xp = lib.xp
    x = xp.where(x < lowest, xp.full_like(x, lowest), x)
    return xp.where(x > highest, xp.full_like(x, highest), x)


class Direction(NamedTuple):
    """The unit vector ``y / |y|`` of each row in two factors, so that products with it never write it out."""

    y: Array
    """A multiple of the unit vector, (N, D)."""

    inverse: Array
    """1 / |y|, (N, 1); 0 for a zero row, whose direction is 0."""

    def dot(self, lib: Backend, x: Array) -> Array:
        """<x, u>, (N, 1)."""
        return lib.dot(x, self.y) * self.inverse

    def times(self, c: Array | float) -> Array:
        """c u, (N, D), for c (N, 1)."""
        return self.y * (c * self.inverse)

    def added_to(self, lib: Backend, x: Array, c: Array) -> Array:
        """The sum x + c u, (N, D), for c (N, 1)."""
        return lib.add_scaled(x, self.y, c * self.inverse)

    def stopped(self, lib: Backend) -> Direction:
        """sg[u]."""
        return Direction(lib.stop_gradient(self.y), lib.stop_gradient(self.inverse))


def noised(lib: Backend, d: Array, noise: Array, sigma: float) -> Array:
    """A vector in the direction of ``d + sigma * noise``, (N, D)."""
    if sigma > _LARGE:
        # Over a power of two, which rounds nothing, in two halves, each of which any dtype has.
        mantissa, exponent = math.frexp(sigma)
        half = exponent // 2
        return lib.add_scaled(d * 2.0**-half * 2.0 ** (half - exponent), noise, mantissa)
    return lib.add_scaled(d, noise, sigma)


def direction(lib: Backend, x: Array) -> tuple[Array, Direction]:
    """Length (N, 1) and direction of each row; a zero row has length 0 and direction 0.

    The derivative at a zero row is zero rather than NaN, in every order: the square root never sees
    a zero. Rows are brought to order one by a power of two first, so nothing overflows or underflows.
    """
    scale = row_scale(lib, x)
    y = x * scale
    squared = lib.dot(y, y)
    zero = squared == 0
    length = lib.xp.sqrt(one_where(lib, zero, squared))
    # Written out: the small entries of y times small cotangents would be lost where a device flushes to zero.
    u, one = zero_rows(lib, zero, y / length), lib.xp.ones_like(length)
    return zero_rows(lib, zero, length / scale), Direction(u, one)


def lengths_in_range(shortest: float, longest: float, *, double: bool) -> bool:
    """Whether lengths of rows show that their squares neither overflowed nor lost digits."""
    limit = 1e150 if double else 1e15
    return 1 / limit < shortest and longest < limit


def in_blocks(
    empty: Callable[..., Array], entries: int, function: Callable[..., Array], *arrays: Array | None
) -> Array:
    """``function`` of blocks of rows of the arrays, of about so many entries, in one result.

    It is made by ``empty(block, shape)``, in the dtype and on the device of a block.

    Temporaries of one block stay in cache, where those of all rows would each cost a trip to memory.
    """
    count, width = next((x.shape[0], x.shape[-1]) for x in arrays if x is not None)
    rows = max(entries // width, 1)
    if count <= rows:
        return function(*arrays)
    result = None
    for start in range(0, count, rows):
        here = slice(start, start + rows)
        block = function(*(None if x is None else x[here] for x in arrays))
        if result is None:
            result = empty(block, (count, *block.shape[1:]))
        result[here] = block
    return result


def safe_inverse(lib: Backend, length: Array, scale: Array | float | None = None) -> Array:
    """``scale / length``, the inverse of a length that a power of two has brought to order one; None stands for 1.

    A length of 0 is read as 1, so that no order of derivative is infinite there; one below the normal numbers as
    the smallest of these, whose inverse is finite.
    """
    xp = lib.xp
    # A default that is a number becomes an input of its graph where torch.compile takes sizes and numbers as open.
    scale = 1.0 if scale is None else scale
    floor = xp.ones_like(length) * scale * float(xp.finfo(length.dtype).smallest_normal)
    inverse = 1 / one_where(lib, length == 0, xp.where(length < floor, floor, length))
    # Apart, so that the derivative never multiplies the scale by the square of the inverse alone.
    return inverse * scale


def safe_log(lib: Backend, r: Array) -> Array:
    """ln r, with ln 0 read as 0 and its derivative there as 0."""
    return lib.xp.log(one_where(lib, r == 0, r))


def power_of_two(lib: Backend, x: Array) -> Array:
    """Largest normal power of two not above a positive 0-d array; 1 for zero and non-finite input.

    Built from comparisons, so it is exact also where a library's ``exp2`` or ``pow`` is not.
    """
    xp = lib.xp
    # Greedy steps adding up to the smallest normal exponent, so that no product is subnormal.
    steps = (63, 32, 16, 8, 4, 2, 1) if x.dtype == xp.float32 else (511, 256, 128, 64, 32, 16, 8, 4, 2, 1)
    one = xp.ones_like(x)
    up = down = one
    for step in steps:
        up = xp.where(x >= up * 2.0**step, up * 2.0**step, up)
        down = xp.where(x < down * 2.0**-step * 2, down * 2.0**-step, down)
    usable = xp.isfinite(x) & (x > 0)
    return xp.where(usable, xp.where(x >= 1, up, down), one)
