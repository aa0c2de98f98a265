"""A rule bound to JAX's automatic differentiation: two primitives, the second linear in the tangents.

JAX offers `custom_jvp`, whose reverse mode is the transpose of the pushforward, and `custom_vjp`, which has
no forward mode. Both are wanted here, and the backward pass is to be the hand-derived pullback. So the
pushforward is a primitive of its own, and the pullback is its transpose. The quantization is one too, since JAX
forgets the rule of a `custom_jvp` where it differentiates a gradient inside `lax.scan`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.estimators.rule import Bindable


@dataclass(frozen=True)
class _Operands:
    """A rule over those of z, codebook, indices and noise that there are; tangents and cotangents follow them."""

    rule: Any
    there: tuple[bool, ...]
    maps: int = 0
    """Over how many leading axes of all operands it is mapped."""

    @classmethod
    def of(cls, rule: Any, given: tuple[Any, ...], maps: int = 0) -> tuple[_Operands, list[Any]]:
        """The rule over what is given, and that."""
        return cls(rule, tuple(x is not None for x in given), maps), [x for x in given if x is not None]

    def all(self, kept: tuple[Any, ...]) -> list[Any]:
        """Each of the four, None in the place of one that there is not, and what follows them."""
        rest = iter(kept)
        return [*(next(rest) if there else None for there in self.there), *rest]

    def call(self, name: str, operands: tuple[Any, ...]) -> Any:
        """A method of the rule."""

        def method(*operands: Any) -> Any:
            return getattr(self.rule, name)(*self.all(operands))

        for _ in range(self.maps):
            method = jax.vmap(method)
        return method(*operands)


def quantize(rule: Bindable, z: Any, codebook: Any, indices: Any, noise: Any) -> Any:
    """``rule.forward``, differentiable."""
    own, operands = _Operands.of(rule, (z, codebook, indices, noise))
    return quantize_p.bind(*operands, rule=own)


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


def _primitive(name: str, method: str, like: int) -> tuple[Primitive, Callable[..., Any]]:
    """A primitive that calls a method of a rule; its output lies where the operand ``like`` lies."""
    primitive = Primitive(name)

    def call(*operands: Any, rule: _Operands) -> Any:
        return rule.call(method, operands)

    # What is linear is compiled; the value is to round as the operations one by one do.
    primitive.def_impl(jax.jit(call, static_argnames="rule") if method == "pushforward" else call)
    mlir.register_lowering(primitive, mlir.lower_fun(call, multiple_results=False))

    @primitive.def_abstract_eval
    def _(*operands: Any, rule: _Operands) -> Any:
        out = jax.eval_shape(functools.partial(call, rule=rule), *operands)
        # It varies over the axes of a device mesh over which the rows do.
        return operands[like].update(shape=out.shape, dtype=out.dtype)

    def batch(operands: tuple[Any, ...], dims: tuple[Any, ...], *, rule: _Operands) -> tuple[Any, int]:
        return _batched(primitive, operands, dims, rule)

    batching.primitive_batchers[primitive] = batch
    return primitive, call


def _batched(
    primitive: Primitive, operands: tuple[Any, ...], dims: tuple[Any, ...], rule: _Operands
) -> tuple[Any, int]:
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)

    def mapped(x: Any, dim: Any) -> Any:
        if dim is None:
            return jnp.broadcast_to(x, (size, *x.shape))
        return jnp.moveaxis(x, dim, 0)

    # What is not rows: a codebook beside indices, and its tangent.
    whole = {sum(rule.there[:1])} if rule.there[1] and rule.there[2] else set()
    if primitive is pushforward_p:
        whole.add(len(operands) - 1)
    if not rule.maps and all(dims[i] is None for i in whole):
        # One codebook for the whole batch: its rows are just more rows.
        rows = [x if i in whole else mapped(x, d) for i, (x, d) in enumerate(zip(operands, dims, strict=True))]
        rows = [x if i in whole else x.reshape(-1, *x.shape[2:]) for i, x in enumerate(rows)]
        out = primitive.bind(*rows, rule=rule)
        return out.reshape(size, -1, *out.shape[1:]), 0
    moved = [mapped(x, d) for x, d in zip(operands, dims, strict=True)]
    return primitive.bind(*moved, rule=replace(rule, maps=rule.maps + 1)), 0


quantize_p, _ = _primitive("diveq_quantize", "forward", 0)
"""``rule.forward`` over what there is of (z, codebook, indices, noise)."""

pushforward_p, _pushforward = _primitive("diveq_pushforward", "pushforward", -2)
"""``rule.pushforward`` over what the rule reads of (z, codebook, indices, noise), then dz and dcodebook."""


def _quantize_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...], *, rule: _Operands) -> tuple[Any, Any]:
    out = quantize_p.bind(*primals, rule=rule)
    dz, dcodebook, *_ = rule.all(tangents)
    if all(x is None or isinstance(x, ad.Zero) for x in (dz, dcodebook)):
        return out, ad.Zero(jax.typeof(out).to_tangent_aval())
    own, kept = _Operands.of(rule.rule, _read(rule.rule, *rule.all(primals)), rule.maps)
    dz = ad.instantiate_zeros(dz)
    # The primitive is linear in two arguments, also where there is but one.
    dcodebook = jnp.zeros(dz.shape[: rule.maps], dz.dtype) if dcodebook is None else ad.instantiate_zeros(dcodebook)
    return out, pushforward_p.bind(*kept, dz, dcodebook, rule=own)


ad.primitive_jvps[quantize_p] = _quantize_jvp


def _transpose(g: Any, *operands: Any, rule: _Operands) -> list[Any]:
    *kept, dz, dcodebook = operands
    g_z, g_codebook = rule.call("pullback", (*kept, ad.instantiate_zeros(g)))

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
