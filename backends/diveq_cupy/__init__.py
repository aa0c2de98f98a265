"""CuPy for diveq_core."""

from __future__ import annotations

from typing import Any

import array_api_compat.cupy as cupy_namespace
import cupy
import cupyx

from diveq_core.arrays.backend import Backend
from diveq_cupy.layers import VectorQuantizer
from diveq_cupy.search import nearest_rows


class CuPyBackend(Backend):
    """CuPy: everything on the current device, nothing read back."""

    # A GPU has no cache to keep the scores in, and larger products fill it better: 256 MiB in float32.
    scores_per_chunk = 1 << 26
    rows_at_least = 1 << 13

    def __init__(self) -> None:
        super().__init__(cupy_namespace, "cupy")

    def owns(self, x: object) -> bool:
        return isinstance(x, cupy.ndarray)

    def to_numpy(self, x: Any) -> Any:
        return cupy.asnumpy(x)

    def place(self, x: Any) -> dict[str, Any]:
        return {}

    def standard_normal(self, function: str, z: Any, rng: Any) -> Any:
        dtype = self.compute_dtype(z.dtype)
        if rng is None:
            drawn = cupy.random.standard_normal(z.shape, dtype=dtype)
        elif isinstance(rng, (cupy.random.Generator, cupy.random.RandomState)):
            drawn = rng.standard_normal(z.shape, dtype=dtype)
        else:
            raise TypeError(
                f"{function}: rng must be a cupy.random.Generator for CuPy arrays, got {type(rng).__name__}"
            )
        return drawn.astype(z.dtype, copy=False)

    def sums_in_parts(self, x: Any) -> bool:
        return True

    def segment_add(self, total: Any, values: Any, segments: Any) -> Any:
        # One segment more takes the rows whose segment is negative.
        count, width = total.shape
        padded = cupy.concatenate([total, cupy.zeros((1, width), total.dtype)])
        cupyx.scatter_add(padded, cupy.where(segments < 0, count, segments), values)
        return padded[:count]

    def search(self, z: Any, codebook: Any) -> Any:
        return nearest_rows(self, z, codebook)


backend = CuPyBackend()

__all__ = ["CuPyBackend", "VectorQuantizer", "backend"]
