"""Dask for diveq_core: searches and lookups block by block, by the library of the blocks; all else by the standard.

A block of vectors is one task. Nothing is computed before the user asks for it, so NaN and infinity are marked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import array_api_compat.dask.array as dask_namespace
import dask.array as da
import numpy as np

from diveq_core.arrays.backend import Backend
from diveq_core.tokens import lookup, nearest

if TYPE_CHECKING:
    from collections.abc import Callable


class DaskBackend(Backend):
    """Dask arrays, of any library whose arrays can be their blocks."""

    def __init__(self) -> None:
        super().__init__(dask_namespace, "dask")

    def owns(self, x: object) -> bool:
        return isinstance(x, da.Array)

    def unfit(self, x: da.Array) -> str | None:
        return "one of unknown size; compute_chunk_sizes() finds it" if np.isnan(x.shape).any() else None

    def quiet(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # What NumPy warns of while a graph is made, from blocks of size zero.
        return np.errstate(all="ignore")(function)

    def to_numpy(self, x: da.Array) -> Any:
        return np.asarray(x.compute())

    def copy(self, x: da.Array) -> da.Array:
        # It cannot be written to.
        return x

    def search(self, z: da.Array, codebook: da.Array) -> da.Array:
        words = codebook.rechunk(-1)
        return da.blockwise(_nearest, "n", _whole_rows(z), "nd", words, "kd", concatenate=True, meta=_like(z, np.int64))

    def take_rows(self, codebook: da.Array, indices: da.Array) -> da.Array:
        words = codebook.rechunk(-1)
        return da.blockwise(
            _lookup, "nd", indices, "n", words, "kd", concatenate=True, meta=_like(codebook, codebook.dtype, 2)
        )


def _whole_rows(z: da.Array) -> da.Array:
    return z if z.numblocks[1] == 1 else z.rechunk({1: -1})


def _like(x: da.Array, dtype: Any, axes: int = 1) -> Any:
    """An array of no entries of the blocks' library."""
    return np.empty_like(x._meta, dtype=dtype, shape=(0,) * axes)


def _nearest(z: Any, codebook: Any) -> Any:
    return nearest(z, codebook, check_finite=False)


def _lookup(indices: Any, codebook: Any) -> Any:
    return lookup(indices, codebook)


backend = DaskBackend()

__all__ = ["DaskBackend", "backend"]
