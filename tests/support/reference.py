"""The estimators once more, as plain stop-gradient expressions, and what automatic differentiation makes of them.

Nothing here comes from diveq_core but the estimator object that each case names: the expressions are those
of the papers, written with the operators that NumPy, torch and JAX share, so that their derivatives are the
library's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from array_api_compat import array_namespace

import diveq_core as dq

if TYPE_CHECKING:
    from collections.abc import Callable


def matrix(width: int) -> np.ndarray:
    """A positive definite matrix that is not symmetric: only the symmetric part may act."""
    m = np.eye(width) * np.linspace(1.0, 2.0, width)
    if width > 1:
        m[0, 1], m[1, 0] = 0.5, -0.25
    return m


def total(xp: Any, x: Any) -> Any:
    return xp.sum(x, axis=-1, keepdims=True)


def norm(xp: Any, x: Any) -> Any:
    return xp.sqrt(total(xp, x * x))


def unit(xp: Any, x: Any) -> Any:
    length = norm(xp, x)
    return x / xp.where(length == 0, xp.ones_like(length), length)


def pnorm(p: float) -> Callable[..., Any]:
    def length(xp: Any, q: Any, z: Any) -> Any:
        d = q - z
        if p == 2:
            return norm(xp, d)
        zero = d == 0
        size = xp.abs(xp.where(zero, xp.ones_like(d), d))
        return total(xp, xp.where(zero, xp.zeros_like(d), size**p)) ** (1 / p)

    return length


def mahalanobis(xp: Any, q: Any, z: Any) -> Any:
    d = q - z
    m = xp.asarray(matrix(d.shape[-1]).tolist(), dtype=d.dtype)
    return xp.sqrt(total(xp, (d @ m) * d))


def cosine(xp: Any, q: Any, z: Any) -> Any:
    return 1 - total(xp, z * q) / (norm(xp, z) * norm(xp, q))


def uneven(xp: Any, q: Any, z: Any) -> Any:
    """A radius that is not one of q - z alone."""
    return 1 + total(xp, (q - z) ** 2) + 0.5 * total(xp, q * q)


def same_place(xp: Any, q: Any, z: Any) -> Any:
    return total(xp, xp.abs(q - z)) == 0


def same_ray(xp: Any, q: Any, z: Any) -> Any:
    a, b = norm(xp, z), norm(xp, q)
    undefined = (a == 0) | (b == 0)
    product = xp.where(undefined, xp.ones_like(a), a * b)
    # Exactly parallel vectors may miss r = 0 by rounding; nothing the strategies draw comes as near.
    return undefined | (1 - total(xp, z * q) / product < 1e-12)


@dataclass(frozen=True)
class Case:
    """An estimator and its expression ``z + length * sg[direction]``."""

    name: str
    make: Callable[[int], dq.Estimator]
    """The estimator for vectors of a width."""

    length: Callable[..., Any]
    """``length(xp, q, z)``, (N, 1): what carries derivatives besides z."""

    sigma: float | None = None
    """Noise added to the direction; infinite if the direction is nothing else."""

    lost: Callable[..., Any] = same_place
    """Rows whose length is zero, where the estimator is straight-through by convention."""

    of_difference: bool = True
    """Whether the length depends on q - z alone."""

    rotates: bool = True
    """Whether the length is unchanged when q and z are rotated."""

    differentiating_only: bool = False
    """Whether only libraries with automatic differentiation can serve it."""

    @property
    def hard(self) -> bool:
        return not self.sigma

    def direction(self, xp: Any, q: Any, z: Any, noise: Any, r: Any) -> Any:
        d = q - z
        if self.sigma is None:
            return d / r
        return unit(xp, noise if math.isinf(self.sigma) else d + self.sigma * noise)

    def __repr__(self) -> str:
        return self.name


def _ones(xp: Any, q: Any, z: Any) -> Any:
    return xp.ones_like(z[..., :1])


def _distance(xp: Any, q: Any, z: Any) -> Any:
    return norm(xp, q - z)


def _sum(x: Any) -> Any:
    return array_namespace(x).sum(x, axis=-1, keepdims=True)


def uneven_value(q: Any, z: Any) -> Any:
    return 1 + _sum((q - z) ** 2) + 0.5 * _sum(q * q)


def uneven_gradients(q: Any, z: Any) -> tuple[Any, Any]:
    r = uneven_value(q, z)
    return (2 * (q - z) + q) / r, -2 * (q - z) / r


def _once(estimator: dq.Estimator) -> Callable[[int], dq.Estimator]:
    # One object for all calls: JAX compiles once for each estimator.
    return lambda width: estimator


_matrices: dict[int, dq.Estimator] = {}


def _mahalanobis(width: int) -> dq.Estimator:
    if width not in _matrices:
        _matrices[width] = dq.Radial(dq.Mahalanobis(matrix(width)))
    return _matrices[width]


def _power(alpha: float) -> Case:
    return Case(f"Power({alpha:g})", _once(dq.Radial(dq.Power(alpha))), lambda xp, q, z: _distance(xp, q, z) ** alpha)


def _pnorm(p: float) -> Case:
    return Case(f"PNorm({p:g})", _once(dq.Radial(dq.PNorm(p))), pnorm(p), rotates=p == 2)


DISTANCE_CASES = (
    Case("STE", _once(dq.STE()), _ones),
    Case("DiVeQDetach", _once(dq.DiVeQDetach()), _distance),
    Case("DiVeQ(0)", _once(dq.DiVeQ(0.0)), _distance, sigma=0.0),
    Case("DiVeQ", _once(dq.DiVeQ()), _distance, sigma=10**-1.5),
    Case("DiVeQ(2)", _once(dq.DiVeQ(2.0)), _distance, sigma=2.0),
    Case("NSVQ", _once(dq.NSVQ()), _distance, sigma=math.inf),
)
RADIAL_CASES = (
    *map(_power, (-1.0, 0.0, 0.5, 1.0, 2.0)),
    *map(_pnorm, (1.0, 1.5, 2.0, 3.0)),
    Case(
        "PseudoHuber",
        _once(dq.Radial(dq.PseudoHuber(0.5))),
        lambda xp, q, z: xp.sqrt(total(xp, (q - z) ** 2) + 0.25),
    ),
    Case("Mahalanobis", _mahalanobis, mahalanobis, rotates=False),
    Case("Cosine", _once(dq.Radial(dq.Cosine())), cosine, lost=same_ray, of_difference=False),
    Case(
        "CustomRadius(r, gradients)",
        _once(dq.Radial(dq.CustomRadius(uneven_value, uneven_gradients))),
        uneven,
        of_difference=False,
    ),
    Case(
        "CustomRadius(r)",
        _once(dq.Radial(dq.CustomRadius(uneven_value))),
        uneven,
        of_difference=False,
        differentiating_only=True,
    ),
    Case("callable", _once(dq.Radial(uneven_value)), uneven, of_difference=False, differentiating_only=True),
)
CASES = (*DISTANCE_CASES, *RADIAL_CASES)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def expression(case: Case, xp: Any, sg: Callable[[Any], Any], z: Any, q: Any, noise: Any) -> Any:
    """``z + r sg[w]`` on rows, with the double ``where`` that keeps lost rows out of every derivative."""
    lost = case.lost(xp, q, z)
    one = xp.ones_like(z)
    z_safe, q_safe = xp.where(lost, one, z), xp.where(lost, -one, q)
    r = case.length(xp, q_safe, z_safe)
    w = sg(case.direction(xp, q_safe, z_safe, noise, r))
    return xp.where(lost, z + sg(q - z), z + r * w)


def frozen(case: Case, z: np.ndarray, q: np.ndarray, noise: np.ndarray) -> Callable[..., np.ndarray]:
    """The expression with its direction frozen here: a function that finite differences may be taken of."""
    w = case.direction(np, q, z, noise, case.length(np, q, z))
    return lambda z, q: z + case.length(np, q, z) * w


@dataclass(frozen=True)
class Expected:
    """Float64 results of torch's automatic differentiation, and the size of the terms that they sum."""

    z_q: np.ndarray
    g_z: np.ndarray
    g_codebook: np.ndarray
    tangent: np.ndarray
    second: tuple[np.ndarray, np.ndarray, np.ndarray]
    """Gradients of ``<h, pullback(z, codebook, g)>`` to z, codebook and g."""

    sizes: dict[str, np.ndarray]
    """Sum of magnitudes behind each entry of z_q, g_z, g_codebook, tangent; for ``second``, of its rows."""


