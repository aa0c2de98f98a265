"""Residual quantization: any estimator, several times, each on what the others left."""

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

    Residuals and sums are computed in at least float32, and z_q is rounded once.

    An index of -1 in a stage after the first marks the stage as dropped, for this vector: it adds nothing, the gradient
    passes by it, and its codebook gets none. In the first stage it marks a vector that was not finite, and gives NaN.

    References
    ----------
    Zeghidour et al., "SoundStream", arXiv:2107.03312, section III-C (residual quantization, quantizer dropout).
    """

    estimator: Estimator | Composite
    stages: int
    spare = True
    sums = True

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
        residual, wide = self._computed(lib, z, codebook)
        stages = []
        for part, (words, own) in enumerate(self.split(lib, "quantize", residual, wide, options)):
            stage = _Stage(self, lib, "quantize", part, own, z.shape[-1])
            z_q, indices = verb(stage.kept(residual), words, self.estimator, **stage.options)
            stages.append((stage.kept(z_q), stage.found(indices)))
            residual = residual - stages[-1][0]
        return self._joined(lib, z, codebook, stages, options)

    def vjp(
        self, lib: Backend, verb: Callable[..., Any], z: Array, codebook: Array, options: Options
    ) -> tuple[tuple[Array, Array], Callable[[Array], tuple[Array, Array]]]:
        residual, wide = self._computed(lib, z, codebook)
        stages, pullbacks = [], []
        for part, (words, own) in enumerate(self.split(lib, "vjp", residual, wide, options)):
            stage = _Stage(self, lib, "vjp", part, own, z.shape[-1])
            (z_q, indices), pullback_of_stage = verb(stage.kept(residual), words, self.estimator, **stage.options)
            stages.append((stage.kept(z_q), stage.found(indices)))
            pullbacks.append((stage, pullback_of_stage))
            residual = residual - stages[-1][0]
        dtype = residual.dtype

        def pullback(g: Array) -> tuple[Array, Array]:
            g = lib.astype(g, dtype)
            g_residual, g_words = None, []
            for stage, pullback_of_stage in reversed(pullbacks):
                g_q = g if g_residual is None else g - g_residual
                g_in, g_stage = pullback_of_stage(stage.kept(g_q))
                g_residual = g_in if g_residual is None else g_residual + g_in
                g_words.append(g_stage)
            g_codebook = self.assembled(lib, codebook, g_words[::-1])
            return lib.astype(g_residual, z.dtype), lib.astype(g_codebook, codebook.dtype)

        return self._joined(lib, z, codebook, stages, options), pullback

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
        residual, wide = self._computed(lib, z, codebook)
        d_residual, dcodebook = (lib.astype(x, residual.dtype) for x in (dz, dcodebook))
        stages, tangent = [], None
        shared = codebook.ndim < self.codebook_ndim
        for part, (words, own) in enumerate(self.split(lib, "jvp", residual, wide, options)):
            dwords = dcodebook if shared else dcodebook[part, ...]
            stage = _Stage(self, lib, "jvp", part, own, z.shape[-1])
            (z_q, indices), moved = verb(
                stage.kept(residual), words, stage.kept(d_residual), dwords, self.estimator, **stage.options
            )
            stages.append((stage.kept(z_q), stage.found(indices)))
            moved = stage.kept(moved)
            tangent = moved if tangent is None else tangent + moved
            residual, d_residual = residual - stages[-1][0], d_residual - moved
        return self._joined(lib, z, codebook, stages, options), lib.astype(tangent, lib.result_dtype(z, codebook))

    def decode(self, lib: Backend, verb: Callable[..., Any], indices: Array, codebook: Array, dtype: Any) -> Array:
        # No float32 rounds what a codebook of float64 holds, whatever is asked for.
        asked, held = lib.compute_dtype(dtype), lib.compute_dtype(codebook.dtype)
        wide = asked if lib.xp.finfo(asked).bits > lib.xp.finfo(held).bits else held
        # In the order of quantize, so that the sum rounds alike.
        parts, (total, *others) = self.decoded_parts(lib, verb, indices, codebook, wide)
        for part, q in zip(parts[1:], others, strict=True):
            dropped, _ = marked(lib, "decode", self.estimator, part, q.shape[-1])
            total = total + lib.xp.where(dropped, lib.xp.zeros_like(q), q)
        return lib.astype(total, dtype)

    def marked(self, lib: Backend, function: str, indices: Array, width: int) -> tuple[Array, Array]:
        # Without its first stage nothing is left of a residual.
        first, *others = self.indices_of_parts(function, indices)
        lost, first = marked(lib, function, self.estimator, first, width)
        return lost, lib.xp.stack([first, *others], axis=self.axis_of_parts(indices))

    def _computed(self, lib: Backend, z: Array, codebook: Array) -> tuple[Array, Array]:
        """Both in the dtype in which residuals and sums are computed."""
        dtype = lib.compute_dtype(lib.result_dtype(z, codebook))
        return lib.astype(z, dtype), lib.astype(codebook, dtype)

    def _joined(
        self, lib: Backend, z: Array, codebook: Array, stages: list[tuple[Array, Array]], options: Options
    ) -> tuple[Array, Array]:
        total, first = stages[0]
        for z_q, found in stages[1:]:
            total = total + z_q
            # A search that finds nothing gives NaN, so the vector is marked, or its indices would decode as dropped.
            first = first if options["indices"] is not None else lib.xp.where(found < 0, found, first)
        indices = lib.xp.stack([first, *(found for _, found in stages[1:])], axis=z.ndim - 1)
        return lib.astype(total, lib.result_dtype(z, codebook)), indices


class _Stage:
    """One stage of a call: where it is dropped, it sees zeros and any index, and adds nothing."""

    def __init__(
        self, residual: Residual, lib: Backend, function: str, part: int, options: Options, width: int
    ) -> None:
        self.lib, self.options, self.given = lib, options, options["indices"]
        self.dropped: Array | None = None
        if part > 0 and self.given is not None:
            self.dropped, indices = marked(lib, function, residual.estimator, self.given, width)
            self.options = {**options, "indices": indices}

    def kept(self, x: Array) -> Array:
        """``x`` (..., D), zero where the stage is dropped; so is its derivative."""
        return x if self.dropped is None else self.lib.xp.where(self.dropped, self.lib.xp.zeros_like(x), x)

    def found(self, indices: Array) -> Array:
        """The stage's indices, with the marks."""
        return indices if self.dropped is None else self.given
