"""The checks for others pass on what is right, and fail on each thing that is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import diveq_core as dq
from diveq_core import testing

M = np.array([[2.0, 0.5, 0.0], [-0.25, 1.0, 0.0], [0.0, 0.0, 3.0]])
RADII = [
    dq.Power(0.5),
    dq.Power(2.0),
    dq.PseudoHuber(0.3),
    dq.PNorm(1.0),
    dq.PNorm(3.0),
    dq.Mahalanobis(M),
    dq.Cosine(),
]
ESTIMATORS = [dq.STE(), dq.NSVQ(), dq.DiVeQ(0.3), dq.DiVeQDetach(), dq.Rotation()]
ESTIMATORS += [dq.Radial(radius) for radius in RADII if not isinstance(radius, dq.Mahalanobis)]


@pytest.mark.parametrize("radius", RADII, ids=repr)
def test_our_radii(radius: Any) -> None:
    testing.check_radius(radius)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_our_estimators(estimator: dq.Estimator) -> None:
    testing.check_estimator(estimator)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("torch", np.float64), ("torch", np.float32), ("jax", np.float32)),
        pytest.param("jax", np.float64, marks=pytest.mark.slow),
    ],
)
def test_our_own_libraries_are_ports(name: str, dtype: Any) -> None:
    pytest.importorskip(name)
    for estimator in ESTIMATORS:
        # Parallel to the last float32 digit is where the cosine's gradient has none.
        if isinstance(estimator, dq.Radial) and isinstance(estimator.radius, dq.Cosine) and dtype == np.float32:
            continue
        testing.check_port(_torch(estimator) if name == "torch" else _jax(estimator, dtype), estimator, dtype=dtype)


def _torch(estimator: dq.Estimator) -> Any:
    import torch

    def port(*arrays: np.ndarray) -> tuple[Any, ...]:
        z, codebook, noise, g = (torch.tensor(x) for x in arrays)
        z.requires_grad_()
        codebook.requires_grad_()
        out = dq.quantize(z, codebook, estimator, noise=noise)
        grads = torch.autograd.grad(out.z_q, (z, codebook), g, materialize_grads=True)
        return out.z_q.detach().numpy(), out.indices.numpy(), *(x.numpy() for x in grads)

    return port


def _jax(estimator: dq.Estimator, dtype: Any) -> Any:
    import jax

    def port(*arrays: np.ndarray) -> tuple[Any, ...]:
        with jax.enable_x64(dtype == np.float64):
            z, codebook, noise, g = (jax.numpy.asarray(x) for x in arrays)
            out, pullback = dq.vjp(z, codebook, estimator, noise=noise)
            return tuple(np.asarray(x) for x in (*out, *pullback(g)))

    return port


def right(z: np.ndarray, codebook: np.ndarray, noise: np.ndarray, g: np.ndarray) -> tuple[Any, ...]:
    (z_q, indices), pullback = dq.vjp(z, codebook, dq.DiVeQ(1.0), noise=noise)
    return (z_q, indices, *pullback(g))


WRONG = {
    "z_q": lambda z_q, i, g_z, g_e: (z_q + 1e-6, i, g_z, g_e),
    "indices": lambda z_q, i, g_z, g_e: (z_q, i[::-1], g_z, g_e),
    "g_z": lambda z_q, i, g_z, g_e: (z_q, i, -g_z, g_e),
    "g_codebook": lambda z_q, i, g_z, g_e: (z_q, i, g_z, g_e * 1.001),
    "g_z must have shape": lambda z_q, i, g_z, g_e: (z_q, i, g_z[:-1], g_e),
    "g_codebook differs by nan": lambda z_q, i, g_z, g_e: (z_q, i, g_z, g_e * np.nan),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_port_is_told_what_is_wrong(message: str) -> None:
    testing.check_port(right, dq.DiVeQ(1.0))
    with pytest.raises(AssertionError, match=rf"check_port: DiVeQ\(sigma=1.0\), .*: {message}"):
        testing.check_port(lambda *arrays: WRONG[message](*right(*arrays)), dq.DiVeQ(1.0))


def test_a_variance_taken_for_a_standard_deviation() -> None:
    with pytest.raises(AssertionError, match="z_q differs"):
        testing.check_port(right, dq.DiVeQ(0.5))


@dataclass(frozen=True)
class Wrong(dq.Estimator):
    """An estimator with one thing wrong."""

    what: str

    def vjp(self, lib: Any, z: Any, q: Any, noise: Any, g: Any) -> tuple[Any, Any]:
        if self.what == "adjoint":
            return g, g
        return (g / lib.dot(q - z, q - z), None) if self.what == "NaN" else (g, None)

    def jvp(self, lib: Any, z: Any, q: Any, noise: Any, dz: Any, dq: Any) -> Any:
        return dz


@pytest.mark.parametrize(
    ("what", "message"),
    [("adjoint", "not adjoint"), ("NaN", "g_z must be finite")],
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_a_wrong_estimator(what: str, message: str) -> None:
    testing.check_estimator(Wrong("nothing"))
    with pytest.raises(AssertionError, match=message):
        testing.check_estimator(Wrong(what))


def test_a_radius_whose_gradient_to_z_has_the_wrong_sign() -> None:
    def gradients(q: Any, z: Any) -> tuple[Any, Any]:
        d = q - z
        to_q = d / np.maximum((d * d).sum(-1, keepdims=True), 1e-300)
        return to_q, to_q

    with pytest.raises(AssertionError, match=r"d\(ln r\)/dz of CustomRadius differs"):
        testing.check_radius(dq.CustomRadius(lambda q, z: np.linalg.norm(q - z, axis=-1), gradients))


@pytest.mark.parametrize("wrong", [None, dq.STE, dq.SFDiVeQ(), dq.Residual(dq.STE(), 2)])
def test_what_is_no_estimator(wrong: Any) -> None:
    with pytest.raises(TypeError, match="check_estimator: expected an Estimator"):
        testing.check_estimator(wrong)
    with pytest.raises(TypeError, match="check_port: expected an Estimator"):
        testing.check_port(right, wrong)
    with pytest.raises(TypeError, match="check_radius: radius must have log"):
        testing.check_radius(wrong)
