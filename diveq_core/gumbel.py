r"""Straight-through Gumbel-softmax: a codeword drawn by its logit, and the softmax's derivative in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diveq_core._array import check_option, describe, zero_rows
from diveq_core.call import Quantized
from diveq_core.checks import check_codebook, check_floating, check_like, flat_rows, refuse_not_finite
from diveq_core.registry import backend_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core._array import Array
    from diveq_core.backend import Backend


@dataclass(frozen=True)
class GumbelST:
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
    This is the derivative of :math:`(\operatorname{onehot} + y - \operatorname{sg}[y]) E`, of any order. The
    codebook's cotangent is therefore that of the hard codeword, not of the mixture y E.

    References
    ----------
    Jang, Gu, Poole, "Categorical Reparameterization with Gumbel-Softmax", arXiv:1611.01144, equations 1 and 2 and
    section 2.2; Maddison, Mnih, Teh, "The Concrete Distribution", arXiv:1611.00712, equation 10.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_option(self, "temperature", above=0.0)


def gumbel_quantize(
    logits: Array,
    codebook: Array,
    estimator: GumbelST,
    /,
    *,
    noise: Array | None = None,
    rng: Any = None,
    check_finite: bool | None = None,
) -> Quantized:
    r"""Draw a codeword for each row of logits; differentiable in libraries that differentiate.

    .. math:: z_q = E_i, \qquad i = \arg\max_k (l_k + \gamma_k)

    Parameters
    ----------
    logits : array (..., K)
        Unnormalized log-probabilities in any real floating dtype; float16 and bfloat16 are computed in float32.
    codebook : array (K, D)
    estimator : GumbelST
    noise : array (..., K), optional
        Standard Gumbel numbers, :math:`-\ln(-\ln U)`, in the shape of ``logits``; zeros make it an argmax.
    rng : optional
        The library's own generator, from which noise is drawn if none is given, as in `quantize`.
    check_finite : bool, optional
        Whether to refuse NaN and infinity. By default NumPy does, and the others do not.

    Returns
    -------
    Quantized
        ``z_q`` (..., D), in the result dtype of ``logits`` and ``codebook``, the codeword bit for bit, and
        ``indices`` (...); ties go to the lowest. A row of logits that is not finite gives NaN and -1.

    Raises
    ------
    TypeError
        If the arrays are of different libraries or dtypes do not fit, or JAX gets neither noise nor key.
    ValueError
        If shapes do not fit, the codebook is empty, or a value is refused.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> logits, codebook = np.array([[0.0, 2.0]]), np.array([[1.0, 1.0], [3.0, 5.0]])
    >>> dq.gumbel_quantize(logits, codebook, dq.GumbelST(0.5), noise=np.zeros((1, 2)))
    Quantized(z_q=array([[3., 5.]]), indices=array([1]))
    """
    call = _Call("gumbel_quantize", logits, codebook, estimator, noise, rng, check_finite)
    return call.quantized(call.lib.bind(call.rule, call.logits, codebook, call.indices, call.noise))


def gumbel_vjp(
    logits: Array,
    codebook: Array,
    estimator: GumbelST,
    /,
    *,
    noise: Array | None = None,
    rng: Any = None,
    check_finite: bool | None = None,
) -> tuple[Quantized, Callable[[Array], tuple[Array, Array]]]:
    r"""Draw codewords, and return the pullback; works in every library, without automatic differentiation.

    .. math:: g_l = \frac1\tau (\operatorname{diag} y - y y^T) E g, \qquad g_{E_k} = \sum_{n : i_n = k} g_n

    Parameters
    ----------
    logits, codebook, estimator, noise, rng, check_finite
        As in `gumbel_quantize`.

    Returns
    -------
    out : Quantized
    pullback : callable
        ``pullback(g)`` takes the cotangent of ``z_q``, (..., D), and gives ``(g_logits, g_codebook)``, (..., K) and
        (K, D), in the dtypes of ``logits`` and ``codebook``. A row of logits that is not finite adds nothing to
        ``g_codebook``.

    Raises
    ------
    TypeError, ValueError
        As `gumbel_quantize`; ``pullback`` likewise, for a cotangent of another library, dtype or shape.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> logits, codebook = np.array([[0.0, 0.0]]), np.array([[1.0, 1.0], [3.0, 5.0]])
    >>> out, pullback = dq.gumbel_vjp(logits, codebook, dq.GumbelST(0.5), noise=np.zeros((1, 2)))
    >>> g_logits, g_codebook = pullback(np.array([[1.0, 0.0]]))
    >>> g_logits
    array([[-1.,  1.]])
    >>> g_codebook
    array([[1., 0.],
           [0., 0.]])
    """
    call = _Call("gumbel_vjp", logits, codebook, estimator, noise, rng, check_finite)
    out = call.quantized(call.rule.forward(call.logits, codebook, call.indices, call.noise))

    def pullback(g: Array, /) -> tuple[Array, Array]:
        check_like(call.lib, "pullback", "g", g, out.z_q, "z_q")
        rows = flat_rows(call.lib, g)
        g_logits, g_codebook = call.rule.pullback(call.logits, codebook, call.indices, call.noise, rows)
        return call.lib.xp.reshape(g_logits, tuple(logits.shape)), g_codebook

    return out, pullback


def gumbel_jvp(
    logits: Array,
    codebook: Array,
    dlogits: Array,
    dcodebook: Array,
    estimator: GumbelST,
    /,
    *,
    noise: Array | None = None,
    rng: Any = None,
    check_finite: bool | None = None,
) -> tuple[Quantized, Array]:
    r"""Draw codewords, and push tangents forward; works in every library.

    .. math:: dz_q = dE_i + \frac1\tau E^T (\operatorname{diag} y - y y^T)\, dl

    Parameters
    ----------
    logits, codebook, estimator, noise, rng, check_finite
        As in `gumbel_quantize`.
    dlogits : array (..., K)
        Tangent of ``logits``.
    dcodebook : array (K, D)
        Tangent of ``codebook``.

    Returns
    -------
    out : Quantized
    tangent : array (..., D)
        Tangent of ``z_q``.

    Raises
    ------
    TypeError, ValueError
        As `gumbel_quantize`, also for tangents of another library, dtype or shape.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> logits, codebook = np.array([[0.0, 0.0]]), np.array([[1.0, 1.0], [3.0, 5.0]])
    >>> out, tangent = dq.gumbel_jvp(
    ...     logits, codebook, np.array([[0.0, 1.0]]), np.zeros((2, 2)), dq.GumbelST(0.5), noise=np.zeros((1, 2))
    ... )
    >>> tangent
    array([[1., 2.]])
    """
    call = _Call("gumbel_jvp", logits, codebook, estimator, noise, rng, check_finite)
    check_like(call.lib, "gumbel_jvp", "dlogits", dlogits, logits, "logits")
    check_like(call.lib, "gumbel_jvp", "dcodebook", dcodebook, codebook, "codebook")
    out = call.quantized(call.rule.forward(call.logits, codebook, call.indices, call.noise))
    rows = flat_rows(call.lib, dlogits)
    tangent = call.rule.pushforward(call.logits, codebook, call.indices, call.noise, rows, dcodebook)
    return out, call.lib.xp.reshape(tangent, tuple(out.z_q.shape))


@dataclass(frozen=True)
class _GumbelRule:
    """Forward, pullback and pushforward over ``logits`` (N, K), ``codebook`` (K, D), ``indices`` (N,)."""

    lib: Backend
    estimator: GumbelST

    def forward(self, logits: Array, codebook: Array, indices: Array, noise: Array) -> Array:
        lib = self.lib
        return lib.astype(lib.take_rows(codebook, indices), lib.result_dtype(logits, codebook))

    def pullback(self, logits: Array, codebook: Array, indices: Array, noise: Array, g: Array) -> tuple[Array, Array]:
        lib, dtype = self.lib, self._dtype(logits, codebook)
        y, codewords, g = self._soft(logits, noise, dtype), lib.astype(codebook, dtype), lib.astype(g, dtype)
        g_logits = self._centred(y, lib.matmul(g, lib.xp.matrix_transpose(codewords)))
        g_codebook = lib.segment_sum(g, indices, codebook.shape[0])
        if lib.records(logits):
            # A sum over rows, which one that is not finite would make NaN.
            kept = zero_rows(lib, lib.xp.expand_dims(indices < 0, axis=1), g)
            g_codebook = g_codebook + lib.matmul(lib.xp.matrix_transpose(self._live(y, indices)), kept)
        return lib.astype(g_logits, logits.dtype), lib.astype(g_codebook, codebook.dtype)

    def pushforward(
        self, logits: Array, codebook: Array, indices: Array, noise: Array, dlogits: Array, dcodebook: Array
    ) -> Array:
        lib, dtype = self.lib, self._dtype(logits, codebook)
        y, codewords = self._soft(logits, noise, dtype), lib.astype(codebook, dtype)
        moved = lib.matmul(self._centred(y, lib.astype(dlogits, dtype)), codewords)
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


class _Call:
    """Checked and flattened arguments of one drawing."""

    def __init__(
        self,
        function: str,
        logits: Array,
        codebook: Array,
        estimator: GumbelST,
        noise: Array | None,
        rng: Any,
        finite: bool | None,
    ) -> None:
        if not isinstance(estimator, GumbelST):
            raise TypeError(f"{function}: estimator must be GumbelST(temperature), got {describe(estimator)}")
        lib = backend_of(function, logits=logits, codebook=codebook)
        check_floating(lib, function, logits=logits, codebook=codebook)
        check_codebook(function, codebook)
        count = codebook.shape[0]
        if logits.ndim < 1 or logits.shape[-1] != count:
            raise ValueError(
                f"{function}: logits must have shape (..., K) with K = {count} as in the codebook "
                f"{tuple(codebook.shape)}, got {tuple(logits.shape)}"
            )
        refuse_not_finite(lib, function, finite, logits=logits, codebook=codebook)
        if noise is not None:
            check_like(lib, function, "noise", noise, logits, "logits")
        xp = lib.xp
        dtype = lib.compute_dtype(lib.result_dtype(logits, codebook))
        if noise is None:
            noise = _standard_gumbel(lib, function, logits, rng, dtype)
        self.lib, self.rule = lib, _GumbelRule(lib, estimator)
        self.shape = (*(int(n) for n in logits.shape[:-1]), codebook.shape[1])
        self.logits, self.noise = flat_rows(lib, logits), flat_rows(lib, noise)
        total = lib.astype(lib.stop_gradient(self.logits), dtype) + lib.astype(self.noise, dtype)
        whole = xp.all(xp.isfinite(total), axis=-1)
        # MLX has no argmax of no rows.
        chosen = xp.argmax(total, axis=-1) if total.shape[0] > 0 else xp.asarray([0], **lib.place(total))[:0]
        chosen = lib.as_indices(chosen)
        self.indices = xp.where(whole, chosen, -xp.ones_like(chosen))

    def quantized(self, z_q: Array) -> Quantized:
        reshape = self.lib.xp.reshape
        return Quantized(reshape(z_q, self.shape), reshape(self.indices, self.shape[:-1]))


def _standard_gumbel(lib: Backend, function: str, like: Array, rng: Any, dtype: Any) -> Array:
    r"""Standard Gumbel numbers :math:`-\ln\chi`, :math:`\chi = (a^2 + b^2) / 2` exponential for normal a and b.

    The generators at hand give normal numbers, and squares of two of these add up to an exponential one exactly.
    """
    xp = lib.xp
    model = xp.zeros((2, *like.shape), dtype=dtype, **lib.place(like))
    normal = lib.standard_normal(function, model, rng)
    exponential = (normal[0, ...] * normal[0, ...] + normal[1, ...] * normal[1, ...]) / 2
    tiny = float(xp.finfo(dtype).smallest_normal)
    return -xp.log(xp.where(exponential < tiny, xp.full_like(exponential, tiny), exponential))
