"""One call of a verb: its arguments checked and flattened, and the rule that they go to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from diveq_core.arrays.checks import check_like, check_pair, check_shape, checked_indices, flat_rows, refuse_not_finite
from diveq_core.arrays.registry import backend_of
from diveq_core.arrays.rows import Array, describe
from diveq_core.estimators.base import Estimator
from diveq_core.estimators.rule import Rule
from diveq_core.estimators.space_filling import CurveRule, SpaceFilling

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend


class Quantized(NamedTuple):
    """What a quantizer gives."""

    z_q: Array
    """Quantized vectors, (..., D)."""

    indices: Array
    """Index of the codeword chosen for each vector, (...)."""


class Call:
    """Checked and flattened arguments of one quantization by one estimator."""

    def __init__(
        self,
        function: str,
        z: Array,
        codebook: Array,
        estimator: Estimator,
        noise: Any,
        rng: Any,
        indices: Array | None,
        finite: bool | None,
    ) -> None:
        check_estimator(function, estimator)
        lib = backend_of(function, z=z, codebook=codebook)
        check_pair(lib, function, z, codebook)
        refuse_not_finite(lib, function, finite, z=z, codebook=codebook)
        self.shape = tuple(z.shape)
        self.rule = Rule.of(lib, estimator, z, codebook)
        self.z = flat_rows(lib, z)
        if isinstance(estimator, SpaceFilling):
            self.rule = CurveRule.of(lib, estimator, z, codebook)
            drawn = estimator.prepare(function, lib, z, codebook, noise, rng)
            self.indices = self._chosen(function, indices, estimator.points(lib, codebook, drawn.dither), "K - 1")
            self.noise = CurveRule.packed(lib, drawn, self.indices, self.z)
            return
        if noise is not None:
            check_like(lib, function, "noise", noise, z, "z")
        if not estimator.noisy:
            noise = None
        elif noise is None:
            noise = lib.standard_normal(function, z, rng)
        self.noise = None if noise is None else flat_rows(lib, noise)
        self.indices = self._chosen(function, indices, codebook, "K")

    def quantized(self, z_q: Array) -> Quantized:
        """The output in the shape of ``z``."""
        reshape = self.rule.lib.xp.reshape
        return Quantized(reshape(z_q, self.shape), reshape(self.indices, self.shape[:-1]))

    def _chosen(self, function: str, indices: Array | None, points: Array, bound: str) -> Array:
        """The given indices, checked, or those of the nearest points, (N,)."""
        lib: Backend = self.rule.lib
        if indices is None:
            return lib.search(self.z, points)
        backend_of(function, z=self.z, indices=indices)
        found = checked_indices(lib, function, indices, points.shape[0], bound=bound)
        check_shape(function, "indices", found, self.shape[:-1], "z without its last axis")
        # They are returned, and what is returned shares no memory with what was given.
        return lib.xp.reshape(lib.copy(found) if found is indices else found, (self.z.shape[0],))


def check_estimator(function: str, estimator: object) -> None:
    """Refuse what is no estimator of one part."""
    if not isinstance(estimator, Estimator):
        hint = "; call it: an instance is expected" if isinstance(estimator, type) else ""
        raise TypeError(f"{function}: estimator must be an Estimator such as DiVeQ(), got {describe(estimator)}{hint}")
