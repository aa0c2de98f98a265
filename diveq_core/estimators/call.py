"""One quantization: its arguments known once, and its value, pullback and pushforward from one rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from diveq_core.arrays.checks import flat_rows, shaped

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.rule import Bindable

    Pullback = Callable[[Array], tuple[Array, Any]]


class Quantized(NamedTuple):
    """What a quantizer gives."""

    z_q: Array
    """Quantized vectors, (..., D)."""

    indices: Array
    """Index of the codeword chosen for each vector, (...)."""


class Call(Protocol):
    """One quantization, of one part or several."""

    def quantize(self) -> Quantized:
        """The output, differentiable in libraries that differentiate."""

    def vjp(self) -> tuple[Quantized, Pullback]:
        """The output, and the pullback of a checked cotangent to those of z and codebook."""

    def jvp(self, dz: Array, dcodebook: Any) -> tuple[Quantized, Array]:
        """The output, and its tangent."""

    def seen(self) -> list[Array]:
        """What each part quantized, once the call has been made: rows (N, D), groups before their stages."""


class OneCall(NamedTuple):
    """A call of one rule."""

    lib: Backend
    rule: Bindable

    z: Array
    """Vectors as rows, (N, D)."""

    codebook: Any
    """What the rule takes in the codebook's place."""

    chosen: Array | None
    """What the rule takes for the indices."""

    noise: Array | None

    indices: Array
    """What is returned, (N,)."""

    batch: tuple[int, ...]
    """The axes of the vectors before the last."""

    def quantize(self) -> Quantized:
        return self._shaped(self.lib.bind(self.rule, self.z, self.codebook, self.chosen, self.noise))

    def vjp(self) -> tuple[Quantized, Pullback]:
        lib, rule, z, noise = self.lib, self.rule, self.z, self.noise
        # Moving averages may overwrite the codebook before the pullback is called.
        read = "q" in rule.reads or rule.trains_codebook
        words, chosen = (lib.snapshot(x) if read and x is not None else None for x in (self.codebook, self.chosen))
        few = rule.linearized(z, words, chosen, noise) if read else None

        def pullback(g: Array) -> tuple[Array, Any]:
            rows = flat_rows(lib, g)
            g_z, g_codebook = few[1](rows) if few else rule.pullback(z, words, chosen, noise, rows)
            if g_z is rows:
                g_z = lib.copy(g_z)
            return g_z if g_z.ndim == g.ndim else lib.xp.reshape(g_z, (*self.batch, z.shape[1])), g_codebook

        return self._shaped(few[0] if few else self._value()), pullback

    def jvp(self, dz: Array, dcodebook: Any) -> tuple[Quantized, Array]:
        lib, rows = self.lib, flat_rows(self.lib, dz)
        out = self._shaped(self._value())
        tangent = self.rule.pushforward(self.z, self.codebook, self.chosen, self.noise, rows, dcodebook)
        if tangent is rows:
            tangent = lib.copy(tangent)
        return out, lib.xp.reshape(tangent, tuple(out.z_q.shape))

    def seen(self) -> list[Array]:
        return [self.z]

    def _value(self) -> Array:
        """The output, by the rule wherever its own derivative may be asked for."""
        lib, rule, z, codebook = self.lib, self.rule, self.z, self.codebook
        # That of the forward pass is another: of a gathered codeword, the gather's.
        if lib.records(z) if codebook is None else lib.records(z, codebook):
            return lib.bind(rule, z, codebook, self.chosen, self.noise)
        return rule.forward(z, codebook, self.chosen, self.noise)

    def _shaped(self, z_q: Array) -> Quantized:
        if len(self.batch) == 1:
            return Quantized(z_q, self.indices)
        lib = self.lib
        return Quantized(shaped(lib, z_q, (*self.batch, z_q.shape[1])), shaped(lib, self.indices, self.batch))
