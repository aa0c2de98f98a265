"""The public verbs: each makes one call of its arguments, and takes from it what it gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import check_floating, check_like, checked_indices, refuse_not_finite, wants_finite
from diveq_core.arrays.registry import backend_of, quiet
from diveq_core.estimators.base import check_estimator

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.base import Quantizer
    from diveq_core.estimators.call import Call, Quantized


@quiet
def quantize(
    z: Array,
    codebook: Array | None,
    /,
    estimator: Quantizer,
    *,
    noise: Any = None,
    rng: Any = None,
    indices: Array | None = None,
    check_finite: bool | None = None,
) -> Quantized:
    r"""Quantize vectors; differentiable in libraries that differentiate.

    .. math:: z_q = \text{estimator}(z, E_i), \qquad i = \arg\min_k \|z - E_k\|

    Parameters
    ----------
    z : array (..., D)
        Vectors to quantize, for instance an encoder's output. They lie along the last axis, whatever the axes mean:
        move the channels of images (B, C, H, W) there first, and those of ``z_q`` back.
    codebook : array (K, D), or None
        None for `FSQ`, which has none.
    estimator : Estimator, Residual or Product
        `STE`, `NSVQ`, `DiVeQ`, `DiVeQDetach`, `Radial` or `Rotation`; `SFDiVeQ` or `SFDiVeQDetach`, whose indices
        are those of segments; `FSQ`, or `GumbelST`, for which ``z`` holds logits; or several of one by `Residual` or
        `Product`, which say what shape of codebook, noise and indices they take.
    noise : array (..., D) or CurveNoise, optional
        Standard normal numbers in the shape of ``z``; the estimator scales them. The same noise gives the same
        numbers in every library. Estimators without noise ignore it; space-filling ones take a `CurveNoise`, and
        `GumbelST` standard Gumbel numbers.
    rng : optional
        The library's own generator, from which noise is drawn if none is given: `numpy.random.Generator`,
        `torch.Generator`, a JAX key, a CuPy generator. Without either, the library's default stream; JAX has none.
    indices : integer array (...), optional
        Codewords to use instead of the nearest; -1 gives NaN, or marks a dropped stage of a `Residual`.
    check_finite : bool, optional
        Whether to refuse NaN and infinity in ``z`` and ``codebook``; see `nearest`.

    Returns
    -------
    Quantized
        ``z_q`` (..., D), in the result dtype of ``z`` and ``codebook`` (in mixed precision cast it to that of ``z``,
        which a codebook of float32 widens), and ``indices`` (...). A hard estimator returns the codeword bit for bit.
        A vector that is not finite gives NaN.

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
    >>> dq.quantize(np.array([[0.2, 0.1]]), np.array([[0.0, 0.0], [1.0, 1.0]]), dq.DiVeQDetach())
    Quantized(z_q=array([[0., 0.]]), indices=array([0]))

    Images with their channels first:

    >>> images, codebook = np.ones((2, 3, 8, 8)), np.zeros((16, 3))
    >>> out = dq.quantize(np.moveaxis(images, 1, -1), codebook, dq.STE())
    >>> np.moveaxis(out.z_q, -1, 1).shape, out.indices.shape
    ((2, 3, 8, 8), (2, 8, 8))
    """
    _, call = checked_call("quantize", z, codebook, estimator, noise, rng, indices, check_finite)
    return call.quantize()


@quiet
def vjp(
    z: Array,
    codebook: Array | None,
    /,
    estimator: Quantizer,
    *,
    noise: Any = None,
    rng: Any = None,
    indices: Array | None = None,
    check_finite: bool | None = None,
) -> tuple[Quantized, Callable[[Array], tuple[Array, Array]]]:
    r"""Quantize, and return the pullback; works in every library, without automatic differentiation.

    .. math:: (g_z, g_E) = \Big(\frac{\partial z_q}{\partial z}^{\!T} g,\;
              \frac{\partial z_q}{\partial E}^{\!T} g\Big)

    with what the estimator's own expression holds under :math:`\operatorname{sg}` constant.

    Parameters
    ----------
    z, codebook, estimator, noise, rng, indices, check_finite
        As in `quantize`.

    Returns
    -------
    out : Quantized
    pullback : callable
        ``pullback(g)`` takes the cotangent of ``z_q``, (..., D), and gives ``(g_z, g_codebook)``, (..., D) and
        (K, D), in the dtypes of ``z`` and ``codebook``; None for ``g_codebook`` where there is none.
        It may be called any number of times, also after the codebook was overwritten; the other arguments must stay
        as they were.

    Raises
    ------
    TypeError, ValueError
        As `quantize`; ``pullback`` likewise, for a cotangent of another library, dtype or shape.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> z, codebook = np.array([[3.0, 4.0]]), np.array([[5.0, 4.0], [9.0, 9.0]])
    >>> out, pullback = dq.vjp(z, codebook, dq.DiVeQDetach())
    >>> g_z, g_codebook = pullback(np.array([[1.0, 2.0]]))
    >>> g_z
    array([[0., 2.]])
    >>> g_codebook
    array([[1., 0.],
           [0., 0.]])
    """
    lib, call = checked_call("vjp", z, codebook, estimator, noise, rng, indices, check_finite)
    out, pull = call.vjp()

    def pullback(g: Array, /) -> tuple[Array, Any]:
        check_like(lib, "pullback", "g", g, out.z_q, "z_q")
        g_z, g_codebook = pull(g)
        if g_codebook is None and codebook is not None:
            g_codebook = lib.xp.zeros_like(codebook)
        return g_z, g_codebook

    return out, pullback


@quiet
def jvp(
    z: Array,
    codebook: Array | None,
    dz: Array,
    dcodebook: Array | None,
    /,
    estimator: Quantizer,
    *,
    noise: Any = None,
    rng: Any = None,
    indices: Array | None = None,
    check_finite: bool | None = None,
) -> tuple[Quantized, Array]:
    r"""Quantize, and push tangents forward; works in every library, without automatic differentiation.

    .. math:: dz_q = \frac{\partial z_q}{\partial z}\,dz + \frac{\partial z_q}{\partial E}\,dE

    with what the estimator's own expression holds under :math:`\operatorname{sg}` constant.

    Parameters
    ----------
    z, codebook, estimator, noise, rng, indices, check_finite
        As in `quantize`.
    dz : array (..., D)
        Tangent of ``z``.
    dcodebook : array (K, D), or None
        Tangent of ``codebook``, in its shape also where a `Residual` or `Product` takes another one.

    Returns
    -------
    out : Quantized
    tangent : array (..., D)
        Tangent of ``z_q``.

    Raises
    ------
    TypeError, ValueError
        As `quantize`, also for tangents of another library, dtype or shape.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> z, codebook = np.array([[3.0, 4.0]]), np.array([[0.0, 4.0], [9.0, 9.0]])
    >>> out, tangent = dq.jvp(z, codebook, np.ones((1, 2)), np.zeros((2, 2)), dq.DiVeQDetach())
    >>> tangent
    array([[0., 1.]])
    """
    lib, call = checked_call("jvp", z, codebook, estimator, noise, rng, indices, check_finite)
    check_like(lib, "jvp", "dz", dz, z, "z")
    if codebook is not None:
        check_like(lib, "jvp", "dcodebook", dcodebook, codebook, "codebook")
    elif dcodebook is not None:
        raise TypeError("jvp: dcodebook must be None where the codebook is, got an array")
    return call.jvp(dz, dcodebook)


def checked_call(
    function: str,
    z: Array,
    codebook: Array | None,
    estimator: Quantizer,
    noise: Any,
    rng: Any,
    indices: Array | None,
    finite: bool | None,
) -> tuple[Backend, Call]:
    """One call of checked arguments: all that does not depend on the parts is looked at here, once."""
    check_estimator(function, estimator)
    arrays = {"z": z} if codebook is None else {"z": z, "codebook": codebook}
    lib = backend_of(function, **arrays)
    check_floating(lib, function, **arrays)
    shape = None if codebook is None else tuple(codebook.shape)
    estimator.check(function, lib, tuple(z.shape), shape)
    if wants_finite(lib, function, finite):
        refuse_not_finite(lib, function, True, **estimator.must_be_finite(lib, z, codebook))
    if indices is not None:
        backend_of(function, z=z, indices=indices)
        found = checked_indices(lib, function, indices, estimator.index_count(shape), bound=estimator.index_bound)
        # They are returned, and what is returned shares no memory with what was given.
        indices = lib.copy(found) if found is indices else found
    return lib, estimator.call(function, lib, z, codebook, noise, rng, indices)
