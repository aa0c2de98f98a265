"""A rule bound to MLX's automatic differentiation: one custom function, with a rule for each transformation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.estimators.rule import Bindable


def quantize(rule: Bindable, z: mx.array, codebook: Any, indices: Any, noise: Any) -> mx.array:
    """``rule.forward``, differentiable."""
    operands = (z, codebook, indices, noise)
    return _bound(rule, tuple(x is not None for x in operands))(*(x for x in operands if x is not None))


def _bound(rule: Bindable, there: tuple[bool, ...]) -> Callable[..., mx.array]:
    """``rule.forward`` over those of z, codebook, indices and noise that there are."""

    def whole(operands: Any) -> list[Any]:
        rest = iter(_several(operands))
        return [next(rest) if here else None for here in there]

    @mx.custom_function
    def bound(*operands: Any) -> Any:
        return rule.forward(*whole(operands))

    @bound.vjp
    def _(operands: Any, g: Any, _: Any) -> Any:
        # Made of MLX's operations on the operands themselves, so it may itself be differentiated.
        g_z, g_codebook = rule.pullback(*whole(operands), g)
        known = [g_z] if g_codebook is None else [g_z, g_codebook]
        return *known, *map(mx.zeros_like, _several(operands)[len(known) :])

    @bound.jvp
    def _(operands: Any, tangents: Any) -> Any:
        tangents = _several(tangents)
        dz = mx.zeros_like(_several(operands)[0]) if tangents[0] is None else tangents[0]
        return rule.pushforward(*whole(operands), dz, tangents[1] if there[1] else None)

    @bound.vmap
    def _(operands: Any, axes: Any) -> Any:
        words = 1 if there[1] and there[2] else None
        return mapped(_bound(rule, there), _several(operands), _several(axes), whole=words), 0

    return bound


def _several(x: Any) -> Any:
    """What MLX gives a rule for each operand; of a single one it is not in a list."""
    return x if isinstance(x, (list, tuple)) else [x]


def mapped(function: Callable[..., mx.array], operands: Any, axes: Any, whole: int | None = 1) -> mx.array:
    """``function``, which acts row by row but for one operand, over a batch that becomes axis 0."""
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    # MLX's own rule for vmap would lose the custom derivatives. So the function is called again, on more rows.
    batched = [
        mx.broadcast_to(x, (size, *x.shape)) if axis is None else mx.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]
    if whole is not None and axes[whole] is not None:
        return mx.stack([function(*(x[i] for x in batched)) for i in range(size)])
    rows = [x.reshape(size * x.shape[1], *x.shape[2:]) for x in batched]
    if whole is not None:
        rows[whole] = operands[whole]
    out = function(*rows)
    return out.reshape(size, batched[0].shape[1], *out.shape[1:])
