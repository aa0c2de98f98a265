"""The search as one custom operator: opaque to ``torch.compile``, with a rule for ``torch.vmap``."""

from __future__ import annotations

import torch

from diveq_core import search
from diveq_core.registry import backend_of


@torch.library.custom_op("diveq_core::nearest", mutates_args=())
def nearest_rows(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest codeword, (N, D), (K, D) -> (N,) int64; -1 for a row that is not finite."""
    lib = backend_of("nearest", z=z)
    dtype = lib.compute_dtype(torch.promote_types(z.dtype, codebook.dtype))
    codebook = codebook.to(dtype)
    found = torch.empty(z.shape[0], dtype=torch.int64, device=z.device)
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        centre, inverse_scale = search.frame(lib, codebook)
        extended = search.extended_codebook(lib, codebook, centre, inverse_scale).T
        canonical = search.first_copies(lib, codebook)
        rows = min(search.rows_per_chunk(lib, codebook.shape[0]), z.shape[0])
        ones_at_the_end = torch.ones(rows, codebook.shape[1] + 1, dtype=dtype, device=z.device)
        scores = torch.empty(rows, codebook.shape[0], dtype=dtype, device=z.device)
        for start in range(0, z.shape[0], rows or 1):
            chunk = z[start : start + rows].to(dtype)
            y, s = ones_at_the_end[: len(chunk)], scores[: len(chunk)]
            torch.sub(chunk, centre, out=y[:, :-1]).mul_(inverse_scale)
            best, chosen = torch.min(torch.mm(y, extended, out=s), dim=1)
            found[start : start + rows] = torch.where(best.isfinite(), canonical[chosen], -1)
    return found


@nearest_rows.register_fake
def _(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return torch.empty(z.shape[0], dtype=torch.int64, device=z.device)


@nearest_rows.register_vmap
def _(info, in_dims, z, codebook):  # type: ignore[no-untyped-def]
    z_dim, codebook_dim = in_dims
    if codebook_dim is None:
        batched = z.movedim(z_dim, 0)
        found = nearest_rows(batched.reshape(-1, batched.shape[-1]), codebook)
        return found.reshape(batched.shape[:2]), 0
    z = z.expand(info.batch_size, *z.shape) if z_dim is None else z.movedim(z_dim, 0)
    return torch.stack([nearest_rows(*pair) for pair in zip(z, codebook.movedim(codebook_dim, 0), strict=True)]), 0
