r"""The radii r(q, z) of the general estimator, each by ln r and its two hand-derived gradients.

A radius acts on the encoder and the codebook through :math:`d(\ln r)` alone (see `Radial`), so that is
what a radius states: ``log`` and ``log_gradients``. Every formula divides by quantities of order one only,
and every gradient is zero, never NaN, where the radius itself is zero. All are choices of the r(q, z) of Su
Jianlin, 2025-10-08, equation 8; the gradients of ln r are derived here.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from diveq_core.arrays.rows import (
    Array,
    check_option,
    derivative_scale,
    one_where,
    row_scale,
    safe_inverse,
    safe_log,
    zero_rows,
)

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend

Gradients = tuple[Array, Array]


class Radius(Protocol):
    """What `Radial` asks of a radius; ``q`` and ``z`` are (N, D)."""

    def log(self, lib: Backend, q: Array, z: Array) -> Array:
        """Value of ln r, (N, 1); finite also where r = 0."""

    def log_gradients(self, lib: Backend, q: Array, z: Array) -> Gradients:
        """Gradients d(ln r)/dq and d(ln r)/dz, (N, D) each; zero where r = 0."""


@dataclass(frozen=True)
class Power:
    r"""Power of the distance.

    .. math:: r = \rho^\alpha, \qquad \frac{\partial \ln r}{\partial q} = \alpha \frac{d}{\rho^2}

    Parameters
    ----------
    alpha : float
        Finite. 0 is the straight-through estimator, 1 is DiVeQ-detach, 2 reflects.

    Notes
    -----
    Where d = 0 both gradients are zero.

    References
    ----------
    Su Jianlin, "DiVeQ: a very concise VQ training scheme", https://kexue.fm/archives/11328, 2025-10-08, equation 11
    and the text before it.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_option(self, "alpha")

    def log(self, lib: Backend, q: Array, z: Array) -> Array:
        rho, _ = lib.polar(q - z)
        return self.alpha * safe_log(lib, rho)

    def log_gradients(self, lib: Backend, q: Array, z: Array) -> Gradients:
        d = q - z
        k = derivative_scale(lib, d)
        length, u = lib.polar(d * k)
        to_q = self.alpha * u * safe_inverse(lib, length, k)
        return to_q, -to_q


