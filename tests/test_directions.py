"""Directions and their derivatives, and search by direction."""

from __future__ import annotations

import numpy as np
import pytest

import diveq_core as dq
from libraries import Library, assert_close, float64_in, library_named
from vectors import D, normal


def test_normalize(library: Library):
    with float64_in(library):
        x = np.array([[[3.0, 4.0]], [[0.0, 0.0]], [[1e-200, 0.0]], [[-1e200, 1e200]]])
        half = np.sqrt(0.5)
        expected = np.array([[[0.6, 0.8]], [[0.0, 0.0]], [[1.0, 0.0]], [[-half, half]]])
        # A square root and a quotient.
        assert_close(dq.normalize(library.to(x)), expected, library, rtol=1e-15)


def test_the_pullback_of_normalize(library: Library):
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((2, 5, 3)).astype(np.float32) for _ in range(2))
    x[1, 2] = 0
    normalized, pullback = dq.normalize_vjp(library.to(x))
    rho = np.linalg.norm(x, axis=-1, keepdims=True)
    u = np.divide(x, rho, out=np.zeros_like(x), where=rho > 0)
    across = g - (g * u).sum(axis=-1, keepdims=True) * u
    expected = np.divide(across, rho, out=np.zeros_like(x), where=rho > 0)
    # About ten operations on numbers of order one.
    assert_close(normalized, u, library, rtol=1e-6, atol=1e-7)
    assert_close(pullback(library.to(g)), expected, library, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_the_pullback_of_normalize_is_automatic_differentiations(name: str):
    library = library_named(name)
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((5, 3)).astype(np.float32) for _ in range(2))
    x[2] = 0
    expected = dq.normalize_vjp(x)[1](g)
    if name == "torch":
        import torch

        leaf = library.to(x).requires_grad_()
        (actual,) = torch.autograd.grad((dq.normalize(leaf) * library.to(g)).sum(), [leaf])
    else:
        import jax

        actual = jax.grad(lambda x: (dq.normalize(x) * g).sum())(library.to(x))
    np.testing.assert_allclose(library.back(actual), expected, rtol=1e-5, atol=1e-6)


def test_the_tangent_of_normalize(library: Library):
    rng = np.random.default_rng(1)
    x, dx, g = (rng.standard_normal((2, 5, 3)).astype(np.float32) for _ in range(3))
    x[1, 2] = 0
    normalized, tangent = dq.normalize_jvp(library.to(x), library.to(dx))
    rho = np.linalg.norm(x, axis=-1, keepdims=True)
    u = np.divide(x, rho, out=np.zeros_like(x), where=rho > 0)
    across = dx - (dx * u).sum(axis=-1, keepdims=True) * u
    expected = np.divide(across, rho, out=np.zeros_like(x), where=rho > 0)
    # About ten operations on numbers of order one.
    assert_close(normalized, u, library, rtol=1e-6, atol=1e-7)
    assert_close(tangent, expected, library, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(library.back(tangent)[1, 2], 0)
    # <g, dx^> = <g_x, dx>: thirty products of order one.
    pulled = library.back(dq.normalize_vjp(library.to(x))[1](library.to(g)))
    np.testing.assert_allclose((library.back(tangent) * g).sum(), (pulled * dx).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e300])
def test_the_tangent_of_normalize_at_extreme_scales(scale: float, library: Library):
    with float64_in(library):
        x, dx = np.array([[3.0, 4.0], [-1.0, 2.0]]), np.array([[1.0, -2.0], [5.0, 0.5]])
        _, expected = dq.normalize_jvp(x, dx)
        # A direction has no scale, so x and dx of one scale give the tangent of scale one; and its rounding.
        normalized, tangent = dq.normalize_jvp(library.to(x * scale), library.to(dx * scale))
        assert_close(tangent, expected, library, rtol=1e-14, atol=1e-15)
        assert_close(normalized, dq.normalize(x), library, rtol=1e-15)


