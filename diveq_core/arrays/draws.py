"""Random numbers of other kinds, from the standard normal ones that every library draws; and weighted choice."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import check_floating
from diveq_core.arrays.registry import backend_of
from diveq_core.arrays.rows import within

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array

# Weights that are added up one by one.
_BLOCK = 1 << 12


def normal(lib: Backend, function: str, like: Array, shape: tuple[int, ...], noise: Array | None, rng: Any) -> Array:
    """Standard normal noise of a shape, in the compute dtype and on the device of ``like``: as given, or drawn."""
    dtype = lib.compute_dtype(like.dtype)
    if noise is None:
        zeros = lib.xp.zeros(shape, dtype=dtype, **lib.place(like))
        return lib.standard_normal(function, zeros, rng)
    backend_of(function, like=like, noise=noise)
    check_floating(lib, function, noise=noise)
    if tuple(noise.shape) != shape:
        raise ValueError(f"{function}: noise must have shape {shape}, got {tuple(noise.shape)}")
    return lib.astype(lib.stop_gradient(noise), dtype)


def uniform(lib: Backend, noise: Array) -> Array:
    r"""Uniform numbers in [0, 1) from pairs of standard normal ones, (..., 2) -> (...): the pair's angle.

    The array API standard has no random numbers, and this needs no second kind of them.
    """
    angle = lib.xp.atan2(noise[..., 0], noise[..., 1])
    below_one = 1 - 2 * float(lib.xp.finfo(noise.dtype).eps)
    return within(lib, angle / (2 * math.pi) + 0.5, 0.0, below_one)


def standard_gumbel(lib: Backend, function: str, like: Array, rng: Any, dtype: Any) -> Array:
    r"""Standard Gumbel numbers :math:`-\ln\chi`, :math:`\chi = (a^2 + b^2) / 2` exponential for normal a and b.

    The generators at hand give normal numbers, and squares of two of these add up to an exponential one exactly.
    """
    xp = lib.xp
    model = xp.zeros((2, *like.shape), dtype=dtype, **lib.place(like))
    normal = lib.standard_normal(function, model, rng)
    exponential = (normal[0, ...] * normal[0, ...] + normal[1, ...] * normal[1, ...]) / 2
    tiny = float(xp.finfo(dtype).smallest_normal)
    return -xp.log(xp.where(exponential < tiny, xp.full_like(exponential, tiny), exponential))


def pick(lib: Backend, weights: Array, positions: Array) -> Array:
    """Indices (M,) into weights (N,) at positions (M,) in [0, 1) of their cumulative sum; never one of weight 0."""
    xp = lib.xp
    cumulative = running_sums(lib, weights)
    below_one = 1 - 2 * float(xp.finfo(positions.dtype).eps)
    inside = within(lib, positions, 0.0, below_one) * cumulative[-1]
    # Counting the sums not above a position: the first index whose sum is above it.
    found = within(lib, lib.searchsorted(cumulative, inside, side="right"), 0, weights.shape[0] - 1)
    # Where a library adds up in parallel, a sum may move by rounding at a weight of 0.
    heaviest = lib.astype(xp.argmax(weights, axis=0, keepdims=True), found.dtype)
    return xp.where(xp.take(weights, found, axis=0) > 0, found, heaviest)


def running_sums(lib: Backend, weights: Array) -> Array:
    """Sums of the first weights, (N,).

    In blocks: added one by one, weights would be lost beside a sum that is 2^24 times as large, in float32.
    """
    xp, count = lib.xp, weights.shape[0]
    if count <= _BLOCK:
        return lib.cumulative_sum(weights)
    blocks = -(-count // _BLOCK)
    padding = xp.zeros((blocks * _BLOCK - count,), dtype=weights.dtype, **lib.place(weights))
    inside = lib.cumulative_sum(xp.reshape(xp.concat([weights, padding]), (blocks, _BLOCK)))
    ends = lib.cumulative_sum(inside[:, -1])
    before = xp.concat([xp.zeros_like(ends[:1]), ends[:-1]])
    return xp.reshape(inside + before[:, None], (blocks * _BLOCK,))[:count]
