"""From vectors to tokens, the indices of codewords, and back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import (
    check_codebook,
    check_floating,
    check_pair,
    checked_dtype,
    checked_indices,
    flat,
    flat_rows,
    refuse_not_finite,
    shaped,
    wants_finite,
)
from diveq_core.arrays.registry import backend_of, quiet
from diveq_core.estimators.base import check_estimator

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.base import Quantizer


class Prepared:
    r"""A codebook, and what the search makes of it before it looks at a vector.

    .. math:: c, \quad s, \quad \big(-s(E_k - c),\ \tfrac12 s^2 \|E_k - c\|^2\big)_k, \quad \|E_k\|^2

    Made by `prepare`, for `nearest`.
    """

    codebook: Array
    """A copy (K, D), in the compute dtype: at least float32."""

    def __init__(self, lib: Backend, codebook: Array) -> None:
        codebook = lib.stop_gradient(codebook)
        self.codebook = lib.copy(lib.astype(codebook, lib.compute_dtype(codebook.dtype)))
        self.searched = lib.prepare(self.codebook)

    def __reduce__(self) -> Any:
        return prepare, (self.codebook,)

    def __repr__(self) -> str:
        count, width = self.codebook.shape
        return f"Prepared({count} codewords of {width}, {self.codebook.dtype})"


@quiet
def prepare(codebook: Array, /) -> Prepared:
    """A codebook for many calls of `nearest`, so that each pays for its own vectors only.

    Parameters
    ----------
    codebook : array (K, D)
        Changing it later changes nothing in what was prepared.

    Returns
    -------
    Prepared
        `nearest` takes it in place of the codebook, and gives the same indices but for near ties, within its bound of
        accuracy. NumPy and PyTorch on the CPU gain by it; elsewhere it is the codebook alone.

    Raises
    ------
    TypeError
        If the codebook is not a real floating array.
    ValueError
        If it is empty or not of the shape (K, D).

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> words = dq.prepare(np.array([[0.0, 0.0], [1.0, 1.0]]))
    >>> words, [int(dq.nearest(frame, words)[0]) for frame in np.array([[[0.2, 0.1]], [[0.9, 1.2]]])]
    (Prepared(2 codewords of 2, float64), [0, 1])
    """
    lib = backend_of("prepare", codebook=codebook)
    check_floating(lib, "prepare", codebook=codebook)
    check_codebook("prepare", tuple(codebook.shape))
    return Prepared(lib, codebook)


@quiet
def nearest(z: Array, codebook: Array | Prepared, /, *, check_finite: bool | None = None) -> Array:
    r"""Index of the nearest codeword; ties go to the lowest index.

    .. math:: i = \arg\min_k \|z - E_k\|

    Parameters
    ----------
    z : array (..., D)
        Vectors in any real floating dtype; float16 and bfloat16 are compared in float32.
    codebook : array (K, D), or Prepared
        Codewords, of the same library as ``z``; what `prepare` made of them, where many calls read the same ones.
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
    common offset or a tiny scale costs no accuracy. With :math:`c` the centre, :math:`\epsilon` the spacing of the
    compute dtype at 1, a the codeword chosen and b the nearest,

    .. math:: \|z - E_a\|^2 - \|z - E_b\|^2 \le (2\sqrt D + 12)\,\epsilon\,(\|z - c\| + l)\,l, \qquad
              l = \max(\|E_a - c\|, \|E_b - c\|)

    in every library, whatever kernel searches (see `set_optional_kernels`). Equal codewords give the lowest index.
    Memory beyond the inputs is a few MiB: no N x K array exists.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> dq.nearest(np.array([[0.2, 0.1], [0.9, 1.2]]), np.array([[0.0, 0.0], [1.0, 1.0]]))
    array([0, 1])
    """
    searched: Any = codebook
    if isinstance(codebook, Prepared):
        codebook, searched = codebook.codebook, codebook.searched
    lib = backend_of("nearest", z=z, codebook=codebook)
    check_pair(lib, "nearest", z, codebook)
    wanted = wants_finite(lib, "nearest", check_finite)
    if not lib.checks_finite:
        refuse_not_finite(lib, "nearest", wanted, z=z, codebook=codebook)
    found = lib.search(flat_rows(lib, z), searched)
    # Where reading values is free, the search's own marks are read, and the vectors only to say which are at fault.
    if lib.checks_finite and wanted and (math.prod(found.shape) == 0 or lib.any_negative(found)):
        refuse_not_finite(lib, "nearest", True, z=z, codebook=codebook)
    return shaped(lib, found, tuple(z.shape[:-1]))


@quiet
def lookup(indices: Array, codebook: Array, /) -> Array:
    r"""Codewords of given indices.

    .. math:: q = E_i

    Parameters
    ----------
    indices : integer array (...)
        As `nearest` gives them.
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
        If the codebook is empty, or, in NumPy, an index is outside ``[-1, K)``.

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
    check_codebook("lookup", tuple(codebook.shape))
    indices = checked_indices(lib, "lookup", indices, codebook.shape[0])
    rows = lib.take_rows(codebook, flat(lib, indices))
    return shaped(lib, rows, (*indices.shape, codebook.shape[1]))


