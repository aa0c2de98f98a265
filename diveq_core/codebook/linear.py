r"""Codebooks that are a frozen matrix times a trained one: every codeword moves when any is used.

.. math:: C = E W, \qquad g_W = E^\top g_C, \qquad g_E = g_C W^\top, \qquad dC = dE\,W + E\,dW
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from diveq_core.arrays.checks import (
    check_codebook,
    check_floating,
    check_like,
    check_shape,
    check_vectors,
    checked_count,
)
from diveq_core.arrays.draws import normal
from diveq_core.arrays.registry import backend_of, quiet
from diveq_core.arrays.rows import Array, describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend


class LinearCodebook(NamedTuple):
    """The two factors."""

    frozen: Array
    """E, (K, D), which is not trained."""

    weight: Array
    """W, (D, D), which is."""


Factors = LinearCodebook | tuple[Array, Array]


@quiet
def linear_codebook_init(like: Array, count: int, /, *, noise: Array | None = None, rng: Any = None) -> LinearCodebook:
    r"""Random frozen codewords and the identity.

    .. math:: E_{kj} \sim \mathcal N(0, 1/D), \qquad W = I

    Parameters
    ----------
    like : array (..., D)
        An array, the vectors to quantize say, whose library, dtype, device and width the codebook gets.
    count : int
        Size K of the codebook.
    noise : array (K, D), optional
        Standard normal numbers; the same noise gives the same codebook in every library.
    rng : optional
        The library's own generator, as in `quantize`.

    Returns
    -------
    LinearCodebook

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit or the count is not positive.

    References
    ----------
    Zhu et al., "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer",
    arXiv:2411.02038 (SimVQ), section 4.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> frozen, weight = dq.linear_codebook_init(np.zeros((5, 2)), 3, rng=np.random.default_rng(0))
    >>> frozen.shape, weight
    ((3, 2), array([[1., 0.],
           [0., 1.]]))
    """
    lib = backend_of("linear_codebook_init", like=like)
    check_floating(lib, "linear_codebook_init", like=like)
    check_vectors("linear_codebook_init", "like", like)
    count = checked_count("linear_codebook_init", "count", count)
    width = like.shape[-1]
    noise = normal(lib, "linear_codebook_init", like, (count, width), noise, rng)
    identity = lib.xp.eye(width, dtype=noise.dtype, **lib.place(like))
    return LinearCodebook(lib.astype(noise * width**-0.5, like.dtype), lib.astype(identity, like.dtype))


@quiet
def linear_codebook(factors: Factors, /) -> Array:
    r"""The codebook of the two factors; differentiable in libraries that differentiate.

    .. math:: C = E W

    Parameters
    ----------
    factors : LinearCodebook, or a pair of arrays (K, D) and (D, D)
        E and W, of one dtype. Stop the gradient of E, or leave it out of the optimizer.

    Returns
    -------
    array (K, D)
        A codebook for `quantize` and all other verbs, multiplied in at least float32.

    Raises
    ------
    TypeError, ValueError
        If libraries, dtypes or shapes do not agree.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> dq.linear_codebook((np.array([[1.0, 2.0]]), np.array([[0.0, 1.0], [1.0, 0.0]])))
    array([[2., 1.]])
    """
    lib, frozen, weight = _checked_factors("linear_codebook", "factors", factors)
    return _product(lib, frozen, weight)


@quiet
def linear_codebook_vjp(factors: Factors, /) -> tuple[Array, Callable[[Array], LinearCodebook]]:
    r"""The codebook and its pullback; works in every library.

    .. math:: g_E = g_C W^\top, \qquad g_W = E^\top g_C

    Parameters
    ----------
    factors
        As in `linear_codebook`.

    Returns
    -------
    codebook : array (K, D)
    pullback : callable
        ``pullback(g_codebook)`` takes what the pullback of `vjp` gives, (K, D), and returns the cotangents of both
        factors, a `LinearCodebook`. Both factors may have been overwritten by then.

    Raises
    ------
    TypeError, ValueError
        As `linear_codebook`; ``pullback`` likewise.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> codebook, pullback = dq.linear_codebook_vjp((np.array([[1.0, 2.0]]), np.eye(2)))
    >>> pullback(np.array([[1.0, 0.0]])).weight
    array([[1., 0.],
           [2., 0.]])
    """
    lib, frozen, weight = _checked_factors("linear_codebook_vjp", "factors", factors)
    product = _product(lib, frozen, weight)
    frozen, weight = lib.snapshot(frozen), lib.snapshot(weight)

    def pullback(g: Array, /) -> LinearCodebook:
        check_like(lib, "pullback", "g", g, frozen, "codebook")
        g = lib.astype(g, frozen.dtype)
        transposed = lib.xp.permute_dims
        return LinearCodebook(
            _product(lib, g, transposed(weight, (1, 0))), _product(lib, transposed(frozen, (1, 0)), g)
        )

    return product, pullback


@quiet
def linear_codebook_jvp(factors: Factors, dfactors: Factors, /) -> tuple[Array, Array]:
    r"""The codebook and its tangent; works in every library.

    .. math:: dC = dE\,W + E\,dW

    Parameters
    ----------
    factors
        As in `linear_codebook`.
    dfactors : LinearCodebook, or a pair of arrays (K, D) and (D, D)
        Their tangents.

    Returns
    -------
    codebook, tangent : array (K, D)

    Raises
    ------
    TypeError, ValueError
        As `linear_codebook`, also for tangents of another library, dtype or shape.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> factors, dfactors = (np.array([[2.0]]), np.array([[3.0]])), (np.array([[1.0]]), np.array([[10.0]]))
    >>> dq.linear_codebook_jvp(factors, dfactors)[1]
    array([[23.]])
    """
    lib, frozen, weight = _checked_factors("linear_codebook_jvp", "factors", factors)
    dfrozen, dweight = _pair("linear_codebook_jvp", "dfactors", dfactors)
    for name, x, like in (("dfrozen", dfrozen, frozen), ("dweight", dweight, weight)):
        check_like(lib, "linear_codebook_jvp", name, x, like, name[1:])
    by_frozen = _product(lib, lib.astype(dfrozen, frozen.dtype), weight)
    by_weight = _product(lib, frozen, lib.astype(dweight, weight.dtype))
    return _product(lib, frozen, weight), by_frozen + by_weight


def _product(lib: Backend, a: Array, b: Array) -> Array:
    wide = lib.compute_dtype(a.dtype)
    return lib.astype(lib.matmul(lib.astype(a, wide), lib.astype(b, wide)), a.dtype)


def _checked_factors(function: str, name: str, factors: Factors) -> tuple[Backend, Array, Array]:
    frozen, weight = _pair(function, name, factors)
    lib = backend_of(function, frozen=frozen, weight=weight)
    check_floating(lib, function, frozen=frozen, weight=weight)
    check_codebook(function, tuple(frozen.shape))
    check_shape(function, "weight", weight, (frozen.shape[1], frozen.shape[1]), "a square of frozen's width")
    if frozen.dtype != weight.dtype:
        raise TypeError(f"{function}: weight must have the dtype of frozen, {frozen.dtype}, got {weight.dtype}")
    return lib, frozen, weight


def _pair(function: str, name: str, factors: Factors) -> tuple[Array, Array]:
    if not isinstance(factors, tuple) or len(factors) != 2:
        raise TypeError(
            f"{function}: {name} must be a LinearCodebook, or a pair of its arrays, got {describe(factors)}"
        )
    frozen, weight = factors
    return frozen, weight
