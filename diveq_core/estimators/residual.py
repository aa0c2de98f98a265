"""Residual quantization: any estimator, several times, each on what the others left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from diveq_core.arrays.rows import describe
from diveq_core.estimators.call import Quantized
from diveq_core.estimators.composite import Composite, Part

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.base import Quantizer, Shape
    from diveq_core.estimators.call import Call, Pullback


@dataclass(frozen=True)
class Residual(Composite):
    r"""Residual quantization: each stage quantizes what the stages before it left.

    .. math:: r_1 = z, \qquad q_s = \text{estimator}(r_s, E^{(s)}), \qquad r_{s+1} = r_s - q_s, \qquad
              z_q = \sum_s q_s

    Parameters
    ----------
    estimator : Estimator, Residual or Product
        Used in every stage. None that takes logits, as `GumbelST` does.
    stages : int
        Number of stages. With fewer than the codebook has (quantizer dropout) the first ones are used, and the
        codebooks of the others get a gradient of zero.

    Notes
    -----
    The codebook is (S, K, D) with S >= stages, or (K, D) shared by all stages. Indices are (..., stages), and
    noise is (stages, ..., D), or a sequence of noises, one for each stage, as space-filling estimators need it. The
    residuals are differentiated too, so straight-through inside gives z the gradient of one straight-through step,
    where detached residuals would give ``stages`` times that.

    Without a codebook, `FSQ` in stages, each divides the cells of the one before: see there.

    Residuals and sums are computed in at least float32, and z_q is rounded once.

    An index of -1 in a stage after the first marks the stage as dropped, for this vector: it adds nothing, the gradient
    passes by it, and its codebook gets none. In the first stage it marks a vector that was not finite, and gives NaN.

    References
    ----------
    Zeghidour et al., "SoundStream", arXiv:2107.03312, section III-C (residual quantization, quantizer dropout).
    """

    estimator: Quantizer
    stages: int
    spare = True
    sums = True

    def __post_init__(self) -> None:
        self._check_fields("stages")
        if not self.estimator.keeps_space:
            raise TypeError(
                f"Residual: estimator must give vectors of the space it takes them from, got {describe(self.estimator)}"
            )
        if self.estimator.entry is not None and self.estimator.refined(0) is self.estimator:
            raise TypeError("Residual: stages of FSQ must be those of one Residual, got one inside another")

    @property
    def parts(self) -> int:  # type: ignore[override]
        return self.stages

    @property
    def entry(self) -> Quantizer | None:
        return self.estimator.entry

    def check(self, function: str, lib: Backend, z: Shape | None, codebook: Shape | None) -> None:
        self.estimator.check(function, lib, z, self.shape_of_part(function, codebook))

    def must_be_finite(self, lib: Backend, z: Array, codebook: Any) -> dict[str, Array]:
        used = codebook if codebook is None or codebook.ndim < self.codebook_axes else codebook[: self.stages, ...]
        return self.estimator.must_be_finite(lib, z, used)

    def noise_of(self, function: str, noise: Array, z: Array, part: int) -> Array:
        if noise.ndim < 1 or noise.shape[0] != self.stages:
            raise ValueError(
                f"{function}: noise of Residual must have shape ({self.stages}, ..., D), got {tuple(noise.shape)}"
            )
        return noise[part, ...]

    def stage(self, part: int) -> Quantizer:
        """What quantizes in a stage."""
        return self.estimator if self.entry is None else self.estimator.refined(part)

    def call(
        self, function: str, lib: Backend, z: Array, codebook: Any, noise: Any, rng: Any, indices: Array | None
    ) -> Call:
        out = z.dtype if codebook is None else lib.result_dtype(z, codebook)
        dtype = lib.compute_dtype(out)
        words = None if codebook is None else lib.astype(codebook, dtype)
        parts = list(self.split(function, lib, z, words, noise, rng, indices))
        return _Stages(self, lib, function, lib.astype(z, dtype), words, parts, (z.dtype, codebook, out), [])

    def decode(self, lib: Backend, indices: Array, codebook: Any, dtype: Any) -> Array:
        wide = lib.compute_dtype(dtype)
        if codebook is not None:
            # No float32 rounds what a codebook of float64 holds, whatever is asked for.
            held = lib.compute_dtype(codebook.dtype)
            wide = wide if lib.xp.finfo(wide).bits > lib.xp.finfo(held).bits else held
        total: Any = None
        for part, own in enumerate(self.indices_of_parts("decode", indices)):
            q = self.stage(part).decode(lib, own, self.words(codebook, part), wide)
            if part > 0:
                dropped, _ = self.estimator.marked(lib, "decode", own, q.shape[-1])
                q = lib.xp.where(dropped, lib.xp.zeros_like(q), q)
            # In the order of quantize, so that the sum rounds alike.
            total = q if total is None else total + q
        return lib.astype(total, dtype)

    def marked(self, lib: Backend, function: str, indices: Array, width: int) -> tuple[Array, Array]:
        # Without its first stage nothing is left of a residual.
        first, *others = self.indices_of_parts(function, indices)
        lost, first = self.estimator.marked(lib, function, first, width)
        return lost, lib.xp.stack([first, *others], axis=self.axis_of_parts(indices))


class _Stages(NamedTuple):
    """A call of all stages, each of which can be called once what those before it left is known."""

    of: Residual
    lib: Backend
    function: str
    z: Array
    """In the dtype in which residuals and sums are computed, as the codebook is."""

    codebook: Any
    parts: list[Part]
    given: tuple[Any, Any, Any]
    """The dtype of z as it was given, the codebook likewise, and the dtype of the output."""

    made: list[Call]
    """The calls of the stages, once they have been made."""

    def quantize(self) -> Quantized:
        residual = self.z
        if self.of.entry is not None:
            residual = self._entered().quantize().z_q
        return self._run(residual, lambda stage: (stage.call.quantize(), None))[0]

    def vjp(self) -> tuple[Quantized, Pullback]:
        of, lib, residual = self.of, self.lib, self.z
        entered: Any = None
        if of.entry is not None:
            (residual, _), entered = self._entered().vjp()
        out, pullbacks = self._run(residual, lambda stage: stage.call.vjp())
        dtype, (z_dtype, codebook, _) = residual.dtype, self.given

        def pullback(g: Array) -> tuple[Array, Any]:
            g = lib.astype(g, dtype)
            g_residual: Any = None
            g_words = []
            for stage, pullback_of_stage in reversed(pullbacks):
                g_q = g if g_residual is None else g - g_residual
                g_in, g_stage = pullback_of_stage(stage.kept(g_q))
                g_residual = g_in if g_residual is None else g_residual + g_in
                g_words.append(g_stage)
            if entered is not None:
                g_residual, _ = entered(g_residual)
            g_codebook = of.assembled(lib, codebook, g_words[::-1])
            g_codebook = None if g_codebook is None else lib.astype(g_codebook, codebook.dtype)
            return lib.astype(g_residual, z_dtype), g_codebook

        return out, pullback

    def jvp(self, dz: Array, dcodebook: Any) -> tuple[Quantized, Array]:
        lib, of, residual = self.lib, self.of, self.z
        d_residual = lib.astype(dz, residual.dtype)
        dcodebook = None if dcodebook is None else lib.astype(dcodebook, residual.dtype)
        if of.entry is not None:
            (residual, _), d_residual = self._entered().jvp(d_residual, None)
        tangent: Any = None

        def step(stage: _Stage) -> tuple[Quantized, Any]:
            nonlocal d_residual, tangent
            out, moved = stage.call.jvp(stage.kept(d_residual), of.words(dcodebook, stage.part.number))
            moved = stage.kept(moved)
            tangent = moved if tangent is None else tangent + moved
            d_residual = d_residual - moved
            return out, None

        out, _ = self._run(residual, step)
        return out, lib.astype(tangent, self.given[2])

    def seen(self) -> list[Array]:
        return [rows for call in self.made for rows in call.seen()]

    def _entered(self) -> Call:
        assert self.of.entry is not None
        return self.of.entry.call(self.function, self.lib, self.z, None, None, None, None)

    def _run(self, residual: Array, step: Callable[[_Stage], tuple[Quantized, Any]]) -> tuple[Quantized, list[Any]]:
        """``step`` of each stage, on what those before it left: the output, and with each stage what else it gave."""
        lib, xp = self.lib, self.lib.xp
        total: Any = None
        others: list[Any] = []
        found: list[Any] = []
        self.made.clear()
        for part in self.parts:
            stage = _Stage.of(self, part, residual)
            self.made.append(stage.call)
            (z_q, indices), other = step(stage)
            z_q = stage.kept(z_q)
            others.append((stage, other))
            found.append(indices if stage.dropped is None else part.indices)
            total = z_q if total is None else total + z_q
            residual = residual - z_q
        if self.parts[0].indices is None:
            # A search that finds nothing gives NaN, so the vector is marked, or its indices would decode as dropped.
            for later in found[1:]:
                found[0] = xp.where(later < 0, later, found[0])
        return Quantized(lib.astype(total, self.given[2]), xp.stack(found, axis=self.z.ndim - 1)), others


class _Stage(NamedTuple):
    """One stage of a call: where it is dropped, it sees zeros and any index, and adds nothing."""

    lib: Backend
    part: Part
    call: Call
    dropped: Array | None
    """The entries (..., D) at which it is."""

    @classmethod
    def of(cls, stages: _Stages, part: Part, residual: Array) -> _Stage:
        lib, indices, dropped = stages.lib, part.indices, None
        if part.number > 0 and indices is not None:
            dropped, indices = stages.of.estimator.marked(lib, stages.function, indices, residual.shape[-1])
            residual = _kept(lib, dropped, residual)
        quantizer = stages.of.stage(part.number)
        call = quantizer.call(stages.function, lib, residual, part.codebook, part.noise, part.rng, indices)
        return cls(lib, part, call, dropped)

    def kept(self, x: Array) -> Array:
        """``x`` (..., D), zero where the stage is dropped; so is its derivative."""
        return _kept(self.lib, self.dropped, x)


def _kept(lib: Backend, dropped: Array | None, x: Array) -> Array:
    return x if dropped is None else lib.xp.where(dropped, lib.xp.zeros_like(x), x)
