"""A rule bound to JAX's automatic differentiation: one primitive, linear in the tangents.

JAX offers `custom_jvp`, whose reverse mode is the transpose of the pushforward, and `custom_vjp`, which has
no forward mode. Both are wanted here, and the backward pass is to be the hand-derived pullback. So the
pushforward is a primitive of its own, and the pullback is its transpose.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

if TYPE_CHECKING:
    from diveq_core.estimators.rule import Bindable


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def quantize(rule: Bindable, z: Any, codebook: Any, indices: Any, noise: Any) -> Any:
    """``rule.forward``, differentiable."""
    return rule.forward(z, codebook, indices, noise)


@quantize.defjvp
def _(rule: Bindable, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    out = quantize(rule, *primals)
    dz, dcodebook, *_ = tangents
    return out, pushforward_p.bind(*_operands(primals), dz, dcodebook, rule=rule)


pushforward_p = Primitive("diveq_pushforward")
"""``rule.pushforward`` over (z, codebook, indices[, noise], dz, dcodebook)."""


def _operands(primals: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x for x in primals if x is not None)


def _pushforward(*operands: Any, rule: Any) -> Any:
    z, codebook, indices, *noise, dz, dcodebook = operands
    return rule.pushforward(z, codebook, indices, noise[0] if noise else None, dz, dcodebook)


pushforward_p.def_impl(jax.jit(_pushforward, static_argnames="rule"))
mlir.register_lowering(pushforward_p, mlir.lower_fun(_pushforward, multiple_results=False))


@pushforward_p.def_abstract_eval
def _(*operands: Any, rule: Any) -> Any:
    out = jax.eval_shape(functools.partial(_pushforward, rule=rule), *operands)
    # The tangent of z tells over which axes of a device mesh the rows vary.
    return operands[-2].update(shape=out.shape, dtype=out.dtype)


def _transpose(g: Any, *operands: Any, rule: Any) -> list[Any]:
    z, codebook, indices, *noise, dz, dcodebook = operands
    g_z, g_codebook = rule.pullback(z, codebook, indices, noise[0] if noise else None, ad.instantiate_zeros(g))

    def wanted(x: Any, g: Any) -> Any:
        if not ad.is_undefined_primal(x):
            return None
        return ad.Zero(x.aval) if g is None else g

    return [None] * (len(operands) - 2) + [wanted(dz, g_z), wanted(dcodebook, g_codebook)]


ad.primitive_transposes[pushforward_p] = _transpose


def _jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...], *, rule: Any) -> tuple[Any, Any]:
    """Linear in (dz, dcodebook), where the primitive is kept; ordinary differentiation in the rest."""
    *residuals, dz, dcodebook = primals
    *residual_tangents, ddz, ddcodebook = (ad.instantiate_zeros(t) for t in tangents)
    z, codebook, *rest = residuals

    def at(z: Any, codebook: Any) -> Any:
        return _pushforward(z, codebook, *rest, dz, dcodebook, rule=rule)

    _, moved = jax.jvp(at, (z, codebook), tuple(residual_tangents[:2]))
    out = pushforward_p.bind(*primals, rule=rule)
    return out, moved + pushforward_p.bind(*residuals, ddz, ddcodebook, rule=rule)


ad.primitive_jvps[pushforward_p] = _jvp


@dataclass(frozen=True)
class _Batched:
    """A rule mapped over a leading axis of the operands that have one; tangents always have one."""

    rule: Any
    axes: tuple[int | None, ...]

    def pushforward(self, *operands: Any) -> Any:
        return jax.vmap(self.rule.pushforward, in_axes=(*self.axes, 0, 0))(*operands)

    def pullback(self, *operands: Any) -> tuple[Any, Any]:
        return jax.vmap(self.rule.pullback, in_axes=(*self.axes, 0))(*operands)


def _batch(operands: tuple[Any, ...], dims: tuple[Any, ...], *, rule: Any) -> tuple[Any, int]:
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)

    def mapped(x: Any, dim: Any) -> Any:
        if dim is None:
            return jnp.broadcast_to(x, (size, *x.shape))
        return jnp.moveaxis(x, dim, 0)

    z, codebook, indices, *noise, dz, dcodebook = operands
    unmapped = [dims[1] is None, dims[-1] is None]
    if all(unmapped) and not isinstance(rule, _Batched):
        # One codebook for the whole batch: its rows are just more rows.
        rows = [mapped(x, d) for x, d in zip((z, indices, *noise, dz), (dims[0], *dims[2:-1]), strict=True)]
        z, indices, *noise, dz = (x.reshape(-1, *x.shape[2:]) for x in rows)
        out = pushforward_p.bind(z, codebook, indices, *noise, dz, dcodebook, rule=rule)
        return out.reshape(size, -1, *out.shape[1:]), 0
    moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True)]
    moved[-2:] = [mapped(x, d) for x, d in zip(operands[-2:], dims[-2:], strict=True)]
    axes = tuple(None if d is None else 0 for d in dims[:-2])
    axes = axes if noise else (*axes, None)
    return pushforward_p.bind(*moved, rule=_Batched(rule, axes)), 0


batching.primitive_batchers[pushforward_p] = _batch
