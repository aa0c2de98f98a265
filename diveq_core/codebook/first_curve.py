r"""A first curve for space-filling quantization: corners among the vectors, in an order that stays short.

.. math:: \pi_0 = \arg\max_k \|E_k - \bar E\|, \qquad
          \pi_{j+1} = \arg\min_{k \notin \{\pi_0, \dots, \pi_j\}} \|E_k - E_{\pi_j}\|
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import checked_count
from diveq_core.arrays.registry import backend_of, quiet
from diveq_core.arrays.search import frame, framed
from diveq_core.codebook.clustering import clustered

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array


@quiet
def curve_init(
    z: Array,
    count: int,
    /,
    *,
    iterations: int = 10,
    noise: Array | None = None,
    rng: Any = None,
    all_reduce: Callable[[Array], Array] | None = None,
) -> Array:
    r"""Corners of a first curve for `SFDiVeQ` and `SFDiVeQDetach`, from recent vectors.

    .. math:: E = \operatorname{kmeans}(z), \qquad
              \pi_{j+1} = \arg\min_{k \notin \{\pi_0, \dots, \pi_j\}} \|E_k - E_{\pi_j}\|, \qquad
              \text{curve} = (E_{\pi_0}, E_{\pi_1}, \dots)

    The curve begins at the codeword farthest from the mean of all, and goes on to the nearest that is left.

    Parameters
    ----------
    z : array (..., D)
        What the encoder gave lately, in any real floating dtype: several batches are better than one. Vectors that
        are not finite are left out.
    count : int
        Corners K, at least 2.
    iterations, noise, rng, all_reduce
        As in `kmeans`.

    Returns
    -------
    array (K, D)
        In the dtype of ``z``.

    Raises
    ------
    TypeError, ValueError
        As `kmeans`, and if there are fewer than 2 corners.

    Notes
    -----
    Neighbouring corners share their segment's gradient and every point of a segment is an output, so segments that
    cross the data at random give outputs where no vector is. Each stage of a residual quantizer begins with what
    the stages before it left over.

    References
    ----------
    Vali, Bäckström, Solin, arXiv:2509.26469 (a curve that begins in recent vectors).

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> z = np.array([[0.0], [9.0], [4.0], [1.0], [8.0], [5.0]])
    >>> curve = dq.curve_init(z, 3, rng=np.random.default_rng(0)).ravel()
    >>> curve if curve[0] < curve[-1] else curve[::-1]
    array([0.5, 4.5, 8.5])
    """
    size = checked_count("curve_init", "count", count, at_least=2)
    corners = clustered("curve_init", z, size, iterations, noise, rng, all_reduce).codebook
    lib = backend_of("curve_init", z=z)
    return lib.take_rows(corners, tour(lib, lib.astype(corners, lib.compute_dtype(corners.dtype))))


def tour(lib: Backend, corners: Array) -> Array:
    """Order in which every corner is followed by the nearest one left, (K,)."""
    xp = lib.xp
    e = framed(lib, corners, *frame(lib, corners))
    numbers = lib.as_indices(xp.arange(e.shape[0], **lib.place(e)))
    gone = xp.zeros_like(e[:, 0])
    far = xp.full_like(gone, float(xp.finfo(gone.dtype).max))
    # The frame's own centre is a rounded mean.
    from_mean = e - xp.mean(e, axis=0, keepdims=True)
    order = [xp.argmax(xp.sum(from_mean * from_mean, axis=1))]
    for _ in range(1, e.shape[0]):
        gone = xp.where(numbers == order[-1], xp.ones_like(gone), gone)
        d = e - lib.take_rows(e, lib.as_indices(xp.reshape(order[-1], (1,))))
        order.append(xp.argmin(xp.where(gone > 0, far, xp.sum(d * d, axis=1))))
    return lib.as_indices(xp.stack(order))
