r"""What the radial term does to a training step, and how the codebook is used.

To first order :math:`\langle g, q - z\rangle = L(z_q) - L(z)`, the price of quantizing; and training with a radius r
equals straight-through plus :math:`\operatorname{sg}[\langle g, q - z\rangle] \ln r`, which pulls q and z together
exactly where that coefficient is positive. (Su Jianlin, "DiVeQ: a very concise VQ training scheme", 2025-10-08.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from diveq_core.arrays.checks import check_floating, check_shape, checked_count, checked_indices, flat, flat_rows
from diveq_core.arrays.registry import backend_of, quiet
from diveq_core.arrays.rows import one_where
from diveq_core.estimators.radial import as_radius

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.radii import Radius


@quiet
def coefficient(g: Array, z: Array, q: Array, /) -> Array:
    r"""Coefficient of the radial term, per vector: the first-order price of quantizing it.

    .. math:: c = \langle g, q - z\rangle

    Parameters
    ----------
    g : array (..., D)
        Cotangent of the quantizer's output, dL/dz_q.
    z : array (..., D)
        Vectors before quantization.
    q : array (..., D)
        Their codewords, as `lookup` gives them.

    Returns
    -------
    array (...)
        In the result dtype of ``z`` and ``q``, computed in at least float32.

    Raises
    ------
    TypeError, ValueError
        If libraries, dtypes or shapes do not agree.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> g, z, q = np.array([[1.0, 1.0], [1.0, -1.0]]), np.zeros((2, 2)), np.array([[1.0, 0.0], [0.0, 2.0]])
    >>> dq.coefficient(g, z, q)
    array([ 1., -2.])
    """
    lib = _check_rows("coefficient", g=g, z=z, q=q)
    return lib.astype(_price(lib, g, z, q), lib.result_dtype(z, q))


@quiet
def positive_share(g: Array, z: Array, q: Array, /) -> Array:
    r"""Share of vectors that the radial term pulls towards their codeword.

    .. math:: \frac1N\,|\{n : \langle g_n, q_n - z_n\rangle > 0\}|

    Parameters
    ----------
    g, z, q : array (..., D)
        As in `coefficient`.

    Returns
    -------
    array ()
        In [0, 1], float32 or wider; NaN for an empty batch.

    Raises
    ------
    TypeError, ValueError
        As `coefficient`.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> g, z, q = np.array([[1.0, 1.0], [1.0, -1.0]]), np.zeros((2, 2)), np.array([[1.0, 0.0], [0.0, 2.0]])
    >>> float(dq.positive_share(g, z, q))
    0.5
    """
    lib = _check_rows("positive_share", g=g, z=z, q=q)
    # Before it is rounded to 16 bits, where a small price would be none.
    c = _price(lib, g, z, q)
    return lib.xp.sum(lib.astype(c > 0, c.dtype)) / (math.prod(c.shape) or math.nan)


@quiet
def equivalent_loss(g: Array, z: Array, q: Array, radius: Radius | Callable[[Array, Array], Array], /) -> Array:
    r"""Auxiliary loss whose gradient, added to straight-through, is the radial estimator's.

    .. math:: \sum_n \operatorname{sg}[\langle g_n, q_n - z_n\rangle] \ln r(q_n, z_n)

    Parameters
    ----------
    g, z, q : array (..., D)
        As in `coefficient`.
    radius : Radius or callable
        As in `Radial`.

    Returns
    -------
    array ()
        Differentiable to ``z`` and ``q`` in libraries that differentiate. A vector with r = 0 adds nothing.

    Raises
    ------
    TypeError, ValueError
        As `coefficient`, and as `Radial` for the radius.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> g, z, q = np.array([[2.0, 0.0]]), np.zeros((1, 2)), np.array([[np.e, 0.0]])
    >>> round(float(dq.equivalent_loss(g, z, q, dq.Power(3.0))), 6)
    16.309691
    """
    lib = _check_rows("equivalent_loss", g=g, z=z, q=q)
    dtype = lib.compute_dtype(lib.result_dtype(z, q))
    rows = [lib.astype(flat_rows(lib, x), dtype) for x in (g, z, q)]
    stopped = lib.stop_gradient(lib.xp.sum(rows[0] * (rows[2] - rows[1]), axis=-1, keepdims=True))
    return lib.xp.sum(stopped * as_radius("equivalent_loss", radius).log(lib, rows[2], rows[1]))


@quiet
def usage(indices: Array, count: int, /) -> Array:
    r"""How many vectors chose each codeword.

    .. math:: n_k = |\{n : i_n = k\}|

    Parameters
    ----------
    indices : integer array (...)
        As `nearest` gives them; -1, the mark of a vector that was not finite, counts for none.
    count : int
        Size K of the codebook.

    Returns
    -------
    array (K,)
        Whole numbers in float32, counted exactly and rounded above 2^24.

    Raises
    ------
    TypeError
        If the indices are not integers.
    ValueError
        If the count is not an integer >= 1, or, in NumPy, an index is outside ``[-1, count)``.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> dq.usage(np.array([0, 2, 2]), 4)
    array([1., 0., 2., 0.], dtype=float32)
    """
    lib = backend_of("usage", indices=indices)
    count = checked_count("usage", "count", count)
    indices = checked_indices(lib, "usage", indices, count, bound="count")
    segments = flat(lib, indices)
    # Sums of ones in float32 would end at 2^24.
    ones = lib.xp.ones((segments.shape[0], 1), dtype=lib.xp.int32, **lib.place(segments))
    return lib.astype(lib.segment_sum(ones, segments, count)[:, 0], lib.xp.float32)


@quiet
def perplexity(counts: Array, /) -> Array:
    r"""Effective number of codewords in use.

    .. math:: \exp\Big(-\sum_k p_k \ln p_k\Big), \qquad p_k = n_k \Big/ \sum_j n_j

    Parameters
    ----------
    counts : array (K,)
        Counts or weights, as `usage` gives them, possibly summed over batches; integers, as `bincount` gives, too.

    Returns
    -------
    array ()
        Between 1 and K; NaN if nothing was counted. Equal counts give their number, to the last place of exp(0).

    Raises
    ------
    TypeError, ValueError
        If the counts are neither real floating nor integers, or not of shape (K,) with K >= 1; in NumPy also if one is
        negative or NaN, which elsewhere gives a number without meaning.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> round(float(dq.perplexity(np.array([3.0, 3.0, 0.0]))), 6)
    2.0
    """
    lib, counts = _checked_counts("perplexity", counts)
    xp = lib.xp
    # A power of two changes no proportion; the inverse of a very large number is flushed to zero in some libraries.
    counts = xp.where(xp.max(counts) > 2.0**64, counts * 2.0**-64, counts)
    largest = xp.max(counts)
    # In parts of the largest the sum cannot overflow, and equal counts have logarithms of 0 alone.
    parts = counts / one_where(lib, largest == 0, largest)
    total = xp.sum(parts)
    mean_log = xp.sum(parts * xp.log(one_where(lib, parts == 0, parts))) / one_where(lib, total == 0, total)
    return lib.nan_where(total == 0, total * xp.exp(-mean_log))


@quiet
def used_share(counts: Array, /) -> Array:
    r"""Share of codewords that were chosen at least once.

    .. math:: \frac1K\,|\{k : n_k > 0\}|

    Parameters
    ----------
    counts : array (K,)
        As in `perplexity`.

    Returns
    -------
    array ()
        In [0, 1].

    Raises
    ------
    TypeError, ValueError
        As `perplexity`.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> float(dq.used_share(np.array([3.0, 1.0, 0.0, 0.0])))
    0.5
    """
    lib, counts = _checked_counts("used_share", counts)
    return lib.xp.mean(lib.astype(counts > 0, counts.dtype))


def _checked_counts(function: str, counts: Array) -> tuple[Backend, Array]:
    """Counts (K,) in their compute dtype; whole numbers in float32, which is that of `usage`."""
    lib = backend_of(function, counts=counts)
    whole = lib.is_integer(counts)
    if not whole:
        check_floating(lib, function, counts=counts)
    if counts.ndim != 1 or counts.shape[0] == 0:
        wanted = "(K,)" if counts.ndim != 1 else "(K,) with K >= 1"
        raise ValueError(f"{function}: counts must have shape {wanted}, got {tuple(counts.shape)}")
    if lib.checks_finite and not bool(lib.xp.all(counts >= 0)):
        raise ValueError(f"{function}: counts must be at least 0, got a negative one or NaN")
    return lib, lib.astype(counts, lib.xp.float32 if whole else lib.compute_dtype(counts.dtype))


def _price(lib: Backend, g: Array, z: Array, q: Array) -> Array:
    """<g, q - z> in the compute dtype, (...)."""
    dtype = lib.compute_dtype(lib.result_dtype(z, q))
    return lib.xp.sum(lib.astype(g, dtype) * (lib.astype(q, dtype) - lib.astype(z, dtype)), axis=-1)


def _check_rows(function: str, **arrays: Array) -> Backend:
    lib = backend_of(function, **arrays)
    check_floating(lib, function, **arrays)
    z = arrays["z"]
    for name, x in arrays.items():
        if x.ndim < 1:
            raise ValueError(f"{function}: {name} must have shape (..., D), got ()")
        check_shape(function, name, x, tuple(z.shape), "z")
    return lib
