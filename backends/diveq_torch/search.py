"""The search as one custom operator: opaque to ``torch.compile``, with a rule for ``torch.vmap``."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch

import diveq_numpy
from diveq_core.arrays import search
from diveq_core.arrays.registry import backend_of
from diveq_core.options import optional_kernels

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend


# Wider, the arithmetic of float32 hides the writing of scores, and the library's product does it faster.
_FUSED_WIDTH = 256

# Wider, NumPy's product on a CPU is faster than torch's.
_OWN_PRODUCT_WIDTH = 128

# Multiplications up to which NumPy's product begins no threads, unless it is one of a single vector.
_UNTHREADED = 1 << 18

# Rows of half precision that are widened at a time on the way to NumPy.
_ROWS_WIDENED = 1 << 16


@torch.library.custom_op("diveq_core::nearest", mutates_args=())
def nearest_rows(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest codeword, (N, D), (K, D) -> (N,) int64; -1 for a row that is not finite."""
    lib = backend_of("nearest", z=z)
    dtype = lib.compute_dtype(torch.promote_types(z.dtype, codebook.dtype))
    if z.device.type == "cpu":
        codebook = codebook.to(dtype)
        return _nearest_by_numpy(z, codebook, _numpy_view(codebook))
    if _fused_serves(z, codebook):
        from diveq_torch import fused

        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            return fused.nearest_rows(lib, z, codebook)
    return _nearest_by_product(lib, z, codebook.to(dtype))


class Prepared(NamedTuple):
    """A codebook on the CPU, in its compute dtype, with what NumPy's search makes of the same memory."""

    codebook: torch.Tensor
    words: diveq_numpy.search.Prepared

    @classmethod
    def of(cls, codebook: torch.Tensor) -> Self:
        codebook = codebook.detach()
        codebook = codebook if codebook.dtype == torch.float64 else codebook.float()
        return cls(codebook, diveq_numpy.backend.prepare(_numpy_view(codebook)))


def nearest_plain(z: torch.Tensor, codebook: torch.Tensor | Prepared) -> torch.Tensor:
    """The same of ordinary values on the CPU, past torch's dispatcher, which takes as long as a small search."""
    held = codebook.codebook if isinstance(codebook, Prepared) else codebook
    dtype = torch.float64 if torch.float64 in (z.dtype, held.dtype) else torch.float32
    if held.dtype != dtype:
        codebook = held = held.to(dtype)
    return _nearest_by_numpy(z, held, codebook.words if isinstance(codebook, Prepared) else _numpy_view(held))


def _fused_serves(z: torch.Tensor, codebook: torch.Tensor) -> bool:
    """Whether the fused kernel can run, and is not too wide for it."""
    if z.device.type != "cuda" or torch.version.hip is not None or not (optional_kernels() and _has_triton()):
        return False
    narrow = z.dtype == codebook.dtype and z.dtype in (torch.float16, torch.bfloat16)
    return (
        torch.float64 not in (z.dtype, codebook.dtype)
        and (narrow or codebook.shape[1] <= _FUSED_WIDTH or not _is_full_float32(z.device))
        and codebook.shape[0] < 1 << 30
        and torch.cuda.get_device_capability(z.device) >= (8, 0)
    )


@functools.cache
def _has_triton() -> bool:
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


def _nearest_by_numpy(
    z: torch.Tensor, codebook: torch.Tensor, words: np.ndarray | diveq_numpy.search.Prepared
) -> torch.Tensor:
    """NumPy's search in the same memory, whose argmin is faster; the product stays torch's up to some width.

    After a product of NumPy's its threads wait for the next one for a tenth of a second, on the cores that
    the rest of a training step needs. Of wide vectors NumPy's product is faster by more than that costs, and it
    is in full float32 whatever torch's is allowed to be.
    """
    found = np.empty(z.shape[0], np.int64)
    product = _product if _own_product(z, codebook) else np.matmul
    step = _ROWS_WIDENED if z.dtype != codebook.dtype else max(z.shape[0], 1)
    with np.errstate(all="ignore"):
        for start in range(0, z.shape[0], step):
            rows = z if step >= z.shape[0] else z[start : start + step]
            rows = _numpy_view(rows if rows.dtype == codebook.dtype else rows.to(codebook.dtype))
            diveq_numpy.search.nearest_rows(diveq_numpy.backend, rows, words, product, found[start : start + step])
    # In memory of torch's own, which can be resized.
    return torch.from_numpy(found).clone()


def _own_product(z: torch.Tensor, codebook: torch.Tensor) -> bool:
    """Whether torch is to multiply."""
    count, width = codebook.shape
    if z.shape[0] > 1 and z.shape[0] * count * width <= _UNTHREADED:
        return False
    # In a forked child torch's threads are not there, and its product would wait for them; NumPy's begins its own.
    return width <= _OWN_PRODUCT_WIDTH and _is_full_float32(z.device) and not diveq_numpy.search.forked()


def _numpy_view(x: torch.Tensor) -> np.ndarray:
    """The tensor's memory. Unlike `Tensor.numpy`, this leaves its storage resizable, as sharding needs it."""
    # The sign of a view may be a bit of the tensor's, of which NumPy would not know.
    x = x.resolve_neg()
    return np.from_dlpack(
        x if type(x) is torch.Tensor and not x.requires_grad else x.detach().as_subclass(torch.Tensor)
    )


def _product(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    torch.mm(torch.from_numpy(a), torch.from_numpy(b), out=torch.from_numpy(out))


def _nearest_by_product(lib: Backend, z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    count, width = codebook.shape
    found = torch.empty(z.shape[0], dtype=torch.int64, device=z.device)
    # Where the user allows TF32, the product is exact in float64: the setting is the whole process's, not ours.
    dtype = codebook.dtype if _is_full_float32(z.device) else torch.float64
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        centre, scale = search.frame(lib, codebook)
        extended = search.extended_codebook(lib, codebook, centre, scale).T.to(dtype)
        canonical = search.first_copies(lib, codebook)
        rows = min(search.rows_per_chunk(lib, count, width), z.shape[0])
        y = torch.empty(rows, width + 1, dtype=dtype, device=z.device)
        scores = torch.empty(rows, count, dtype=dtype, device=z.device)
        for start in range(0, z.shape[0], rows or 1):
            chunk = z[start : start + rows].to(codebook.dtype)
            here = slice(0, len(chunk))
            y[here, :-1], y[here, -1:] = search.framed_rows(lib, chunk, centre, scale)
            torch.mm(y[here], extended, out=scores[here])
            # min's index is not always the first among equals on a device; argmin's is.
            chosen = canonical[scores[here].argmin(dim=1)]
            found[start : start + rows] = torch.where(scores[here].amin(dim=1).isfinite(), chosen, -1)
    return found


def _is_full_float32(device: torch.device) -> bool:
    """Whether products in float32 are computed in float32 on a device, not in TF32 or bfloat16."""
    kind = device.type
    if kind not in ("cpu", "cuda"):
        return True
    settings = torch.backends.mkldnn if kind == "cpu" else torch.backends.cuda
    return settings.matmul.fp32_precision in ("ieee", "none")


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
