r"""The auxiliary losses of vector quantization, one for the codewords and one for the encoder.

.. math:: L + \beta \|q - \operatorname{sg}[z]\|^2 + \gamma \|z - \operatorname{sg}[q]\|^2

Papers exchange the Greek letters; here each term has its own function and the weight is yours to multiply.
Both are means over the entries that the mask leaves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import check_like, check_pair, check_shape, check_single, checked_indices, flat_rows
from diveq_core.arrays.registry import backend_of, quiet
from diveq_core.arrays.rows import one_where

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.rows import Array


@quiet
def codebook_loss(z: Array, codebook: Array, indices: Array, /, *, mask: Array | None = None) -> Array:
    r"""Codebook loss, which moves codewords to the vectors that chose them and leaves the vectors alone.

    .. math:: L = \frac{1}{MD} \sum_n m_n \|q_n - \operatorname{sg}[z_n]\|^2, \qquad M = \sum_n m_n

    Parameters
    ----------
    z : array (..., D)
        Vectors in any real floating dtype; float16 and bfloat16 are computed in float32.
    codebook : array (K, D)
        Not the quantized output: a straight-through output carries no gradient to the codebook.
    indices : integer array (...)
        The codeword of each vector, as `nearest` or `quantize` gives it.
    mask : bool array (...), optional
        Which vectors count; by default all.

    Returns
    -------
    array ()
        In the result dtype of ``z`` and ``codebook``. Differentiable in libraries that differentiate, with respect
        to the codebook only.

    Raises
    ------
    TypeError
        If the arrays are of different libraries, ``z`` or ``codebook`` is not real floating, the indices are
        not integers, or the mask is not bool.
    ValueError
        If shapes do not fit, the codebook is empty, or, in NumPy, an index is outside ``[-1, K)``.

    Notes
    -----
    The loss of a masked batch is that of the vectors the mask leaves. If it leaves none, the loss and its
    gradient are 0. What a masked vector holds is never read: it may be NaN, and its index -1. A vector that
    is not masked and holds NaN makes the loss NaN.

    References
    ----------
    van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", arXiv:1711.00937, equation 3,
    second term.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> z, codebook = np.array([[1.0, 2.0], [8.0, 8.0]]), np.array([[1.0, 4.0]])
    >>> print(dq.codebook_loss(z, codebook, np.array([0, 0]), mask=np.array([True, False])))
    2.0
    """
    call = _Loss("codebook_loss", z, codebook, indices, mask)
    return call.value(call.lib.stop_gradient(z), codebook)


@quiet
def commitment_loss(z: Array, codebook: Array, indices: Array, /, *, mask: Array | None = None) -> Array:
    r"""Commitment loss, which moves vectors to their codewords and leaves the codewords alone.

    .. math:: L = \frac{1}{MD} \sum_n m_n \|z_n - \operatorname{sg}[q_n]\|^2, \qquad M = \sum_n m_n

    Masks are those of `codebook_loss`, and so is the value; the gradient goes to ``z`` only.

    Parameters
    ----------
    z, codebook, indices, mask
        As in `codebook_loss`.

    Returns
    -------
    array ()
        In the result dtype of ``z`` and ``codebook``.

    Raises
    ------
    TypeError, ValueError
        As `codebook_loss`.

    References
    ----------
    van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", arXiv:1711.00937, equation 3,
    third term.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> z, codebook = np.array([[1.0, 2.0], [8.0, 8.0]]), np.array([[1.0, 4.0]])
    >>> print(dq.commitment_loss(z, codebook, np.array([0, 0])))
    17.25
    """
    call = _Loss("commitment_loss", z, codebook, indices, mask)
    return call.value(z, call.lib.stop_gradient(codebook))


@quiet
def codebook_loss_vjp(
    z: Array, codebook: Array, indices: Array, /, *, mask: Array | None = None
) -> tuple[Array, Callable[[Array], Array]]:
    r"""Codebook loss and its pullback; works in every library, without automatic differentiation.

    .. math:: g_{E_k} = \frac{2g}{MD} \sum_{n : i_n = k} m_n (q_n - z_n)

    Parameters
    ----------
    z, codebook, indices, mask
        As in `codebook_loss`.

    Returns
    -------
    loss : array ()
    pullback : callable
        ``pullback(g)`` takes the cotangent of the loss, (), and gives that of the codebook, (K, D). The codebook may
        have been overwritten by then; the other arguments must stay as they were.

    Raises
    ------
    TypeError, ValueError
        As `codebook_loss`; ``pullback`` likewise, for a cotangent of another library, dtype or shape.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> z, codebook = np.array([[1.0, 2.0]]), np.array([[1.0, 4.0]])
    >>> loss, pullback = dq.codebook_loss_vjp(z, codebook, np.array([0]))
    >>> pullback(np.array(1.0))
    array([[0., 2.]])
    """
    call = _Loss("codebook_loss_vjp", z, codebook, indices, mask)
    z = call.lib.stop_gradient(z)
    loss, words = call.value(z, codebook), call.lib.snapshot(codebook)

    def pullback(g: Array, /) -> Array:
        rows = -call.slope(loss, g, z, words)
        return call.lib.astype(call.lib.segment_sum(rows, call.indices, words.shape[0]), words.dtype)

    return loss, pullback


@quiet
def commitment_loss_vjp(
    z: Array, codebook: Array, indices: Array, /, *, mask: Array | None = None
) -> tuple[Array, Callable[[Array], Array]]:
    r"""Commitment loss and its pullback; works in every library, without automatic differentiation.

    .. math:: g_{z_n} = \frac{2g}{MD}\, m_n (z_n - q_n)

    Parameters
    ----------
    z, codebook, indices, mask
        As in `codebook_loss`.

    Returns
    -------
    loss : array ()
    pullback : callable
        ``pullback(g)`` takes the cotangent of the loss, (), and gives that of ``z``, (..., D). The codebook may have
        been overwritten by then; the other arguments must stay as they were.

    Raises
    ------
    TypeError, ValueError
        As `codebook_loss`; ``pullback`` likewise, for a cotangent of another library, dtype or shape.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> z, codebook = np.array([[1.0, 2.0]]), np.array([[1.0, 4.0]])
    >>> loss, pullback = dq.commitment_loss_vjp(z, codebook, np.array([0]))
    >>> pullback(np.array(1.0))
    array([[ 0., -2.]])
    """
    call = _Loss("commitment_loss_vjp", z, codebook, indices, mask)
    codebook = call.lib.stop_gradient(codebook)
    loss, words = call.value(z, codebook), call.lib.snapshot(codebook)

    def pullback(g: Array, /) -> Array:
        rows = call.slope(loss, g, z, words)
        return call.lib.xp.reshape(call.lib.astype(rows, z.dtype), tuple(z.shape))

    return loss, pullback


class _Loss:
    """Checked and flattened arguments of a loss: the error z - q of the vectors that count, and its scale."""

    def __init__(self, function: str, z: Array, codebook: Array, indices: Array, mask: Array | None) -> None:
        lib = backend_of(function, z=z, codebook=codebook, indices=indices)
        check_single(function, codebook)
        check_pair(lib, function, z, codebook)
        indices = checked_indices(lib, function, indices, codebook.shape[0])
        check_shape(function, "indices", indices, tuple(z.shape[:-1]), "z without its last axis")
        rows = math.prod(z.shape[:-1])
        if mask is not None:
            backend_of(function, z=z, mask=mask)
            if mask.dtype != lib.bool_dtype:
                raise TypeError(f"{function}: mask must have dtype bool, got {mask.dtype}")
            check_shape(function, "mask", mask, tuple(z.shape[:-1]), "z without its last axis")
            mask = lib.xp.reshape(mask, (rows, 1))
        self.lib, self.mask, self.rows, self.width = lib, mask, rows, z.shape[-1]
        self.indices = lib.xp.reshape(indices, (rows,))
        self.out_dtype = lib.result_dtype(z, codebook)
        self.compute_dtype = lib.compute_dtype(self.out_dtype)

    def error(self, z: Array, codebook: Array) -> Array:
        """``z - q`` (N, D), zero where masked."""
        lib = self.lib
        z, indices = lib.astype(flat_rows(lib, z), self.compute_dtype), self.indices
        if self.mask is not None:
            # No NaN is made by the mark -1 of what is masked: JAX can be told to stop at one.
            indices = lib.xp.where(self.mask[:, 0], indices, lib.xp.zeros_like(indices))
        q = lib.astype(lib.take_rows(codebook, indices), self.compute_dtype)
        if self.mask is None:
            return z - q
        # Before the difference: a derivative of it would bring a masked NaN back.
        zero = lib.xp.zeros_like(z)
        return lib.xp.where(self.mask, z, zero) - lib.xp.where(self.mask, q, zero)

    def count(self) -> Any:
        """``M D``, or 1 where nothing counts."""
        if self.mask is None:
            return max(self.rows * self.width, 1)
        xp = self.lib.xp
        counted = xp.sum(xp.astype(self.mask, self.compute_dtype)) * self.width
        return one_where(self.lib, counted == 0, counted)

    def value(self, z: Array, codebook: Array) -> Array:
        error = self.error(z, codebook)
        return self.lib.astype(self.lib.xp.sum(error * error) / self.count(), self.out_dtype)

    def slope(self, loss: Array, g: Array, z: Array, codebook: Array) -> Array:
        """``2 g m (z - q) / (M D)``, (N, D)."""
        check_like(self.lib, "pullback", "g", g, loss, "loss")
        return self.error(z, codebook) * (2 * self.lib.astype(g, self.compute_dtype) / self.count())
