"""Derivatives of the pullback: what automatic differentiation of the stop-gradient expression gives, twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import diveq_core as dq
from libraries import library_named
from reference import CASES, Case, case_named, expected, expression
from strategies import (
    EPS,
    SECOND_ROUNDINGS,
    SHAPES,
    Problem,
    example_count,
    precision,
    problems,
)

pytest.importorskip("torch", reason="torch's automatic differentiation is the reference")

by_case = pytest.mark.parametrize("case", CASES, ids=repr)


def torch_second(case: Case, p: Problem, pull: Any, dtype: str = "float64") -> list[np.ndarray]:
    """g_z and g_E, recorded as they are to be differentiated; gradients of ``<dz, g_z> + <dE, g_E>`` to z, E and g."""
    import torch

    def tensor(x: np.ndarray) -> Any:
        return torch.tensor(x.astype(dtype))

    z, codebook, g = (tensor(x).requires_grad_() for x in (p.z, p.codebook, p.g))
    g_z, g_codebook = pull(z, codebook, g, tensor(p.noise), torch.tensor(p.indices))
    pushed = (g_z * tensor(p.dz)).sum() + (g_codebook * tensor(p.dcodebook)).sum()
    second = torch.autograd.grad(pushed, (z, codebook, g), materialize_grads=True)
    return [x.detach().numpy() for x in (g_z, g_codebook, *second)]


def jax_second(case: Case, p: Problem, pull: Any) -> list[np.ndarray]:
    import jax
    import jax.numpy as jnp

    def pushed(z: Any, codebook: Any, g: Any) -> Any:
        g_z, g_codebook = pull(z, codebook, g, jnp.asarray(p.noise), jnp.asarray(p.indices))
        return jnp.sum(g_z * p.dz) + jnp.sum(g_codebook * p.dcodebook), (g_z, g_codebook)

    differentiated = jax.grad(pushed, argnums=(0, 1, 2), has_aux=True)
    second, first = differentiated(jnp.asarray(p.z), jnp.asarray(p.codebook), jnp.asarray(p.g))
    return [np.asarray(x) for x in (*first, *second)]


def check(case: Case, p: Problem, got: list[np.ndarray], dtype: str = "float64") -> None:
    want = expected(case, p)
    size = want.sizes["second"]
    rows = np.zeros((p.codebook.shape[0], 1))
    np.add.at(rows, p.indices.reshape(-1), size.reshape(-1, 1))
    # The reference's own largest term of a row stands for those that the estimate of sizes leaves out.
    references = (want.g_z, want.g_codebook, *want.second)
    all_terms = (want.sizes["g_z"], want.sizes["g_codebook"], size, rows, want.sizes["tangent"])
    for value, reference, terms in zip(got, references, all_terms, strict=True):
        tolerance = SECOND_ROUNDINGS * EPS[dtype] * (terms + np.max(np.abs(reference), axis=-1, keepdims=True))
        # What lies below the normal numbers may be lost.
        tolerance = tolerance + (2.0**-1022 if dtype == "float64" else 2.0**-126)
        error = np.abs(value - reference)
        assert np.all(error <= tolerance), f"off by {np.max(error)}, at most {np.max(tolerance)} allowed"


@by_case
@given(p=problems())
def test_torch_double_backward(case: Case, p: Problem) -> None:
    """Of ``quantize``, with every mixed derivative in z, codebook and cotangent."""
    import torch

    estimator = case.make(p.width)

    def pull(z: Any, codebook: Any, g: Any, noise: Any, indices: Any) -> Any:
        z_q = dq.quantize(z, codebook, estimator, noise=noise, indices=indices).z_q
        return torch.autograd.grad(z_q, (z, codebook), g, create_graph=True, materialize_grads=True)

    check(case, p, torch_second(case, p, pull))


@by_case
@given(p=problems())
def test_torch_derivative_of_the_explicit_pullback(case: Case, p: Problem) -> None:
    estimator = case.make(p.width)

    def pull(z: Any, codebook: Any, g: Any, noise: Any, indices: Any) -> Any:
        return dq.vjp(z, codebook, estimator, noise=noise, indices=indices)[1](g)

    check(case, p, torch_second(case, p, pull))


@by_case
@pytest.mark.parametrize("power", [-100, -60, 50, 100])
@settings(max_examples=example_count(0.3))
@given(p=problems())
def test_second_order_at_extreme_scales(case: Case, power: int, p: Problem) -> None:
    """Float32 against float64, for vectors from 1e-30 to 1e30 and second cotangents of order one."""
    if case.name.startswith(("CustomRadius", "callable")):
        pytest.skip("the range of a radius of one's own is its author's affair")
    p, estimator = p.rounded("float32"), case.make(p.width)
    p = replace(p.scaled(2.0**power), dz=p.dz, dcodebook=p.dcodebook)

    def pull(z: Any, codebook: Any, g: Any, noise: Any, indices: Any) -> Any:
        return dq.vjp(z, codebook, estimator, noise=noise, indices=indices)[1](g)

    check(case, p, torch_second(case, p, pull, "float32"), "float32")


@by_case
@settings(max_examples=example_count(0.3))
@given(p=problems(shapes=SHAPES[:2]))
def test_jax_reverse_over_reverse(case: Case, p: Problem) -> None:
    jax = pytest.importorskip("jax")
    estimator = case.make(p.width)

    def pull(z: Any, codebook: Any, g: Any, noise: Any, indices: Any) -> Any:
        def quantize(z: Any, codebook: Any) -> Any:
            return dq.quantize(z, codebook, estimator, noise=noise, indices=indices).z_q

        return jax.vjp(quantize, z, codebook)[1](g)

    with precision(library_named("jax"), "float64"):
        check(case, p, jax_second(case, p, pull))


@by_case
@settings(max_examples=example_count(0.3))
@given(p=problems(shapes=SHAPES[:2]))
def test_jax_derivative_of_the_explicit_pullback(case: Case, p: Problem) -> None:
    pytest.importorskip("jax")
    estimator = case.make(p.width)

    def pull(z: Any, codebook: Any, g: Any, noise: Any, indices: Any) -> Any:
        return dq.vjp(z, codebook, estimator, noise=noise, indices=indices)[1](g)

    with precision(library_named("jax"), "float64"):
        check(case, p, jax_second(case, p, pull))


def loss(xp: Any, z_q: Any) -> Any:
    """Curved, so that the cotangent itself moves."""
    return xp.sum(xp.sin(z_q) * z_q)


def penalty(xp: Any, gradients: Any) -> Any:
    """A gradient penalty over both arguments."""
    return sum(xp.sum(g * g) for g in gradients)


@by_case
@given(p=problems(lost=False, shapes=SHAPES[:1]))
def test_torch_gradient_penalty_and_hessian_vector_product(case: Case, p: Problem) -> None:
    import torch

    estimator, noise, indices = case.make(p.width), torch.tensor(p.noise), torch.tensor(p.indices)

    def ours(z: Any, codebook: Any) -> Any:
        return dq.quantize(z, codebook, estimator, noise=noise, indices=indices).z_q

    def plain(z: Any, codebook: Any) -> Any:
        return expression(case, torch, torch.detach, z, codebook[indices], noise)

    results = []
    for quantize in (ours, plain):
        z, codebook = (torch.tensor(x).requires_grad_() for x in (p.z, p.codebook))
        gradients = torch.autograd.grad(
            loss(torch, quantize(z, codebook)), (z, codebook), create_graph=True, materialize_grads=True
        )
        of_penalty = torch.autograd.grad(
            penalty(torch, gradients), (z, codebook), retain_graph=True, materialize_grads=True
        )
        pushed = (gradients[0] * torch.tensor(p.dz)).sum() + (gradients[1] * torch.tensor(p.dcodebook)).sum()
        product = torch.autograd.grad(pushed, (z, codebook), materialize_grads=True)
        results.append([x.numpy() for x in (*of_penalty, *product)])
    compare_whole(case, p, *results)


def compare_whole(case: Case, p: Problem, got: list[np.ndarray], want: list[np.ndarray]) -> None:
    """Sums over the whole batch: roundings of its largest term, and of the digits that the case loses."""
    sizes = expected(case, p).sizes
    lossy = 1 + np.max(sizes["second"]) + np.max(sizes["g_z"]) ** 2
    for a, b in zip(got, want, strict=True):
        error = np.abs(a - b)
        tolerance = SECOND_ROUNDINGS * EPS["float64"] * lossy * (1 + np.max(np.abs(b)))
        assert np.all(error <= tolerance), f"off by {np.max(error)}, allowed {tolerance}"


@by_case
@settings(max_examples=example_count(0.1))
@given(p=problems(lost=False, shapes=SHAPES[3:]))
def test_torch_hessian(case: Case, p: Problem) -> None:
    """``torch.func``: forward over reverse, with z and codebook mixed."""
    import torch

    estimator, noise, indices = case.make(p.width), torch.tensor(p.noise), torch.tensor(p.indices)

    def ours(z: Any, codebook: Any) -> Any:
        return loss(torch, dq.quantize(z, codebook, estimator, noise=noise, indices=indices).z_q)

    def plain(z: Any, codebook: Any) -> Any:
        return loss(torch, expression(case, torch, torch.detach, z, codebook[indices], noise))

    hessians = []
    for function in (ours, plain):
        blocks = torch.func.jacrev(torch.func.grad(function, argnums=(0, 1)), argnums=(0, 1))(
            torch.tensor(p.z), torch.tensor(p.codebook)
        )
        hessians.append([block.numpy() for row in blocks for block in row])
    compare_whole(case, p, *hessians)


# JAX compiles each of these for seconds; reverse over reverse above covers every case.
FOR_JAX = [case_named(name) for name in ("STE", "DiVeQ", "Power(2)", "PNorm(1.5)", "Cosine")]


@pytest.mark.parametrize("case", FOR_JAX, ids=repr)
@settings(max_examples=3)
@given(p=problems(lost=False, shapes=SHAPES[3:]))
def test_jax_hessian_and_hessian_vector_product(case: Case, p: Problem) -> None:
    """Forward over reverse, reverse over reverse and forward over forward."""
    jax = pytest.importorskip("jax")
    estimator = case.make(p.width)

    def ours(z: Any, codebook: Any) -> Any:
        z_q = dq.quantize(
            z, codebook, estimator, noise=jax.numpy.asarray(p.noise), indices=jax.numpy.asarray(p.indices)
        ).z_q
        return loss(jax.numpy, z_q)

    def plain(z: Any, codebook: Any) -> Any:
        q = codebook[p.indices]
        return loss(jax.numpy, expression(case, jax.numpy, jax.lax.stop_gradient, z, q, jax.numpy.asarray(p.noise)))

    with jax.enable_x64(True):
        z, codebook, dz, de = (jax.numpy.asarray(x) for x in (p.z, p.codebook, p.dz, p.dcodebook))
        results = []
        for function in (ours, plain):
            gradient = jax.grad(function, argnums=(0, 1))
            hessian = jax.hessian(function, argnums=(0, 1))(z, codebook)
            product = jax.jvp(gradient, (z, codebook), (dz, de))[1]
            reverse = jax.grad(lambda z, e: penalty(jax.numpy, gradient(z, e)), argnums=(0, 1))(z, codebook)
            # Both tangents of the pushforward move: dz and dcodebook, and what it is taken at.
            twice = jax.jvp(
                lambda z, e: jax.jvp(function, (z, e), (jax.numpy.sin(z) + dz, e * e + de))[1],
                (z, codebook),
                (dz, de),
            )[1]
            results.append([np.asarray(x) for x in (*hessian[0], *hessian[1], *product, *reverse, twice)])
        compare_whole(case, p, *results)


ZERO = [("torch", case) for case in CASES if case.of_difference or case.name == "Cosine"]
ZERO += [("jax", case) for case in (*FOR_JAX, case_named("Mahalanobis"), case_named("PseudoHuber"))]


@pytest.mark.parametrize(("name", "case"), ZERO, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@settings(max_examples=3)
@given(p=problems(shapes=SHAPES[:1]))
def test_no_order_is_nan_at_zero_distance(name: str, case: Case, dtype: str, p: Problem) -> None:
    """Three derivatives of a batch with vectors on their codewords are finite; the first is straight-through."""
    if (name, dtype) == ("jax", "float64"):
        pytest.skip("float32 has the narrower range; torch shows that float64 is no different")
    on = np.arange(p.indices.size) % 2 == 0
    z = np.where(on[:, None], p.q, p.z).astype(dtype)
    codebook, noise = p.codebook.astype(dtype), p.noise.astype(dtype)
    estimator = case.make(p.width)
    if name == "torch":
        import torch

        a, b = torch.tensor(z).requires_grad_(), torch.tensor(codebook).requires_grad_()
        options = {"noise": torch.tensor(noise), "indices": torch.tensor(p.indices)}
        value = loss(torch, dq.quantize(a, b, estimator, **options).z_q)
        orders = []
        for _ in range(3):
            grads = torch.autograd.grad(value, (a, b), create_graph=True, materialize_grads=True)
            orders.append([g.detach().numpy() for g in grads])
            value = penalty(torch, grads)
    else:
        jax = pytest.importorskip("jax")
        with precision(library_named("jax"), dtype):
            options = {"noise": jax.numpy.asarray(noise), "indices": jax.numpy.asarray(p.indices)}

            def function(z: Any, codebook: Any) -> Any:
                return loss(jax.numpy, dq.quantize(z, codebook, estimator, **options).z_q)

            orders = []
            for _ in range(3):
                gradient = jax.grad(function, argnums=(0, 1))
                orders.append([np.asarray(g) for g in gradient(jax.numpy.asarray(z), jax.numpy.asarray(codebook))])
                function = lambda z, e, inner=gradient: penalty(jax.numpy, inner(z, e))  # noqa: E731
    for grads in orders:
        assert all(np.all(np.isfinite(g)) for g in grads)
    slope = np.sin(z) + z * np.cos(z)
    # One sine, one cosine, two products and a sum.
    np.testing.assert_allclose(orders[0][0][on], slope[on], rtol=0, atol=16 * EPS[dtype] * (1 + np.max(np.abs(z))))
