"""Quantization in several parts: what `Residual` and `Product` share.

Both compose the public verbs, so their derivatives are the chain rule over the hand-derived ones, written out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import check_floating, checked_indices, refuse_not_finite
from diveq_core.arrays.registry import backend_of
from diveq_core.arrays.rows import Array, describe
from diveq_core.estimators.base import Estimator
from diveq_core.estimators.space_filling import CurveNoise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diveq_core.arrays.backend import Backend

Options = dict[str, Any]


class Composite:
    """An estimator applied in several parts; see `Residual` and `Product`."""

    estimator: Estimator | Composite
    parts: int
    sums: bool = False
    """Whether the output is a sum of codewords, which 16 bits would round."""

    spare: bool = False
    """Whether there may be codebooks that no part uses."""

    def _check(self, name: str) -> None:
        label = type(self).__name__
        if not isinstance(self.estimator, (Estimator, Composite)):
            raise TypeError(f"{label}: estimator must be an estimator such as DiVeQ(), got {describe(self.estimator)}")
        if not isinstance(self.parts, int) or isinstance(self.parts, bool) or self.parts < 1:
            raise ValueError(f"{label}: {name} must be an integer >= 1, got {self.parts!r}")

    @property
    def codebook_ndim(self) -> int:
        """Axes of a codebook that has one for each part; one that is shared has one axis less."""
        return 1 + (self.estimator.codebook_ndim if isinstance(self.estimator, Composite) else 2)

    def check(self, function: str, z: Array, codebook: Array) -> Backend:
        """The backend of ``z`` and the codebook; refuses what no part could be cut from."""
        lib = backend_of(function, z=z, codebook=codebook)
        check_floating(lib, function, z=z, codebook=codebook)
        if z.ndim < 1:
            raise ValueError(f"{function}: z must have shape (..., D), got {tuple(z.shape)}")
        return lib

    def is_shared(self, function: str, codebook: Array) -> bool:
        """Whether one codebook serves all parts; refuses a codebook of the wrong shape."""
        if codebook.ndim == self.codebook_ndim - 1:
            return True
        if codebook.ndim == self.codebook_ndim:
            count = codebook.shape[0]
            if count == self.parts or (self.spare and count > self.parts):
                return False
        raise ValueError(
            f"{function}: the codebook of {type(self).__name__} must have {self.codebook_ndim} axes, the first of "
            f"length {'at least ' if self.spare else ''}{self.parts}, or {self.codebook_ndim - 1} if it is shared, "
            f"got {tuple(codebook.shape)}"
        )

    def axis_of_parts(self, indices: Array) -> int:
        """The axis of indices (..., parts, ...), or below zero where there is none."""
        return indices.ndim - (self.codebook_ndim - 2)

    def indices_of_parts(self, function: str, indices: Array) -> list[Array]:
        """The indices of each part."""
        axis = self.axis_of_parts(indices)
        if axis < 0 or indices.shape[axis] != self.parts:
            raise ValueError(
                f"{function}: indices of {type(self).__name__} must have shape (..., {self.parts}, ...), one for each "
                f"part of each vector, got {tuple(indices.shape)}"
            )
        return [indices[(*(slice(None),) * axis, part, ...)] for part in range(self.parts)]

    def decoded_parts(
        self, lib: Backend, verb: Callable[..., Any], indices: Array, codebook: Array, dtype: Any
    ) -> tuple[list[Array], list[Array]]:
        """The indices of each part, and its codewords by ``verb``, the public `decode`."""
        shared = self.is_shared("decode", codebook)
        parts = self.indices_of_parts("decode", checked_indices(lib, "decode", indices, codebook.shape[-2]))
        return parts, [
            verb(indices, codebook if shared else codebook[part, ...], self.estimator, dtype=dtype)
            for part, indices in enumerate(parts)
        ]

    def marked(self, lib: Backend, function: str, indices: Array, width: int) -> tuple[Array, Array]:
        """As the function `marked`, of this estimator."""
        raise TypeError(f"{describe(self)} must define marked(lib, function, indices, width)")

    def split(
        self, lib: Backend, function: str, z: Array, codebook: Array, options: Options
    ) -> Iterator[tuple[Array, Options]]:
        """Codebook and options of each part."""
        shared = self.is_shared(function, codebook)
        # Once for all: what the stages of a residual leave of a vector whose index is -1 is NaN, and may be.
        used = codebook if shared else codebook[: self.parts, ...]
        refuse_not_finite(lib, function, options["check_finite"], z=z, codebook=used)
        noises = self.noises(function, options["noise"], z)
        indices, streams = options["indices"], lib.streams(function, options["rng"], self.parts)
        of_parts: list[Any] = [None] * self.parts
        if indices is not None:
            backend_of(function, z=z, indices=indices)
            of_parts = self.indices_of_parts(function, checked_indices(lib, function, indices, codebook.shape[-2]))
        for part in range(self.parts):
            yield (
                codebook if shared else codebook[part, ...],
                {
                    "noise": noises[part],
                    "rng": streams[part],
                    "indices": of_parts[part],
                    "check_finite": False,
                },
            )

    def noises(self, function: str, noise: Any, z: Array) -> list[Any]:
        """The noise of each part, from one array for all or from a sequence with one for each."""
        if noise is None:
            return [None] * self.parts
        wanted = f"{function}: noise of {type(self).__name__} must be an array, or a sequence of {self.parts} of them"
        # Itself a tuple, but the noise of one part.
        if isinstance(noise, CurveNoise):
            raise TypeError(f"{wanted}, got {describe(noise)}")
        if isinstance(noise, (list, tuple)):
            if len(noise) != self.parts:
                raise ValueError(f"{wanted}, got {len(noise)}")
            return list(noise)
        backend_of(function, z=z, noise=noise)
        return [self.noise_of(function, noise, z, part) for part in range(self.parts)]

    def noise_of(self, function: str, noise: Array, z: Array, part: int) -> Array:
        """The noise of one part."""
        raise TypeError(f"{describe(self)} must define noise_of(function, noise, z, part)")

    def assembled(self, lib: Backend, codebook: Array, gradients: list[Array]) -> Array:
        """The codebook's cotangent from those of the parts: added up if it is shared, stacked otherwise."""
        if codebook.ndim < self.codebook_ndim:
            total = gradients[0]
            for gradient in gradients[1:]:
                total = total + gradient
            return total
        unused = codebook.shape[0] - len(gradients)
        return lib.xp.stack([*gradients, *[lib.xp.zeros_like(gradients[0])] * unused], axis=0)

    def decode(self, lib: Backend, verb: Callable[..., Any], indices: Array, codebook: Array, dtype: Any) -> Array:
        """The output from the indices, by ``verb``, the public `decode`."""
        raise TypeError(f"{describe(self)} must define decode(lib, verb, indices, codebook, dtype)")

    def quantize(
        self, lib: Backend, verb: Callable[..., Any], z: Array, codebook: Array, options: Options
    ) -> tuple[Array, Array]:
        """``(z_q, indices)`` by ``verb``, the public `quantize`."""
        raise TypeError(f"{describe(self)} must define quantize(lib, verb, z, codebook, options)")

    def vjp(
        self, lib: Backend, verb: Callable[..., Any], z: Array, codebook: Array, options: Options
    ) -> tuple[tuple[Array, Array], Callable[[Array], tuple[Array, Array]]]:
        """``((z_q, indices), pullback)`` by ``verb``, the public `vjp`."""
        raise TypeError(f"{describe(self)} must define vjp(lib, verb, z, codebook, options)")

    def jvp(
        self,
        lib: Backend,
        verb: Callable[..., Any],
        z: Array,
        codebook: Array,
        dz: Array,
        dcodebook: Array,
        options: Options,
    ) -> tuple[tuple[Array, Array], Array]:
        """``((z_q, indices), tangent)`` by ``verb``, the public `jvp`."""
        raise TypeError(f"{describe(self)} must define jvp(lib, verb, z, codebook, dz, dcodebook, options)")


def marked(
    lib: Backend, function: str, estimator: Estimator | Composite, indices: Array, width: int
) -> tuple[Array, Array]:
    """The entries (..., D) whose index is the mark -1, and the indices with 0 in its place."""
    if isinstance(estimator, Composite):
        return estimator.marked(lib, function, indices, width)
    xp = lib.xp
    lost = indices == -1
    entries = xp.broadcast_to(xp.expand_dims(lost, axis=-1), (*indices.shape, width))
    return entries, xp.where(lost, xp.zeros_like(indices), indices)
