"""The layers for CuPy."""

from __future__ import annotations

from typing import Any

import cupy

from diveq_core.layers.explicit import ExplicitLayer


class VectorQuantizer(ExplicitLayer):
    """`diveq_core.layers.explicit.ExplicitLayer` for CuPy, on the current device.

    Parameters
    ----------
    dim, codebook_size, estimator, **options
        As in `diveq_core.layers.Settings`.
    dtype : dtype
        Of the state, float32 or wider.
    rng : cupy.random.Generator, optional
    all_reduce : callable, optional

    """

    @staticmethod
    def like(dtype: Any) -> Any:
        return cupy.zeros((), cupy.float32 if dtype is None else dtype)
