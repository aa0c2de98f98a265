"""The public verbs. Each checks its arguments, flattens (..., D) to (N, D), and calls one rule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from diveq_core._array import (
    Array,
    check_codebook,
    check_finite,
    check_floating,
    check_pair,
    check_shape,
    describe,
)
from diveq_core.compose import Composite
from diveq_core.estimators import Estimator
from diveq_core.registry import backend_of
from diveq_core.rule import Rule
from diveq_core.space_filling import CurveRule, SpaceFilling

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.backend import Backend


class Quantized(NamedTuple):
    """What a quantizer gives."""

    z_q: Array
    """Quantized vectors, (..., D)."""

    indices: Array
    """Index of the codeword chosen for each vector, (...)."""


def nearest(z: Array, codebook: Array, /, *, check_finite: bool | None = None) -> Array:
    r"""Index of the nearest codeword; ties go to the lowest index.

    .. math:: i = \arg\min_k \|z - E_k\|

    Parameters
    ----------
    z : array (..., D)
        Vectors in any real floating dtype; float16 and bfloat16 are compared in float32.
    codebook : array (K, D)
        Codewords, of the same library as ``z``.
    check_finite : bool, optional
        Whether to refuse NaN and infinity. By default NumPy does, where looking is free, and the others do not.

    Returns
    -------
    integer array (...)
        In the library's index dtype. Where nothing was refused, -1 for a vector that is not finite, and for
        every vector if a codeword is not finite.

    Raises
    ------
    TypeError
        If the arrays are of different libraries or not real floating.
    ValueError
        If the shapes do not fit, the codebook is empty, or a value is refused.

    Notes
    -----
    Both sides are centred and brought to order one by a power of two before the matrix product, so a
    common offset or a tiny scale costs no accuracy. Squared distances are right to rounding in the
    compute dtype of the centred data; codewords that differ by less cannot be told apart, except that equal
    ones always give the lowest index. Memory beyond the inputs is a few MiB: no N x K array exists.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> dq.nearest(np.array([[0.2, 0.1], [0.9, 1.2]]), np.array([[0.0, 0.0], [1.0, 1.0]]))
    array([0, 1])
    """
    lib = backend_of("nearest", z=z, codebook=codebook)
    _check_inputs(lib, "nearest", z, codebook, check_finite)
    return _search(lib, z, codebook)


def lookup(indices: Array, codebook: Array, /) -> Array:
    """Codewords of given indices: ``codebook[indices]``.

    Parameters
    ----------
    indices : integer array (...)
    codebook : array (K, D)

    Returns
    -------
    array (..., D)
        In the codebook's dtype. An index of -1, the mark of a vector that was not finite, gives NaN.

    Raises
    ------
    TypeError
        If the indices are not integers, or the arrays are of different libraries.
    ValueError
        If the codebook is empty, or, in NumPy, an index is outside ``[0, K)``.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> dq.lookup(np.array([1, 0]), np.array([[0.0, 0.5], [1.0, 1.5]]))
    array([[1. , 1.5],
           [0. , 0.5]])
    """
    lib = backend_of("lookup", indices=indices, codebook=codebook)
    check_floating(lib, "lookup", codebook=codebook)
    check_codebook("lookup", codebook)
    indices = _checked_indices(lib, "lookup", indices, codebook)
    rows = lib.take_rows(codebook, lib.xp.reshape(indices, (math.prod(indices.shape),)))
    return lib.xp.reshape(rows, (*indices.shape, codebook.shape[1]))


def decode(indices: Array, codebook: Array, estimator: Estimator | Composite, /) -> Array:
    """Vectors from indices: what a hard estimator's `quantize` gave, exactly.

    Parameters
    ----------
    indices : integer array (...)
        As `quantize` gave them: with one axis more for a `Residual` or `Product`.
    codebook : array (K, D)
        Or what the `Residual` or `Product` takes.
    estimator : Estimator, Residual or Product

    Returns
    -------
    array (..., D)
        In the codebook's dtype.

    Raises
    ------
    TypeError, ValueError
        As `lookup`.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> codebooks = np.array([[[0.0, 0.0], [4.0, 4.0]], [[0.0, 0.0], [0.5, -0.5]]])
    >>> dq.decode(np.array([[1, 1], [0, 1]]), codebooks, dq.Residual(dq.STE(), stages=2))
    array([[ 4.5,  3.5],
           [ 0.5, -0.5]])
    """
    if isinstance(estimator, Composite):
        return estimator.decode(decode, indices, codebook)
    _check_estimator("decode", estimator)
    return lookup(indices, codebook)


def quantize(
    z: Array,
    codebook: Array,
    estimator: Estimator | Composite,
    /,
    *,
    noise: Array | None = None,
    rng: Any = None,
    indices: Array | None = None,
    check_finite: bool | None = None,
) -> Quantized:
    r"""Quantize vectors; differentiable in libraries that differentiate.

    .. math:: z_q = \text{estimator}(z, E_i), \qquad i = \arg\min_k \|z - E_k\|

    Parameters
    ----------
    z : array (..., D)
        Vectors to quantize, for instance an encoder's output.
    codebook : array (K, D)
    estimator : Estimator, Residual or Product
        `STE`, `NSVQ`, `DiVeQ`, `DiVeQDetach` or `Radial`; or several of them by `Residual` or `Product`, which
        say what shape of codebook, noise and indices they take.
    noise : array (..., D), optional
        Standard normal numbers in the shape of ``z``; the estimator scales them. The same noise gives the same
        numbers in every library. Estimators without noise ignore it.
    rng : optional
        The library's own generator, from which noise is drawn if none is given: `numpy.random.Generator`,
        `torch.Generator`, a JAX key, a CuPy generator. Without either, the library's default stream; JAX has none.
    indices : integer array (...), optional
        Codewords to use instead of the nearest.
    check_finite : bool, optional
        Whether to refuse NaN and infinity in ``z`` and ``codebook``; see `nearest`.

    Returns
    -------
    Quantized
        ``z_q`` (..., D), in the result dtype of ``z`` and ``codebook``, and ``indices`` (...). A hard estimator
        returns the codeword bit for bit. A vector that is not finite gives NaN.

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
    """
    if isinstance(estimator, Composite):
        options = {"noise": noise, "rng": rng, "indices": indices, "check_finite": check_finite}
        return Quantized(*estimator.quantize(quantize, z, codebook, options))
    call = _Call("quantize", z, codebook, estimator, noise, rng, indices, check_finite)
    z_q = call.rule.lib.bind(call.rule, call.z, codebook, call.indices, call.noise)
    return call.quantized(z_q)


def vjp(
    z: Array,
    codebook: Array,
    estimator: Estimator | Composite,
    /,
    *,
    noise: Array | None = None,
    rng: Any = None,
    indices: Array | None = None,
    check_finite: bool | None = None,
) -> tuple[Quantized, Callable[[Array], tuple[Array, Array]]]:
    """Quantize, and return the pullback; works in every library, without automatic differentiation.

    Parameters are those of `quantize`.

    Returns
    -------
    out : Quantized
    pullback : callable
        ``pullback(g)`` takes the cotangent of ``z_q``, (..., D), and gives ``(g_z, g_codebook)``, (..., D) and
        (K, D), in the dtypes of ``z`` and ``codebook``. It may be called any number of times.

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
    if isinstance(estimator, Composite):
        options = {"noise": noise, "rng": rng, "indices": indices, "check_finite": check_finite}
        parts, pullback_of_parts = estimator.vjp(vjp, z, codebook, options)
        return Quantized(*parts), pullback_of_parts
    call = _Call("vjp", z, codebook, estimator, noise, rng, indices, check_finite)
    rule = call.rule
    out = call.quantized(rule.forward(call.z, codebook, call.indices, call.noise))

    def pullback(g: Array, /) -> tuple[Array, Array]:
        _check_like(rule.lib, "pullback", "g", g, out.z_q, "z_q")
        g_z, g_codebook = rule.pullback(call.z, codebook, call.indices, call.noise, call.flat(g))
        return rule.lib.xp.reshape(g_z, z.shape), g_codebook

    return out, pullback


