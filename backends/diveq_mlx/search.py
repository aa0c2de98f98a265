"""The search as one custom function, with a rule for ``mx.vmap``."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from diveq_core.arrays import search
from diveq_core.arrays.registry import backend_of
from diveq_mlx.bind import mapped


@mx.custom_function
def nearest_rows(z: mx.array, codebook: mx.array) -> mx.array:
    """Index of the nearest codeword, (N, D), (K, D) -> (N,); -1 for a row that is not finite."""
    return search.nearest_rows(backend_of("nearest", z=z), z, codebook)


@nearest_rows.vmap
def _(operands: Any, axes: Any) -> Any:
    return mapped(nearest_rows, operands, axes), 0
