r"""Residual and product quantization: any estimator, several times, in each other too.

Both compose the public verbs, so their derivatives are the chain rule over the hand-derived ones, written out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diveq_core._array import Array, describe
from diveq_core.estimators import Estimator
from diveq_core.registry import backend_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diveq_core.backend import Backend

Options = dict[str, Any]


class Composite:
    """An estimator applied in several parts; see `Residual` and `Product`."""

    estimator: Estimator | Composite
    parts: int

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

    def decoded_parts(self, verb: Callable[..., Any], indices: Array, codebook: Array) -> list[Array]:
        """Codewords of each part by ``verb``, the public `decode`."""
        leading = indices.ndim - (self.codebook_ndim - 2)
        if leading < 0 or indices.shape[leading] != self.parts:
            raise ValueError(
                f"decode: indices of {type(self).__name__} must have {self.codebook_ndim - 2} axes or more, of length "
                f"{self.parts} where its parts are, got {tuple(indices.shape)}"
            )
        here = (slice(None),) * leading
        shared = self.is_shared("decode", codebook)
        return [
            verb(indices[(*here, part, ...)], codebook if shared else codebook[part, ...], self.estimator)
            for part in range(self.parts)
        ]

    def is_shared(self, function: str, codebook: Array) -> bool:
        """Whether one codebook serves all parts; refuses a codebook of the wrong shape."""
        shared: bool = codebook.ndim == self.codebook_ndim - 1
        if not shared and (codebook.ndim != self.codebook_ndim or codebook.shape[0] < self.parts):
            raise ValueError(
                f"{function}: the codebook of {type(self).__name__} must have {self.codebook_ndim} axes, the first of "
                f"length {self.parts}, or {self.codebook_ndim - 1} if it is shared, got {tuple(codebook.shape)}"
            )
        return shared

    def split(self, function: str, z: Array, codebook: Array, options: Options) -> Iterator[tuple[Array, Options]]:
        """Codebook and options of each part."""
        lib = backend_of(function, z=z, codebook=codebook)
        shared = self.is_shared(function, codebook)
        noise, indices, streams = options["noise"], options["indices"], lib.streams(options["rng"], self.parts)
        here = (slice(None),) * (z.ndim - 1)
        if indices is not None and (indices.ndim < z.ndim or indices.shape[z.ndim - 1] != self.parts):
            raise ValueError(
                f"{function}: indices of {type(self).__name__} must have shape (..., {self.parts}, ...) with "
                f"{tuple(z.shape[:-1])} in front, got {tuple(indices.shape)}"
            )
        for part in range(self.parts):
            yield (
                codebook if shared else codebook[part, ...],
                {
                    "noise": None if noise is None else self.noise_of(function, noise, z, part),
                    "rng": streams[part],
                    "indices": None if indices is None else indices[(*here, part, ...)],
                    "check_finite": options["check_finite"],
                },
            )

    def noise_of(self, function: str, noise: Array, z: Array, part: int) -> Array:
        """The noise of one part."""
        raise TypeError(f"{describe(self)} must define noise_of(function, noise, z, part)")

    def decode(self, verb: Callable[..., Any], indices: Array, codebook: Array) -> Array:
        """The output from the indices, by ``verb``, the public `decode`."""
        raise TypeError(f"{describe(self)} must define decode(verb, indices, codebook)")

    def quantize(self, verb: Callable[..., Any], z: Array, codebook: Array, options: Options) -> tuple[Array, Array]:
        """``(z_q, indices)`` by ``verb``, the public `quantize`."""
        raise TypeError(f"{describe(self)} must define quantize(verb, z, codebook, options)")

    def vjp(self, verb: Callable[..., Any], z: Array, codebook: Array, options: Options) -> tuple[Any, Any]:
        """``((z_q, indices), pullback)`` by ``verb``, the public `vjp`."""
        raise TypeError(f"{describe(self)} must define vjp(verb, z, codebook, options)")

    def jvp(
        self, verb: Callable[..., Any], z: Array, codebook: Array, dz: Array, dcodebook: Array, options: Options
    ) -> tuple[Any, Array]:
        """``((z_q, indices), tangent)`` by ``verb``, the public `jvp`."""
        raise TypeError(f"{describe(self)} must define jvp(verb, z, codebook, dz, dcodebook, options)")


@dataclass(frozen=True)
class Residual(Composite):
    r"""Residual quantization: each stage quantizes what the stages before it left.

    .. math:: r_1 = z, \qquad q_s = \text{estimator}(r_s, E^{(s)}), \qquad r_{s+1} = r_s - q_s, \qquad
              z_q = \sum_s q_s

    Parameters
    ----------
    estimator : Estimator, Residual or Product
        Used in every stage.
    stages : int
        Number of stages. With fewer than the codebook has (quantizer dropout) the first ones are used, and the
        codebooks of the others get a gradient of zero.

    Notes
    -----
    The codebook is (S, K, D) with S >= stages, or (K, D) shared by all stages. Indices are (..., stages), and
    noise is (stages, ..., D). The residuals are differentiated too, so straight-through inside gives z the gradient
    of one straight-through step, where detached residuals would give ``stages`` times that.

    References
    ----------
    Zeghidour et al., "SoundStream", arXiv:2107.03312, section III-C (residual quantization, quantizer dropout).
    """

    estimator: Estimator | Composite
    stages: int

    def __post_init__(self) -> None:
        self._check("stages")

    @property
    def parts(self) -> int:  # type: ignore[override]
        return self.stages

    def noise_of(self, function: str, noise: Array, z: Array, part: int) -> Array:
        if noise.ndim < 1 or noise.shape[0] != self.stages:
            raise ValueError(
                f"{function}: noise of Residual must have shape ({self.stages}, ..., D), got {tuple(noise.shape)}"
            )
        return noise[part, ...]

    def quantize(self, verb: Callable[..., Any], z: Array, codebook: Array, options: Options) -> tuple[Array, Array]:
        lib, residual = self._start(z, codebook)
        outs = []
        for words, own in self.split("quantize", z, codebook, options):
            outs.append(verb(residual, words, self.estimator, **own))
            residual = residual - outs[-1].z_q
        return self._joined(lib, z, outs)

    def vjp(self, verb: Callable[..., Any], z: Array, codebook: Array, options: Options) -> tuple[Any, Any]:
        lib, residual = self._start(z, codebook)
        outs, pullbacks = [], []
        for words, own in self.split("vjp", z, codebook, options):
            out, pullback_of_stage = verb(residual, words, self.estimator, **own)
            outs.append(out)
            pullbacks.append(pullback_of_stage)
            residual = residual - out.z_q

        def pullback(g: Array) -> tuple[Array, Array]:
            g_residual, g_words = None, []
            for pullback_of_stage in reversed(pullbacks):
                g_q = g if g_residual is None else g - g_residual
                g_in, g_stage = pullback_of_stage(g_q)
                g_residual = g_in if g_residual is None else g_residual + g_in
                g_words.append(g_stage)
            return lib.astype(g_residual, z.dtype), _assembled(lib, codebook, self, g_words[::-1])

        return self._joined(lib, z, outs), pullback

    def jvp(
        self, verb: Callable[..., Any], z: Array, codebook: Array, dz: Array, dcodebook: Array, options: Options
    ) -> tuple[Any, Array]:
        lib, residual = self._start(z, codebook)
        d_residual = lib.astype(dz, residual.dtype)
        outs, tangent = [], None
        shared = codebook.ndim < self.codebook_ndim
        for part, (words, own) in enumerate(self.split("jvp", z, codebook, options)):
            dwords = dcodebook if shared else dcodebook[part, ...]
            out, moved = verb(residual, words, d_residual, dwords, self.estimator, **own)
            outs.append(out)
            tangent = moved if tangent is None else tangent + moved
            residual, d_residual = residual - out.z_q, d_residual - moved
        return self._joined(lib, z, outs), tangent

    def decode(self, verb: Callable[..., Any], indices: Array, codebook: Array) -> Array:
        # In the order of quantize, so that the sum rounds alike.
        total, *others = self.decoded_parts(verb, indices, codebook)
        for q in others:
            total = total + q
        return total

    def _start(self, z: Array, codebook: Array) -> tuple[Backend, Array]:
        lib = backend_of("Residual", z=z, codebook=codebook)
        return lib, lib.astype(z, lib.result_dtype(z, codebook))

    def _joined(self, lib: Backend, z: Array, outs: list[Any]) -> tuple[Array, Array]:
        total = outs[0].z_q
        for out in outs[1:]:
            total = total + out.z_q
        return total, lib.xp.stack([out.indices for out in outs], axis=z.ndim - 1)


@dataclass(frozen=True)
class Product(Composite):
    r"""Product quantization: the entries of a vector in equal groups, each with a codebook.

    .. math:: z = (z^{(1)}, \dots, z^{(G)}), \qquad z_q = \big(\text{estimator}(z^{(j)}, E^{(j)})\big)_j

    Parameters
    ----------
    estimator : Estimator, Residual or Product
        Used in every group.
    groups : int
        Number of groups G; it divides D.

    Notes
    -----
    The codebook is (G, K, D/G), or (K, D/G) shared by all groups. Indices are (..., G), and noise is (..., D).

    References
    ----------
    Jégou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", IEEE TPAMI 33(1), 2011, section II-B.
    """

    estimator: Estimator | Composite
    groups: int

    def __post_init__(self) -> None:
        self._check("groups")

    @property
    def parts(self) -> int:  # type: ignore[override]
        return self.groups

    def noise_of(self, function: str, noise: Array, z: Array, part: int) -> Array:
        if noise.shape[-1] != z.shape[-1]:
            raise ValueError(
                f"{function}: noise of Product must have shape (..., D) with D = {z.shape[-1]} as in z, "
                f"got {tuple(noise.shape)}"
            )
        return noise[self._group(z, part)]

    def quantize(self, verb: Callable[..., Any], z: Array, codebook: Array, options: Options) -> tuple[Array, Array]:
        lib = self._check_groups("quantize", z, codebook)
        outs = [
            verb(z[self._group(z, part)], words, self.estimator, **own)
            for part, (words, own) in enumerate(self.split("quantize", z, codebook, options))
        ]
        return self._joined(lib, z, outs)

    def vjp(self, verb: Callable[..., Any], z: Array, codebook: Array, options: Options) -> tuple[Any, Any]:
        lib = self._check_groups("vjp", z, codebook)
        done = [
            verb(z[self._group(z, part)], words, self.estimator, **own)
            for part, (words, own) in enumerate(self.split("vjp", z, codebook, options))
        ]

        def pullback(g: Array) -> tuple[Array, Array]:
            parts = [pullback_of_group(g[self._group(z, part)]) for part, (_, pullback_of_group) in enumerate(done)]
            g_z = lib.xp.concat([g_part for g_part, _ in parts], axis=-1)
            return g_z, _assembled(lib, codebook, self, [g_words for _, g_words in parts])

        return self._joined(lib, z, [out for out, _ in done]), pullback

    def jvp(
        self, verb: Callable[..., Any], z: Array, codebook: Array, dz: Array, dcodebook: Array, options: Options
    ) -> tuple[Any, Array]:
        lib = self._check_groups("jvp", z, codebook)
        shared = codebook.ndim < self.codebook_ndim
        done = []
        for part, (words, own) in enumerate(self.split("jvp", z, codebook, options)):
            here = self._group(z, part)
            dwords = dcodebook if shared else dcodebook[part, ...]
            done.append(verb(z[here], words, dz[here], dwords, self.estimator, **own))
        tangent = lib.xp.concat([moved for _, moved in done], axis=-1)
        return self._joined(lib, z, [out for out, _ in done]), tangent

    def decode(self, verb: Callable[..., Any], indices: Array, codebook: Array) -> Array:
        lib = backend_of("decode", indices=indices, codebook=codebook)
        return lib.xp.concat(self.decoded_parts(verb, indices, codebook), axis=-1)

    def _group(self, z: Array, part: int) -> tuple[Any, ...]:
        width = z.shape[-1] // self.groups
        return (..., slice(part * width, (part + 1) * width))

    def _check_groups(self, function: str, z: Array, codebook: Array) -> Backend:
        if z.ndim < 1 or z.shape[-1] % self.groups:
            raise ValueError(
                f"{function}: z must have shape (..., D) with D a multiple of {self.groups} groups, "
                f"got {tuple(z.shape)}"
            )
        return backend_of(function, z=z, codebook=codebook)

    def _joined(self, lib: Backend, z: Array, outs: list[Any]) -> tuple[Array, Array]:
        z_q = lib.xp.concat([out.z_q for out in outs], axis=-1)
        return z_q, lib.xp.stack([out.indices for out in outs], axis=z.ndim - 1)


def _assembled(lib: Backend, codebook: Array, composite: Composite, gradients: list[Array]) -> Array:
    """The codebook's cotangent from those of the parts: added up if it is shared, stacked otherwise."""
    if codebook.ndim < composite.codebook_ndim:
        total = gradients[0]
        for gradient in gradients[1:]:
            total = total + gradient
        return total
    unused = codebook.shape[0] - len(gradients)
    return lib.xp.stack([*gradients, *[lib.xp.zeros_like(gradients[0])] * unused], axis=0)
