"""A rule bound to torch's automatic differentiation, in reverse and forward mode.

What is kept for the backward pass is what the rule reads. A codebook that gets no gradient is not kept, but the
codewords gathered from it: moving averages may overwrite it before the backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._C._functorch import TransformType, _unwrap_for_grad, is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from diveq_core.estimators.rule import Bindable


class _Reverse(torch.autograd.Function):
    """The rule's pullback. It is made of torch operations, so it may itself be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rule: Any, fixed: bool, z: Any, codebook: Any, indices: Any, noise: Any) -> Any:
        out = rule.forward(z, codebook, indices, noise)
        # What is kept may not be what the caller is free to overwrite.
        return out.clone() if out is codebook else out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        rule, *_ = inputs
        ctx.rule = rule
        ctx.save_for_backward(*_read(*inputs))

    @staticmethod
    def backward(ctx: Any, g: Any) -> tuple[Any, ...]:
        g_z, g_codebook = ctx.rule.pullback(*ctx.saved_tensors, g)
        # Torch accumulates in place into what it is given here, which may be the caller's own.
        g_z = g_z.clone() if g_z is g else g_z
        return None, None, g_z, g_codebook, None, None


class _Eager(torch.autograd.Function):
    """The same in one part: of one in two, torch looks up the signature at each call, as long as a small rule takes."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        rule, _, *arrays = inputs
        few = rule.linearized(*arrays) if _reads_words(rule) else None
        output, ctx.pull = few or (_Reverse.forward(*inputs), None)
        _Reverse.setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, g: Any) -> tuple[Any, ...]:
        if ctx.pull is None or torch.is_grad_enabled():
            return _Reverse.backward(ctx, g)
        # Read for torch's check that nothing was overwritten.
        assert ctx.saved_tensors is not None
        g_z, g_codebook = ctx.pull(g)
        return None, None, g_z.clone() if g_z is g else g_z, g_codebook, None, None


class _Both(_Reverse):
    """The pushforward besides; apart, since dynamo refuses a Function that has one."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _Reverse.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*_read(*inputs))

    @staticmethod
    def jvp(ctx: Any, _rule: None, _fixed: None, dz: Any, dcodebook: Any, _indices: None, _noise: Any) -> Any:
        z, codebook, indices, noise = ctx.saved_tensors
        return _pushed(ctx.rule, z, codebook, indices, noise, dz, dcodebook)


def _read(rule: Any, fixed: bool, z: Any, codebook: Any, indices: Any, noise: Any) -> tuple[Any, ...]:
    """What the derivatives read."""
    reads, words = rule.reads, _reads_words(rule)
    return (
        z if "z" in reads else None,
        codebook if words else None,
        indices if words and not fixed else None,
        noise if "noise" in reads else None,
    )


def _reads_words(rule: Any) -> bool:
    """Whether the derivatives read codewords, or their number."""
    return "q" in rule.reads or rule.trains_codebook


class _Fixed:
    """A rule whose codewords are held apart from what autograd saves, so that checkpoints do not gather them anew."""

    def __init__(self, rule: Any, words: Any, indices: Any, noise: Any) -> None:
        self.rule, self.words, self.indices, self.noise = rule, words, indices, noise
        self.reads, self.trains_codebook = rule.reads - {"q"}, False

    def forward(self, z: Any, _codebook: None, _indices: None, noise: Any) -> Any:
        out = self.rule.forward(z, self.words, self.indices, self._noise(noise))
        return out.clone() if out is self.words else out

    def pullback(self, z: Any, _codebook: None, _indices: None, noise: Any, g: Any) -> tuple[Any, None]:
        return self.rule.pullback(z, self.words, None, self._noise(noise), g)[0], None

    def pushforward(self, z: Any, _codebook: None, _indices: None, noise: Any, dz: Any, _dcodebook: None) -> Any:
        return self.rule.pushforward(z, self.words, None, self._noise(noise), dz, None)

    def linearized(self, *_: Any) -> None:
        return None

    def _noise(self, given: Any) -> Any:
        return given if self.noise is None else self.noise


