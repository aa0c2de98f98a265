r"""Straight-through Gumbel-softmax: a codeword drawn by its logit, and the softmax's derivative in its place.

.. math:: y = \operatorname{softmax}\big((l + \gamma) / \tau\big), \qquad
          J = \frac{\partial y}{\partial l} = \frac1\tau (\operatorname{diag} y - y y^T), \qquad
          g_l = J E g, \qquad dz_q = dE_i + E^T J\, dl
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import check_codebook, check_like, flat_rows
from diveq_core.arrays.draws import standard_gumbel
from diveq_core.arrays.rows import check_option, describe, zero_rows
from diveq_core.estimators.base import Shape, Single

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array


@dataclass(frozen=True)
class GumbelST(Single):
    r"""Straight-through Gumbel-softmax over logits, with Gumbel noise :math:`\gamma` and temperature :math:`\tau`.

    .. math:: z_q = \operatorname{onehot}(i)\,E = E_i, \qquad i = \arg\max_k (l_k + \gamma_k), \qquad
              y = \operatorname{softmax}\big((l + \gamma) / \tau\big)

    .. math:: g_l = \frac1\tau (\operatorname{diag} y - y y^T) E g, \qquad g_{E_k} = \sum_{n : i_n = k} g_n

    Parameters
    ----------
    temperature : float
        Finite and > 0. The lower, the nearer y is to the one-hot, and the larger and rarer the gradients.

    Notes
    -----
    In place of ``z`` the verbs take the logits l, (..., K), unnormalized log-probabilities; those of groups side by
    side for a `Product`. A codeword whose logit is -inf is never chosen, and adds nothing to the gradient of the row.
    ``noise`` (..., K) holds standard Gumbel numbers, :math:`-\ln(-\ln U)`; zeros make it an argmax. Ties go to the
    lowest index. A row of logits that holds NaN or +inf, or -inf alone, gives NaN and -1, and adds nothing to the
    codebook's gradient. The codeword is given bit for bit.

    This is the derivative of :math:`(\operatorname{onehot} + y - \operatorname{sg}[y]) E`, of any order. The
    codebook's cotangent is therefore that of the hard codeword, not of the mixture y E.

    References
    ----------
    Jang, Gu, Poole, "Categorical Reparameterization with Gumbel-Softmax", arXiv:1611.01144, equations 1 and 2 and
    section 2.2; Maddison, Mnih, Teh, "The Concrete Distribution", arXiv:1611.00712, equation 10.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> logits, codebook = np.array([[0.0, 2.0]]), np.array([[1.0, 1.0], [3.0, 5.0]])
    >>> dq.quantize(logits, codebook, dq.GumbelST(0.5), noise=np.zeros((1, 2)))
    Quantized(z_q=array([[3., 5.]]), indices=array([1]))
    """

    temperature: float = 1.0
    keeps_space = False

    def __post_init__(self) -> None:
        check_option(self, "temperature", above=0.0)

    @property
    def noisy(self) -> bool:
        return True

    def check(self, function: str, lib: Backend, z: Shape | None, codebook: Shape | None) -> None:
        if codebook is None:
            raise TypeError(f"{function}: codebook must be an array of shape (K, D) for GumbelST, got {describe(None)}")
        check_codebook(function, codebook)
        if z is not None and (len(z) < 1 or z[-1] != codebook[0]):
            raise ValueError(
                f"{function}: z of GumbelST must be logits of shape (..., K) with K = {codebook[0]} as in the codebook "
                f"{codebook}, got {z}"
            )

    def must_be_finite(self, lib: Backend, z: Array, codebook: Any) -> dict[str, Array]:
        # Codewords may be excluded by -inf; all of a row leave nothing to choose, which the result shows.
        excluded = lib.xp.isinf(z) & (z < 0)
        return {"z": lib.xp.where(excluded, lib.xp.zeros_like(z), z), "codebook": codebook}

    def rule(self, lib: Backend, z: Array, codebook: Any) -> GumbelRule:
        return GumbelRule(lib, self)

    def draw(self, function: str, lib: Backend, z: Array, codebook: Array, noise: Any, rng: Any) -> Array:
        if noise is None:
            dtype = lib.compute_dtype(lib.result_dtype(z, codebook))
            return flat_rows(lib, standard_gumbel(lib, function, z, rng, dtype))
        check_like(lib, function, "noise", noise, z, "z")
        return flat_rows(lib, noise)

    def search(self, lib: Backend, z: Array, codebook: Array, noise: Array) -> Array:
        xp = lib.xp
        dtype = lib.compute_dtype(lib.result_dtype(z, codebook))
        total = lib.astype(lib.stop_gradient(z), dtype) + lib.astype(noise, dtype)
        there = xp.isfinite(total)
        whole = xp.all(there | (xp.isinf(total) & (total < 0)), axis=-1) & xp.any(there, axis=-1)
        # MLX has no argmax of no rows.
        chosen = xp.argmax(total, axis=-1) if total.shape[0] > 0 else xp.asarray([0], **lib.place(total))[:0]
        chosen = lib.as_indices(chosen)
        return xp.where(whole, chosen, -xp.ones_like(chosen))


@dataclass(frozen=True)
class GumbelRule:
    """Forward, pullback and pushforward over ``logits`` (N, K), ``codebook`` (K, D), ``indices`` (N,)."""

    lib: Backend
    estimator: GumbelST
    reads = frozenset(("z", "q", "noise"))
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

    def linearized(self, *_: Any) -> None:
        return None

    def _centred(self, y: Array, x: Array) -> Array:
        """``(diag y - y y^T) x / tau``: symmetric, so it serves both directions."""
        return y * (x - self.lib.dot(y, x)) / self._temperature(x)

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
        powers = xp.exp(shifted / self._temperature(shifted))
        return powers / xp.sum(powers, axis=-1, keepdims=True)

    def _temperature(self, x: Array) -> float:
        """The temperature, which in the dtype of ``x`` would be zero below its normal numbers."""
        return max(self.estimator.temperature, float(self.lib.xp.finfo(x.dtype).smallest_normal))

    def _dtype(self, logits: Array, codebook: Array) -> Any:
        return self.lib.compute_dtype(self.lib.result_dtype(logits, codebook))