# torch's forward mode compiles decompositions by a function that torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_the_tangent_of_normalize_is_forward_modes(name: str):
    library = library_named(name)
    rng = np.random.default_rng(0)
    x, dx = (rng.standard_normal((5, 3)).astype(np.float32) for _ in range(2))
    x[2] = 0
    if name == "torch":
        from torch.func import jvp
    else:
        from jax import jvp
    expected = jvp(dq.normalize, (library.to(x),), (library.to(dx),))
    for ours, theirs in zip(dq.normalize_jvp(library.to(x), library.to(dx)), expected, strict=True):
        # Two orders of about ten operations.
        assert_close(ours, library.back(theirs), library, rtol=1e-5, atol=1e-6)


def test_the_derivative_of_a_direction_at_every_length() -> None:
    x, g = normal(8, D), normal(8, D, seed=1)
    expected = dq.normalize_vjp(x)[1](g)
    for a, b in [(-1000, -1000), (1000, 1000), (-1020, -900), (1020, 900), (1000, 0), (-900, 0), (0, 1000), (0, -1000)]:
        g_x = dq.normalize_vjp(np.ldexp(x, a))[1](np.ldexp(g, b))
        np.testing.assert_allclose(np.ldexp(g_x, a - b), expected, rtol=1e-12, atol=1e-13)
    # Its length is beyond the largest number, and below the normal ones.
    g_x = dq.normalize_vjp(np.full((1, 2), 1.7e308))[1](np.array([[1e300, 0.0]]))
    np.testing.assert_allclose(g_x, np.array([[1.0, -1.0]]) * (0.5e300 / 1.7e308 / np.sqrt(2)), rtol=1e-12)
    g_x = dq.normalize_vjp(np.array([[0.0, 1e-310]]))[1](np.array([[1e-20, 0.0]]))
    np.testing.assert_allclose(g_x, [[1e290, 0.0]], rtol=1e-12)


def test_nearest_by_direction(library: Library):
    rng = np.random.default_rng(0)
    z, codebook = rng.standard_normal((200, 5)), rng.standard_normal((30, 5))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z, codebook)]
    expected = (unit[0] @ unit[1].T).argmax(axis=1)
    # Lengths play no part.
    z, codebook = z * rng.uniform(0.01, 100, (200, 1)), codebook * rng.uniform(0.01, 100, (30, 1))
    found = dq.nearest_cosine(library.to(z.astype(np.float32)), library.to(codebook.astype(np.float32)))
    np.testing.assert_array_equal(library.back(found), expected)


def test_zeros_have_cosine_zero(library: Library):
    codebook = library.to(np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]], np.float32))
    z = library.to(np.array([[[-1.0, 0.1]], [[1.0, 0.1]], [[0.05, 1.0]]], np.float32))
    # Away from all others, along them (the first of two), and hardly along them.
    np.testing.assert_array_equal(library.back(dq.nearest_cosine(z, codebook)), [[0], [1], [1]])


def test_errors_of_directions(library: Library):
    scalar = library.to(np.zeros((), np.float32))
    with pytest.raises(ValueError, match=r"^normalize: x must have shape \(\.\.\., D\) with D >= 1, got \(\)$"):
        dq.normalize(scalar)
    x = library.to(np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"^pullback: g must have the shape of x, \(2, 3\), got \(3, 2\)$"):
        dq.normalize_vjp(x)[1](library.to(np.ones((3, 2), np.float32)))
    with pytest.raises(ValueError, match=r"^normalize_jvp: x must have shape \(\.\.\., D\) with D >= 1, got \(\)$"):
        dq.normalize_jvp(scalar, scalar)
    with pytest.raises(ValueError, match=r"^normalize_jvp: dx must have the shape of x, \(2, 3\), got \(3, 2\)$"):
        dq.normalize_jvp(x, library.to(np.ones((3, 2), np.float32)))
    with pytest.raises(TypeError, match=r"^normalize_jvp: "):
        dq.normalize_jvp(x, library.to(np.ones((2, 3), np.int32)))
    with pytest.raises(ValueError, match=r"^nearest_cosine: z must have shape"):
        dq.nearest_cosine(library.to(np.ones((2, 4), np.float32)), x)
    bad = library.to(np.array([[np.nan, 0, 0]], np.float32))
    with pytest.raises(ValueError, match=r"^nearest_cosine: z must be finite"):
        dq.nearest_cosine(bad, x, check_finite=True)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(library.back(dq.nearest_cosine(bad, x, check_finite=False)), [-1])
