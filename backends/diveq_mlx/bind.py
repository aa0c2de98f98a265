"""A rule bound to MLX's automatic differentiation: one custom function, with a rule for each transformation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.estimators.rule import Bindable


def quantize(rule: Bindable, z: mx.array, codebook: mx.array, indices: mx.array, noise: mx.array | None) -> mx.array:
    """``rule.forward``, differentiable."""
    operands = (z, codebook, indices) if noise is None else (z, codebook, indices, noise)
    return _bound(rule)(*operands)


def _bound(rule: Bindable) -> Callable[..., mx.array]:
    @mx.custom_function
    def bound(z: Any, codebook: Any, indices: Any, noise: Any = None) -> Any:
        return rule.forward(z, codebook, indices, noise)

    @bound.vjp
    def _(operands: Any, g: Any, _: Any) -> Any:
        # Made of MLX's operations on the operands themselves, so it may itself be differentiated.
        z, codebook, indices, *noise = operands
        g_z, g_codebook = rule.pullback(z, codebook, indices, noise[0] if noise else None, g)
        if g_codebook is None:
            g_codebook = mx.zeros_like(codebook)
        return g_z, g_codebook, *map(mx.zeros_like, operands[2:])

    @bound.jvp
    def _(operands: Any, tangents: Any) -> Any:
        z, codebook, indices, *noise = operands
        dz = mx.zeros_like(z) if tangents[0] is None else tangents[0]
        return rule.pushforward(z, codebook, indices, noise[0] if noise else None, dz, tangents[1])

    @bound.vmap
    def _(operands: Any, axes: Any) -> Any:
        return mapped(_bound(rule), operands, axes), 0

    return bound


def mapped(function: Callable[..., mx.array], operands: Any, axes: Any) -> mx.array:
    """``function``, which acts row by row but for its second operand, over a batch that becomes axis 0."""
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    # MLX's own rule for vmap would lose the custom derivatives. So the function is called again, on more rows.
    batched = [
        mx.broadcast_to(x, (size, *x.shape)) if axis is None else mx.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]
    if axes[1] is not None:
        return mx.stack([function(*(x[i] for x in batched)) for i in range(size)])
    rows = [x.reshape(size * x.shape[1], *x.shape[2:]) for x in batched]
    rows[1] = operands[1]
    out = function(*rows)
    return out.reshape(size, batched[0].shape[1], *out.shape[1:])
