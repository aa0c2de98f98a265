"""What `vjp` and `jvp` give beside pullback and tangent carries the estimator's derivative, as from `quantize`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import diveq_core as dq
from libraries import Library, library_named
from strategies import precision
from vectors import D, K, N, normal

if TYPE_CHECKING:
    from collections.abc import Callable

# Those that differentiate, with the error of a few dozen operations on numbers of order one.
LIBRARIES = {"torch": 1e-12, "jax": 1e-12, "mlx": 2e-5}

# An estimator, the shape of its vectors, of its codebook (None for none), and of its noise.
Case = tuple[Any, tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None]
WORDS = (K, D)
SINGLE: list[Case] = [
    (dq.STE(), (N, D), WORDS, None),
    (dq.NSVQ(), (N, D), WORDS, (N, D)),
    (dq.DiVeQ(), (N, D), WORDS, (N, D)),
    (dq.DiVeQDetach(), (2, N, D), WORDS, None),
    (dq.Rotation(), (N, D), WORDS, None),
    (dq.Radial(dq.Power(2.0)), (N, D), WORDS, None),
    (dq.Radial(dq.PseudoHuber()), (N, D), WORDS, None),
    (dq.Radial(dq.PNorm(3.0)), (N, D), WORDS, None),
    (dq.Radial(dq.Mahalanobis(np.diag([1.0, 2.0, 3.0, 4.0]))), (N, D), WORDS, None),
    (dq.Radial(dq.Cosine()), (N, D), WORDS, None),
    (dq.SFDiVeQ(), (N, D), WORDS, (2, N, D)),
    (dq.SFDiVeQDetach(), (N, D), WORDS, (2, N, D)),
    (dq.GumbelST(0.7), (N, K), WORDS, (N, K)),
    (dq.FSQ([5, 4, 7, 3]), (N, D), None, None),
]
COMPOSITE: list[Case] = [
    (dq.Residual(dq.DiVeQDetach(), 2), (N, D), (2, K, D), None),
    (dq.Residual(dq.DiVeQ(), 3), (N, D), WORDS, (3, N, D)),
    (dq.Residual(dq.FSQ([5, 4, 7, 3]), 2), (N, D), None, None),
    (dq.Product(dq.Residual(dq.DiVeQDetach(), 2), 2), (N, 2 * D), (2, 2, K, D), None),
    (dq.Residual(dq.Product(dq.Radial(dq.PseudoHuber()), 2), 2), (N, 2 * D), (2, 2, K, D), None),
    (dq.Product(dq.GumbelST(0.7), 2), (N, 2 * K), (2, K, D), (N, 2 * K)),
]
# Its rotation is held constant, so that a second derivative is zero.
ROTATED: Case = (dq.Residual(dq.Rotation(), 2), (N, D), (2, K, D), None)
by_library = pytest.mark.parametrize("name", LIBRARIES)


def differentiable(name: str) -> tuple[Library, str]:
    library = library_named(name)
    return library, "float64" if library.float64 else "float32"


def gradients(library: Library, function: Callable[..., Any], arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Those of a sum to all its arguments, by the library's own differentiation; zeros where it depends on none."""
    given, to = [library.to(x) for x in arrays], tuple(range(len(arrays)))
    if library.name == "torch":
        import torch

        for x in given:
            x.requires_grad_()
        total = function(*given)
        return [library.back(x) for x in torch.autograd.grad(total, given, materialize_grads=True)]
    if library.name == "jax":
        import jax

        return [library.back(x) for x in jax.grad(function, to)(*given)]
    import mlx.core as mx

    found = mx.grad(function, to)(*given)
    return [library.back(x) for x in (found if isinstance(found, (list, tuple)) else [found])]


def pulled(library: Library, function: Callable[..., Any], operands: list[Any], g: Any) -> list[Any]:
    """The library's own pullback, itself to be differentiated."""
    if library.name == "torch":
        import torch

        return list(torch.autograd.grad(function(*operands), operands, g, create_graph=True, materialize_grads=True))
    if library.name == "jax":
        import jax

        return list(jax.vjp(function, *operands)[1](g))
    import mlx.core as mx

    return list(mx.vjp(function, operands, [g])[1])


class Problem:
    """One case in one library."""

    def __init__(self, library: Library, dtype: str, case: Case) -> None:
        self.library = library
        self.estimator, shape, words, noise = case
        self.arrays = [normal(*shape, seed=1).astype(dtype)]
        if words is not None:
            self.arrays.append(normal(*words, seed=2).astype(dtype))
        drawn = None if noise is None else library.to(normal(*noise, seed=3).astype(dtype))
        if isinstance(self.estimator, (dq.SFDiVeQ, dq.SFDiVeQDetach)):
            dither = np.random.default_rng(4).random(K - 1).astype(dtype)
            drawn = dq.CurveNoise(library.to(dither), drawn)
        self.noise = drawn
        out = dq.quantize(*self.operands(*map(library.to, self.arrays)), self.estimator, noise=drawn)
        self.w = library.to(normal(*out.z_q.shape, seed=5).astype(dtype))
        # Fixed, so that every call chooses alike.
        self.indices = out.indices

    @staticmethod
    def operands(z: Any, codebook: Any = None) -> tuple[Any, Any]:
        return z, codebook

    def weighed(self, x: Any) -> Any:
        return (x * self.w).sum()

    def options(self) -> dict[str, Any]:
        return {"noise": self.noise, "indices": self.indices}

    def quantize(self, *given: Any) -> Any:
        return dq.quantize(*self.operands(*given), self.estimator, **self.options()).z_q

    def vjp(self, *given: Any) -> tuple[Any, Any]:
        out, pullback = dq.vjp(*self.operands(*given), self.estimator, **self.options())
        return out.z_q, pullback

    def jvp(self, *given: Any) -> Any:
        z, codebook = self.operands(*given)
        return dq.jvp(z, codebook, z, codebook, self.estimator, **self.options())[0].z_q


