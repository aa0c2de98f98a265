"""The search on the CPU: BLAS in chunks that stay in cache, or faiss where its fused kernel is faster."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np

from diveq_core import search

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.backend import Backend

# Up to here faiss compares without writing the scores, which are most of the traffic at small D.
_FUSED_WIDTH = 32

# Rows that faiss is given at a time, which bounds the centred copy of them.
_FUSED_ENTRIES = 1 << 21


def nearest_rows(
    lib: Backend, z: np.ndarray, codebook: np.ndarray, product: Callable[..., object] = np.matmul
) -> np.ndarray:
    """Index of the nearest codeword, (N, D), (K, D) -> (N,) int64; -1 for a row that is not finite.

    ``product(a, b, out=c)`` multiplies matrices: a caller with threads of its own brings its own.
    """
    dtype = lib.compute_dtype(lib.result_dtype(z, codebook))
    codebook = codebook.astype(dtype, copy=False)
    found = np.empty(z.shape[0], np.int64)
    with np.errstate(all="ignore"):
        centre, inverse_scale = search.frame(lib, codebook)
        canonical = _first_copies(lib, codebook)
        faiss = _faiss() if dtype == np.float32 and codebook.shape[1] <= _FUSED_WIDTH else None
        if faiss is None:
            _by_product(lib, z, codebook, centre, inverse_scale, found, product)
        else:
            _by_fused_kernel(faiss, z, (codebook - centre) * inverse_scale, centre, inverse_scale, found)
    if canonical is not None:
        found = np.where(found < 0, found, canonical[found])
    return found


def _by_product(
    lib: Backend,
    z: np.ndarray,
    codebook: np.ndarray,
    centre: np.ndarray,
    inverse_scale: Any,
    found: np.ndarray,
    product: Callable[..., object],
) -> None:
    count, width = codebook.shape
    rows = min(search.rows_per_chunk(lib, count, width), z.shape[0])
    extended = _aligned((width + 1, count), codebook.dtype)
    extended[...] = search.extended_codebook(lib, codebook, centre, inverse_scale).T
    y = _aligned((rows, width + 1), codebook.dtype)
    y[:, -1] = 1
    scores = _aligned((rows, count), codebook.dtype)
    centred = bool(np.any(centre))
    for start in range(0, z.shape[0], rows or 1):
        chunk = z[start : start + rows]
        here = slice(0, len(chunk))
        if centred:
            np.subtract(chunk, centre, out=y[here, :-1], dtype=codebook.dtype)
            chunk = y[here, :-1]
        np.multiply(chunk, inverse_scale, out=y[here, :-1], dtype=codebook.dtype)
        product(y[here], extended, out=scores[here])
        chosen = scores[here].argmin(axis=1)
        best = np.take_along_axis(scores[here], chosen[:, None], axis=1)[:, 0]
        found[start : start + rows] = np.where(np.isfinite(best), chosen, -1)


def _aligned(shape: tuple[int, int], dtype: Any) -> np.ndarray:
    """Array that starts on a cache line; a product whose result does not takes a sixth longer."""
    size = shape[0] * shape[1] * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _by_fused_kernel(
    faiss: Any, z: np.ndarray, e: np.ndarray, centre: np.ndarray, inverse_scale: Any, found: np.ndarray
) -> None:
    rows = max(_FUSED_ENTRIES // e.shape[1], 1)
    for start in range(0, z.shape[0], rows):
        y = (z[start : start + rows].astype(e.dtype, copy=False) - centre) * inverse_scale
        distances, chosen = faiss.knn(y, e, 1)
        found[start : start + rows] = np.where(np.isfinite(distances[:, 0]), chosen[:, 0], -1)


def _first_copies(lib: Backend, codebook: np.ndarray) -> np.ndarray | None:
    """The core's ``first_copies``, or None where no two codewords can be equal."""
    keys = np.sort(lib.row_keys(codebook))
    return search.first_copies(lib, codebook) if np.any(keys[1:] == keys[:-1]) else None


@functools.cache
def _faiss() -> Any:
    """The faiss package, or None where it is not installed."""
    return importlib.import_module("faiss") if importlib.util.find_spec("faiss") else None
