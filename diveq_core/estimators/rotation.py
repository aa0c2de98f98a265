r"""The rotation trick: the cotangent is turned with the vector, and scaled with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diveq_core.arrays.rows import one_where, zero_rows
from diveq_core.estimators.base import Estimator

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array


@dataclass(frozen=True)
class Rotation(Estimator):
    r"""The rotation trick: the codeword as a rotated and scaled vector, held constant but for the vector.

    .. math:: z_q = \operatorname{sg}[s R]\,z = q, \qquad g_z = s R^T g, \qquad g_q = 0, \qquad dz_q = s R\,dz

    with :math:`s = \|q\| / \|z\|`, :math:`\hat z = z / \|z\|`, :math:`\hat q = q / \|q\|` and R the rotation in
    the plane of z and q that takes :math:`\hat z` to :math:`\hat q`, by the angle :math:`\theta` between them:

    .. math:: R = I - (1 - \cos\theta)(\hat z \hat z^T + p p^T) + \sin\theta\,(p \hat z^T - \hat z p^T), \qquad
              p \sin\theta = \hat q - \langle\hat q, \hat z\rangle \hat z

    Notes
    -----
    R is the paper's product of two reflections :math:`I - 2 w w^T + 2 \hat q \hat z^T`, whose w, the
    direction of :math:`\hat z + \hat q`, is rounding noise where z and q are nearly antiparallel; written
    with p it is orthogonal there too.

    Where z and q are antiparallel, to rounding, every plane through z would do and none is chosen:
    :math:`R = I - 2 \hat z \hat z^T`, the reflection, which is also what is left in one dimension.
    Where z = 0: straight-through, g_z = g. Where q = 0: g_z = 0, as s says.
    The codebook gets no gradient: train it by an auxiliary loss or by moving averages.

    References
    ----------
    Fifty, Junkins, Duan, Iyengar, Liu, Amid, Thrun, Ré, "Restructuring Vector Quantization with the Rotation
    Trick", arXiv:2410.06424, section 4.2.

    Examples
    --------
    A quarter turn to twice the length, and the cotangent turned back:

    >>> import numpy as np
    >>> import diveq_core as dq
    >>> z, codebook = np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]])
    >>> out, pullback = dq.vjp(z, codebook, dq.Rotation())
    >>> pullback(np.array([[0.0, 1.0]]))[0]
    array([[2., 0.]])
    """

    @property
    def trains_codebook(self) -> bool:
        # What is derived from it may train it.
        return type(self) is not Rotation

    def vjp(self, lib: Backend, z: Array, q: Array, noise: Array | None, g: Array) -> tuple[Array, Array | None]:
        return _rotation(lib, z, q)(g, -1.0), None

    def jvp(self, lib: Backend, z: Array, q: Array, noise: Array | None, dz: Array, dq: Array) -> Array:
        return _rotation(lib, z, q)(dz, 1.0)


def _rotation(lib: Backend, z: Array, q: Array) -> Callable[[Array, float], Array]:
    """``x -> s R x`` for the sign 1, ``x -> s R^T x`` for the sign -1; constant in ``z`` and ``q``."""
    xp = lib.xp
    long_z, z_hat = lib.polar(lib.stop_gradient(z))
    long_q, q_hat = lib.polar(lib.stop_gradient(q))
    # By their difference: exactly nothing where the directions are equal, and no digits lost where they are close.
    apart = q_hat - z_hat
    one_less_cos = lib.dot(apart, apart) / 2
    beside = apart - lib.dot(apart, z_hat) * z_hat
    # A second time, since what is left of a vector nearly along z need not be orthogonal to it.
    sin, p = lib.polar(beside - lib.dot(beside, z_hat) * z_hat)
    # Below this, p is what rounding left of parallel or antiparallel vectors.
    noise = sin < 8 * float(xp.finfo(z.dtype).eps)
    sin, p = zero_rows(lib, noise, sin), zero_rows(lib, noise, p)
    lost = long_z == 0
    s = long_q / one_where(lib, lost, long_z)

    def apply(x: Array, sign: float) -> Array:
        along, across = lib.dot(z_hat, x), lib.dot(p, x)
        turned = sign * sin * (along * p - across * z_hat)
        return xp.where(lost, x, s * (x - one_less_cos * (along * z_hat + across * p) + turned))

    return apply
