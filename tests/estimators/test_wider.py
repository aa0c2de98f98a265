"""A radius or an estimator of one's own that computes in a wider dtype than the vectors have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import diveq_core as dq
from libraries import Library, float64_in, library_named


def wide(x: Any) -> Any:
    return x.double() if hasattr(x, "double") else x.astype("float64")


def squared(q: Any, z: Any) -> Any:
    return ((wide(q) - wide(z)) ** 2).sum(-1)


def gradients(q: Any, z: Any) -> Any:
    to_q = 2 * (wide(q) - wide(z)) / squared(q, z)[:, None]
    return to_q, -to_q


@dataclass(frozen=True)
class Wider(dq.DiVeQDetach):
    """An estimator whose pullback is in float64."""

    def vjp(self, lib: Any, z: Any, q: Any, noise: Any, g: Any) -> Any:
        return super().vjp(lib, wide(z), wide(q), noise, wide(g))


POWER = dq.Radial(dq.Power(2.0))
PAIRS = {
    "a radius": (dq.Radial(squared), POWER),
    "a radius with its gradients": (dq.Radial(dq.CustomRadius(squared, gradients)), POWER),
    "an estimator": (Wider(), dq.DiVeQDetach()),
}


@pytest.mark.parametrize("name", ["torch", "jax"])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_gradients_of_both_orders_have_the_dtype_of_the_vectors(name: str, pair: tuple[Any, Any]) -> None:
    library, rng = library_named(name), np.random.default_rng(0)
    z, codebook = (rng.standard_normal((n, 3)).astype(np.float32) for n in (5, 4))
    with float64_in(library):
        found = [twice(library, z, codebook, estimator) for estimator in pair]
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == np.float32
        # Both round to float32, at one place or another.
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


def twice(library: Library, z: np.ndarray, codebook: np.ndarray, estimator: Any) -> list[np.ndarray]:
    """Gradients of a sum of squares, and gradients of their sum."""
    arrays = [library.to(x) for x in (z, codebook)]
    if library.name == "jax":
        import jax

        def once(z: Any, codebook: Any) -> Any:
            return jax.grad(lambda *arrays: (dq.quantize(*arrays, estimator).z_q ** 2).sum(), (0, 1))(z, codebook)

        again = jax.grad(lambda *arrays: sum(g.sum() for g in once(*arrays)), (0, 1))(*arrays)
        return [library.back(g) for g in (*once(*arrays), *again)]
    import torch

    leaves = [x.requires_grad_() for x in arrays]
    first = torch.autograd.grad((dq.quantize(*leaves, estimator).z_q ** 2).sum(), leaves, create_graph=True)
    return [library.back(g) for g in (*first, *torch.autograd.grad(sum(g.sum() for g in first), leaves))]
