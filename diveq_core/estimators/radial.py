r"""The general form, for any differentiable radius r(q, z); `radii` holds the radii."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.rows import Array, derivative_scale
from diveq_core.estimators.base import Estimator
from diveq_core.estimators.custom_radius import CustomRadius

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend
    from diveq_core.estimators.base import Shape


@dataclass(frozen=True)
class Radial(Estimator):
    r"""The general form, for any differentiable radius r(q, z).

    .. math:: z_q = z + r \operatorname{sg}[d / r] = q, \qquad
              g_z = g + \langle g,d\rangle \frac{\partial \ln r}{\partial z}, \qquad
              g_q = \langle g,d\rangle \frac{\partial \ln r}{\partial q}

    Parameters
    ----------
    radius : Radius or callable
        `Power`, `PseudoHuber`, `PNorm`, `Mahalanobis`, `Cosine`, a `CustomRadius`, or r(q, z) itself.

    Notes
    -----
    Training with it equals straight-through plus the auxiliary loss
    :math:`\operatorname{sg}[\langle g, q - z\rangle] \ln r`. Where r = 0: g_z = g and g_q = 0.

    References
    ----------
    Su Jianlin, "DiVeQ: a very concise VQ training scheme", https://kexue.fm/archives/11328, 2025-10-08, equations 8
    and 9 (the general r(q, z), its differential and the auxiliary loss).
    """

    radius: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", as_radius("Radial", self.radius))

    def check(self, function: str, lib: Backend, z: Shape | None, codebook: Shape | None) -> None:
        super().check(function, lib, z, codebook)
        # Only a radius with parameters of a width has it.
        check_width = getattr(self.radius, "check_width", None)
        if codebook is not None and check_width is not None:
            check_width(codebook[-1])

    def _live_error(self, lib: Backend, z: Array, q: Array) -> tuple[Array, Array | float]:
        r"""``k sg[d / r] r``, equal to k d but differentiable through r alone; and 1 / k.

        The power of two k brings it to order one; what is multiplied with it is brought back by 1 / k.
        """
        d = q - z
        if not lib.records(d):
            return d, 1.0
        log_r, k = self.radius.log(lib, q, z), derivative_scale(lib, d)
        return lib.stop_gradient(d * k) * lib.xp.exp(log_r - lib.stop_gradient(log_r)), 1 / k

    def vjp(self, lib: Backend, z: Array, q: Array, noise: Array | None, g: Array) -> tuple[Array, Array | None]:
        live, back = self._live_error(lib, z, q)
        # Times 1 / k here: a gradient of ln r may be small, beside a large delta say, and be lost by it.
        coefficient = lib.dot(g, live) * back
        to_q, to_z = self.radius.log_gradients(lib, q, z)
        return g + coefficient * to_z, coefficient * to_q

    def jvp(self, lib: Backend, z: Array, q: Array, noise: Array | None, dz: Array, dq: Array) -> Array:
        live, back = self._live_error(lib, z, q)
        to_q, to_z = self.radius.log_gradients(lib, q, z)
        return dz + live * (lib.dot(to_q * back, dq) + lib.dot(to_z * back, dz))


def as_radius(function: str, radius: Any) -> Any:
    """The radius itself, or a callable as one."""
    stated = hasattr(radius, "log") and hasattr(radius, "log_gradients")
    if isinstance(radius, type) or not (stated or callable(radius)):
        raise TypeError(
            f"{function}: radius must be a radius such as Power(1.0), or a callable r(q, z), got {radius!r}"
        )
    return radius if stated else CustomRadius(radius)
