"""Residual quantization: any estimator, several times, each on what the others left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diveq_core.compose import Composite

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core._array import Array
    from diveq_core.backend import Backend
    from diveq_core.compose import Options
    from diveq_core.estimators import Estimator


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
    noise is (stages, ..., D), or a sequence of noises, one for each stage, as space-filling estimators need it. The
    residuals are differentiated too, so straight-through inside gives z the gradient of one straight-through step,
    where detached residuals would give ``stages`` times that.

    References
    ----------
    Zeghidour et al., "SoundStream", arXiv:2107.03312, section III-C (residual quantization, quantizer dropout).
    """

    estimator: Estimator | Composite
    stages: int
    spare = True

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

    def quantize(
        self, lib: Backend, verb: Callable[..., Any], z: Array, codebook: Array, options: Options
    ) -> tuple[Array, Array]:
        residual = self._start(lib, z, codebook)
        outs = []
        for words, own in self.split(lib, "quantize", z, codebook, options):
            outs.append(verb(residual, words, self.estimator, **own))
            residual = residual - outs[-1].z_q
        return self._joined(lib, z, outs)

    def vjp(
        self, lib: Backend, verb: Callable[..., Any], z: Array, codebook: Array, options: Options
    ) -> tuple[tuple[Array, Array], Callable[[Array], tuple[Array, Array]]]:
        residual = self._start(lib, z, codebook)
        outs, pullbacks = [], []
        for words, own in self.split(lib, "vjp", z, codebook, options):
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
            return lib.astype(g_residual, z.dtype), self.assembled(lib, codebook, g_words[::-1])

        return self._joined(lib, z, outs), pullback

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
        residual = self._start(lib, z, codebook)
        d_residual = lib.astype(dz, residual.dtype)
        outs, tangent = [], None
        shared = codebook.ndim < self.codebook_ndim
        for part, (words, own) in enumerate(self.split(lib, "jvp", z, codebook, options)):
            dwords = dcodebook if shared else dcodebook[part, ...]
            out, moved = verb(residual, words, d_residual, dwords, self.estimator, **own)
            outs.append(out)
            tangent = moved if tangent is None else tangent + moved
            residual, d_residual = residual - out.z_q, d_residual - moved
        return self._joined(lib, z, outs), tangent

    def decode(self, lib: Backend, verb: Callable[..., Any], indices: Array, codebook: Array) -> Array:
        # In the order of quantize, so that the sum rounds alike.
        total, *others = self.decoded_parts(verb, indices, codebook)
        for q in others:
            total = total + q
        return total

    def _start(self, lib: Backend, z: Array, codebook: Array) -> Array:
        return lib.astype(z, lib.result_dtype(z, codebook))

    def _joined(self, lib: Backend, z: Array, outs: list[Any]) -> tuple[Array, Array]:
        total = outs[0].z_q
        for out in outs[1:]:
            total = total + out.z_q
        return total, lib.xp.stack([out.indices for out in outs], axis=z.ndim - 1)