@by_library
@pytest.mark.parametrize("case", [*SINGLE, ROTATED, *COMPOSITE], ids=lambda case: repr(case[0]))
def test_the_output_is_differentiable_as_that_of_quantize(name: str, case: Case) -> None:
    library, dtype = differentiable(name)
    with precision(library, dtype):
        p = Problem(library, dtype, case)
        expected = gradients(library, lambda *given: p.weighed(p.quantize(*given)), p.arrays)
        assert any(np.abs(x).max() > 0.1 for x in expected)
        for verb in (lambda *given: p.vjp(*given)[0], p.jvp):
            found = gradients(library, lambda *given, verb=verb: p.weighed(verb(*given)), p.arrays)
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=LIBRARIES[name] * (1 + np.abs(b).max()))
        given = [library.to(x) for x in p.arrays]
        for z_q in (p.vjp(*given)[0], p.jvp(*given)):
            np.testing.assert_array_equal(library.back(z_q), library.back(p.quantize(*given)))


@by_library
@pytest.mark.parametrize("case", COMPOSITE, ids=lambda case: repr(case[0]))
def test_the_pullback_of_composites_differentiated_again(name: str, case: Case) -> None:
    library, dtype = differentiable(name)
    with precision(library, dtype):
        p = Problem(library, dtype, case)
        tangents = [library.to(normal(*x.shape, seed=6).astype(dtype)) for x in p.arrays]

        def pushed(cotangents: Any) -> Any:
            return sum((g * t).sum() for g, t in zip(cotangents, tangents, strict=False) if g is not None)

        def explicit(*given: Any) -> Any:
            return pushed(p.vjp(*given)[1](p.w))

        def own(*given: Any) -> Any:
            return pushed(pulled(library, p.quantize, list(given), p.w))

        expected = gradients(library, own, p.arrays)
        assert any(np.abs(x).max() > 0.1 for x in expected)
        for a, b in zip(gradients(library, explicit, p.arrays), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=LIBRARIES[name] * (1 + np.abs(b).max()))


LOSSES = {
    "codebook": (dq.codebook_loss, dq.codebook_loss_vjp, 1),
    "commitment": (dq.commitment_loss, dq.commitment_loss_vjp, 0),
}


@by_library
@pytest.mark.parametrize("which", LOSSES)
def test_losses_beside_a_pullback_stop_the_other_side(name: str, which: str) -> None:
    library, dtype = differentiable(name)
    loss, loss_vjp, moved = LOSSES[which]
    arrays = [normal(N, D).astype(dtype), normal(K, D, seed=1).astype(dtype)]
    with precision(library, dtype):
        indices, one = library.to(np.arange(N) % K), library.to(np.ones((), dtype))
        tangent = library.to(normal(*arrays[moved].shape, seed=2).astype(dtype))
        pairs = [
            (
                gradients(library, lambda z, e: loss_vjp(z, e, indices)[0], arrays),
                gradients(library, lambda z, e: loss(z, e, indices), arrays),
            ),
            (
                gradients(library, lambda z, e: (loss_vjp(z, e, indices)[1](one) * tangent).sum(), arrays),
                gradients(
                    library,
                    lambda z, e: (
                        pulled(library, lambda z, e: loss(z, e, indices), [z, e], one)[moved] * tangent
                    ).sum(),
                    arrays,
                ),
            ),
        ]
    for found, expected in pairs:
        assert np.abs(expected[moved]).max() > 1e-3
        assert not np.any(expected[1 - moved])
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=LIBRARIES[name])


@by_library
def test_directions_and_linear_codebooks_beside_a_pullback(name: str) -> None:
    library, dtype = differentiable(name)
    x, w = normal(K, D).astype(dtype), normal(D, D, seed=1).astype(dtype)
    with precision(library, dtype):
        g = library.to(normal(K, D, seed=2).astype(dtype))
        values: list[tuple[Any, Any, list[np.ndarray]]] = [
            (dq.normalize, lambda x: dq.normalize_vjp(x)[0], [x]),
            (dq.normalize, lambda x: dq.normalize_jvp(x, x)[0], [x]),
            (lambda *e: dq.linear_codebook(e), lambda *e: dq.linear_codebook_vjp(e)[0], [x, w]),
            (lambda *e: dq.linear_codebook(e), lambda *e: dq.linear_codebook_jvp(e, e)[0], [x, w]),
        ]
        for plain, beside, arrays in values:
            expected = gradients(library, lambda *given, f=plain: (f(*given) * g).sum(), arrays)
            found = gradients(library, lambda *given, f=beside: (f(*given) * g).sum(), arrays)
            for a, b in zip(found, expected, strict=True):
                assert np.abs(b).max() > 0.1
                np.testing.assert_allclose(a, b, rtol=0, atol=LIBRARIES[name] * (1 + np.abs(b).max()))