def _scatter(rows: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    out = np.zeros((count, rows.shape[-1]))
    np.add.at(out, indices.reshape(-1), rows.reshape(-1, rows.shape[-1]))
    return out


def expected(case: Case, p: Any) -> Expected:
    """What a problem's answers are, by torch in float64 on the plain expression."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)

    def leaf(x: np.ndarray) -> Any:
        return torch.tensor(x.astype(np.float64)).requires_grad_()

    z, codebook, g = leaf(p.z), leaf(p.codebook), leaf(p.g)
    noise, dz, dcodebook = leaf(p.noise).detach(), leaf(p.dz).detach(), leaf(p.dcodebook).detach()
    q = codebook[torch.tensor(p.indices)]
    z_q = expression(case, torch, torch.detach, z, q, noise)
    g_z, g_codebook = torch.autograd.grad(z_q, (z, codebook), g, create_graph=True, materialize_grads=True)
    pushed = (g_z * dz).sum() + (g_codebook * dcodebook).sum()
    second = torch.autograd.grad(pushed, (z, codebook, g), materialize_grads=True)
    z, q, g_z = (x.detach().numpy() for x in (z, q, g_z))
    sizes = _sizes(case, p, z, q)
    return Expected(
        z_q.detach().numpy(),
        g_z,
        g_codebook.detach().numpy(),
        second[2].numpy(),
        tuple(x.numpy() for x in second),
        sizes,
    )


def _sizes(case: Case, p: Any, z: np.ndarray, q: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    noise, g, dz = (np.abs(x.astype(np.float64)) for x in (p.noise, p.g, p.dz))
    dq_ = np.abs(p.dcodebook.astype(np.float64))[p.indices]
    lost = case.lost(np, q, z)
    z_safe, q_safe = np.where(lost, np.ones_like(z), z), np.where(lost, -np.ones_like(z), q)
    leaves = [torch.tensor(x).requires_grad_() for x in (z_safe, q_safe)]
    r = case.length(torch, leaves[1], leaves[0])
    # STE's length is constant; a zero that depends on both keeps autograd content.
    log_r = torch.log(r).sum() + 0 * (leaves[0] + leaves[1]).sum()
    slopes = torch.autograd.grad(log_r, leaves)
    slope = np.where(lost, 0, np.maximum(*(np.abs(s.numpy()) for s in slopes)))
    r = r.detach().numpy()
    if case.length is cosine:
        # Two terms that cancel where q and z are antiparallel.
        lengths = np.minimum(norm(np, q_safe), norm(np, z_safe))
        terms = (np.abs(unit(np, q_safe)) + np.abs(unit(np, z_safe))) / (lengths * r)
        slope = np.where(lost, 0, np.maximum(slope, terms))
    elif case.length is mahalanobis:
        # Entries of M d, whose terms may cancel.
        terms = np.abs(q_safe - z_safe) @ np.abs(matrix(z.shape[-1])) / r**2
        slope = np.where(lost, 0, np.maximum(slope, terms))
    step = np.where(lost, 0, np.abs(r * case.direction(np, q_safe, z_safe, p.noise.astype(np.float64), r)))
    # Digits that the definition itself loses: by 1 - cos near parallel, by d + sigma eps near its zero.
    lossy = np.ones_like(r)
    if case.length is cosine:
        lossy = 1 + 1 / np.where(lost, 1, r)
    elif case.sigma and not math.isinf(case.sigma):
        d, sum_ = np.abs(q - z), q - z + case.sigma * p.noise.astype(np.float64)
        lossy = (norm(np, d) + case.sigma * norm(np, noise)) / np.where(norm(np, sum_) == 0, 1, norm(np, sum_))
        lossy = np.maximum(1, lossy)
    radial = lossy * total(np, g * step) * slope
    pushed = lossy * step * total(np, slope * (dz + dq_))
    top = np.max(slope, axis=-1, keepdims=True)
    reach = np.max(step, axis=-1, keepdims=True)
    second = lossy * total(np, g) * total(np, dz + dq_) * (top + reach * top**2)
    return {
        "z_q": np.abs(z) + np.abs(q) + lossy * step,
        "g_z": g + radial,
        "g_codebook": _scatter(radial, p.indices, p.codebook.shape[0]),
        "tangent": dz + pushed,
        "second": second,
    }
