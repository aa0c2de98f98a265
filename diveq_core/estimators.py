r"""The estimators: forward, pullback (vjp) and pushforward (jvp) of each, side by side.

Everything here acts row by row on ``z`` (N, D) and the chosen codewords ``q`` (N, D), with

.. math:: d = q - z, \qquad \rho = \|d\|, \qquad u = d / \rho \quad (0 \text{ where } \rho = 0),

``noise`` (N, D) standard normal, ``g`` the cotangent of the output and ``dz``, ``dq`` tangents. The pullbacks
may be differentiated again: what stands under ``sg`` is held constant and everything else is free, as
automatic differentiation of the stop-gradient expression has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diveq_core._array import Array, Direction, check_option, derivative_scale, describe
from diveq_core.custom_radius import CustomRadius

if TYPE_CHECKING:
    from diveq_core.backend import Backend


class Estimator:
    """What every estimator offers; derive from it to write one."""

    @property
    def noisy(self) -> bool:
        """Whether the estimator needs noise."""
        return False

    @property
    def hard(self) -> bool:
        """Whether the output is the codeword itself, bit for bit."""
        return True

    @property
    def constant(self) -> bool:
        """Whether ``vjp`` and ``jvp`` read no z, q and noise; where they do not, None stands for each."""
        return False

    @property
    def trains_codebook(self) -> bool:
        """Whether the codebook ever gets a gradient; where it gets none, ``jvp`` takes None for ``dq``."""
        return True

    def forward(self, lib: Backend, z: Array, q: Array, noise: Array | None) -> Array:
        """The output z_q, (N, D)."""
        return q

    def vjp(self, lib: Backend, z: Array, q: Array, noise: Array | None, g: Array) -> tuple[Array, Array | None]:
        """Pullback of ``g``: (g_z, g_q), (N, D) each; None for a g_q that is zero throughout."""
        raise TypeError(f"{describe(self)} must define vjp(lib, z, q, noise, g)")

    def jvp(self, lib: Backend, z: Array, q: Array, noise: Array | None, dz: Array, dq: Array) -> Array:
        """Pushforward of ``dz`` and ``dq``: the tangent of z_q, (N, D)."""
        raise TypeError(f"{describe(self)} must define jvp(lib, z, q, noise, dz, dq)")


@dataclass(frozen=True)
class STE(Estimator):
    r"""Straight-through estimator.

    .. math:: z_q = z + \operatorname{sg}[q - z] = q, \qquad g_z = g, \qquad g_q = 0

    Notes
    -----
    The codebook gets no gradient: train it by an auxiliary loss or by moving averages.

    References
    ----------
    van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", arXiv:1711.00937, section 3.2.
    """

    @property
    def constant(self) -> bool:
        # What is derived from it may read what it likes.
        return type(self) is STE

    @property
    def trains_codebook(self) -> bool:
        return type(self) is not STE

    def vjp(self, lib: Backend, z: Array, q: Array, noise: Array | None, g: Array) -> tuple[Array, Array | None]:
        return g, None

    def jvp(self, lib: Backend, z: Array, q: Array, noise: Array | None, dz: Array, dq: Array) -> Array:
        return dz


class _Distance(Estimator):
    r"""The distance family :math:`z_q = z + \rho\,w` with a fixed unit direction w."""

    def w(self, lib: Backend, d: Array, u: Direction, noise: Array | None) -> Direction:
        """The direction w, through which no derivative flows."""
        raise TypeError(f"{describe(self)} must define w(lib, d, u, noise)")

    def forward(self, lib: Backend, z: Array, q: Array, noise: Array | None) -> Array:
        d = q - z
        rho, u = lib.direction(d)
        return self.w(lib, d, u, noise).added_to(lib, z, rho)

    def vjp(self, lib: Backend, z: Array, q: Array, noise: Array | None, g: Array) -> tuple[Array, Array | None]:
        d = q - z
        _, u = lib.direction(d)
        w = self.w(lib, d, u, noise).stopped(lib)
        g_q = u.times(w.dot(lib, g))
        return g - g_q, g_q

    def jvp(self, lib: Backend, z: Array, q: Array, noise: Array | None, dz: Array, dq: Array) -> Array:
        d = q - z
        _, u = lib.direction(d)
        w = self.w(lib, d, u, noise).stopped(lib)
        return w.added_to(lib, dz, u.dot(lib, dq - dz))


@dataclass(frozen=True)
class DiVeQDetach(_Distance):
    r"""DiVeQ without noise: the distance times the detached true direction.

    .. math:: z_q = z + \rho \operatorname{sg}[u] = q, \qquad
              g_z = g - \langle g,u\rangle u, \qquad g_q = \langle g,u\rangle u

    Notes
    -----
    Where :math:`\rho = 0`: g_z = g and g_q = 0. Equal to ``Radial(Power(1))``.

    References
    ----------
    Vali, Bäckström, Solin, "DiVeQ", arXiv:2509.26469, appendix (DiVeQ-detach);
    Su Jianlin, "DiVeQ: a very concise VQ training scheme", https://kexue.fm/archives/11328, 2025-10-08, equation 6.
    """

    def w(self, lib: Backend, d: Array, u: Direction, noise: Array | None) -> Direction:
        return u


@dataclass(frozen=True)
class DiVeQ(_Distance):
    r"""DiVeQ: the distance times a detached direction near the true one.

    .. math:: z_q = z + \rho\,w, \qquad
              w = \operatorname{sg}\Big[\frac{d + \sigma\varepsilon}{\|d + \sigma\varepsilon\|}\Big], \qquad
              g_z = g - \langle g,w\rangle u, \qquad g_q = \langle g,w\rangle u

    Parameters
    ----------
    sigma : float
        Standard deviation (not variance) of the noise, in the units of ``z``; finite and >= 0. The paper
        recommends a variance of 1e-3. With 0 it is `DiVeQDetach` and draws no noise.

    Notes
    -----
    Where :math:`\rho = 0`: z_q = z, g_z = g and g_q = 0. Large sigma tends to `NSVQ`. A sigma that changes from step to
    step, traced say, is ``DiVeQ(sigma=1.0)`` with ``noise=sigma_t * eps``.

    References
    ----------
    Vali, Bäckström, Solin, "DiVeQ: Differentiable Vector Quantization Using the Reparameterization Trick",
    arXiv:2509.26469; in this form Su Jianlin, 2025-10-08, equation 7.
    """

    sigma: float = 10**-1.5

    def __post_init__(self) -> None:
        check_option(self, "sigma", at_least=0.0)

    @property
    def noisy(self) -> bool:
        return self.sigma > 0

    @property
    def hard(self) -> bool:
        return self.sigma == 0

    def w(self, lib: Backend, d: Array, u: Direction, noise: Array | None) -> Direction:
        return u if noise is None else lib.direction(lib.add_scaled(d, noise, self.sigma))[1]


@dataclass(frozen=True)
class NSVQ(_Distance):
    r"""Noise substitution: the distance times a random direction.

    .. math:: z_q = z + \rho\,w, \qquad w = \varepsilon / \|\varepsilon\|, \qquad
              g_z = g - \langle g,w\rangle u, \qquad g_q = \langle g,w\rangle u

    Notes
    -----
    Where :math:`\rho = 0`: z_q = z, g_z = g and g_q = 0.

    References
    ----------
    Vali, Bäckström, "NSVQ: Noise Substitution in Vector Quantization for Machine Learning", IEEE Access
    10:13598, 2022; in this form Su Jianlin, 2025-10-08, equation 5.
    """

    @property
    def noisy(self) -> bool:
        return True

    @property
    def hard(self) -> bool:
        return False

    def w(self, lib: Backend, d: Array, u: Direction, noise: Array | None) -> Direction:
        return lib.direction(noise)[1]


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
        stated = hasattr(self.radius, "log") and hasattr(self.radius, "log_gradients")
        if isinstance(self.radius, type) or not (stated or callable(self.radius)):
            raise TypeError(
                f"Radial: radius must be a radius such as Power(1.0), or a callable r(q, z), got {self.radius!r}"
            )
        if not stated:
            object.__setattr__(self, "radius", CustomRadius(self.radius))

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