def jvp(
    z: Array,
    codebook: Array,
    dz: Array,
    dcodebook: Array,
    estimator: Estimator | Composite,
    /,
    *,
    noise: Array | None = None,
    rng: Any = None,
    indices: Array | None = None,
    check_finite: bool | None = None,
) -> tuple[Quantized, Array]:
    """Quantize, and push tangents forward; works in every library, without automatic differentiation.

    Parameters
    ----------
    z, codebook, estimator, noise, rng, indices, check_finite
        As in `quantize`.
    dz : array (..., D)
        Tangent of ``z``.
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
    if isinstance(estimator, Composite):
        options = {"noise": noise, "rng": rng, "indices": indices, "check_finite": check_finite}
        parts, tangent_of_parts = estimator.jvp(jvp, z, codebook, dz, dcodebook, options)
        return Quantized(*parts), tangent_of_parts
    call = _Call("jvp", z, codebook, estimator, noise, rng, indices, check_finite)
    rule = call.rule
    _check_like(rule.lib, "jvp", "dz", dz, z, "z")
    _check_like(rule.lib, "jvp", "dcodebook", dcodebook, codebook, "codebook")
    out = call.quantized(rule.forward(call.z, codebook, call.indices, call.noise))
    tangent = rule.pushforward(call.z, codebook, call.indices, call.noise, call.flat(dz), dcodebook)
    return out, rule.lib.xp.reshape(tangent, out.z_q.shape)


class _Call:
    """Checked and flattened arguments of one quantization."""

    def __init__(
        self,
        function: str,
        z: Array,
        codebook: Array,
        estimator: Estimator,
        noise: Array | None,
        rng: Any,
        indices: Array | None,
        finite: bool | None,
    ) -> None:
        _check_estimator(function, estimator)
        lib = backend_of(function, z=z, codebook=codebook)
        _check_inputs(lib, function, z, codebook, finite)
        self.shape = tuple(z.shape)
        self.rule = Rule(lib, estimator)
        self.z = self.flat(z)
        if isinstance(estimator, SpaceFilling):
            self.rule = CurveRule(lib, estimator)
            drawn = estimator.prepare(function, lib, z, codebook, noise, rng)
            self.indices = self.chosen(function, indices, estimator.points(lib, codebook, drawn.dither))
            self.noise = CurveRule.packed(lib, drawn, self.indices, self.z)
            return
        if noise is not None:
            _check_like(lib, function, "noise", noise, z, "z")
        if not estimator.noisy:
            noise = None
        elif noise is None:
            noise = lib.standard_normal(function, z, rng)
        self.noise = None if noise is None else self.flat(noise)
        self.indices = self.chosen(function, indices, codebook)

    def chosen(self, function: str, indices: Array | None, points: Array) -> Array:
        """The given indices, checked, or those of the nearest points, (N,)."""
        lib = self.rule.lib
        if indices is None:
            return lib.search(self.z, points)
        backend_of(function, z=self.z, indices=indices)
        indices = _checked_indices(lib, function, indices, points)
        check_shape(function, "indices", indices, self.shape[:-1], "z without its last axis")
        return lib.xp.reshape(indices, (self.z.shape[0],))

    def flat(self, x: Array) -> Array:
        """(..., D) to (N, D)."""
        return _flat(self.rule.lib, x)

    def quantized(self, z_q: Array) -> Quantized:
        """The output in the shape of ``z``."""
        reshape = self.rule.lib.xp.reshape
        return Quantized(reshape(z_q, self.shape), reshape(self.indices, self.shape[:-1]))


def _check_estimator(function: str, estimator: object) -> None:
    if not isinstance(estimator, Estimator):
        hint = "; call it: an instance is expected" if isinstance(estimator, type) else ""
        raise TypeError(f"{function}: estimator must be an Estimator such as DiVeQ(), got {describe(estimator)}{hint}")


def _flat(lib: Backend, x: Array) -> Array:
    # The size is spelled out: -1 is ambiguous for an empty batch.
    return lib.xp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))


def _search(lib: Backend, z: Array, codebook: Array) -> Array:
    return lib.xp.reshape(lib.search(_flat(lib, z), codebook), tuple(z.shape[:-1]))


def _check_inputs(lib: Backend, function: str, z: Array, codebook: Array, finite: bool | None) -> None:
    check_pair(lib, function, z, codebook)
    if lib.checks_finite if finite is None else finite:
        check_finite(lib, function, z=z, codebook=codebook)


def _checked_indices(lib: Backend, function: str, indices: Array, codebook: Array) -> Array:
    if not lib.is_integer(indices):
        raise TypeError(f"{function}: indices must have an integer dtype, got {indices.dtype}")
    if lib.checks_finite and math.prod(indices.shape) > 0:
        lowest, highest = int(lib.xp.min(indices)), int(lib.xp.max(indices))
        if lowest < 0 or highest >= codebook.shape[0]:
            raise ValueError(
                f"{function}: indices must lie in [0, K) with K = {codebook.shape[0]}, "
                f"got values from {lowest} to {highest}"
            )
    return lib.as_indices(indices)


def _check_like(lib: Backend, function: str, name: str, x: Array, model: Array, like: str) -> None:
    """Check that ``x`` has the library and shape of ``model``, and a real floating dtype."""
    backend_of(function, **{like.split()[0]: model, name: x})
    check_floating(lib, function, **{name: x})
    check_shape(function, name, x, tuple(model.shape), like)
