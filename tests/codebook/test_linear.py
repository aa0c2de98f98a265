"""Linear codebooks."""

from __future__ import annotations

import numpy as np
import pytest

import diveq_core as dq
from libraries import Library, assert_close, library_named


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
