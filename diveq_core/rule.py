"""The differentiation rule of one quantization: what a backend binds to its library.

An estimator speaks of rows ``z`` and ``q``; a rule speaks of ``z`` and the codebook. It gathers the chosen
codewords, calls the estimator in the compute dtype, and gives every cotangent the dtype of its primal.
Nothing but the inputs needs to be saved between forward and backward: everything else is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core._array import Array
    from diveq_core.backend import Backend
    from diveq_core.estimators import Estimator


class Bindable(Protocol):
    """What `Backend.bind` needs: hashable, its output (N, ...) differentiable to its first two arguments.

    The forms of the arguments are the rule's own: `Rule` says what they are for an estimator.
    """

    def forward(self, z: Array, codebook: Array, indices: Array, noise: Any) -> Array: ...

    def pullback(self, z: Array, codebook: Array, indices: Array, noise: Any, g: Array) -> tuple[Array, Array]: ...

    def pushforward(
        self, z: Array, codebook: Array, indices: Array, noise: Any, dz: Array, dcodebook: Array
    ) -> Array: ...


@dataclass(frozen=True)
class Rule:
    """Forward, pullback and pushforward over ``z`` (N, D), ``codebook`` (K, D), ``indices`` (N,).

    ``noise`` is (N, D), or None for an estimator without.
    """

    lib: Backend
    estimator: Estimator

    def forward(self, z: Array, codebook: Array, indices: Array, noise: Array | None) -> Array:
        """Output z_q, (N, D), in the result dtype of ``z`` and ``codebook``."""
        lib = self.lib
        out_dtype = lib.result_dtype(z, codebook)
        if self.estimator.hard:
            return lib.astype(lib.take_rows(codebook, indices), out_dtype)
        compute = self._compute_dtype(z, codebook)

        def rows(z: Array, indices: Array, noise: Array | None) -> Array:
            q = compute(lib.take_rows(codebook, indices))
            return lib.astype(self.estimator.forward(lib, compute(z), q, compute(noise)), out_dtype)

        return lib.by_rows(rows, z, indices, noise)

    def pullback(self, z: Array, codebook: Array, indices: Array, noise: Array | None, g: Array) -> tuple[Array, Array]:
        """Cotangents of ``z`` (N, D) and ``codebook`` (K, D), each in its own dtype."""
        lib = self.lib
        compute = self._compute_dtype(z, codebook)
        g_codebook = lib.xp.zeros_like(compute(codebook))

        def rows(z_rows: Array, indices: Array, noise: Array | None, g: Array) -> Array:
            nonlocal g_codebook
            q = compute(lib.take_rows(codebook, indices))
            g_z, g_q = self.estimator.vjp(lib, compute(z_rows), q, compute(noise), compute(g))
            if g_q is not None:
                g_codebook = lib.segment_add(g_codebook, g_q, indices)
            return lib.astype(g_z, z.dtype)

        g_z = lib.by_rows(rows, z, indices, noise, g)
        return g_z, lib.astype(g_codebook, codebook.dtype)

    def pushforward(
        self, z: Array, codebook: Array, indices: Array, noise: Array | None, dz: Array, dcodebook: Array
    ) -> Array:
        """Tangent of z_q, (N, D)."""
        lib = self.lib
        out_dtype = lib.result_dtype(z, codebook)
        compute = self._compute_dtype(z, codebook)

        def rows(z: Array, indices: Array, noise: Array | None, dz: Array) -> Array:
            q = compute(lib.take_rows(codebook, indices))
            dq = compute(lib.take_rows(dcodebook, indices))
            return lib.astype(self.estimator.jvp(lib, compute(z), q, compute(noise), compute(dz), dq), out_dtype)

        return lib.by_rows(rows, z, indices, noise, dz)

    def _compute_dtype(self, z: Array, codebook: Array) -> Callable[[Any], Any]:
        """Conversion to the dtype in which the estimator computes; None stays None."""
        lib = self.lib
        dtype = lib.compute_dtype(lib.result_dtype(z, codebook))
        return lambda x: None if x is None else lib.astype(x, dtype)