@quiet
def decode(indices: Array, codebook: Array | None, /, estimator: Quantizer, *, dtype: Any = None) -> Array:
    r"""Vectors from indices: what a hard estimator's `quantize` gave, exactly if ``dtype`` is that of its ``z_q``.

    .. math:: z_q = E_i

    Parameters
    ----------
    indices : integer array (...)
        As `quantize` gave them: with one axis more for a `Residual` or `Product`.
    codebook : array (K, D), or None
        Or what the `Residual` or `Product` takes; None for `FSQ`.
    estimator : Estimator, Residual or Product
        With noise it gives the codeword, which its output was near. None that is space-filling: an index alone does
        not say where on its segment a vector lies. `project` and `decode_curve` do.
    dtype : optional
        The library's floating dtype of the result; the codebook's by default (float32 where there is none), and
        at least float32 for a `Residual`, whose sums 16 bits would round. With the dtype of ``z_q`` from `quantize` the
        result is ``z_q`` bit for bit.

    Returns
    -------
    array (..., D)
        The sum of the stages' codewords for a `Residual`, and those of the groups side by side for a `Product`. An
        index of -1 gives NaN; in a stage of a `Residual` after the first it marks one that was dropped, and adds
        nothing.

    Raises
    ------
    TypeError
        If the indices are not integers, the arrays are of different libraries, or the estimator is space-filling.
    ValueError
        If shapes do not fit, or, in NumPy, an index is outside ``[-1, K)``.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> codebooks = np.array([[[0.0, 0.0], [4.0, 4.0]], [[0.0, 0.0], [0.5, -0.5]]])
    >>> dq.decode(np.array([[1, 1], [0, 1]]), codebooks, dq.Residual(dq.STE(), stages=2))
    array([[ 4.5,  3.5],
           [ 0.5, -0.5]])
    >>> dq.decode(np.array([[1, -1]]), codebooks, dq.Residual(dq.STE(), stages=2))
    array([[4., 4.]])
    """
    check_estimator("decode", estimator)
    arrays = {} if codebook is None else {"codebook": codebook}
    lib = backend_of("decode", indices=indices, **arrays)
    check_floating(lib, "decode", **arrays)
    shape = None if codebook is None else tuple(codebook.shape)
    estimator.check("decode", lib, None, shape)
    indices = checked_indices(lib, "decode", indices, estimator.index_count(shape), bound=estimator.index_bound)
    if dtype is None:
        held = lib.xp.float32 if codebook is None else codebook.dtype
        dtype = lib.compute_dtype(held) if estimator.sums else held
    return estimator.decode(lib, indices, codebook, checked_dtype(lib, "decode", dtype))
