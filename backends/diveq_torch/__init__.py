"""PyTorch for diveq_core: eager, ``torch.func``, ``torch.compile``, autocast, any device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import array_api_compat.torch as torch_namespace
import torch

from diveq_core._array import safe_log
from diveq_core.backend import Backend
from diveq_torch.bind import quantize
from diveq_torch.search import nearest_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.rule import Rule


class TorchBackend(Backend):
    """PyTorch."""

    # For the product on a GPU, which larger chunks fill better: 256 MiB in float32.
    scores_per_chunk = 1 << 26
    rows_at_least = 1 << 13

    def __init__(self) -> None:
        super().__init__(torch_namespace, "torch")

    def owns(self, x: object) -> bool:
        return isinstance(x, torch.Tensor)

    def is_floating(self, x: torch.Tensor) -> bool:
        return x.dtype.is_floating_point

    def is_integer(self, x: torch.Tensor) -> bool:
        return not (x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool)

    def is_concrete(self, x: torch.Tensor) -> bool:
        return not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(x)

    def result_dtype(self, a: torch.Tensor, b: torch.Tensor) -> torch.dtype:
        return torch.promote_types(a.dtype, b.dtype)

    def astype(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype)

    def stop_gradient(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    def standard_normal(self, function: str, z: torch.Tensor, rng: Any) -> torch.Tensor:
        if rng is not None and not isinstance(rng, torch.Generator):
            raise TypeError(f"{function}: rng must be a torch.Generator for torch tensors, got {type(rng).__name__}")
        return torch.randn(z.shape, generator=rng, dtype=z.dtype, device=z.device)

    def matmul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        with torch.autocast(a.device.type, enabled=False):
            return torch.matmul(a, b)

    def segment_sum(self, values: torch.Tensor, segments: torch.Tensor, count: int) -> torch.Tensor:
        # One segment more than asked for takes the rows whose segment is negative.
        total = torch.zeros((count + 1, values.shape[1]), dtype=values.dtype, device=values.device)
        kept = torch.where(segments < 0, count, segments)
        return total.index_add(0, kept, values)[:count]

    def row_keys(self, codebook: torch.Tensor) -> torch.Tensor:
        # Adding zero makes -0.0 and 0.0 one key, as they are one number. Integer sums are exact in any order.
        bits = (codebook + 0.0).view(torch.int64 if codebook.dtype == torch.float64 else torch.int32)
        numbers = torch.arange(1, codebook.shape[1] + 1, device=codebook.device)
        return (bits.to(torch.int64) * (numbers * -7046029254386353131)).sum(dim=1)

    def search(self, z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        return nearest_rows(z.detach(), codebook.detach())

    def bind(
        self,
        rule: Rule,
        z: torch.Tensor,
        codebook: torch.Tensor,
        indices: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> torch.Tensor:
        return quantize(rule, z, codebook, indices, noise)

    def log_radius_gradients(
        self, r: Callable[[Any, Any], Any], q: torch.Tensor, z: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_r, pullback = torch.func.vjp(lambda q, z: safe_log(self, r(q, z)), q, z)
        to_q, to_z = pullback(torch.ones_like(log_r))
        return to_q, to_z


backend = TorchBackend()
