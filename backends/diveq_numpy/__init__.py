"""NumPy for diveq_core."""

from __future__ import annotations

from typing import Any

import numpy as np

from diveq_core.backend import Backend
from diveq_numpy.search import nearest_rows


class NumPyBackend(Backend):
    """NumPy: values are free to read, so NaN and infinity are refused."""

    checks_finite = True

    def __init__(self) -> None:
        super().__init__(np, "numpy")

    def owns(self, x: object) -> bool:
        # A mask would be ignored, and a matrix has its own products.
        return isinstance(x, (np.ndarray, np.generic)) and not isinstance(x, (np.ma.MaskedArray, np.matrix))

    def all_finite(self, x: np.ndarray) -> bool:
        # A sum is one pass without a temporary; only its overflow needs the second look.
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.sum(x)
        return bool(np.isfinite(total)) or bool(np.isfinite(x).all())

    def standard_normal(self, function: str, z: np.ndarray, rng: Any) -> np.ndarray:
        if rng is None:
            # The stream that np.random.seed governs: what "default" means to NumPy's users.
            drawn = np.random.standard_normal(z.shape)  # noqa: NPY002
        elif isinstance(rng, np.random.Generator):
            drawn = rng.standard_normal(z.shape, dtype=self.compute_dtype(z.dtype))
        else:
            raise TypeError(
                f"{function}: rng must be a numpy.random.Generator for NumPy arrays, got {type(rng).__name__}"
            )
        return drawn.astype(z.dtype, copy=False)

    def stable_argsort(self, x: np.ndarray) -> np.ndarray:
        # Unlike the standard's, NumPy's argsort is not stable unless asked.
        return np.argsort(x, kind="stable")

    def segment_sum(self, values: np.ndarray, segments: np.ndarray, count: int) -> np.ndarray:
        total = np.zeros((count, values.shape[1]), dtype=values.dtype)
        order = np.argsort(segments, kind="stable")
        ordered = segments[order]
        if ordered.size:
            starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
            total[ordered[starts]] = np.add.reduceat(values[order], starts, axis=0)
        return total

    def row_keys(self, codebook: np.ndarray) -> np.ndarray:
        # Adding zero makes -0.0 and 0.0 one key, as they are one number. Integer sums are exact in any order.
        bits = np.ascontiguousarray(codebook + 0.0).view(f"u{codebook.dtype.itemsize}")
        numbers = np.arange(1, codebook.shape[1] + 1, dtype=np.uint64)
        return bits.astype(np.uint64) @ (numbers * np.uint64(0x9E3779B97F4A7C15))

    def search(self, z: np.ndarray, codebook: np.ndarray) -> np.ndarray:
        return nearest_rows(self, z, codebook)

    def take_rows(self, codebook: np.ndarray, indices: np.ndarray) -> np.ndarray:
        if indices.size and indices.min() < 0:
            return super().take_rows(codebook, indices)
        return codebook[indices]


backend = NumPyBackend()
