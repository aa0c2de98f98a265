"""Product quantization: any estimator, once for each group of entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from diveq_core.estimators.call import Quantized
from diveq_core.estimators.composite import Composite

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.base import Quantizer, Shape
    from diveq_core.estimators.call import Call, Pullback


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
    sequence of noises, one for each group, as space-filling estimators need it. An index of -1 gives NaN in its
    group. The logits of `GumbelST` lie side by side, (..., G K). For `FSQ` the codebook is None.

    References
    ----------
    Jégou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", IEEE TPAMI 33(1), 2011, section II-B.
    """

    estimator: Quantizer
    groups: int

    def __post_init__(self) -> None:
        self._check_fields("groups")

    @property
    def parts(self) -> int:  # type: ignore[override]
        return self.groups

    @property
    def sums(self) -> bool:  # type: ignore[override]
        return self.estimator.sums

    @property
    def keeps_space(self) -> bool:  # type: ignore[override]
        return self.estimator.keeps_space

    @property
    def entry(self) -> Quantizer | None:
        inner = self.estimator.entry
        return None if inner is None else Product(inner, self.groups)

    def refined(self, depth: int) -> Quantizer:
        inner = self.estimator.refined(depth)
        return self if inner is self.estimator else Product(inner, self.groups)

    def check(self, function: str, lib: Backend, z: Shape | None, codebook: Shape | None) -> None:
        own = self.shape_of_part(function, codebook)
        if z is not None:
            if len(z) < 1 or z[-1] % self.groups:
                raise ValueError(
                    f"{function}: z must have shape (..., D) with D a multiple of {self.groups} groups, got {z}"
                )
            z = (*z[:-1], z[-1] // self.groups)
        self.estimator.check(function, lib, z, own)

    def must_be_finite(self, lib: Backend, z: Array, codebook: Any) -> dict[str, Array]:
        return self.estimator.must_be_finite(lib, z, codebook)

    def noise_of(self, function: str, noise: Array, z: Array, part: int) -> Array:
        if noise.ndim < 1 or noise.shape[-1] != z.shape[-1]:
            raise ValueError(
                f"{function}: noise of Product must have shape (..., D) with D = {z.shape[-1]} as in z, "
                f"got {tuple(noise.shape)}"
            )
        return self.group(noise, part)

    def group(self, x: Array, part: int) -> Array:
        """The entries of one group."""
        width = x.shape[-1] // self.groups
        return x[..., part * width : (part + 1) * width]

    def call(
        self, function: str, lib: Backend, z: Array, codebook: Any, noise: Any, rng: Any, indices: Array | None
    ) -> Call:
        calls = [
            self.estimator.call(function, lib, self.group(z, part.number), *part[1:])
            for part in self.split(function, lib, z, codebook, noise, rng, indices)
        ]
        return _Groups(self, lib, codebook, calls, z.ndim - 1)

    def decode(self, lib: Backend, indices: Array, codebook: Any, dtype: Any) -> Array:
        parts = enumerate(self.indices_of_parts("decode", indices))
        groups = [self.estimator.decode(lib, own, self.words(codebook, part), dtype) for part, own in parts]
        return lib.xp.concat(groups, axis=-1)

    def marked(self, lib: Backend, function: str, indices: Array, width: int) -> tuple[Array, Array]:
        parts = self.indices_of_parts(function, indices)
        pairs = [self.estimator.marked(lib, function, part, width // self.groups) for part in parts]
        found = lib.xp.stack([found for _, found in pairs], axis=self.axis_of_parts(indices))
        return lib.xp.concat([lost for lost, _ in pairs], axis=-1), found


class _Groups(NamedTuple):
    """A call of all groups."""

    of: Product
    lib: Backend
    codebook: Any
    calls: list[Call]
    axis: int
    """That of the parts in the indices."""

    def quantize(self) -> Quantized:
        return self._joined([call.quantize() for call in self.calls])

    def vjp(self) -> tuple[Quantized, Pullback]:
        done = [call.vjp() for call in self.calls]

        def pullback(g: Array) -> tuple[Array, Any]:
            parts = [pull(self.of.group(g, part)) for part, (_, pull) in enumerate(done)]
            g_z = self.lib.xp.concat([g_part for g_part, _ in parts], axis=-1)
            return g_z, self.of.assembled(self.lib, self.codebook, [g_words for _, g_words in parts])

        return self._joined([out for out, _ in done]), pullback

    def jvp(self, dz: Array, dcodebook: Any) -> tuple[Quantized, Array]:
        of = self.of
        done = [call.jvp(of.group(dz, part), of.words(dcodebook, part)) for part, call in enumerate(self.calls)]
        return self._joined([out for out, _ in done]), self.lib.xp.concat([moved for _, moved in done], axis=-1)

    def seen(self) -> list[Array]:
        return [rows for call in self.calls for rows in call.seen()]

    def _joined(self, outs: list[Quantized]) -> Quantized:
        z_q = self.lib.xp.concat([out.z_q for out in outs], axis=-1)
        return Quantized(z_q, self.lib.xp.stack([out.indices for out in outs], axis=self.axis))
