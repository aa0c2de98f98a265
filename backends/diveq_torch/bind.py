"""A rule bound to torch's automatic differentiation, in reverse and forward mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diveq_core.rule import Rule


class _Reverse(torch.autograd.Function):
    """The rule's pullback. It is made of torch operations, so it may itself be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rule: Rule, z: Any, codebook: Any, indices: Any, noise: Any) -> Any:
        return rule.forward(z, codebook, indices, noise)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        rule, *arrays = inputs
        ctx.rule = rule
        ctx.save_for_backward(*arrays)

    @staticmethod
    def backward(ctx: Any, g: Any) -> tuple[Any, ...]:
        g_z, g_codebook = ctx.rule.pullback(*ctx.saved_tensors, g)
        return None, g_z, g_codebook, None, None


class _Both(_Reverse):
    """The pushforward besides; apart, since dynamo refuses a Function that has one."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _Reverse.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def jvp(ctx: Any, _rule: None, dz: Any, dcodebook: Any, _indices: None, _noise: Any) -> Any:
        z, codebook, indices, noise = ctx.saved_tensors
        dz = torch.zeros_like(z) if dz is None else dz
        dcodebook = torch.zeros_like(codebook) if dcodebook is None else dcodebook
        return ctx.rule.pushforward(z, codebook, indices, noise, dz, dcodebook)


def quantize(rule: Rule, z: Any, codebook: Any, indices: Any, noise: Any) -> Any:
    """``rule.forward``, differentiable."""
    function = _Reverse if torch.compiler.is_compiling() else _Both
    return function.apply(rule, z, codebook, indices, noise)
