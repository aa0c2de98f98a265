r"""What differentiates `diveq_core.estimators.gumbel`, and the noise that it draws.

.. math:: y = \operatorname{softmax}\big((l + \gamma) / \tau\big), \qquad
          J = \frac{\partial y}{\partial l} = \frac1\tau (\operatorname{diag} y - y y^T), \qquad
          g_l = J E g, \qquad dz_q = dE_i + E^T J\, dl
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.rows import zero_rows

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.gumbel import GumbelST


@dataclass(frozen=True)
class GumbelRule:
    """Forward, pullback and pushforward over ``logits`` (N, K), ``codebook`` (K, D), ``indices`` (N,)."""

    lib: Backend
    estimator: GumbelST
    constant = False
    trains_codebook = True
    noise_by_indices = False

    def fixed(self, codebook: Array, indices: Array) -> tuple[Array, Array]:
        return self.lib.snapshot(codebook), indices

    def forward(self, logits: Array, codebook: Array, indices: Array, noise: Array) -> Array:
        lib = self.lib
        return lib.astype(lib.take_rows(codebook, indices), lib.result_dtype(logits, codebook))

    def pullback(self, logits: Array, codebook: Array, indices: Any, noise: Array, g: Array) -> tuple[Array, Any]:
        lib, dtype = self.lib, self._dtype(logits, codebook)
        y, codewords, g = self._soft(logits, noise, dtype), lib.astype(codebook, dtype), lib.astype(g, dtype)
        g_logits = self._centred(y, lib.matmul(g, lib.xp.matrix_transpose(codewords)))
        g_logits = lib.astype(g_logits, logits.dtype)
        if indices is None:
            return g_logits, None
        # A row that is not finite would make sums over rows NaN.
        kept = zero_rows(lib, lib.xp.expand_dims(indices < 0, axis=1), g)
        g_codebook = lib.segment_sum(kept, indices, codebook.shape[0])
        if lib.records(logits):
            g_codebook = g_codebook + lib.matmul(lib.xp.matrix_transpose(self._live(y, indices)), kept)
        return g_logits, lib.astype(g_codebook, codebook.dtype)

    def pushforward(
        self, logits: Array, codebook: Array, indices: Any, noise: Array, dlogits: Array, dcodebook: Any
    ) -> Array:
        lib, dtype = self.lib, self._dtype(logits, codebook)
        y, codewords = self._soft(logits, noise, dtype), lib.astype(codebook, dtype)
        moved = lib.matmul(self._centred(y, lib.astype(dlogits, dtype)), codewords)
        if dcodebook is None or indices is None:
            return lib.astype(moved, lib.result_dtype(logits, codebook))
        dcodewords = lib.astype(dcodebook, dtype)
        moved = moved + lib.take_rows(dcodewords, indices)
        if lib.records(logits):
            moved = moved + lib.matmul(self._live(y, indices), dcodewords)
        return lib.astype(moved, lib.result_dtype(logits, codebook))

    def _centred(self, y: Array, x: Array) -> Array:
        """``(diag y - y y^T) x / tau``: symmetric, so it serves both directions."""
        return y * (x - self.lib.dot(y, x)) / self.estimator.temperature

    def _live(self, y: Array, indices: Array) -> Array:
        """``y - sg[y]``: nothing in value, but the derivative of y, which the next order of derivative asks for."""
        return zero_rows(self.lib, self.lib.xp.expand_dims(indices < 0, axis=1), y - self.lib.stop_gradient(y))

    def _soft(self, logits: Array, noise: Array, dtype: Any) -> Array:
        """``softmax((l + gumbel) / tau)``, (N, K)."""
        lib = self.lib
        xp = lib.xp
        shifted = lib.astype(logits, dtype) + lib.astype(noise, dtype)
        # Before the division by tau, which might overflow; a common shift changes no y, nor its derivatives.
        shifted = shifted - lib.stop_gradient(xp.max(shifted, axis=-1, keepdims=True))
        powers = xp.exp(shifted / self.estimator.temperature)
        return powers / xp.sum(powers, axis=-1, keepdims=True)

    def _dtype(self, logits: Array, codebook: Array) -> Any:
        return self.lib.compute_dtype(self.lib.result_dtype(logits, codebook))


def standard_gumbel(lib: Backend, function: str, like: Array, rng: Any, dtype: Any) -> Array:
    r"""Standard Gumbel numbers :math:`-\ln\chi`, :math:`\chi = (a^2 + b^2) / 2` exponential for normal a and b.

    The generators at hand give normal numbers, and squares of two of these add up to an exponential one exactly.
    """
    xp = lib.xp
    model = xp.zeros((2, *like.shape), dtype=dtype, **lib.place(like))
    normal = lib.standard_normal(function, model, rng)
    exponential = (normal[0, ...] * normal[0, ...] + normal[1, ...] * normal[1, ...]) / 2
    tiny = float(xp.finfo(dtype).smallest_normal)
    return -xp.log(xp.where(exponential < tiny, xp.full_like(exponential, tiny), exponential))
