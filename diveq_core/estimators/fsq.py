r"""Finite scalar quantization: every coordinate bounded and rounded by itself, without a codebook."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import check_floating, check_like, checked_indices, flat_rows, refuse_not_finite
from diveq_core.arrays.registry import backend_of, quiet
from diveq_core.arrays.rows import describe
from diveq_core.estimators.call import Quantized
from diveq_core.estimators.fsq_rule import FSQRule, level_of, row_of

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array

# How far short of the outermost level the bound stops: epsilon of the paper's code.
_MARGIN = 1e-3


@quiet
def fsq(z: Array, levels: Sequence[int], /, *, check_finite: bool | None = None) -> Quantized:
    r"""Bound each coordinate, round it to one of L levels; differentiable in libraries that differentiate.

    .. math:: z_q = \frac{1}{\lfloor L/2 \rfloor} \operatorname{round} b(z)
              = \frac{1}{\lfloor L/2 \rfloor} \big(b(z) + \operatorname{sg}[\operatorname{round} b(z) - b(z)]\big)

    .. math:: b(z) = h \tanh(z + \operatorname{artanh}(o / h)) - o, \qquad
              h = \tfrac12 (L - 1)(1 - 10^{-3}), \qquad o = \tfrac12 \text{ for even } L, 0 \text{ for odd}

    .. math:: g_z = \frac{b'(z)}{\lfloor L/2 \rfloor}\, g, \qquad b'(z) = h - (b(z) + o)^2 / h

    Parameters
    ----------
    z : array (..., D)
        Vectors in any real floating dtype; float16 and bfloat16 are computed in float32.
    levels : sequence of D integers
        Number of levels of each coordinate, each >= 3.
    check_finite : bool, optional
        Whether to refuse NaN and infinity. By default NumPy does, and the others do not.

    Returns
    -------
    Quantized
        ``z_q`` (..., D), in the dtype of ``z`` and within [-1, 1], and ``indices`` (...), in [0, product of levels):
        the levels counted from 0 are the digits of a mixed radix, the first coordinate's the lowest. A
        vector that is not finite gives NaN and -1.

    Raises
    ------
    TypeError
        If ``z`` is not a real floating array, or a level not an integer.
    ValueError
        If there are not D levels, one is below 3, their product leaves the index dtype, or a value is refused.

    Notes
    -----
    The shift by artanh centres the grid: b(0) = 0. The paper's pseudocode has tan there, which its authors call an
    error, and with which b(0) is off by 4e-4 at L = 4 and less above. Two levels cannot be centred: o > h. Above
    some 1000 levels the margin of 1e-3 keeps the outermost ones out of reach. A coordinate halfway between
    levels goes to the even one.

    References
    ----------
    Mentzer, Minnen, Agustsson, Tschannen, "Finite Scalar Quantization: VQ-VAE Made Simple", arXiv:2309.15505,
    section 3.1 and appendix A.1.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> out = dq.fsq(np.array([[0.0, -3.0], [0.6, 3.0]]), [5, 4])
    >>> out.z_q
    array([[ 0. , -1. ],
           [ 0.5,  0.5]])
    >>> out.indices
    array([ 2, 18])
    """
    call = _Call("fsq", z, levels, check_finite)
    return call.quantized(call.lib.bind(call.rule, call.z, call.grid, call.digits, None))


@quiet
def fsq_vjp(
    z: Array, levels: Sequence[int], /, *, check_finite: bool | None = None
) -> tuple[Quantized, Callable[[Array], Array]]:
    r"""Quantize by `fsq`, and return the pullback; works in every library, without automatic differentiation.

    .. math:: g_z = \frac{b'(z)}{\lfloor L/2 \rfloor}\, g

    Parameters
    ----------
    z, levels, check_finite
        As in `fsq`.

    Returns
    -------
    out : Quantized
    pullback : callable
        ``pullback(g)`` takes the cotangent of ``z_q`` and gives that of ``z``, (..., D) both; ``z`` must stay as it
        was.

    Raises
    ------
    TypeError, ValueError
        As `fsq`; ``pullback`` likewise, for a cotangent of another library, dtype or shape.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> out, pullback = dq.fsq_vjp(np.array([[0.0]]), [5])
    >>> pullback(np.array([[1.0]]))
    array([[0.999]])
    """
    call = _Call("fsq_vjp", z, levels, check_finite)
    out = call.quantized(call.rule.forward(call.z, call.grid, call.digits, None))

    def pullback(g: Array, /) -> Array:
        check_like(call.lib, "pullback", "g", g, out.z_q, "z_q")
        g_z, _ = call.rule.pullback(call.z, call.grid, call.digits, None, flat_rows(call.lib, g))
        return call.lib.xp.reshape(g_z, call.shape)

    return out, pullback


@quiet
def fsq_jvp(
    z: Array, dz: Array, levels: Sequence[int], /, *, check_finite: bool | None = None
) -> tuple[Quantized, Array]:
    r"""Quantize by `fsq`, and push a tangent forward; works in every library.

    .. math:: dz_q = \frac{b'(z)}{\lfloor L/2 \rfloor}\, dz

    Parameters
    ----------
    z, levels, check_finite
        As in `fsq`.
    dz : array (..., D)
        Tangent of ``z``.

    Returns
    -------
    out : Quantized
    tangent : array (..., D)
        Tangent of ``z_q``.

    Raises
    ------
    TypeError, ValueError
        As `fsq`, also for a tangent of another library, dtype or shape.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> out, tangent = dq.fsq_jvp(np.array([[0.0]]), np.array([[2.0]]), [5])
    >>> tangent
    array([[1.998]])
    """
    call = _Call("fsq_jvp", z, levels, check_finite)
    check_like(call.lib, "fsq_jvp", "dz", dz, z, "z")
    out = call.quantized(call.rule.forward(call.z, call.grid, call.digits, None))
    tangent = call.rule.pushforward(call.z, call.grid, call.digits, None, flat_rows(call.lib, dz), call.grid)
    return out, call.lib.xp.reshape(tangent, call.shape)


@quiet
def fsq_decode(indices: Array, levels: Sequence[int], /, *, dtype: Any = None) -> Array:
    r"""Vectors of given indices: exactly the ``z_q`` that `fsq` gave with them.

    .. math:: z_{q,j} = \frac{m_j}{\lfloor L_j/2 \rfloor} - 1, \qquad
              m_j = \Big\lfloor i \Big/ \prod_{k < j} L_k \Big\rfloor \bmod L_j

    Parameters
    ----------
    indices : integer array (...)
        As `fsq` gives them.
    levels : sequence of D integers
        As in `fsq`.
    dtype : optional
        The library's floating dtype of the result, that of ``z``; float32 by default.

    Returns
    -------
    array (..., D)
        An index of -1, the mark of a vector that was not finite, gives NaN.

    Raises
    ------
    TypeError
        If the indices or a level are not integers.
    ValueError
        If there is no level, one is below 3, their product leaves the index dtype, or, in NumPy, an index is outside
        ``[-1, product of levels)``.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> dq.fsq_decode(np.array([2, 18]), [5, 4], dtype=np.float64)
    array([[ 0. , -1. ],
           [ 0.5,  0.5]])
    """
    lib = backend_of("fsq_decode", indices=indices)
    levels = _checked_levels(lib, "fsq_decode", levels, None)
    indices = checked_indices(lib, "fsq_decode", indices, math.prod(levels), bound="product of levels")
    xp = lib.xp
    dtype = xp.float32 if dtype is None else dtype
    indices = xp.expand_dims(indices, axis=-1)
    levels_, places = (row_of(lib, x, indices.dtype, indices) for x in (levels, _places(levels)))
    digits = indices // places % levels_
    z_q = lib.astype(level_of(lib, digits, levels, lib.compute_dtype(dtype)), dtype)
    return lib.nan_where((indices < 0) | (indices >= math.prod(levels)), z_q)


class _Call:
    """Checked and flattened arguments of one quantization."""

    def __init__(self, function: str, z: Array, levels: Sequence[int], finite: bool | None) -> None:
        lib = backend_of(function, z=z)
        check_floating(lib, function, z=z)
        levels = _checked_levels(lib, function, levels, z)
        refuse_not_finite(lib, function, finite, z=z)
        xp = lib.xp
        dtype = lib.compute_dtype(z.dtype)
        self.lib, self.shape, self.rule = lib, tuple(z.shape), FSQRule(lib, levels)
        self.z = flat_rows(lib, z)
        offsets = [0.0 if level % 2 else 0.5 for level in levels]
        halves = [(level - 1) * (1 - _MARGIN) / 2 for level in levels]
        shifts = [math.atanh(o / h) for o, h in zip(offsets, halves, strict=True)]
        row = partial(row_of, lib, dtype=dtype, like=z)
        half, offset, shift = row(halves), row(offsets), row(shifts)
        self.grid = xp.concat([half, offset, shift])
        flat = lib.astype(lib.stop_gradient(self.z), dtype)
        rounded = xp.round(xp.tanh(flat + shift) * half - offset)
        whole = xp.all(xp.isfinite(flat), axis=-1, keepdims=True)
        index_dtype = _index_dtype(lib)
        zeroed = lib.astype(xp.where(whole, rounded, xp.zeros_like(rounded)), index_dtype)
        digits = zeroed + row_of(lib, [level // 2 for level in levels], index_dtype, z)
        self.digits = xp.where(whole, digits, -xp.ones_like(digits))
        weighted = digits * row_of(lib, _places(levels), index_dtype, z)
        indices = lib.astype(xp.sum(weighted, axis=-1), index_dtype)
        whole = xp.reshape(whole, tuple(indices.shape))
        self.indices = xp.where(whole, indices, -xp.ones_like(indices))

    def quantized(self, z_q: Array) -> Quantized:
        reshape = self.lib.xp.reshape
        return Quantized(reshape(z_q, self.shape), reshape(self.indices, self.shape[:-1]))


def _places(levels: Sequence[int]) -> list[int]:
    """Value of each digit: the product of the levels before it."""
    return [math.prod(levels[:position]) for position in range(len(levels))]


def _index_dtype(lib: Backend) -> Any:
    """int64, or int32 where the library has no wider one by default."""
    return lib.as_indices(lib.xp.asarray([0])).dtype


def _checked_levels(lib: Backend, function: str, levels: Sequence[int], z: Array | None) -> tuple[int, ...]:
    wanted = "levels must be a sequence of integers >= 3, one for each coordinate"
    if isinstance(levels, (str, bytes)) or not isinstance(levels, Sequence):
        raise TypeError(f"{function}: {wanted}, got {describe(levels)}")
    for level in levels:
        if isinstance(level, bool) or not isinstance(level, numbers.Integral):
            raise TypeError(f"{function}: {wanted}, got {level!r} of {describe(level)}")
    if not levels or min(levels) < 3:
        raise ValueError(f"{function}: {wanted}, got {list(levels)}")
    if z is not None and (z.ndim < 1 or z.shape[-1] != len(levels)):
        raise ValueError(
            f"{function}: z must have shape (..., D) with D = {len(levels)}, one for each level, got {tuple(z.shape)}"
        )
    largest = int(lib.xp.iinfo(_index_dtype(lib)).max)
    if math.prod(levels) - 1 > largest:
        raise ValueError(
            f"{function}: the product of levels must be at most {largest + 1}, the range of the indices of "
            f"{lib.name}, got {math.prod(levels)}"
        )
    return tuple(int(level) for level in levels)
