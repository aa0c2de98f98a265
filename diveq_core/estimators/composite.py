"""Quantization in several parts: what `Residual` and `Product` share.

Both hold calls of their parts, so their derivatives are the chain rule over the hand-derived ones, written out.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from diveq_core.arrays.registry import backend_of
from diveq_core.arrays.rows import describe
from diveq_core.estimators.base import Quantizer, Shape, check_estimator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array


class Part(NamedTuple):
    """What one part of a call is given."""

    number: int
    codebook: Any
    noise: Any
    rng: Any
    indices: Array | None


class Composite(Quantizer):
    """An estimator applied in several parts; see `Residual` and `Product`."""

    estimator: Quantizer
    parts: int
    spare: bool = False
    """Whether there may be codebooks that no part uses."""

    def _check_fields(self, name: str) -> None:
        label = type(self).__name__
        check_estimator(label, self.estimator)
        if not isinstance(self.parts, int) or isinstance(self.parts, bool) or self.parts < 1:
            raise ValueError(f"{label}: {name} must be an integer >= 1, got {self.parts!r}")

    @property
    def codebook_axes(self) -> int:  # type: ignore[override]
        """Axes of a codebook that has one for each part; one that is shared has one axis less."""
        own = self.estimator.codebook_axes
        return own + 1 if own else 0

    @property
    def index_axes(self) -> int:  # type: ignore[override]
        return 1 + self.estimator.index_axes

    @property
    def index_bound(self) -> str:  # type: ignore[override]
        return self.estimator.index_bound

    def is_shared(self, function: str, codebook: Shape) -> bool:
        """Whether one codebook serves all parts; refuses a shape that serves none."""
        axes = self.codebook_axes
        if len(codebook) == axes - 1:
            return True
        if len(codebook) == axes and (codebook[0] == self.parts or (self.spare and codebook[0] > self.parts)):
            return False
        raise ValueError(
            f"{function}: the codebook of {type(self).__name__} must have {axes} axes, the first of length "
            f"{'at least ' if self.spare else ''}{self.parts}, or {axes - 1} if it is shared, got {codebook}"
        )

    def shape_of_part(self, function: str, codebook: Shape | None) -> Shape | None:
        """The shape of one part's codebook."""
        if codebook is None or self.codebook_axes == 0:
            return codebook
        return codebook if self.is_shared(function, codebook) else codebook[1:]

    def index_count(self, codebook: Shape | None) -> int:
        return self.estimator.index_count(codebook)

    def words(self, codebook: Any, part: int) -> Any:
        """The codebook of one part, or what is of its shape."""
        if codebook is None or codebook.ndim < self.codebook_axes:
            return codebook
        return codebook[part, ...]

    def assembled(self, lib: Backend, codebook: Any, gradients: list[Any]) -> Any:
        """The codebook's cotangent from those of the parts: added up if it is shared, stacked otherwise."""
        if codebook is None or gradients[0] is None:
            return None
        if codebook.ndim < self.codebook_axes:
            total = gradients[0]
            for gradient in gradients[1:]:
                total = total + gradient
            return total
        unused = codebook.shape[0] - len(gradients)
        return lib.xp.stack([*gradients, *[lib.xp.zeros_like(gradients[0])] * unused], axis=0)

    def axis_of_parts(self, indices: Array) -> int:
        """The axis of indices (..., parts, ...), or below zero where there is none."""
        return indices.ndim - self.index_axes

    def indices_of_parts(self, function: str, indices: Array) -> list[Array]:
        """The indices of each part."""
        axis = self.axis_of_parts(indices)
        if axis < 0 or indices.shape[axis] != self.parts:
            raise ValueError(
                f"{function}: indices of {type(self).__name__} must have shape (..., {self.parts}, ...), one for each "
                f"part of each vector, got {tuple(indices.shape)}"
            )
        return [indices[(*(slice(None),) * axis, part, ...)] for part in range(self.parts)]

    def split(
        self, function: str, lib: Backend, z: Array, codebook: Any, noise: Any, rng: Any, indices: Array | None
    ) -> Iterator[Part]:
        """What each part is given."""
        noises, streams = self._noises(function, noise, z), lib.streams(function, rng, self.parts)
        of_parts = [None] * self.parts if indices is None else self.indices_of_parts(function, indices)
        for part in range(self.parts):
            yield Part(part, self.words(codebook, part), noises[part], streams[part], of_parts[part])

    def _noises(self, function: str, noise: Any, z: Array) -> list[Any]:
        """The noise of each part, from one array for all or from a sequence with one for each."""
        if noise is None:
            return [None] * self.parts
        # A tuple with names is the noise of one part.
        if hasattr(noise, "_fields"):
            raise TypeError(f"{self._wanted_noise(function)}, got {describe(noise)}")
        if isinstance(noise, (list, tuple)):
            if len(noise) != self.parts:
                raise ValueError(f"{self._wanted_noise(function)}, got {len(noise)}")
            return list(noise)
        backend_of(function, z=z, noise=noise)
        return [self.noise_of(function, noise, z, part) for part in range(self.parts)]

    def _wanted_noise(self, function: str) -> str:
        return f"{function}: noise of {type(self).__name__} must be an array, or a sequence of {self.parts} of them"

    @abstractmethod
    def noise_of(self, function: str, noise: Array, z: Array, part: int) -> Array:
        """The noise of one part."""
