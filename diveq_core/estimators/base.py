r"""The estimators: forward, pullback (vjp) and pushforward (jvp) of each, side by side.

Everything here acts row by row on ``z`` (N, D) and the chosen codewords ``q`` (N, D), with

.. math:: d = q - z, \qquad \rho = \|d\|, \qquad u = d / \rho \quad (0 \text{ where } \rho = 0),

``noise`` (N, D) standard normal, ``g`` the cotangent of the output and ``dz``, ``dq`` tangents. The pullbacks
may be differentiated again: what stands under ``sg`` is held constant and everything else is free, as
automatic differentiation of the stop-gradient expression has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diveq_core.arrays.rows import Array, describe

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend


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
