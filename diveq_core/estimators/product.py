"""Product quantization: any estimator, once for each group of entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diveq_core.estimators.composite import Composite, marked

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.base import Estimator
    from diveq_core.estimators.composite import Options


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
    The codebook is (G, K, D/G), or (K, D/G) shared by all groups. Indices are (..., G), and noise is (..., D), or a
    sequence of noises, one for each group, as space-filling estimators need it. An index of -1 gives NaN in its group.

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

    @property
    def sums(self) -> bool:  # type: ignore[override]
        return isinstance(self.estimator, Composite) and self.estimator.sums

    def check(self, function: str, z: Array, codebook: Array) -> Backend:
        lib = super().check(function, z, codebook)
        if z.shape[-1] % self.groups:
            raise ValueError(
                f"{function}: z must have shape (..., D) with D a multiple of {self.groups} groups, "
                f"got {tuple(z.shape)}"
            )
        return lib

    def noise_of(self, function: str, noise: Array, z: Array, part: int) -> Array:
        if noise.ndim < 1 or noise.shape[-1] != z.shape[-1]:
            raise ValueError(
                f"{function}: noise of Product must have shape (..., D) with D = {z.shape[-1]} as in z, "
                f"got {tuple(noise.shape)}"
            )
        return noise[self._group(z, part)]

    def quantize(
        self, lib: Backend, verb: Callable[..., Any], z: Array, codebook: Array, options: Options
    ) -> tuple[Array, Array]:
        outs = [
            verb(z[self._group(z, part)], words, self.estimator, **own)
            for part, (words, own) in enumerate(self.split(lib, "quantize", z, codebook, options))
        ]
        return self._joined(lib, z, outs)

    def vjp(
        self, lib: Backend, verb: Callable[..., Any], z: Array, codebook: Array, options: Options
    ) -> tuple[tuple[Array, Array], Callable[[Array], tuple[Array, Array]]]:
        done = [
            verb(z[self._group(z, part)], words, self.estimator, **own)
            for part, (words, own) in enumerate(self.split(lib, "vjp", z, codebook, options))
        ]

        def pullback(g: Array) -> tuple[Array, Array]:
            parts = [pullback_of_group(g[self._group(z, part)]) for part, (_, pullback_of_group) in enumerate(done)]
            g_z = lib.xp.concat([g_part for g_part, _ in parts], axis=-1)
            return g_z, self.assembled(lib, codebook, [g_words for _, g_words in parts])

        return self._joined(lib, z, [out for out, _ in done]), pullback

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
        shared = codebook.ndim < self.codebook_ndim
        done = []
        for part, (words, own) in enumerate(self.split(lib, "jvp", z, codebook, options)):
            here = self._group(z, part)
            dwords = dcodebook if shared else dcodebook[part, ...]
            done.append(verb(z[here], words, dz[here], dwords, self.estimator, **own))
        tangent = lib.xp.concat([moved for _, moved in done], axis=-1)
        return self._joined(lib, z, [out for out, _ in done]), tangent

    def decode(self, lib: Backend, verb: Callable[..., Any], indices: Array, codebook: Array, dtype: Any) -> Array:
        _, groups = self.decoded_parts(lib, verb, indices, codebook, dtype)
        return lib.xp.concat(groups, axis=-1)

    def marked(self, lib: Backend, function: str, indices: Array, width: int) -> tuple[Array, Array]:
        parts = self.indices_of_parts(function, indices)
        pairs = [marked(lib, function, self.estimator, part, width // self.groups) for part in parts]
        found = lib.xp.stack([found for _, found in pairs], axis=self.axis_of_parts(indices))
        return lib.xp.concat([lost for lost, _ in pairs], axis=-1), found

    def _group(self, z: Array, part: int) -> tuple[Any, ...]:
        width = z.shape[-1] // self.groups
        return (..., slice(part * width, (part + 1) * width))

    def _joined(self, lib: Backend, z: Array, outs: list[Any]) -> tuple[Array, Array]:
        z_q = lib.xp.concat([out.z_q for out in outs], axis=-1)
        return z_q, lib.xp.stack([out.indices for out in outs], axis=z.ndim - 1)
