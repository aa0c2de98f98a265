r"""The maps around a quantizer, each with its pullback: axes, masks, projections, directions.

.. math:: y = x W + b, \qquad g_x = g W^\top, \qquad g_W = x^\top g, \qquad g_b = \textstyle\sum_n g_n
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import flat_rows, shaped
from diveq_core.directions import normalize, normalize_vjp

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array

    Mapped = tuple[Array, Callable[[Array], Array]]


def moved(lib: Backend, x: Array, start: int, end: int) -> Mapped:
    """One axis at another place."""
    if x.ndim + start == end or start == end:
        return x, lambda g: g
    return _moved(lib, x, start, end), lambda g: _moved(lib, g, end, start)


def _moved(lib: Backend, x: Array, start: int, end: int) -> Array:
    axes = list(range(x.ndim))
    axes.insert(end % x.ndim, axes.pop(start % x.ndim))
    return lib.xp.permute_dims(x, tuple(axes))


def cast(lib: Backend, x: Array, dtype: Any) -> Mapped:
    """Another dtype; the cotangent gets back its own."""
    own = x.dtype
    return lib.astype(x, dtype), lambda g: lib.astype(g, own)


def kept(lib: Backend, x: Array, keep: Array | None) -> Mapped:
    """Zeros for the vectors (..., D) that are not to be kept, (...)."""
    if keep is None:
        return x, lambda g: g
    at = lib.xp.expand_dims(keep, axis=-1)

    def zeroed(x: Array) -> Array:
        return lib.xp.where(at, x, lib.xp.zeros_like(x))

    return zeroed(x), zeroed


def affine(lib: Backend, x: Array, weight: Array, bias: Array) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
    """``x W + b`` of vectors (..., D), in the dtype of ``x``; its pullback gives the cotangents of x, W and b."""
    xp, dtype = lib.xp, x.dtype
    w = lib.astype(weight, dtype)
    rows = flat_rows(lib, x)
    y = lib.matmul(rows, w) + lib.astype(bias, dtype)[None, :]

    def pullback(g: Array) -> tuple[Array, ...]:
        g = flat_rows(lib, g)
        g_x = lib.matmul(g, xp.permute_dims(w, (1, 0)))
        g_w = lib.matmul(xp.permute_dims(rows, (1, 0)), g)
        return xp.reshape(g_x, x.shape), lib.astype(g_w, weight.dtype), lib.astype(xp.sum(g, axis=0), bias.dtype)

    return shaped(lib, y, (*x.shape[:-1], w.shape[1])), pullback


def direction(lib: Backend, x: Array, groups: int, explicit: bool) -> Mapped:
    """The directions of vectors (..., D), of each group of entries by itself."""
    shape = tuple(x.shape)
    grouped = (*shape[:-1], groups, shape[-1] // groups)
    rows = shaped(lib, x, grouped)
    if not explicit:
        return shaped(lib, normalize(rows), shape), lambda g: g
    y, pullback = normalize_vjp(rows)
    return shaped(lib, y, shape), lambda g: shaped(lib, pullback(shaped(lib, g, grouped)), shape)
