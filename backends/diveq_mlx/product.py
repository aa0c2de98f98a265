"""Products in float32 also where MLX multiplies in TF32, whose numbers have 11 significant bits."""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx


def rounds() -> bool:
    """Whether a product of float32 may be one of TF32: on a GPU, unless MLX was told otherwise at its start."""
    return mx.default_device().type == mx.DeviceType.gpu and os.environ.get("MLX_ENABLE_TF32") != "0"


def matmul(a: mx.array, b: mx.array) -> mx.array:
    """``a @ b``, in float32 if both are."""
    if a.dtype == b.dtype == mx.float32 and rounds():
        return _split(a, b)
    return mx.matmul(a, b)


@mx.custom_function
def _split(a: mx.array, b: mx.array) -> mx.array:
    """One longer product, of parts that TF32 holds exactly; what is left out is below a rounding of float32."""
    (a, a_mid, a_low), (b, b_mid, b_low) = _parts(a), _parts(b)
    left = mx.concatenate([a_low, a_mid, a, a_mid, a, a], axis=-1)
    return mx.matmul(left, mx.concatenate([b, b_mid, b_low, b, b_mid, b], axis=-2))


@_split.vjp
def _(operands: Any, g: Any, _: Any) -> Any:
    a, b = operands
    return matmul(g, mx.swapaxes(b, -1, -2)), matmul(mx.swapaxes(a, -1, -2), g)


@_split.jvp
def _(operands: Any, tangents: Any) -> Any:
    (a, b), (da, db) = operands, tangents
    moved = [] if da is None else [matmul(da, b)]
    return sum(moved if db is None else [*moved, matmul(a, db)])


@_split.vmap
def _(operands: Any, axes: Any) -> Any:
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    batched = [
        mx.broadcast_to(x, (size, *x.shape)) if axis is None else mx.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]
    return matmul(*batched), 0


def _parts(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Three numbers of 8 bits whose sum is x, as bfloat16 holds them; what is not finite there stays in the first."""
    high = _cut(x)
    finite = mx.isfinite(high)
    high = mx.where(finite, high, x)
    rest = mx.where(finite, x - high, 0.0)
    mid = _cut(rest)
    return high, mid, rest - mid


def _cut(x: mx.array) -> mx.array:
    return x.astype(mx.bfloat16).astype(mx.float32)
