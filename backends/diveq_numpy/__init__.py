"""NumPy for diveq_core."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from diveq_core.arrays.backend import Backend
from diveq_core.arrays.rows import Direction, in_blocks, lengths_in_range
from diveq_numpy.layers import VectorQuantizer
from diveq_numpy.search import Prepared, nearest_rows

if TYPE_CHECKING:
    from collections.abc import Callable

# Entries of a block of rows: 256 KiB in float32, so that a handful of temporaries fits the cache.
_BLOCK_ENTRIES = 1 << 16

# Entries up to which a product of vectors begins no threads.
_SMALL = 1 << 13

_FLOAT32 = np.dtype(np.float32)


class NumPyBackend(Backend):
    """NumPy: values are free to read, so NaN and infinity are refused."""

    checks_finite = True

    def __init__(self) -> None:
        super().__init__(np, "numpy")

    def owns(self, x: object) -> bool:
        # A mask would be ignored, and a matrix has its own products.
        if type(x) is np.ndarray:
            return True
        return isinstance(x, (np.ndarray, np.generic)) and not isinstance(x, (np.ma.MaskedArray, np.matrix))

    def is_floating(self, x: np.ndarray) -> bool:
        return x.dtype.kind == "f"

    def is_integer(self, x: np.ndarray) -> bool:
        return x.dtype.kind in "iu"

    def all_finite(self, x: np.ndarray) -> bool:
        # Squares do not cancel, so one number tells; only its overflow needs the second look.
        if x.size <= _SMALL:
            return math.isfinite(np.vdot(x, x)) or bool(np.isfinite(x).all())
        if x.size <= _BLOCK_ENTRIES:
            return bool(np.isfinite(x).all())
        # A sum is one pass without a temporary; only its overflow needs the second look.
        return bool(np.isfinite(np.sum(x))) or bool(np.isfinite(x).all())

    def any_negative(self, x: np.ndarray) -> bool:
        # The least of all is read in one pass, without a temporary; of a few numbers its place is found sooner.
        return x.size > 0 and x.item(x.argmin()) < 0

    def compute_dtype(self, dtype: Any) -> Any:
        if dtype is _FLOAT32:
            return dtype
        # Also of another byte order than the machine's.
        dtype = np.dtype(dtype)
        if dtype.type is np.longdouble:
            return np.dtype(np.longdouble)
        return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)

    def copy(self, x: np.ndarray) -> np.ndarray:
        return np.array(x, order="C")

    def quiet(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Underflow on the way is harmless, and overflow shows in the result.
        def call(*args: Any, **options: Any) -> Any:
            with np.errstate(all="ignore"):
                return function(*args, **options)

        return call

    def standard_normal(self, function: str, z: np.ndarray, rng: Any) -> np.ndarray:
        if rng is None:
            # The stream that np.random.seed governs: what "default" means to NumPy's users.
            drawn = np.random.standard_normal(z.shape)  # noqa: NPY002
        elif isinstance(rng, np.random.Generator):
            # No generator draws wider numbers.
            dtype = np.float32 if self.compute_dtype(z.dtype) == np.float32 else np.float64
            drawn = rng.standard_normal(z.shape, dtype=dtype)
        else:
            raise TypeError(
                f"{function}: rng must be a numpy.random.Generator for NumPy arrays, got {type(rng).__name__}"
            )
        return drawn.astype(z.dtype, copy=False)

    def stable_argsort(self, x: np.ndarray) -> np.ndarray:
        # Unlike the standard's, NumPy's argsort is not stable unless asked.
        return np.argsort(x, kind="stable")

    def dot(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.vecdot(a, b)[:, None]

    def direction(self, x: np.ndarray) -> tuple[np.ndarray, Direction]:
        rho = np.sqrt(self.dot(x, x))
        inverse = 1 / rho
        if len(x):
            # Of a number and its inverse one is above the middle of the range.
            either = rho + inverse
            extreme = either[either.argmax(), 0]
            if lengths_in_range(1 / extreme, extreme, double=x.dtype == np.float64):
                return rho, Direction(x, inverse)
        return super().direction(x)

    def by_rows(self, function: Callable[..., Any], *arrays: Any) -> Any:
        return in_blocks(lambda like, shape: np.empty(shape, like.dtype), _BLOCK_ENTRIES, function, *arrays)

    def sums_in_parts(self, x: np.ndarray) -> bool:
        return True

    def segment_add(self, total: np.ndarray, values: np.ndarray, segments: np.ndarray) -> np.ndarray:
        if self.any_negative(segments):
            values, segments = values[segments >= 0], segments[segments >= 0]
        # One flat index an entry: add.at is several times faster on one axis than on two. Flattening must not copy.
        total = np.ascontiguousarray(total)
        width = values.shape[1]
        entries = segments[:, None] * width + np.arange(width)
        np.add.at(total.reshape(-1), entries.reshape(-1), values.reshape(-1))
        return total

    def row_keys(self, codebook: np.ndarray) -> np.ndarray:
        if codebook.dtype.itemsize > 8:
            return super().row_keys(codebook)
        # Adding zero makes -0.0 and 0.0 one key, as they are one number. Integer sums are exact in any order.
        bits = np.ascontiguousarray(codebook + 0.0).view(f"u{codebook.dtype.itemsize}")
        odd = 2 * np.arange(codebook.shape[1], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        mixed = bits * odd
        # Bits of few patterns, of signs say, would meet in a sum that is linear in them.
        mixed ^= mixed >> np.uint64(29)
        return (mixed * np.uint64(0xBF58476D1CE4E5B9)).sum(axis=1)

    def prepare(self, codebook: np.ndarray) -> Prepared:
        return Prepared(self, codebook.astype(self.compute_dtype(codebook.dtype), copy=False))

    def search(self, z: np.ndarray, codebook: np.ndarray | Prepared) -> np.ndarray:
        return nearest_rows(self, z, codebook)

    def take_rows(self, codebook: np.ndarray, indices: np.ndarray) -> np.ndarray:
        if self.any_negative(indices):
            return super().take_rows(codebook, indices)
        return codebook.take(indices, axis=0)


backend = NumPyBackend()

__all__ = ["NumPyBackend", "VectorQuantizer", "backend"]
