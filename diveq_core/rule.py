"""The differentiation rule of one quantization: what a backend binds to its library.

An estimator speaks of rows ``z`` and ``q``; a rule speaks of ``z`` and the codebook. It gathers the chosen
codewords, calls the estimator in the compute dtype, and gives every cotangent the dtype of its primal.
Nothing but the inputs needs to be saved between forward and backward: everything else is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diveq_core._array import Array
    from diveq_core.backend import Backend
    from diveq_core.estimators import Estimator


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
        z, q, noise = self._rows(z, codebook, indices, noise)
        return lib.astype(self.estimator.forward(lib, z, q, noise), out_dtype)

    def pullback(self, z: Array, codebook: Array, indices: Array, noise: Array | None, g: Array) -> tuple[Array, Array]:
        """Cotangents of ``z`` (N, D) and ``codebook`` (K, D), each in its own dtype."""
        lib = self.lib
        rows, q, eps = self._rows(z, codebook, indices, noise)
        g_z, g_q = self.estimator.vjp(lib, rows, q, eps, lib.astype(g, rows.dtype))
        if g_q is None:
            return lib.astype(g_z, z.dtype), lib.xp.zeros_like(codebook)
        g_codebook = lib.segment_sum(g_q, indices, codebook.shape[0])
        return lib.astype(g_z, z.dtype), lib.astype(g_codebook, codebook.dtype)

    def pushforward(
        self, z: Array, codebook: Array, indices: Array, noise: Array | None, dz: Array, dcodebook: Array
    ) -> Array:
        """Tangent of z_q, (N, D)."""
        lib = self.lib
        rows, q, eps = self._rows(z, codebook, indices, noise)
        dq = lib.astype(lib.take_rows(dcodebook, indices), rows.dtype)
        tangent = self.estimator.jvp(lib, rows, q, eps, lib.astype(dz, rows.dtype), dq)
        return lib.astype(tangent, lib.result_dtype(z, codebook))

    def _rows(
        self, z: Array, codebook: Array, indices: Array, noise: Array | None
    ) -> tuple[Array, Array, Array | None]:
        lib = self.lib
        dtype = lib.compute_dtype(lib.result_dtype(z, codebook))
        q = lib.astype(lib.take_rows(codebook, indices), dtype)
        return lib.astype(z, dtype), q, None if noise is None else lib.astype(noise, dtype)
