r"""A radius r(q, z) given as a function, its values and gradients checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diveq_core.arrays.rows import Array, describe, safe_log, zero_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.backend import Backend
    from diveq_core.estimators.radii import Gradients


@dataclass(frozen=True)
class CustomRadius:
    r"""A radius of one's own.

    .. math:: z_q = z + r \operatorname{sg}[d / r], \qquad r = r(q, z) \ge 0

    The gradients of ln r, which `Radial` multiplies by :math:`\langle g, d\rangle`, are those given, or those that
    automatic differentiation derives from ``r``.

    Parameters
    ----------
    r : callable
        ``r(q, z)``, (N, D), (N, D) -> (N,) or (N, 1), non-negative, in functions of the arrays' own library.
    log_r_gradients : callable, optional
        ``log_r_gradients(q, z)`` -> :math:`(\partial \ln r/\partial q, \partial \ln r/\partial z)`, (N, D) each.
        Needed in libraries without automatic differentiation; elsewhere they derive it from ``r``.

    Notes
    -----
    Where r is zero both gradients are taken as zero. A second derivative there is whatever the
    library makes of the given functions.

    References
    ----------
    Su Jianlin, "DiVeQ: a very concise VQ training scheme", https://kexue.fm/archives/11328, 2025-10-08, equations 8
    and 9.
    """

    r: Callable[[Array, Array], Array]
    log_r_gradients: Callable[[Array, Array], Gradients] | None = None

    def __post_init__(self) -> None:
        given = self.r if self.log_r_gradients is None else self.log_r_gradients
        for name, value in (("r", self.r), ("log_r_gradients", given)):
            if isinstance(value, type) or not callable(value):
                raise TypeError(f"CustomRadius: {name} must be callable with (q, z), got {describe(value)}")

    def _value(self, q: Array, z: Array) -> Array:
        value = self.r(q, z)
        if not hasattr(value, "shape"):
            raise TypeError(f"CustomRadius: r(q, z) must give an array (N,) or (N, 1), got {describe(value)}")
        if tuple(value.shape) == (q.shape[0],):
            value = value[:, None]
        if tuple(value.shape) != (q.shape[0], 1):
            raise ValueError(
                f"CustomRadius: r(q, z) must have shape (N,) or (N, 1) with N = {q.shape[0]}, got {tuple(value.shape)}"
            )
        return value

    def log(self, lib: Backend, q: Array, z: Array) -> Array:
        # The logarithm first: a function may compute in a wider dtype, of a wider range.
        return lib.astype(safe_log(lib, self._value(q, z)), q.dtype)

    def log_gradients(self, lib: Backend, q: Array, z: Array) -> Gradients:
        if self.log_r_gradients is None:
            to_q, to_z = lib.log_radius_gradients(self._value, q, z)
        else:
            pair = self.log_r_gradients(q, z)
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(hasattr(x, "shape") for x in pair):
                raise TypeError(
                    f"CustomRadius: log_r_gradients(q, z) must give two arrays, (d ln r/dq, d ln r/dz), "
                    f"got {describe(pair)}"
                )
            to_q, to_z = pair
            for name, gradient in (("q", to_q), ("z", to_z)):
                if tuple(gradient.shape) != tuple(q.shape):
                    raise ValueError(
                        f"CustomRadius: log_r_gradients(q, z) must give the gradient to {name} in the shape of "
                        f"{name}, {tuple(q.shape)}, got {tuple(gradient.shape)}"
                    )
        zero = self._value(q, z) == 0
        to_q, to_z = (lib.astype(gradient, q.dtype) for gradient in (to_q, to_z))
        return zero_rows(lib, zero, to_q), zero_rows(lib, zero, to_z)
