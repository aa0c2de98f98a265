r"""Proofs to run elsewhere: of a port, of an estimator, of a radius.

Each check draws its cases by NumPy in float64, compares, and raises an `AssertionError` that names the case, the
quantity and the size of the difference.

.. code-block:: python

    from diveq_core import testing
    testing.check_port(my_vjp, dq.DiVeQ(1.0))
    testing.check_estimator(MyEstimator())
    testing.check_radius(MyRadius())
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diveq_core.arrays.registry import backend_of
from diveq_core.arrays.rows import describe
from diveq_core.estimators.base import Estimator
from diveq_core.estimators.custom_radius import CustomRadius
from diveq_core.tokens import lookup
from diveq_core.verbs import jvp, vjp

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.estimators.radii import Radius

# N, K, D, common offset, scale. More vectors than codewords repeat indices; vector 0 sits on a codeword.
_CASES = {
    "repeated indices": (64, 5, 3, 0.0, 1.0),
    "K = 1": (7, 1, 3, 0.0, 1.0),
    "D = 1": (9, 4, 1, 0.0, 1.0),
    "one vector": (1, 6, 2, 0.0, 1.0),
    "offset of 10": (32, 8, 4, 10.0, 1.0),
    "scale of 1e-5": (32, 8, 4, 0.0, 1e-5),
}


class _Case(NamedTuple):
    name: str
    z: np.ndarray
    codebook: np.ndarray
    noise: np.ndarray
    g: np.ndarray


def check_port(
    port: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[Any, Any, Any, Any]],
    estimator: Estimator,
    /,
    *,
    dtype: Any = np.float64,
    tolerance: float | None = None,
    seed: int = 0,
) -> None:
    r"""Check an implementation of an estimator in any library against this one's pullback.

    .. math:: (z_q, i, g_z, g_E) = \text{port}(z, E, \varepsilon, g), \qquad
              |x - x'| \le \tau \max |x'| \text{ for each of them}

    Parameters
    ----------
    port : callable
        ``port(z, codebook, noise, g) -> (z_q, indices, g_z, g_codebook)`` over NumPy arrays (N, D), (K, D), (N, D),
        (N, D); it converts to its own library and back. ``noise`` is standard normal, for the estimator to scale.
    estimator : Estimator
        What the port is to be, of those whose noise has the shape of ``z``.
    dtype : NumPy dtype, default float64
        What the port computes in.
    tolerance : float, optional
        tau; 1e-9 for float64 and 1e-4 for float32 by default.
    seed : int, default 0

    Raises
    ------
    AssertionError
        If an index, output or gradient differs, in shape or value.
    TypeError
        If the estimator is not one, or is space-filling.

    Notes
    -----
    Among the cases: repeated indices, a vector that sits on its codeword, K = 1, D = 1, an offset, a tiny scale. A port
    that passes for ``DiVeQ(1.0)`` and for ``Radial(Cosine())``, which share no symmetry, has no sign or factor wrong.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> from diveq_core import testing
    >>> def port(z, codebook, noise, g):  # DiVeQ-detach that forgets that indices repeat
    ...     i = np.argmin(((z[:, None] - codebook) ** 2).sum(-1), 1)
    ...     d = codebook[i] - z
    ...     u = d / np.maximum(np.linalg.norm(d, axis=1, keepdims=True), 1e-300)
    ...     g_q = (g * u).sum(1, keepdims=True) * u
    ...     g_codebook = np.zeros_like(codebook)
    ...     g_codebook[i] = g_q
    ...     return codebook[i], i, g - g_q, g_codebook
    >>> testing.check_port(port, dq.DiVeQDetach())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    AssertionError: check_port: DiVeQDetach(), repeated indices: g_codebook differs by ...
    """
    _check_estimator("check_port", estimator)
    dtype = np.dtype(dtype)
    allowed = tolerance if tolerance is not None else 1e-9 if dtype == np.float64 else 1e-4
    for case in _cases(seed, dtype):
        got = port(case.z, case.codebook, case.noise, case.g)
        (z_q, indices), pullback = vjp(case.z, case.codebook, estimator, noise=case.noise)
        expected = (z_q, indices, *pullback(case.g))
        for name, x, x_expected in zip(("z_q", "indices", "g_z", "g_codebook"), got, expected, strict=True):
            where = f"check_port: {estimator}, {case.name}: {name}"
            _close(where, np.asarray(x), x_expected, 0.0 if name == "indices" else allowed)


def check_estimator(estimator: Estimator, /, *, seed: int = 0) -> None:
    r"""Check that an estimator of one's own is consistent with itself.

    .. math:: \langle g, J(dz, dE)\rangle = \langle g_z, dz\rangle + \langle g_E, dE\rangle, \qquad
              (g_z, g_E) = J^\top g

    Besides: a hard estimator returns the codeword bit for bit, and nothing is NaN where a vector sits on its codeword.

    Parameters
    ----------
    estimator : Estimator
    seed : int, default 0

    Raises
    ------
    AssertionError
        If one of these does not hold.
    TypeError
        If it is not an `Estimator`, or is space-filling.

    Examples
    --------
    >>> import diveq_core as dq
    >>> from diveq_core import testing
    >>> testing.check_estimator(dq.Radial(dq.Cosine()))
    """
    _check_estimator("check_estimator", estimator)
    rng = np.random.default_rng(seed + 1)
    for case in _cases(seed, np.dtype(np.float64)):
        where = f"check_estimator: {estimator}, {case.name}"
        out, pullback = vjp(case.z, case.codebook, estimator, noise=case.noise)
        dz, dcodebook = rng.standard_normal(case.z.shape), rng.standard_normal(case.codebook.shape)
        _, tangent = jvp(case.z, case.codebook, dz, dcodebook, estimator, noise=case.noise)
        g_z, g_codebook = pullback(case.g)
        for name, x in (("z_q", out.z_q), ("g_z", g_z), ("g_codebook", g_codebook), ("tangent", tangent)):
            if not np.isfinite(x).all():
                raise AssertionError(f"{where}: {name} must be finite, got NaN or infinity")
        if estimator.hard and not np.array_equal(out.z_q, lookup(out.indices, case.codebook)):
            raise AssertionError(f"{where}: z_q must be the codeword bit for bit, since estimator.hard is true")
        terms = np.concatenate([(g_z * dz).ravel(), (g_codebook * dcodebook).ravel()])
        size = np.abs(terms).sum() + np.abs(case.g * tangent).sum()
        difference = abs(terms.sum() - (case.g * tangent).sum())
        if difference > 1e-9 * size:
            raise AssertionError(f"{where}: vjp and jvp are not adjoint, off by {difference:.3g} of {size:.3g}")


def check_radius(radius: Radius | Callable[[Any, Any], Any], /, *, seed: int = 0, tolerance: float = 1e-5) -> None:
    r"""Check that a radius's two gradients are those of its ln r, and are zero where r is zero.

    .. math:: \frac{\partial \ln r}{\partial q} \cdot v \approx \frac{\ln r(q + h v, z) - \ln r(q - h v, z)}{2 h}

    Parameters
    ----------
    radius : Radius
        With ``log`` and ``log_gradients``; for a `CustomRadius`, one with ``log_r_gradients``.
    seed : int, default 0
    tolerance : float, default 1e-5
        Of the larger of 1 and the difference quotient.

    Raises
    ------
    AssertionError
        If a gradient differs from the central difference, or is not zero where q = z and r = 0.
    TypeError
        If it is no radius.

    Examples
    --------
    >>> import diveq_core as dq
    >>> from diveq_core import testing
    >>> testing.check_radius(dq.PseudoHuber(0.5))
    >>> wrong = dq.CustomRadius(lambda q, z: ((q - z) ** 2).sum(-1), lambda q, z: (2 * (q - z), -2 * (q - z)))
    >>> testing.check_radius(wrong)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    AssertionError: check_radius: d(ln r)/dq of CustomRadius differs by ...
    """
    if isinstance(radius, type) or not (hasattr(radius, "log") and hasattr(radius, "log_gradients")):
        raise TypeError(f"check_radius: radius must have log and log_gradients, got {describe(radius)}")
    rng, h, n, width = np.random.default_rng(seed), 1e-6, 50, 3
    matrix = getattr(radius, "matrix", None)
    width = width if matrix is None else matrix.shape[0]
    q, z, v = rng.standard_normal((3, n, width))
    lib = backend_of("check_radius", q=q)
    log, log_gradients = lib.quiet(radius.log), lib.quiet(radius.log_gradients)
    gradients = log_gradients(lib, q, z)
    for name, gradient, moved in zip("qz", gradients, ((v, 0 * v), (0 * v, v)), strict=True):
        ahead, behind = (log(lib, q + s * h * moved[0], z + s * h * moved[1]) for s in (1, -1))
        quotient = (ahead - behind)[:, 0] / (2 * h)
        worst = np.max(np.abs((gradient * v).sum(axis=1) - quotient) / np.maximum(1, np.abs(quotient)))
        if not worst <= tolerance:
            raise AssertionError(
                f"check_radius: d(ln r)/d{name} of {type(radius).__name__} differs by {worst:.3g} of the central "
                f"difference, expected at most {tolerance:.3g}"
            )
    at_zero = radius.r(z, z) if isinstance(radius, CustomRadius) else None
    for name, gradient in zip("qz", log_gradients(lib, z, z), strict=True):
        zero = gradient == 0 if at_zero is None or not np.any(at_zero) else np.isfinite(gradient)
        if not np.all(zero):
            raise AssertionError(f"check_radius: d(ln r)/d{name} of {type(radius).__name__} must be 0 where q = z")


def _cases(seed: int, dtype: np.dtype) -> list[_Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, (n, k, width, offset, scale) in _CASES.items():
        z, noise, g = rng.standard_normal((3, n, width))
        codebook = rng.standard_normal((k, width))
        z[0] = codebook[k // 2]
        arrays = (z * scale + offset, codebook * scale + offset, noise, g)
        cases.append(_Case(name, *(x.astype(dtype) for x in arrays)))
    return cases


def _close(what: str, x: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    if x.shape != expected.shape:
        raise AssertionError(f"{what} must have shape {expected.shape}, got {x.shape}")
    largest = float(np.max(np.abs(expected), initial=0.0))
    difference = float(np.max(np.abs(x - expected), initial=0.0))
    if not difference <= tolerance * largest:
        raise AssertionError(f"{what} differs by {difference:.3g}, allowed {tolerance * largest:.3g}")


def _check_estimator(function: str, estimator: object) -> None:
    if not isinstance(estimator, Estimator) or estimator.corners > 1 or estimator.codebook_axes == 0:
        raise TypeError(f"{function}: expected an Estimator whose noise has the shape of z, got {describe(estimator)}")
