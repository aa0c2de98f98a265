r"""Search by direction: vectors and codewords on the unit sphere.

.. math:: i = \arg\max_k \langle \hat z, \hat E_k\rangle = \arg\min_k \|\hat z - \hat E_k\|, \qquad \hat x = x / \|x\|
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diveq_core.arrays.checks import (
    check_floating,
    check_like,
    check_pair,
    check_vectors,
    flat_rows,
    refuse_not_finite,
    shaped,
)
from diveq_core.arrays.registry import backend_of, quiet
from diveq_core.arrays.rows import Array, direction, one_where, row_scale, zero_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend


@quiet
def normalize(x: Array, /) -> Array:
    r"""Vectors over their lengths; differentiable in libraries that differentiate.

    .. math:: \hat x = x / \|x\|, \qquad \hat 0 = 0

    Parameters
    ----------
    x : array (..., D)

    Returns
    -------
    array (..., D)
        Of the same dtype, computed in at least float32; neither overflows nor underflows. A vector of zeros stays
        zeros, and its derivative there is zero.

    Raises
    ------
    TypeError, ValueError
        If the array is not real floating or has no axis.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> dq.normalize(np.array([[3.0, 4.0], [0.0, 0.0]]))
    array([[0.6, 0.8],
           [0. , 0. ]])
    """
    lib = _check("normalize", x)
    return shaped(lib, lib.astype(_polar(lib, x)[1], x.dtype), tuple(x.shape))


@quiet
def normalize_vjp(x: Array, /) -> tuple[Array, Callable[[Array], Array]]:
    r"""Vectors over their lengths, and the pullback; works in every library.

    .. math:: g_x = \frac{1}{\|x\|}\,(g - \langle g, \hat x\rangle \hat x), \qquad 0 \text{ where } x = 0

    Parameters
    ----------
    x : array (..., D)
        As in `normalize`.

    Returns
    -------
    normalized : array (..., D)
    pullback : callable
        ``pullback(g)`` takes the cotangent of the result and gives that of ``x``, both (..., D). ``x`` (which may
        be a codebook) and the result may have been overwritten by then.

    Raises
    ------
    TypeError, ValueError
        As `normalize`; ``pullback`` likewise.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> _, pullback = dq.normalize_vjp(np.array([[0.0, 2.0]]))
    >>> pullback(np.array([[1.0, 5.0]]))
    array([[0.5, 0. ]])
    """
    lib = _check("normalize_vjp", x)
    kept = lib.snapshot(x)

    def pullback(g: Array, /) -> Array:
        check_like(lib, "pullback", "g", g, kept, "x")
        return _across(lib, _polar(lib, kept)[1], g, kept)

    return shaped(lib, lib.astype(_polar(lib, x)[1], x.dtype), tuple(x.shape)), pullback


@quiet
def normalize_jvp(x: Array, dx: Array, /) -> tuple[Array, Array]:
    r"""Vectors over their lengths, and their tangents; works in every library.

    .. math:: d\hat x = \frac{1}{\|x\|}\,(dx - \langle dx, \hat x\rangle \hat x), \qquad 0 \text{ where } x = 0

    Parameters
    ----------
    x : array (..., D)
        As in `normalize`.
    dx : array (..., D)
        Tangent of ``x``.

    Returns
    -------
    normalized, tangent : array (..., D)
        In the dtype of ``x``.

    Raises
    ------
    TypeError, ValueError
        As `normalize`, also for a tangent of another library, dtype or shape.

    Notes
    -----
    The same linear map as that of `normalize_vjp`, for the derivative of a direction is symmetric.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> dq.normalize_jvp(np.array([[0.0, 2.0]]), np.array([[1.0, 5.0]]))
    (array([[0., 1.]]), array([[0.5, 0. ]]))
    """
    lib = _check("normalize_jvp", x)
    check_like(lib, "normalize_jvp", "dx", dx, x, "x")
    _, u = _polar(lib, x)
    return lib.xp.reshape(lib.astype(u, x.dtype), tuple(x.shape)), _across(lib, u, dx, x)


@quiet
def nearest_cosine(z: Array, codebook: Array, /, *, check_finite: bool | None = None) -> Array:
    r"""Index of the codeword of nearest direction; ties go to the lowest index.

    .. math:: i = \arg\max_k \frac{\langle z, E_k\rangle}{\|z\|\,\|E_k\|}

    Parameters
    ----------
    z : array (..., D)
    codebook : array (K, D)
    check_finite : bool, optional
        As in `nearest`.

    Returns
    -------
    integer array (...)
        In the library's index dtype; -1 where `nearest` gives it.

    Raises
    ------
    TypeError, ValueError
        As `nearest`.

    Notes
    -----
    The cosine with a vector of zeros is taken as 0: such a codeword is nearer than any that points away.
    To train by direction, quantize what `normalize` makes of vectors and codebook.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> dq.nearest_cosine(np.array([[9.0, 1.0], [0.1, 0.9]]), np.array([[0.0, 5.0], [0.1, 0.0]]))
    array([1, 0])
    """
    lib = backend_of("nearest_cosine", z=z, codebook=codebook)
    check_pair(lib, "nearest_cosine", z, codebook)
    refuse_not_finite(lib, "nearest_cosine", check_finite, z=z, codebook=codebook)
    xp = lib.xp
    rho, words = _polar(lib, lib.stop_gradient(codebook))
    _, rows = _polar(lib, lib.stop_gradient(z))
    dtype = lib.compute_dtype(lib.result_dtype(z, codebook))
    # One more coordinate gives a codeword of zeros length one too: then distance and cosine are in the same order.
    words = xp.concat([lib.astype(words, dtype), lib.astype(xp.astype(rho == 0, rho.dtype), dtype)], axis=1)
    rows = lib.astype(rows, dtype)
    rows = xp.concat([rows, xp.zeros_like(rows[:, :1])], axis=1)
    return xp.reshape(lib.search(rows, words), tuple(z.shape[:-1]))


def _polar(lib: Backend, x: Array) -> tuple[Array, Array]:
    """Lengths (N, 1) and directions (N, D) in the compute dtype."""
    # By the quotient, not by a product with the inverse: along an axis a direction is exactly of length one.
    rho, u = direction(lib, lib.astype(flat_rows(lib, x), lib.compute_dtype(x.dtype)))
    return rho, u.y


def _across(lib: Backend, u: Array, v: Array, x: Array) -> Array:
    """``(v - <v, u> u) / rho`` in the shape and dtype of ``x``, whose length is rho; 0 where rho = 0."""
    v, rows = (lib.astype(flat_rows(lib, a), u.dtype) for a in (v, x))
    # Of lengths that powers of two have brought to order one, so that only the result can overflow or underflow.
    scale, scale_v = row_scale(lib, rows), row_scale(lib, v)
    rho, _ = lib.direction(rows * scale)
    v = v * scale_v
    across = (v - lib.dot(v, u) * u) / one_where(lib, rho == 0, rho)
    # Their quotient in two halves: the whole of it may leave the range where the result does not.
    half = lib.xp.sqrt(scale) / lib.xp.sqrt(scale_v)
    across = across * half * half
    return lib.xp.reshape(lib.astype(zero_rows(lib, rho == 0, across), x.dtype), tuple(x.shape))


def _check(function: str, x: Array) -> Backend:
    lib = backend_of(function, x=x)
    check_floating(lib, function, x=x)
    check_vectors(function, "x", x)
    return lib
