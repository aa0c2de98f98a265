"""The layers for CuPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cupy

from diveq_core.layers.explicit import DEFAULT, ExplicitLayer

if TYPE_CHECKING:
    from collections.abc import Callable


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

    def __init__(
        self,
        dim: int,
        codebook_size: int | None = None,
        estimator: Any = DEFAULT,
        *,
        dtype: Any = cupy.float32,
        rng: Any = None,
        all_reduce: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(cupy.zeros((), dtype), dim, codebook_size, estimator, rng, all_reduce, options)
