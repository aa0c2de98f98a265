r"""The distance family :math:`z_q = z + \rho\,w`: NSVQ, DiVeQ and DiVeQ without noise differ in the direction w."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.rows import Array, Direction, check_option, noised
from diveq_core.estimators.base import Estimator

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend


class _Distance(Estimator):
    r"""The distance family :math:`z_q = z + \rho\,w` with a fixed unit direction w."""

    @abstractmethod
    def w(self, lib: Backend, d: Array, u: Direction, noise: Array | None) -> Direction:
        """The direction w, through which no derivative flows."""

    def forward(self, lib: Backend, z: Array, q: Array, noise: Array | None) -> Array:
        d = q - z
        rho, u = lib.direction(d)
        return self.w(lib, d, u, noise).added_to(lib, z, rho)

    def vjp(self, lib: Backend, z: Array, q: Array, noise: Array | None, g: Array) -> tuple[Array, Array | None]:
        d = q - z
        _, u = lib.direction(d)
        return self._pulled(lib, u, self.w(lib, d, u, noise).stopped(lib), g)

    def linearized(self, lib: Backend, z: Array, q: Array, noise: Array | None) -> tuple[Array, Callable[..., Any]]:
        if type(self).forward is not _Distance.forward or type(self).vjp is not _Distance.vjp:
            # What is derived from it may have rules of its own.
            return super().linearized(lib, z, q, noise)
        d = q - z
        rho, u = lib.direction(d)
        w = self.w(lib, d, u, noise)
        return q if self.hard else w.added_to(lib, z, rho), lambda g: self._pulled(lib, u, w, g)

    def _pulled(self, lib: Backend, u: Direction, w: Direction, g: Array) -> tuple[Array, Array]:
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
        return u if noise is None else lib.direction(noised(lib, d, noise, self.sigma))[1]


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
