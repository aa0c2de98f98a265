"""The straight-through estimator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diveq_core.estimators.base import Estimator

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array


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
    def reads(self) -> frozenset[str]:
        # What is derived from it may read what it likes.
        return frozenset() if type(self) is STE else super().reads

    @property
    def trains_codebook(self) -> bool:
        return type(self) is not STE

    def vjp(self, lib: Backend, z: Array, q: Array, noise: Array | None, g: Array) -> tuple[Array, Array | None]:
        return g, None

    def jvp(self, lib: Backend, z: Array, q: Array, noise: Array | None, dz: Array, dq: Array) -> Array:
        return dz
