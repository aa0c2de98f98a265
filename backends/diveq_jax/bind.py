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
    kept = _read(rule, *primals)
    if dcodebook is None:
        # The primitive is linear in two arguments, also where there is but one.
        dcodebook = jnp.zeros((), dz.dtype)
    own = _Operands(rule, tuple(x is not None for x in kept))
    return out, pushforward_p.bind(*(x for x in kept if x is not None), dz, dcodebook, rule=own)


def _read(rule: Bindable, z: Any, codebook: Any, indices: Any, noise: Any) -> tuple[Any, ...]:
    """What the derivatives read."""
    reads = rule.reads
    words = "q" in reads or rule.trains_codebook
    return (
        z if "z" in reads else None,
        codebook if words else None,
        indices if words else None,
        noise if "noise" in reads else None,
    )


@dataclass(frozen=True)
class _Operands:
    """A rule over those of z, codebook, indices and noise that there are, and the two tangents."""

    rule: Any
    there: tuple[bool, ...]
    axes: tuple[int | None, ...] | None = None
    """Where it is mapped over a leading axis, that of each of these: 0, or None for what has none."""

    def pushforward(self, *operands: Any) -> Any:
        *kept, dz, dcodebook = operands
        if self.axes is not None:
            inner = _Operands(self.rule, self.there)
            return jax.vmap(inner.pushforward, in_axes=(*self.axes, 0, 0))(*operands)
        return self.rule.pushforward(*self._all(kept), dz, dcodebook)

    def pullback(self, *operands: Any) -> tuple[Any, Any]:
        *kept, g = operands
        if self.axes is not None:
            inner = _Operands(self.rule, self.there)
            return jax.vmap(inner.pullback, in_axes=(*self.axes, 0))(*operands)
        return self.rule.pullback(*self._all(kept), g)

    def _all(self, kept: list[Any]) -> list[Any]:
        rest = iter(kept)
        return [next(rest) if there else None for there in self.there]


pushforward_p = Primitive("diveq_pushforward")
"""``rule.pushforward`` over what the rule reads of (z, codebook, indices, noise), then dz and dcodebook."""


def _pushforward(*operands: Any, rule: _Operands) -> Any:
    return rule.pushforward(*operands)


pushforward_p.def_impl(jax.jit(_pushforward, static_argnames="rule"))
mlir.register_lowering(pushforward_p, mlir.lower_fun(_pushforward, multiple_results=False))


@pushforward_p.def_abstract_eval
def _(*operands: Any, rule: _Operands) -> Any:
    out = jax.eval_shape(functools.partial(_pushforward, rule=rule), *operands)
    # The tangent of z tells over which axes of a device mesh the rows vary.
    return operands[-2].update(shape=out.shape, dtype=out.dtype)


def _transpose(g: Any, *operands: Any, rule: _Operands) -> list[Any]:
    *kept, dz, dcodebook = operands
    g_z, g_codebook = rule.pullback(*kept, ad.instantiate_zeros(g))

    def wanted(x: Any, g: Any) -> Any:
        if not ad.is_undefined_primal(x):
            return None
        return ad.Zero(x.aval) if g is None else g

    return [None] * len(kept) + [wanted(dz, g_z), wanted(dcodebook, g_codebook)]


ad.primitive_transposes[pushforward_p] = _transpose


def _jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...], *, rule: _Operands) -> tuple[Any, Any]:
    """Linear in (dz, dcodebook), where the primitive is kept; ordinary differentiation in the rest."""
    *residuals, dz, dcodebook = primals
    *residual_tangents, ddz, ddcodebook = (ad.instantiate_zeros(t) for t in tangents)
    out = pushforward_p.bind(*primals, rule=rule)
    linear = pushforward_p.bind(*residuals, ddz, ddcodebook, rule=rule)
    # Of z and codebook, that is; indices and noise are constants.
    live = sum(rule.there[:2])
    if not live:
        return out, linear

    def at(*moving: Any) -> Any:
        return _pushforward(*moving, *residuals[live:], dz, dcodebook, rule=rule)

    _, moved = jax.jvp(at, tuple(residuals[:live]), tuple(residual_tangents[:live]))
    return out, moved + linear


ad.primitive_jvps[pushforward_p] = _jvp


def _batch(operands: tuple[Any, ...], dims: tuple[Any, ...], *, rule: _Operands) -> tuple[Any, int]:
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)

    def mapped(x: Any, dim: Any) -> Any:
        if dim is None:
            return jnp.broadcast_to(x, (size, *x.shape))
        return jnp.moveaxis(x, dim, 0)

    words = sum(rule.there[:1]) if rule.there[1] else None
    one_codebook = dims[-1] is None and (words is None or (dims[words] is None and rule.there[2]))
    if one_codebook and rule.axes is None:
        # One codebook for the whole batch: its rows are just more rows.
        whole = {words, len(operands) - 1}
        rows = [
            x if i in whole else (y := mapped(x, d)).reshape(-1, *y.shape[2:])
            for i, (x, d) in enumerate(zip(operands, dims, strict=True))
        ]
        out = pushforward_p.bind(*rows, rule=rule)
        return out.reshape(size, -1, *out.shape[1:]), 0
    moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True)]
    moved[-2:] = [mapped(x, d) for x, d in zip(operands[-2:], dims[-2:], strict=True)]
    axes = tuple(None if d is None else 0 for d in dims[:-2])
    return pushforward_p.bind(*moved, rule=_Operands(rule, (True,) * len(axes), axes)), 0


batching.primitive_batchers[pushforward_p] = _batch