def quantize(rule: Bindable, z: Any, codebook: Any, indices: Any, noise: Any) -> Any:
    """``rule.forward``, differentiable."""
    if torch.jit.is_tracing():
        # A Function would be kept as Python, which no file holds.
        return _in_operations(rule, z, codebook, indices, noise)
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return _traced(rule, z, codebook, indices, noise)
        _look_at_numbers(getattr(rule, "estimator", None))
        if forward_ad._current_level >= 0:
            own, dz = forward_ad.unpack_dual(z)
            words, dcodebook = (None, None) if codebook is None else forward_ad.unpack_dual(codebook)
            if dz is not None or dcodebook is not None:
                moved = _pushed(rule, own, words, indices, noise, dz, dcodebook)
                return forward_ad.make_dual(_bound(_Reverse, rule, own, words, indices, noise), moved)
            if not (z.requires_grad or (codebook is not None and codebook.requires_grad)):
                # Dynamo does not see tangents that come from outside.
                return _in_operations(rule, z, codebook, indices, noise)
        return _bound(_Reverse, rule, z, codebook, indices, noise)
    transformed = torch._C._are_functorch_transforms_active()
    function = _Both if transformed or forward_ad._current_level >= 0 else _Eager
    if not _reads_words(rule) or transformed or not _is_fixed(rule, codebook):
        return _bound(function, rule, z, codebook, indices, noise)
    with torch.no_grad():
        words, own = rule.fixed(_detached(codebook), indices)
        # Chosen by the indices, it belongs to the codewords.
        held = noise if rule.noise_by_indices else None
    given = None if rule.noise_by_indices else _kept(noise)
    return function.apply(_Fixed(rule, words, own, held), True, z, None, None, given)


def _look_at_numbers(x: Any) -> None:
    """Read the numbers that a dataclass holds.

    With ``dynamic=True`` they are inputs of the graph, and dynamo fails where a Function is the first to read one.
    """
    for name in getattr(x, "__dataclass_fields__", ()):
        value = getattr(x, name)
        if isinstance(value, float):
            _ = value + 0.0
        elif hasattr(value, "__dataclass_fields__"):
            _look_at_numbers(value)


def _bound(function: Any, rule: Any, z: Any, codebook: Any, indices: Any, noise: Any) -> Any:
    if not _reads_words(rule):
        return function.apply(rule, True, _kept(z) if rule.reads else z, _detached(codebook), indices, noise)
    if not _is_fixed(rule, codebook):
        return function.apply(rule, False, _kept(z), codebook, indices, _kept(noise))
    words, own = rule.fixed(_detached(codebook), indices)
    return function.apply(rule, True, z, words, own, _kept(noise))


def _detached(x: Any) -> Any:
    return None if x is None else x.detach()


def _is_fixed(rule: Any, codebook: Any) -> bool:
    """Whether the codebook certainly takes no derivative."""
    if not rule.trains_codebook:
        return True
    if codebook.requires_grad:
        return False
    if torch.compiler.is_compiling():
        return True
    if is_functorch_wrapped_tensor(codebook):
        return False
    return forward_ad._current_level < 0 or forward_ad.unpack_dual(codebook).tangent is None


def _kept(x: Any) -> Any:
    """What autograd can save: a copy of what was made under ``torch.inference_mode``."""
    if x is None or torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return x.clone()


def _pushed(rule: Any, z: Any, codebook: Any, indices: Any, noise: Any, dz: Any, dcodebook: Any) -> Any:
    """``rule.pushforward``, of zeros where there is no tangent."""
    if rule.trains_codebook and dcodebook is None and indices is not None:
        dcodebook = torch.zeros_like(codebook)
    # A constant rule has no second tangent, so there is a first.
    dz = torch.zeros_like(z) if dz is None else dz
    return rule.pushforward(z, codebook, indices, noise, dz, dcodebook)


def _traced(rule: Any, z: Any, codebook: Any, indices: Any, noise: Any) -> Any:
    """The value, and the pushforward of tangents that are zero but have a derivative, in operations alone.

    Under the transformations of ``torch.func`` dynamo can trace no Function. The innermost one is taken off the
    arrays, so that it alone sees the tangents, and the pushforward's coefficients are left to those further out.
    """
    level = retrieve_current_functorch_interpreter()
    key = level.key()
    if key == TransformType.Grad or key == TransformType.Jvp:
        number = level.level()
        inner = [None if x is None else _unwrap_for_grad(x, number) for x in (z, codebook, indices, noise)]
        with level.lower():
            out = quantize(rule, *inner)
    else:
        return _in_operations(rule, z, codebook, indices, noise)
    return _moved(rule, z, codebook, inner, out)


def _in_operations(rule: Any, z: Any, codebook: Any, indices: Any, noise: Any) -> Any:
    inner = [z.detach(), _detached(codebook), indices, _detached(noise)]
    return _moved(rule, z, codebook, inner, rule.forward(*inner))


def _moved(rule: Any, z: Any, codebook: Any, inner: list[Any], out: Any) -> Any:
    moved = rule.pushforward(*inner, inner[0] - z, None if codebook is None else inner[1] - codebook)
    # Subtracted, as adding a zero would lose the sign of another one; of what is not finite no zero is left.
    return out - (torch.where((moved == moved) | out.isnan(), moved, 0.0) + 0.0)


def has_values(x: torch.Tensor) -> bool:
    """Whether a tensor has values at all: not on the device of none, nor under a mode that only looks at shapes."""
    return not x.is_meta and not isinstance(x, FakeTensor)