@dataclass(frozen=True)
class PseudoHuber:
    r"""Distance smoothed near zero.

    .. math:: r = \sqrt{\rho^2 + \delta^2}, \qquad
              \frac{\partial \ln r}{\partial q} = \frac{d}{\rho^2 + \delta^2}

    Parameters
    ----------
    delta : float
        Positive, in the units of ``z``. Far below ``rho`` it is DiVeQ-detach, far above straight-through.

    References
    ----------
    Su Jianlin, 2025-10-08, equation 8, for a general r(q, z); this r and its gradient are derived here.
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        check_option(self, "delta", above=0.0)

    def _scaled(self, lib: Backend, q: Array, z: Array) -> tuple[Array, Array, Array]:
        """``d / s``, ``(rho^2 + delta^2) / s^2`` and ``s``, the larger of delta and the entries of d."""
        xp = lib.xp
        d = q - z
        s = xp.max(xp.abs(lib.stop_gradient(d)), axis=-1, keepdims=True)
        limits = xp.finfo(d.dtype)
        delta = min(max(self.delta, float(limits.smallest_normal)), float(limits.max))
        s = xp.where(s < delta, xp.full_like(s, delta), s)
        d_s = d / s
        return d_s, lib.dot(d_s, d_s) + (delta / s) ** 2, s

    def log(self, lib: Backend, q: Array, z: Array) -> Array:
        _, squared, s = self._scaled(lib, q, z)
        return 0.5 * lib.xp.log(squared) + lib.xp.log(s)

    def log_gradients(self, lib: Backend, q: Array, z: Array) -> Gradients:
        d_s, squared, s = self._scaled(lib, q, z)
        to_q = d_s / squared / s
        return to_q, -to_q


@dataclass(frozen=True)
class PNorm:
    r"""The p-norm of the quantization error.

    .. math:: r = \Big(\sum_j |d_j|^p\Big)^{1/p}, \qquad
              \frac{\partial \ln r}{\partial q} = \frac{\operatorname{sign}(d)\,|d|^{p-1}}{\sum_j |d_j|^p}

    Parameters
    ----------
    p : float
        At least 1 and finite; 2 is DiVeQ-detach.

    Notes
    -----
    Where d = 0 both gradients are zero. A second derivative does not exist where a coordinate of d is zero and
    p < 2; it is taken as zero.

    References
    ----------
    Su Jianlin, 2025-10-08, equation 8, for a general r(q, z); this r and its gradient are derived here.
    """

    p: float = 2.0

    def __post_init__(self) -> None:
        check_option(self, "p", at_least=1.0)

    def _scaled(self, lib: Backend, q: Array, z: Array) -> tuple[Array, Array, Array]:
        """``v = d / s``, ``sign(v) |v|^(p-1)`` and ``s``, the largest entry of each row."""
        xp = lib.xp
        d = q - z
        s = xp.max(xp.abs(lib.stop_gradient(d)), axis=-1, keepdims=True)
        v = d / one_where(lib, s == 0, s)
        if self.p == 2:
            return v, v, s
        # No negative power, which would overflow for an entry that is small beside the largest.
        power = one_where(lib, v == 0, xp.abs(v)) ** (self.p - 1)
        return v, zero_rows(lib, v == 0, xp.where(v < 0, -power, power)), s

    def log(self, lib: Backend, q: Array, z: Array) -> Array:
        v, power, s = self._scaled(lib, q, z)
        return safe_log(lib, lib.dot(power, v)) / self.p + safe_log(lib, s)

    def log_gradients(self, lib: Backend, q: Array, z: Array) -> Gradients:
        v, power, s = self._scaled(lib, q, z)
        total = lib.dot(power, v)
        to_q = zero_rows(lib, s == 0, power / one_where(lib, s == 0, total) * safe_inverse(lib, s))
        return to_q, -to_q


@dataclass(frozen=True)
class Mahalanobis:
    r"""Length of the quantization error in a metric.

    .. math:: r = \sqrt{d^\top M d}, \qquad \frac{\partial \ln r}{\partial q} = \frac{M d}{d^\top M d}

    Parameters
    ----------
    matrix : array (D, D)
        Positive definite, an array of NumPy or of the library of ``z``; only its symmetric part acts. It
        is a constant, of which a copy is kept: no gradient flows to it.

    Raises
    ------
    TypeError
        If the matrix is no array, or its dtype is not real floating point.
    ValueError
        If the matrix is not square, not finite or not positive definite.

    Notes
    -----
    Where d = 0 both gradients are zero. Two are equal if their matrices have equal entries, so that copies share what
    was compiled; one whose matrix is being traced equals itself alone.

    References
    ----------
    Su Jianlin, 2025-10-08, equation 8, for a general r(q, z); this r and its gradient are derived here.
    """

    matrix: Array = field(compare=False)
    width: int = field(init=False, repr=False)
    entries: Any = field(init=False, repr=False)
    """Those of the matrix in float64, as bytes."""

    def __post_init__(self) -> None:
        from diveq_core.arrays.registry import backend_of

        lib = backend_of("Mahalanobis", matrix=self.matrix)
        shape = tuple(self.matrix.shape)
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1:
            raise ValueError(f"Mahalanobis: matrix must have shape (D, D), got {shape}")
        if not lib.is_floating(self.matrix):
            raise TypeError(f"Mahalanobis: matrix must have a real floating dtype, got {self.matrix.dtype}")
        object.__setattr__(self, "width", shape[0])
        object.__setattr__(self, "entries", object())
        if lib.is_concrete(self.matrix):
            # Apart from the caller's array, which may be overwritten where the entries are not.
            object.__setattr__(self, "matrix", lib.snapshot(lib.stop_gradient(self.matrix)))
            if not lib.all_finite(self.matrix):
                raise ValueError("Mahalanobis: matrix must be finite, got NaN or infinity in it")
            smallest = float(lib.xp.min(lib.xp.linalg.eigvalsh(self._symmetric(lib, _usual(lib, self.matrix)))))
            if smallest <= 0:
                raise ValueError(f"Mahalanobis: matrix must be positive definite, got smallest eigenvalue {smallest:g}")
            # Adding zero makes -0.0 and 0.0 the one number they are.
            object.__setattr__(self, "entries", array("d", [x + 0.0 for x in _numbers(lib, self.matrix)]).tobytes())

    def check_width(self, width: int) -> None:
        """Refuse vectors of another width than the matrix."""
        if width != self.width:
            raise ValueError(
                f"Mahalanobis: matrix must have shape (D, D) with D = {width} as in z, got {(self.width, self.width)}"
            )

    def _symmetric(self, lib: Backend, x: Array) -> Array:
        m = lib.like(self.matrix, x, self.entries)
        return (m + lib.xp.permute_dims(m, (1, 0))) * 0.5

    def _scaled(self, lib: Backend, q: Array, z: Array) -> tuple[Array, Array, Array]:
        """``M y``, ``<y, M y>`` and the power of two ``k`` for which ``y = k d``."""
        d = q - z
        self.check_width(d.shape[-1])
        k = row_scale(lib, d)
        y = d * k
        m_y = lib.matmul(y, self._symmetric(lib, d))
        return m_y, lib.dot(y, m_y), k

    def log(self, lib: Backend, q: Array, z: Array) -> Array:
        _, squared, k = self._scaled(lib, q, z)
        return 0.5 * safe_log(lib, squared) - lib.xp.log(k)

    def log_gradients(self, lib: Backend, q: Array, z: Array) -> Gradients:
        m_y, squared, k = self._scaled(lib, q, z)
        zero = squared == 0
        to_q = zero_rows(lib, zero, m_y / one_where(lib, zero, squared) * k)
        return to_q, -to_q


def _usual(lib: Backend, x: Array) -> Array:
    """In float32 or float64: no library factors matrices of 16 bits, nor NumPy those of 128."""
    xp = lib.xp
    return lib.astype(x, xp.float32 if lib.compute_dtype(x.dtype) == xp.float32 else xp.float64)


def _numbers(lib: Backend, matrix: Array) -> list[float]:
    entries = lib.xp.reshape(matrix, (matrix.shape[0] ** 2,))
    return entries.tolist() if hasattr(entries, "tolist") else [float(entries[i]) for i in range(entries.shape[0])]


@dataclass(frozen=True)
class Cosine:
    r"""Cosine distance; it depends on q and z, not on their difference alone.

    .. math:: r = 1 - \langle\hat z, \hat q\rangle, \qquad
              \frac{\partial \ln r}{\partial q} = -\frac{\hat z - \langle\hat z,\hat q\rangle\hat q}{\|q\|\,r}

    Notes
    -----
    Computed as :math:`r = \tfrac12\|h\|^2` with :math:`h = \hat q - \hat z`, which keeps its digits where q
    and z almost agree. Both gradients are zero where q and z are parallel and where either is zero.

    References
    ----------
    Su Jianlin, 2025-10-08, equation 8, for a general r(q, z); this r and its gradients are derived here.
    """

    def _apart(self, lib: Backend, q_hat: Array, z_hat: Array) -> tuple[Array, Array]:
        """Length and direction of h; of parallel vectors rounding leaves a few ulps, which are no direction."""
        xp = lib.xp
        h = q_hat - z_hat
        largest = xp.max(xp.abs(lib.stop_gradient(h)), axis=-1, keepdims=True)
        return lib.polar(zero_rows(lib, largest < 8 * float(xp.finfo(h.dtype).eps), h))

    def log(self, lib: Backend, q: Array, z: Array) -> Array:
        _, q_hat = lib.polar(q)
        _, z_hat = lib.polar(z)
        length, _ = self._apart(lib, q_hat, z_hat)
        return safe_log(lib, 0.5 * length * length)

    def log_gradients(self, lib: Backend, q: Array, z: Array) -> Gradients:
        q_scale, z_scale = derivative_scale(lib, q), derivative_scale(lib, z)
        q_length, q_hat = lib.polar(q * q_scale)
        z_length, z_hat = lib.polar(z * z_scale)
        length, direction = self._apart(lib, q_hat, z_hat)
        h_r = 2 * direction * safe_inverse(lib, length)
        undefined = lib.xp.logical_or(length == 0, lib.xp.logical_or(q_length == 0, z_length == 0))
        to_q = (h_r - q_hat) * safe_inverse(lib, q_length, q_scale)
        to_z = -(h_r + z_hat) * safe_inverse(lib, z_length, z_scale)
        return zero_rows(lib, undefined, to_q), zero_rows(lib, undefined, to_z)
