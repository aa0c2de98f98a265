"""Quantizers of each coordinate by itself: levels instead of codewords, and the indices that are made of them."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import check_shape, flat, flat_rows, shaped
from diveq_core.estimators.base import Estimator, Shape
from diveq_core.estimators.call import OneCall
from diveq_core.estimators.rule import Rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.call import Call


class Scalar(Estimator):
    """Levels of each coordinate, and the indices that are made of them."""

    levels: Sequence[int]
    codebook_axes = 0
    index_bound = "product of levels"

    @property
    def trains_codebook(self) -> bool:
        return False

    @abstractmethod
    def rounded(self, lib: Backend, z: Array) -> Array:
        """Which level of each coordinate is chosen, counted from the middle one, in the dtype of ``z``."""

    def level(self, lib: Backend, k: Array) -> Array:
        """Value of the levels counted from the middle one."""
        return k / self.row(lib, [level // 2 for level in self.levels], k)

    def row(self, lib: Backend, values: Sequence[float], like: Array) -> Array:
        """The values as a row, (1, D), in the dtype of ``like`` and where it is."""
        return lib.xp.asarray([list(values)], dtype=like.dtype, **lib.place(like))

    def index_count(self, codebook: Shape | None) -> int:
        return math.prod(self.levels)

    def check(self, function: str, lib: Backend, z: Shape | None, codebook: Shape | None) -> None:
        if codebook is not None:
            raise TypeError(f"{function}: codebook must be None, since FSQ has none, got one of shape {codebook}")
        if z is not None and (len(z) < 1 or z[-1] != len(self.levels)):
            raise ValueError(
                f"{function}: z must have shape (..., D) with D = {len(self.levels)}, one for each level, got {z}"
            )
        largest = int(lib.xp.iinfo(_index_dtype(lib)).max)
        if math.prod(self.levels) - 1 > largest:
            raise ValueError(
                f"{function}: the product of levels must be at most {largest + 1}, the range of the indices of "
                f"{lib.name}, got {math.prod(self.levels)}"
            )

    def call(
        self, function: str, lib: Backend, z: Array, codebook: None, noise: Any, rng: Any, indices: Array | None
    ) -> Call:
        rows, batch = flat_rows(lib, z), tuple(z.shape[:-1])
        dtype = lib.compute_dtype(z.dtype)
        if indices is None:
            indices, digits = self._found(lib, lib.astype(lib.stop_gradient(rows), dtype))
        else:
            check_shape(function, "indices", indices, batch, "z without its last axis")
            indices = flat(lib, indices)
            digits = self._digits(lib, indices)
        words = self._levels(lib, indices, digits, dtype)
        return OneCall(lib, Rule.of(lib, self, z, None), rows, words, None, None, indices, batch)

    def decode(self, lib: Backend, indices: Array, codebook: None, dtype: Any) -> Array:
        own = flat(lib, indices)
        words = self._levels(lib, own, self._digits(lib, own), lib.compute_dtype(dtype))
        return shaped(lib, lib.astype(words, dtype), (*indices.shape, len(self.levels)))

    def _found(self, lib: Backend, z: Array) -> tuple[Array, Array]:
        """Indices (N,), and their digits (N, D), of vectors (N, D)."""
        xp, dtype = lib.xp, _index_dtype(lib)
        whole = xp.all(xp.isfinite(z), axis=-1, keepdims=True)
        digits = lib.astype(xp.where(whole, self.rounded(lib, z), xp.zeros_like(z)), dtype)
        digits = digits + self.row(lib, [level // 2 for level in self.levels], digits)
        indices = lib.astype(xp.sum(digits * self.row(lib, self._places(), digits), axis=-1), dtype)
        return xp.where(whole[:, 0], indices, -xp.ones_like(indices)), digits

    def _digits(self, lib: Backend, indices: Array) -> Array:
        indices = lib.xp.expand_dims(indices, axis=-1)
        return indices // self.row(lib, self._places(), indices) % self.row(lib, self.levels, indices)

    def _levels(self, lib: Backend, indices: Array, digits: Array, dtype: Any) -> Array:
        """The level of each digit, which encoder and decoder share so that they agree bit for bit."""
        digits = lib.astype(digits, dtype)
        z_q = self.level(lib, digits - self.row(lib, [level // 2 for level in self.levels], digits))
        indices = lib.xp.expand_dims(indices, axis=-1)
        return lib.nan_where((indices < 0) | (indices >= math.prod(self.levels)), z_q)

    def _places(self) -> list[int]:
        """Value of each digit: the product of the levels before it."""
        return [math.prod(self.levels[:position]) for position in range(len(self.levels))]


def _index_dtype(lib: Backend) -> Any:
    """int64, or int32 where the library has no wider one by default."""
    return lib.as_indices(lib.xp.asarray([0])).dtype
