r"""Straight-through Gumbel-softmax: a codeword drawn by its logit, and the softmax's derivative in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import check_codebook, check_floating, check_like, flat_rows, refuse_not_finite
from diveq_core.arrays.registry import backend_of, quiet
from diveq_core.arrays.rows import check_option, describe
from diveq_core.estimators.call import Quantized
from diveq_core.estimators.gumbel_rule import GumbelRule, standard_gumbel

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.rows import Array


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


@quiet
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
        A codeword whose logit is -inf is never chosen, and adds nothing to the gradient of the row.
    codebook : array (K, D)
    estimator : GumbelST
    noise : array (..., K), optional
        Standard Gumbel numbers, :math:`-\ln(-\ln U)`, in the shape of ``logits``; zeros make it an argmax.
    rng : optional
        The library's own generator, from which noise is drawn if none is given, as in `quantize`.
    check_finite : bool, optional
        Whether to refuse NaN and infinity, but not -inf in ``logits``. By default NumPy does, and the others do not.

    Returns
    -------
    Quantized
        ``z_q`` (..., D), in the result dtype of ``logits`` and ``codebook``, the codeword bit for bit, and
        ``indices`` (...); ties go to the lowest. A row of logits that holds NaN or +inf, or -inf alone, gives NaN and
        -1.

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


@quiet
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
        ``g_codebook``. The codebook may have been overwritten by then; ``logits`` and ``noise`` must stay as they were.

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

    words = call.lib.snapshot(codebook)

    def pullback(g: Array, /) -> tuple[Array, Array]:
        check_like(call.lib, "pullback", "g", g, out.z_q, "z_q")
        rows = flat_rows(call.lib, g)
        g_logits, g_codebook = call.rule.pullback(call.logits, words, call.indices, call.noise, rows)
        return call.lib.xp.reshape(g_logits, tuple(logits.shape)), g_codebook

    return out, pullback


@quiet
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
        # Codewords may be excluded by -inf; all of a row leave nothing to choose, which the result shows.
        excluded = lib.xp.isinf(logits) & (logits < 0)
        known = lib.xp.where(excluded, lib.xp.zeros_like(logits), logits)
        refuse_not_finite(lib, function, finite, logits=known, codebook=codebook)
        if noise is not None:
            check_like(lib, function, "noise", noise, logits, "logits")
        xp = lib.xp
        dtype = lib.compute_dtype(lib.result_dtype(logits, codebook))
        if noise is None:
            noise = standard_gumbel(lib, function, logits, rng, dtype)
        self.lib, self.rule = lib, GumbelRule(lib, estimator)
        self.shape = (*(int(n) for n in logits.shape[:-1]), codebook.shape[1])
        self.logits, self.noise = flat_rows(lib, logits), flat_rows(lib, noise)
        total = lib.astype(lib.stop_gradient(self.logits), dtype) + lib.astype(self.noise, dtype)
        there = xp.isfinite(total)
        whole = xp.all(there | (xp.isinf(total) & (total < 0)), axis=-1) & xp.any(there, axis=-1)
        # MLX has no argmax of no rows.
        chosen = xp.argmax(total, axis=-1) if total.shape[0] > 0 else xp.asarray([0], **lib.place(total))[:0]
        chosen = lib.as_indices(chosen)
        self.indices = xp.where(whole, chosen, -xp.ones_like(chosen))

    def quantized(self, z_q: Array) -> Quantized:
        reshape = self.lib.xp.reshape
        return Quantized(reshape(z_q, self.shape), reshape(self.indices, self.shape[:-1]))
