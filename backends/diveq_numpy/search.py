"""The search on the CPU: BLAS in chunks that stay in cache, or faiss where its fused kernel is faster."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from diveq_core.arrays import search
from diveq_core.options import optional_kernels
from diveq_numpy import few

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend

# Up to here faiss compares without writing the scores, which are most of the traffic at small D.
_FUSED_WIDTH = 32

# Entries of the rows that faiss is given at a time, which bounds the centred copy of them. Not fewer: below a quarter
# as many rows as codewords it is thirty times slower.
_FUSED_ENTRIES = 1 << 21

# How many times as far as its codeword's length a vector may lie from it for faiss's answer to stand.
_FUSED_REACH = 4.0


class Prepared:
    """A codebook in its compute dtype, and what the search makes of it: each part when first needed, then kept."""

    def __init__(self, lib: Backend, codebook: np.ndarray) -> None:
        self.lib, self.codebook = lib, codebook

    @functools.cached_property
    def squares(self) -> np.ndarray:
        return np.vecdot(self.codebook, self.codebook)

    @functools.cached_property
    def longest(self) -> float:
        return few.longest_of(self.squares)

    @functools.cached_property
    def frame(self) -> tuple[np.ndarray, Any]:
        """Centre and scale."""
        return search.frame(self.lib, self.codebook)

    @functools.cached_property
    def extended(self) -> np.ndarray:
        count, width = self.codebook.shape
        extended = _aligned((width + 1, count), self.codebook.dtype)
        extended[...] = search.extended_codebook(self.lib, self.codebook, *self.frame).T
        return extended

    @functools.cached_property
    def framed(self) -> tuple[np.ndarray, np.ndarray]:
        """Codewords in their frame, and the squared distance up to which faiss's answer stands."""
        e = search.framed(self.lib, self.codebook, *self.frame)
        return e, np.einsum("kd,kd->k", e, e) * e.dtype.type(_FUSED_REACH**2)

    @functools.cached_property
    def canonical(self) -> np.ndarray | None:
        """The core's ``first_copies``, or None where no two codewords can be equal."""
        keys = np.sort(self.lib.row_keys(self.codebook))
        return search.first_copies(self.lib, self.codebook) if np.any(keys[1:] == keys[:-1]) else None


def nearest_rows(
    lib: Backend,
    z: np.ndarray,
    codebook: np.ndarray | Prepared,
    product: Callable[..., object] = np.matmul,
    found: np.ndarray | None = None,
) -> np.ndarray:
    """Index of the nearest codeword, (N, D), (K, D) -> (N,) int64; -1 for a row that is not finite.

    ``product(a, b, out=c)`` multiplies matrices: a caller with threads of its own brings its own, and memory for
    what is ``found`` if it wants. Overflow on the way is expected: call it where NumPy warns of none.
    """
    words = codebook.codebook if isinstance(codebook, Prepared) else codebook
    dtype = lib.compute_dtype(lib.result_dtype(z, words))
    # What was prepared in float32 does not serve vectors of float64.
    ready = isinstance(codebook, Prepared) and words.dtype == dtype
    prepared = codebook if ready else Prepared(lib, words.astype(dtype, copy=False))
    found = np.empty(z.shape[0], np.int64) if found is None else found
    if few.serves(z, words) and few.search(z.astype(dtype, copy=False), prepared, product, found):
        return found
    done = 0
    if dtype == np.float32 and words.shape[1] <= _FUSED_WIDTH and (faiss := _faiss()) is not None:
        done = _by_fused_kernel(faiss, prepared, z, product, found)
    if done < z.shape[0]:
        _by_product(prepared, z[done:], product, found[done:])
    if prepared.canonical is not None:
        found[...] = np.where(found < 0, found, prepared.canonical[found])
    return found


def _by_product(prepared: Prepared, z: np.ndarray, product: Callable[..., object], found: np.ndarray) -> None:
    lib, codebook, extended, (centre, scale) = prepared.lib, prepared.codebook, prepared.extended, prepared.frame
    count, width = codebook.shape
    rows = min(search.rows_per_chunk(lib, count, width), z.shape[0])
    y = _aligned((rows, width + 1), codebook.dtype)
    scores = _aligned((rows, count), codebook.dtype)
    centred, limit = bool(np.any(centre)), 2.0**search.REACH
    y[:, -1] = 1
    for start in range(0, z.shape[0], rows or 1):
        whole = chunk = z[start : start + rows]
        here = slice(0, len(chunk))
        if centred:
            np.subtract(chunk, centre, out=y[here, :-1], dtype=codebook.dtype)
            chunk = y[here, :-1]
        np.multiply(chunk, scale, out=y[here, :-1], dtype=codebook.dtype)
        # NaN is neither.
        near = y[here].max() <= limit and y[here].min() >= -limit
        if not near:
            y[here, :-1], y[here, -1:] = search.framed_rows(lib, whole.astype(codebook.dtype), centre, scale)
        product(y[here], extended, out=scores[here])
        chosen = scores[here].argmin(axis=1)
        best = np.take_along_axis(scores[here], chosen[:, None], axis=1)[:, 0]
        found[start : start + rows] = np.where(np.isfinite(best), chosen, -1)
        if not near:
            y[:, -1] = 1


def _aligned(shape: tuple[int, int], dtype: Any) -> np.ndarray:
    """Array that starts on a cache line; a product whose result does not takes a sixth longer."""
    size = shape[0] * shape[1] * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _by_fused_kernel(
    faiss: Any, prepared: Prepared, z: np.ndarray, product: Callable[..., object], found: np.ndarray
) -> int:
    """How many of the rows were found; the others are too far from the codebook for faiss.

    faiss compares ``|y|^2 + |e|^2 - 2 <y, e>``, which loses what decides where y is long beside e. Its answer stands
    where the distance is a few lengths of the codeword at most; other rows are searched again, by the product.
    """
    (centre, scale), (e, limit) = prepared.frame, prepared.framed
    start, rows = 0, max(_FUSED_ENTRIES // e.shape[1], 1)
    while start < z.shape[0]:
        y = np.subtract(z[start : start + rows], centre, dtype=e.dtype)
        y *= scale
        squares, chosen = (x[:, 0] for x in faiss.knn(y, e, 1))
        here = found[start : start + len(y)]
        here[...] = chosen
        # -1 stands for a distance that is not finite, and is no index.
        far = np.flatnonzero(~(squares <= np.take(limit, chosen, mode="clip")) | (chosen < 0))
        if len(far):
            again = np.empty(len(far), here.dtype)
            _by_product(prepared, z[start : start + len(y)][far], product, again)
            here[far] = again
        start += len(y)
        if 2 * len(far) > len(y):
            break
    return start


def _faiss() -> Any:
    """The faiss package, or None where it is not installed or may not be used."""
    return _import_faiss() if optional_kernels() and not forked() else None


@functools.cache
def _import_faiss() -> Any:
    try:
        # Not asked for first: who hides a package may answer that by an error too.
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "faiss":
            return None
        warnings.warn(f"nearest: faiss is installed but fails to import, so it is not used: {error}", stacklevel=2)
        return None
    # A folder of that name is a package too.
    return faiss if hasattr(faiss, "knn") else None


# Threads do not live on in a forked child, which would wait forever for those that its parent's products began.
_forked = False


def forked() -> bool:
    """Whether this process was forked from one that had imported this module."""
    return _forked


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
