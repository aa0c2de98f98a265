"""Composites and curves under the libraries' transformations, in 16 bits, and differentiated twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import diveq_core as dq
from libraries import Library, library_named, standard_promotion
from strategies import EPS, example_count, precision, to_library

if TYPE_CHECKING:
    from collections.abc import Callable

N, K, D = 5, 4, 4

CASES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "residual": (dq.Residual(dq.DiVeQ(0.3), 2), (2, K, D), (2, N, D)),
    "product": (dq.Product(dq.DiVeQDetach(), 2), (2, K, D // 2), (N, D)),
    "residual of products": (dq.Residual(dq.Product(dq.NSVQ(), 2), 2), (2, 2, K, D // 2), (2, N, D)),
    "curve": (dq.SFDiVeQ(0.3), (K, D), (2, N, D)),
}
by_case = pytest.mark.parametrize("case", CASES)
seeds = st.integers(0, 2**32 - 1)


def draw(case: str, seed: int) -> tuple[Any, ...]:
    """z, codebook, noise, a dither and a cotangent."""
    _, words, eps = CASES[case]
    rng = np.random.default_rng(seed)
    shapes = ((N, D), words, eps, (K - 1,), (N, D))
    return tuple(rng.random(s) if s == (K - 1,) else rng.standard_normal(s) for s in shapes)


def noise_of(case: str, noise: Any, dither: Any) -> Any:
    return dq.CurveNoise(dither, noise) if case == "curve" else noise


def quantizer(case: str, noise: Any, dither: Any) -> Callable[[Any, Any], Any]:
    return lambda z, codebook: dq.quantize(z, codebook, CASES[case][0], noise=noise_of(case, noise, dither)).z_q


def plain(xp: Any, sg: Any, case: str, z: Any, codebook: Any, noise: Any, dither: Any, indices: Any) -> Any:
    """The stop-gradient expressions, stage by stage; no vector lies on its codeword."""

    def norm(x: Any) -> Any:
        return (x * x).sum(-1)[..., None] ** 0.5

    def one(z: Any, q: Any, noise: Any, sigma: float | None) -> Any:
        direction = noise if sigma is None else q - z + sigma * noise
        return z + norm(q - z) * sg(direction / norm(direction))

    def product(z: Any, words: Any, noise: Any, indices: Any, sigma: float | None) -> Any:
        half = [slice(0, D // 2), slice(D // 2, D)]
        outs = [one(z[:, h], words[j][indices[:, j]], noise[:, h], sigma) for j, h in enumerate(half)]
        return xp.concatenate(outs, -1)

    if case == "product":
        return product(z, codebook, noise, indices, 0.0)
    if case == "curve":
        t = dither[indices][:, None]
        first, second = (one(z, codebook[indices + j], noise[j], 0.3) for j in (0, 1))
        return z + (1 - t) * (first - z) + t * (second - z)
    residual = z
    for stage in (0, 1):
        if case == "residual":
            out = one(residual, codebook[stage][indices[:, stage]], noise[stage], 0.3)
        else:
            out = product(residual, codebook[stage], noise[stage], indices[:, stage], None)
        residual = residual - out
    return z - residual


@by_case
@settings(max_examples=example_count(0.5))
@given(seed=seeds)
def test_torch_differentiates_twice_to_the_expression(case: str, seed: int) -> None:
    torch = pytest.importorskip("torch")
    z, codebook, noise, dither, g = (torch.tensor(x) for x in draw(case, seed))
    indices = dq.quantize(z, codebook, CASES[case][0], noise=noise_of(case, noise, dither)).indices
    results = []
    for function in (
        quantizer(case, noise, dither),
        lambda z, e: plain(torch, torch.Tensor.detach, case, z, e, noise, dither, indices),
    ):
        leaves = [x.clone().requires_grad_() for x in (z, codebook)]
        z_q = function(*leaves)
        first = torch.autograd.grad(z_q, leaves, g, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(sum((x * x).sum() for x in first), leaves)
        results.append([x.detach().numpy() for x in (z_q, *first, *second)])
    for ours, expected in zip(*results, strict=True):
        # Some dozens of roundings; a second derivative divides by distances down to a hundredth, twice in two stages.
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9 * (1 + np.abs(expected).max()))


# JAX compiles each of these for seconds.
@pytest.mark.parametrize("case", ["residual", "curve"])
def test_jax_differentiates_twice_to_the_expression(case: str) -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        z, codebook, noise, dither, g = (jax.numpy.asarray(x) for x in draw(case, 0))
        indices = dq.quantize(z, codebook, CASES[case][0], noise=noise_of(case, noise, dither)).indices

        def penalty(function: Any, z: Any, e: Any) -> Any:
            first = jax.vjp(function, z, e)[1](g)
            return sum((x * x).sum() for x in first), first

        def expression(z: Any, e: Any) -> Any:
            return plain(jax.numpy, jax.lax.stop_gradient, case, z, e, noise, dither, indices)

        results = []
        for function in (quantizer(case, noise, dither), expression):
            twice = jax.grad(lambda z, e, f=function: penalty(f, z, e), (0, 1), has_aux=True)
            second, first = jax.jit(twice)(z, codebook)
            results.append([np.asarray(x) for x in (*first, *second)])
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9 * (1 + np.abs(expected).max()))


@pytest.mark.parametrize("case", ["residual", "product", "curve"])
def test_torch_compiles_in_one_graph(case: str) -> None:
    torch = pytest.importorskip("torch")
    z, codebook, noise, dither, g = (torch.tensor(x) for x in draw(case, 1))
    leaves = [z.requires_grad_(), codebook.requires_grad_()]

    def step(z: Any, codebook: Any, noise: Any, dither: Any) -> Any:
        return quantizer(case, noise, dither)(z, codebook)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        z_q = function(z, codebook, noise, dither)
        results.append([z_q, *torch.autograd.grad(z_q, leaves, g, materialize_grads=True)])
    # The same operations, possibly in blocks or not.
    for ours, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "case"), [*(("torch", case) for case in CASES), ("jax", "residual"), ("jax", "curve")]
)
def test_a_batch_of_codebooks_is_one_after_the_other(name: str, case: str) -> None:
    """``vmap`` of output and gradients over everything; in JAX compiled too."""
    library = library_named(name)
    with precision(library, "float64"):
        draws = [[library.to(x) for x in draw(case, seed)] for seed in (2, 3)]

        def pulled(z: Any, codebook: Any, noise: Any, dither: Any, g: Any) -> Any:
            if name == "torch":
                import torch

                z_q, pullback = torch.func.vjp(quantizer(case, noise, dither), z, codebook)
            else:
                import jax

                z_q, pullback = jax.vjp(quantizer(case, noise, dither), z, codebook)
            return (z_q, *pullback(g))

        one = pulled
        if name == "jax":
            import jax

            one = jax.jit(pulled)
        expected = [[library.back(x) for x in one(*arrays)] for arrays in draws]
        if name == "torch":
            import torch

            batched = torch.func.vmap(pulled)(*(torch.stack(pair) for pair in zip(*draws, strict=True)))
        else:
            batched = jax.jit(jax.vmap(pulled))(*(jax.numpy.stack(pair) for pair in zip(*draws, strict=True)))
        for ours, pair in zip(batched, zip(*expected, strict=True), strict=True):
            np.testing.assert_allclose(library.back(ours), np.stack(pair), rtol=1e-11, atol=1e-11)


@by_case
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@settings(max_examples=example_count(0.3))
@given(seed=seeds)
def test_sixteen_bits_round_each_stage_once(library: Library, case: str, dtype: str, seed: int) -> None:
    """Against float64 on the same numbers and codewords: a rounding of the result and one of what enters a stage."""
    if (dtype == "float16" and not library.float16) or (dtype == "bfloat16" and library.bfloat16 is None):
        pytest.skip(f"{library.name} has no {dtype}")
    arrays = [to_library(library, x, dtype) for x in draw(case, seed)]
    wide = [library.back(x).astype(np.float64) for x in arrays]
    with standard_promotion():
        out, pullback = dq.vjp(*arrays[:2], CASES[case][0], noise=noise_of(case, *arrays[2:4]))
        got = (out.z_q, *pullback(arrays[4]))
    noise = noise_of(case, *wide[2:4])
    expected, wide_pullback = dq.vjp(
        *wide[:2], CASES[case][0], noise=noise, indices=library.back(out.indices).astype(int)
    )
    for value, want in zip(got, (expected.z_q, *wide_pullback(wide[4])), strict=True):
        assert value.dtype == arrays[0].dtype
        error = np.abs(library.back(value).astype(np.float64) - want)
        assert np.all(np.isfinite(error))
        # Directions of a second stage follow the rounded residual, divided by its length: in two dimensions, as in
        # the residual of products, that may be a tenth.
        lengths = np.linalg.norm(wide[4]) + np.linalg.norm(wide[0])
        assert error.max() <= (16 if case == "residual of products" else 2) * EPS[dtype] * lengths
