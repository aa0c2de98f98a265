"""Linear codebooks, and search by direction."""

from __future__ import annotations

import numpy as np
import pytest

import diveq_core as dq
from conftest import Library, assert_close, float64_in, library_named


def factors(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in [(7, 3), (3, 3), (7, 3), (3, 3), (7, 3)]]


def test_the_codebook_and_its_pullback_and_tangent(library: Library):
    e, w, de, dw, g = factors()
    arrays = tuple(library.to(x) for x in (e, w, de, dw, g))
    # Sums of up to seven products of order one.
    close = {"rtol": 1e-5, "atol": 1e-5}
    assert_close(dq.linear_codebook(arrays[:2]), e @ w, library, **close)
    codebook, pullback = dq.linear_codebook_vjp(arrays[:2])
    assert_close(codebook, e @ w, library, **close)
    g_e, g_w = pullback(arrays[4])
    assert_close(g_e, g @ w.T, library, **close)
    assert_close(g_w, e.T @ g, library, **close)
    codebook, tangent = dq.linear_codebook_jvp(arrays[:2], arrays[2:4])
    assert_close(codebook, e @ w, library, **close)
    assert_close(tangent, de @ w + e @ dw, library, **close)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_automatic_differentiation_reaches_both_factors(name: str):
    library = library_named(name)
    e, w, _, _, g = factors()
    z = np.random.default_rng(1).standard_normal((20, 3)).astype(np.float32)
    out, pullback = dq.vjp(z, e @ w, dq.DiVeQDetach())
    _, back = dq.linear_codebook_vjp((e, w))
    upstream = np.resize(g, z.shape)
    expected = back(pullback(upstream)[1])
    t = library.to(upstream)

    def loss(e, w):
        return (dq.quantize(library.to(z), dq.linear_codebook((e, w)), dq.DiVeQDetach()).z_q * t).sum()

    arrays = [library.to(e), library.to(w)]
    if name == "torch":
        import torch

        actual = torch.autograd.grad(loss(*(x.requires_grad_() for x in arrays)), arrays)
    else:
        import jax

        actual = jax.grad(loss, argnums=(0, 1))(*arrays)
    assert out.indices.shape == (20,)
    for a, b in zip(actual, expected, strict=True):
        # Sums of twenty terms of order one in another order.
        np.testing.assert_allclose(library.back(a), b, rtol=1e-4, atol=1e-5)


def test_a_linear_codebook_moves_unused_codewords():
    e, w, *_ = factors()
    z = (e @ w)[:1] + 0.1
    codebook, back = dq.linear_codebook_vjp((e, w))
    _, pullback = dq.vjp(z, codebook, dq.DiVeQDetach())
    g_codebook = pullback(np.ones_like(z))[1]
    assert (np.abs(g_codebook).sum(axis=1) > 0).sum() == 1
    moved = dq.linear_codebook((e, w - 0.1 * back(g_codebook).weight))
    assert (np.abs(moved - codebook).sum(axis=1) > 0).all()


def test_beginning(library: Library):
    noise = np.random.default_rng(0).standard_normal((400, 16)).astype(np.float32)
    like = library.to(np.zeros((2, 16), np.float32))
    frozen, weight = dq.linear_codebook_init(like, 400, noise=library.to(noise))
    assert_close(frozen, noise / 4, library)
    assert_close(weight, np.eye(16, dtype=np.float32), library)
    assert_close(dq.linear_codebook(dq.linear_codebook_init(like, 400, noise=library.to(noise))), noise / 4, library)


def test_beginning_from_a_generator():
    frozen, _ = dq.linear_codebook_init(np.zeros((1, 16)), 4000, rng=np.random.default_rng(0))
    # The standard error of 64,000 numbers' spread is 0.3 %.
    assert frozen.std() == pytest.approx(0.25, rel=0.01)


def test_half_precision(library: Library):
    if not library.float16:
        pytest.skip(f"{library.name} has no float16")
    e, w, *_ = (x.astype(np.float16) for x in factors())
    expected = (e.astype(np.float32) @ w.astype(np.float32)).astype(np.float16)
    # One unit in the last place, where the sums in float32 were taken in another order.
    assert_close(dq.linear_codebook((library.to(e), library.to(w))), expected, library, rtol=1e-3)


def test_errors_of_linear_codebooks(library: Library):
    e, w, *_ = (library.to(x) for x in factors())
    with pytest.raises(ValueError, match=r"^linear_codebook: weight must have the shape of .*, got \(7, 3\)$"):
        dq.linear_codebook((e, e))
    with pytest.raises(ValueError, match=r"^pullback: g must have the shape of codebook, \(7, 3\), got \(3, 3\)$"):
        dq.linear_codebook_vjp((e, w))[1](w)
    with pytest.raises(ValueError, match=r"^linear_codebook_jvp: dweight must have the shape of weight"):
        dq.linear_codebook_jvp((e, w), (e, e))
    for wrong in (0, True, 2.0):
        with pytest.raises(ValueError, match=r"^linear_codebook_init: count must be an integer >= 1"):
            dq.linear_codebook_init(e, wrong)
    with pytest.raises(ValueError, match=r"^linear_codebook_init: noise must have shape \(2, 3\), got \(7, 3\)$"):
        dq.linear_codebook_init(e, 2, noise=e)
    if library.float16:
        half = library.to(np.eye(3, dtype=np.float16))
        with pytest.raises(TypeError, match=r"^linear_codebook: weight must have the dtype of frozen"):
            dq.linear_codebook((e, half))


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
