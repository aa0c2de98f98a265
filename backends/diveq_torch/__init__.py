"""PyTorch for diveq_core: eager, ``torch.func``, ``torch.compile``, autocast, any device."""

from __future__ import annotations

import contextlib
from array import array
from typing import TYPE_CHECKING, Any

import array_api_compat.torch as torch_namespace
import torch
from torch._C import _functorch
from torch.autograd import forward_ad

from diveq_core.arrays.backend import Backend
from diveq_core.arrays.rows import Direction, in_blocks, lengths_in_range, row_scale, safe_log
from diveq_torch import draws
from diveq_torch.bind import has_values, quantize
from diveq_torch.layers import VectorQuantizer
from diveq_torch.search import Prepared, nearest_plain, nearest_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.estimators.rule import Bindable

# Entries of a block of rows: 2 MiB in float32, so that temporaries stay in cache and dispatch costs little.
_BLOCK_ENTRIES = 1 << 19

# Without those of 8 bits, in which torch computes nothing.
_FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


_ORDINARY = frozenset((torch.Tensor, torch.nn.Parameter))


def _is_traced() -> bool:
    """Whether what is computed now may have no values."""
    # A mode that waits for operators may trace them.
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _is_plain(*tensors: torch.Tensor) -> bool:
    """Whether these are ordinary values on the CPU from which nothing is recorded: free to read and overwrite."""
    if _is_traced() or forward_ad._current_level >= 0:
        return False
    recording = torch.is_grad_enabled()
    for x in tensors:
        if (
            type(x) not in _ORDINARY
            or not x.is_cpu
            or (recording and x.requires_grad)
            or _functorch.is_functorch_wrapped_tensor(x)
            # Of vmap as torch.autograd.functional has it.
            or _functorch.is_legacy_batchedtensor(x)
        ):
            return False
    return True


def _is_transformed_while_compiled() -> bool:
    """Whether dynamo is inside a transformation of ``torch.func``, where its guards fail on arrays of NumPy."""
    return torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


@torch.compiler.assume_constant_result
def _numbers(entries: bytes) -> list[float]:
    return array("d", entries).tolist()


