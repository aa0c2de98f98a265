"""MLX for diveq_core: eager and under ``grad``, ``vjp``, ``jvp``, ``vmap``, ``compile`` and ``checkpoint``.

Products of float32 keep its digits also on a GPU, where MLX rounds operands to TF32 by default and has no setting for a
single product: they are made of parts there, unless ``MLX_ENABLE_TF32=0`` was set before MLX's first one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from diveq_core.arrays.backend import Backend
from diveq_core.arrays.rows import describe, safe_log
from diveq_mlx.bind import quantize
from diveq_mlx.product import matmul
from diveq_mlx.search import nearest_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.estimators.rule import Bindable


class MlxBackend(Backend):
    """MLX."""

    def __init__(self) -> None:
        super().__init__(mx, "mlx")

    def owns(self, x: object) -> bool:
        return isinstance(x, mx.array)

    def is_concrete(self, x: mx.array) -> bool:
        # Inside compile and vmap an evaluation is refused, and MLX has no other way to ask.
        try:
            mx.eval(x)
        except ValueError as error:
            if "function transformations" not in str(error):
                raise
            return False
        return True

    def to_numpy(self, x: mx.array) -> Any:
        return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)

    def stop_gradient(self, x: mx.array) -> mx.array:
        return mx.stop_gradient(x)

    def records(self, *arrays: mx.array) -> bool:
        return True

    def standard_normal(self, function: str, z: mx.array, rng: Any) -> mx.array:
        if rng is not None:
            _check_key(function, rng)
        return mx.random.normal(z.shape, z.dtype, key=rng)

    def streams(self, function: str, rng: Any, count: int) -> list[Any]:
        if rng is None:
            return [None] * count
        _check_key(function, rng)
        return list(mx.random.split(rng, count))

    def sums_in_parts(self, x: mx.array) -> bool:
        return True

    def segment_add(self, total: mx.array, values: mx.array, segments: mx.array) -> mx.array:
        # One segment more takes the rows whose segment is out of range, where MLX would write into other memory.
        count, width = total.shape
        kept = mx.stop_gradient(mx.where((segments < 0) | (segments >= count), count, segments))
        padded = mx.concatenate([total, mx.zeros((1, width), total.dtype)])
        return padded.at[kept].add(values)[:count]

    def matmul(self, a: mx.array, b: mx.array) -> mx.array:
        return matmul(a, b)

    def take_rows(self, codebook: mx.array, indices: mx.array) -> mx.array:
        # Out of range MLX reads other memory.
        return super().take_rows(codebook, mx.where(indices < codebook.shape[0], indices, -1))

    def first_equal(self, x: mx.array) -> mx.array:
        # Not by searchsorted, over whose sorted numbers MLX cannot vmap.
        order = mx.argsort(x)
        ordered = x[order]
        begins = ordered != mx.concatenate([ordered[:1], ordered[:-1]])
        start = mx.cummax(mx.where(begins, mx.arange(x.shape[0]), 0))
        return order[start][mx.argsort(order)]

    def search(self, z: mx.array, codebook: mx.array) -> mx.array:
        return nearest_rows(mx.stop_gradient(z), mx.stop_gradient(codebook))

    def bind(
        self, rule: Bindable, z: mx.array, codebook: mx.array, indices: mx.array, noise: mx.array | None
    ) -> mx.array:
        return quantize(rule, z, codebook, indices, noise)

    def log_radius_gradients(self, r: Callable[[Any, Any], Any], q: mx.array, z: mx.array) -> tuple[mx.array, mx.array]:
        to_q, to_z = mx.grad(lambda q, z: mx.sum(safe_log(self, r(q, z))), argnums=(0, 1))(q, z)
        return to_q, to_z


def _check_key(function: str, rng: object) -> None:
    if not isinstance(rng, mx.array):
        raise TypeError(f"{function}: rng must be an MLX key for MLX arrays, got {describe(rng)}")
    if rng.dtype != mx.uint32 or rng.shape != (2,):
        raise TypeError(
            f"{function}: rng must be an MLX key, uint32 of shape (2,), got an array {rng.dtype} of shape {rng.shape}"
        )


backend = MlxBackend()
