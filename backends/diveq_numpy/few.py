r"""The search for few vectors, where bringing a codebook into its frame would cost more than the product.

.. math:: s_k = \|E_k\|^2 - 2 \langle z, E_k\rangle, \qquad
          |\hat s_k - s_k| \le (D + 4)\,\epsilon\,(\|z\| + L)\,L, \qquad L = \max_k \|E_k\|

A codeword whose score is the least by more than twice that bound is the nearest one. Others are compared again, in a
wider format and by differences, which lose nothing to an offset: with a the one of least score,

.. math:: \|z - E_k\|^2 - \|z - E_a\|^2 = \langle E_k - E_a,\ (E_k - z) + (E_a - z)\rangle

Of equal codewords these are the same bit for bit, so the lowest index wins.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_numpy.search import Prepared

# Vectors, their entries and scores up to which this way is the faster one.
ROWS, _ENTRIES, _SCORES = 1 << 10, 1 << 16, 1 << 19

# Codewords that may be compared again, for each vector and besides: of more the frame is faster.
_AGAIN, _BESIDES = 4, 64


def serves(z: np.ndarray, codebook: np.ndarray) -> bool:
    """Whether these vectors are few."""
    return 0 < len(z) <= ROWS and z.size <= _ENTRIES and len(z) * len(codebook) <= _SCORES


def search(z: np.ndarray, prepared: Prepared, product: Callable[..., object], found: np.ndarray) -> bool:
    """Whether every one of some vectors was ``found``: not if one is not finite, or too much is left to compare.

    All in the compute dtype, (N, D), (K, D) and (N,), with N at least 1.
    """
    codebook, longest = prepared.codebook, prepared.longest
    scores = np.empty((len(z), len(codebook)), codebook.dtype)
    product(z * -2, codebook.T, out=scores)
    scores += prepared.squares
    found[...] = chosen = scores.argmin(axis=1)
    # Of numbers of Python, whose products stay in range. NaN is not below.
    reach = longest_of(np.vecdot(z, z))
    size, (factor, smallest, largest) = (reach + longest) * longest, _limits(codebook.dtype, codebook.shape[1])
    if not size < largest:
        return False
    bound = scores[np.arange(len(z)), chosen] + (size * factor + smallest)
    apart = scores > bound[:, None]
    if np.count_nonzero(apart) == scores.size - len(z):
        return True
    rows, words = (~apart).nonzero()
    if len(rows) > _AGAIN * len(z) + _BESIDES:
        return False
    found[...] = _compared(z, codebook, chosen, rows, words)
    return True


def longest_of(squares: np.ndarray) -> float:
    """The root of the largest; argmax finds it in a third of max's time."""
    return math.sqrt(squares[squares.argmax()])


def _compared(z: np.ndarray, codebook: np.ndarray, chosen: np.ndarray, rows: np.ndarray, words: np.ndarray) -> Any:
    """For each row the nearest of some codewords, the lowest among equals; pairs of row and codeword are in order."""
    wide = np.float64 if codebook.dtype == np.float32 else np.longdouble
    here, other, reference = (x.astype(wide) for x in (z[rows], codebook[words], codebook[chosen[rows]]))
    # Unlike a library's product, einsum treats all rows alike.
    further = np.einsum("pd,pd->p", other - reference, (other - here) + (reference - here))
    order = np.lexsort((words, further, rows))
    return words[order[np.flatnonzero(np.diff(rows, prepend=-1))]]


@functools.cache
def _limits(dtype: np.dtype, width: int) -> tuple[float, float, float]:
    """Twice the bound, over ``(|z| + L) L``; what is lost below the normal numbers; up to where scores are finite."""
    limits = np.finfo(dtype)
    return 2 * (width + 4) * float(limits.eps), 16 * width * float(limits.smallest_normal), float(limits.max) / 4