class TorchBackend(Backend):
    """PyTorch."""

    # For the product on a GPU, which larger chunks fill better: 256 MiB in float32.
    scores_per_chunk = 1 << 26
    rows_at_least = 1 << 13

    def __init__(self) -> None:
        super().__init__(torch_namespace, "torch")

    def owns(self, x: object) -> bool:
        return isinstance(x, torch.Tensor)

    def unfit(self, x: torch.Tensor) -> str | None:
        if x.is_nested:
            return f"a nested tensor of layout {x.layout}"
        return None if x.layout is torch.strided else f"a tensor of layout {x.layout}"

    def is_floating(self, x: torch.Tensor) -> bool:
        return x.dtype in _FLOATING

    def is_integer(self, x: torch.Tensor) -> bool:
        return not (x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool)

    def is_concrete(self, x: torch.Tensor) -> bool:
        if torch.compiler.is_compiling() or not has_values(x):
            return False
        return not torch._C._functorch.is_functorch_wrapped_tensor(x)

    def reads_free(self, x: torch.Tensor) -> bool:
        return _is_plain(x)

    def to_numpy(self, x: torch.Tensor) -> Any:
        # The whole of one that is sharded.
        x = x.full_tensor() if hasattr(x, "full_tensor") else x
        x = x.detach().cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy(force=True)

    def all_finite(self, x: torch.Tensor) -> bool:
        # A sum is one pass without a temporary; only its overflow needs the second look.
        return bool(x.sum().isfinite()) or bool(x.isfinite().all())

    def any_negative(self, x: torch.Tensor) -> bool:
        return x.numel() > 0 and x.min().item() < 0

    def result_dtype(self, a: torch.Tensor, b: torch.Tensor) -> torch.dtype:
        return torch.promote_types(a.dtype, b.dtype)

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float64 else torch.float32

    def astype(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x if x.dtype == dtype else x.to(dtype)

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            # It may outlive the mode, whose own tensors take no part in what is differentiated later.
            with torch.inference_mode(False), torch.no_grad():
                return x.clone(memory_format=torch.contiguous_format)
        # Contiguous, as collectives ask.
        return x.clone(memory_format=torch.contiguous_format)

    def like(self, values: Any, x: torch.Tensor, entries: bytes | None = None) -> torch.Tensor:
        if isinstance(entries, bytes) and _is_transformed_while_compiled():
            return torch.tensor(_numbers(entries), dtype=x.dtype, device=x.device).reshape(-1, x.shape[-1])
        # The sum is a copy that may be written to, without which torch warns.
        return torch.as_tensor(values + 0, dtype=x.dtype, device=x.device)

    def stop_gradient(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    def standard_normal(self, function: str, z: torch.Tensor, rng: Any) -> torch.Tensor:
        if rng is not None and not isinstance(rng, torch.Generator):
            raise TypeError(f"{function}: rng must be a torch.Generator for torch tensors, got {type(rng).__name__}")
        # A transformation of torch.func has its own way with random numbers.
        ordinary = type(z) in _ORDINARY and not (_is_traced() or torch._C._are_functorch_transforms_active())
        if ordinary and z.is_cpu and z.numel() > draws.CHUNK:
            return draws.normal(z, rng)
        if rng is None:
            # torch.compile takes a generator only where every size is known.
            return torch.randn_like(z, memory_format=torch.contiguous_format)
        return torch.randn(z.shape, generator=rng, dtype=z.dtype, device=z.device)

    def matmul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.device.type == "meta":  # which has no autocast
            return torch.matmul(a, b)
        with torch.autocast(a.device.type, enabled=False):
            return torch.matmul(a, b)

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * b).sum(dim=-1, keepdim=True)

    def add_scaled(self, x: torch.Tensor, y: torch.Tensor, c: torch.Tensor | float) -> torch.Tensor:
        return torch.addcmul(x, y, c) if isinstance(c, torch.Tensor) else torch.add(x, y, alpha=c)

    def records(self, *arrays: torch.Tensor) -> bool:
        return not _is_plain(*arrays)

    def direction(self, x: torch.Tensor) -> tuple[torch.Tensor, Direction]:
        if not _is_plain(x) or x.shape[0] == 0:
            return super().direction(x)
        rho = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        shortest, longest = rho.aminmax()
        if lengths_in_range(shortest.item(), longest.item(), double=x.dtype == torch.float64):
            return rho, Direction(x, rho.reciprocal())
        # Of order one by powers of two, which leave all digits as they are at other scales.
        scale = row_scale(self, x)
        y = x * scale
        length = torch.linalg.vector_norm(y, dim=1, keepdim=True)
        mantissa, exponent = torch.frexp(length)
        y = torch.ldexp(y, -exponent)
        return length / scale, Direction(y, torch.where(mantissa == 0, 0.0, 1 / mantissa))

    def by_rows(self, function: Callable[..., Any], *arrays: Any) -> Any:
        if _is_plain(*(x for x in arrays if x is not None)):
            return in_blocks(torch.Tensor.new_empty, _BLOCK_ENTRIES, function, *arrays)
        return function(*arrays)

    def sums_in_parts(self, x: torch.Tensor) -> bool:
        # The number of rows may be open in what is compiled.
        return not torch.compiler.is_compiling()

    def segment_add(self, total: torch.Tensor, values: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        if _is_plain(total, values, segments) and not self.any_negative(segments):
            return total.index_add_(0, segments, values)
        # Not by one segment more: the vmap of torch.autograd.functional knows no concatenation.
        lost = segments < 0
        return total.index_add(0, torch.where(lost, 0, segments), torch.where(lost[:, None], 0, values))

    def take_rows(self, codebook: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        if _is_plain(codebook, indices):
            # Looking for a negative index takes longer than to find none.
            with contextlib.suppress(IndexError):
                return codebook.index_select(0, indices)
        rows = codebook.index_select(0, torch.where(indices < 0, 0, indices))
        return torch.where((indices < 0)[:, None], float("nan"), rows)

    def row_keys(self, codebook: torch.Tensor) -> torch.Tensor:
        # Adding zero makes -0.0 and 0.0 one key, as they are one number. Integer sums are exact in any order.
        bits = (codebook + 0.0).view(torch.int64 if codebook.dtype == torch.float64 else torch.int32)
        odd = 2 * torch.arange(codebook.shape[1], device=codebook.device) - 7046029254386353131
        mixed = bits.to(torch.int64) * odd
        # Bits of few patterns, of signs say, would meet in a sum that is linear in them.
        return ((mixed ^ (mixed >> 29)) * -4658895280553007687).sum(dim=1)

    def prepare(self, codebook: torch.Tensor) -> torch.Tensor | Prepared:
        return Prepared.of(codebook) if _is_plain(codebook) else codebook

    def search(self, z: torch.Tensor, codebook: torch.Tensor | Prepared) -> torch.Tensor:
        words = codebook.codebook if isinstance(codebook, Prepared) else codebook.detach()
        z = z.detach()
        if _is_plain(z, words):
            return nearest_plain(z, codebook)
        # A custom operator does not look, and one whose memory is not there is read all the same.
        if z.device != words.device:
            raise ValueError(f"nearest: z and codebook must be on one device, got {z.device} and {words.device}")
        return nearest_rows(z, words)

    def bind(
        self,
        rule: Bindable,
        z: torch.Tensor,
        codebook: torch.Tensor,
        indices: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> torch.Tensor:
        return quantize(rule, z, codebook, indices, noise)

    def log_radius_gradients(
        self, r: Callable[[Any, Any], Any], q: torch.Tensor, z: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.jit.is_tracing():
            raise TypeError(
                "Radial: torch.jit.trace cannot derive the gradients of a radius given by its value alone; expected "
                "CustomRadius(r, log_r_gradients), got r alone"
            )
        log_r, pullback = torch.func.vjp(lambda q, z: safe_log(self, r(q, z)), q, z)
        to_q, to_z = pullback(torch.ones_like(log_r))
        return to_q, to_z


backend = TorchBackend()

__all__ = ["TorchBackend", "VectorQuantizer", "backend"]
