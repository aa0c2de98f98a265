"""Forward, pullback and pushforward against plain stop-gradient expressions, in every library and dtype."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import diveq_core as dq
from libraries import Library, library_named
from reference import CASES, Case, case_named, expected, expression, frozen
from strategies import (
    EPS,
    ROUNDINGS,
    Problem,
    assert_within,
    dtypes_of,
    example_count,
    precision,
    problems,
    round_to,
    to_library,
)

pytest.importorskip("torch", reason="torch's automatic differentiation is the reference")

by_case = pytest.mark.parametrize("case", CASES, ids=repr)
differentiating = pytest.mark.parametrize("name", ["torch", "jax", "mlx"])


def arrays_of(library: Library, p: Problem, dtype: str) -> dict[str, Any]:
    """All arrays of a problem in one dtype, in the order of the fields."""
    names = ("z", "codebook", "noise", "g", "dz", "dcodebook")
    arrays = {name: to_library(library, getattr(p, name), dtype) for name in names}
    return arrays | {"indices": library.to(p.indices.astype(np.int32))}


@by_case
@given(data=st.data())
def test_verbs_are_plain_automatic_differentiation(library: Library, case: Case, data: st.DataObject) -> None:
    """``vjp`` and ``jvp`` equal torch's differentiation of the plain expression in float64, to rounding."""
    if case.differentiating_only and not library.differentiates:
        pytest.skip(f"{library.name} has no automatic differentiation for a radius given by its value")
    dtype = data.draw(st.sampled_from(dtypes_of(library)))
    p = data.draw(problems()).rounded(dtype)
    want, estimator = expected(case, p), case.make(p.width)
    with precision(library, dtype):
        a = arrays_of(library, p, dtype)
        options = {"noise": a["noise"], "indices": a["indices"]}
        same, tangent = dq.jvp(a["z"], a["codebook"], a["dz"], a["dcodebook"], estimator, **options)
        assert_within(tangent, want.tangent, want.sizes["tangent"], dtype, library, ROUNDINGS)
        # Of few vectors a pullback may keep what the forward pass computed, of many it computes it anew.
        for few in (0, 1 << 14):
            with patch("diveq_core.estimators.rule._FEW", few):
                out, pullback = dq.vjp(a["z"], a["codebook"], estimator, **options)
                g_z, g_codebook = pullback(a["g"])
            for name, value in {"z_q": out.z_q, "g_z": g_z, "g_codebook": g_codebook}.items():
                assert_within(value, getattr(want, name), want.sizes[name], dtype, library, ROUNDINGS)
            np.testing.assert_array_equal(library.back(same.z_q), library.back(out.z_q))


@by_case
@given(p=problems())
def test_pullback_and_pushforward_are_adjoint(library: Library, case: Case, p: Problem) -> None:
    r"""``<g, jvp(dz, dE)> = <g_z, dz> + <g_E, dE>``."""
    if case.differentiating_only and not library.differentiates:
        pytest.skip(f"{library.name} has no automatic differentiation for a radius given by its value")
    dtype = "float64" if library.float64 else "float32"
    p, estimator = p.rounded(dtype), case.make(p.width)
    a = arrays_of(library, p, dtype)
    options = {"noise": a["noise"], "indices": a["indices"]}
    _, pullback = dq.vjp(a["z"], a["codebook"], estimator, **options)
    pulled = [library.back(x).astype(np.float64) for x in pullback(a["g"])]
    _, tangent = dq.jvp(a["z"], a["codebook"], a["dz"], a["dcodebook"], estimator, **options)
    left = np.sum(p.g * library.back(tangent))
    right = np.sum(p.dz * pulled[0]) + np.sum(p.dcodebook * pulled[1])
    # The same sums as above, each weighted by what it is multiplied with.
    sizes = expected(case, p).sizes
    size = np.sum(np.abs(p.g) * sizes["tangent"]) + np.sum(np.abs(p.dz) * sizes["g_z"])
    size += np.sum(np.abs(p.dcodebook) * sizes["g_codebook"])
    assert abs(left - right) <= ROUNDINGS * EPS[dtype] * size


@by_case
@given(p=problems(away=True))
def test_pullback_is_finite_differences_of_the_frozen_surrogate(case: Case, p: Problem) -> None:
    if case.differentiating_only:
        pytest.skip("NumPy has no automatic differentiation for a radius given by its value")
    if case.name == "Cosine" and p.width == 1:
        pytest.skip("the cosine of one coordinate is constant but for a jump")
    estimator, q, dq_ = case.make(p.width), p.q, p.dcodebook[p.indices]
    surrogate = frozen(case, p.z, q, p.noise)
    # No coordinate of q - z is below 1/4, so steps of this size cross no kink. Fourth order: what is
    # left is of order (step / 1/4)^4 = 2^-32, times a fifth derivative of (1, ..., 100), and rounding of 2^-53 / step.
    step = 2.0**-10 / max(1.0, np.max(np.abs(p.dz)), np.max(np.abs(dq_)))

    def central(h: float) -> np.ndarray:
        ahead = surrogate(p.z + h * p.dz, q + h * dq_)
        return (ahead - surrogate(p.z - h * p.dz, q - h * dq_)) / (2 * h)

    slope = (4 * central(step) - central(2 * step)) / 3
    _, tangent = dq.jvp(p.z, p.codebook, p.dz, p.dcodebook, estimator, noise=p.noise, indices=p.indices)
    size = np.max(expected(case, p).sizes["tangent"], axis=-1, keepdims=True)
    if case.name == "Cosine":
        size = size * (1 + np.max(expected(case, p).sizes["second"]))
    assert np.all(np.abs(tangent - slope) <= 1e-8 * size)
    _, pullback = dq.vjp(p.z, p.codebook, estimator, noise=p.noise, indices=p.indices)
    g_z, g_codebook = pullback(p.g)
    moved = np.sum(g_z * p.dz) + np.sum(g_codebook * p.dcodebook)
    assert abs(np.sum(p.g * slope) - moved) <= 1e-8 * np.sum(np.abs(p.g) * size)


@differentiating
@by_case
@given(data=st.data())
def test_quantize_differentiates_to_the_same(name: str, case: Case, data: st.DataObject) -> None:
    """Reverse mode of ``quantize`` itself, from the output on."""
    library = library_named(name)
    dtype = data.draw(st.sampled_from(dtypes_of(library)))
    p = data.draw(problems()).rounded(dtype)
    want, estimator = expected(case, p), case.make(p.width)
    with precision(library, dtype):
        a = arrays_of(library, p, dtype)
        options = {"noise": a["noise"], "indices": a["indices"]}
        if name == "torch":
            import torch

            z, codebook = (x.requires_grad_() for x in (a["z"], a["codebook"]))
            with patch("diveq_core.estimators.rule._FEW", data.draw(st.sampled_from([0, 1 << 14]))):
                z_q = dq.quantize(z, codebook, estimator, **options).z_q
                g_z, g_codebook = torch.autograd.grad(z_q, (z, codebook), a["g"], materialize_grads=True)
        elif name == "mlx":
            import mlx.core as mx

            (z_q,), (g_z, g_codebook) = mx.vjp(
                lambda *x: dq.quantize(*x, estimator, **options).z_q, [a["z"], a["codebook"]], [a["g"]]
            )
        else:
            import jax

            def quantize(z: Any, codebook: Any) -> Any:
                return dq.quantize(z, codebook, estimator, **options).z_q

            z_q, pullback = jax.vjp(quantize, a["z"], a["codebook"])
            g_z, g_codebook = pullback(a["g"])
        got = {"z_q": z_q, "g_z": g_z, "g_codebook": g_codebook}
        for key, value in got.items():
            assert_within(value, getattr(want, key), want.sizes[key], dtype, library, ROUNDINGS)


# torch.func.jvp compiles its decompositions so.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@differentiating
@by_case
@settings(max_examples=example_count(0.2))
@given(p=problems())
def test_quantize_pushes_forward_to_the_same(name: str, case: Case, p: Problem) -> None:
    """Forward mode of ``quantize`` itself."""
    library = library_named(name)
    p = p.rounded("float32")
    want, estimator = expected(case, p), case.make(p.width)
    a = arrays_of(library, p, "float32")

    def quantize(z: Any, codebook: Any) -> Any:
        return dq.quantize(z, codebook, estimator, noise=a["noise"], indices=a["indices"]).z_q

    if name == "torch":
        from torch.func import jvp
    elif name == "mlx":
        import mlx.core as mx

        jvp = lambda *call: [x for (x,) in mx.jvp(*call)]  # noqa: E731
    else:
        from jax import jvp
    pairs = [(a["z"], a["codebook"]), (a["dz"], a["dcodebook"])]
    z_q, tangent = jvp(quantize, *(map(list, pairs) if name == "mlx" else pairs))
    assert_within(z_q, want.z_q, want.sizes["z_q"], "float32", library, ROUNDINGS)
    assert_within(tangent, want.tangent, want.sizes["tangent"], "float32", library, ROUNDINGS)


@by_case
@settings(max_examples=example_count(0.3))
@given(p=problems())
def test_torch_and_jax_differentiate_the_expression_alike(case: Case, p: Problem) -> None:
    """JAX's own differentiation of the plain expression: the reference does not rest on torch alone."""
    jax = pytest.importorskip("jax")
    want = expected(case, p)
    with jax.enable_x64(True):

        def plain(z: Any, codebook: Any) -> Any:
            return expression(
                case, jax.numpy, jax.lax.stop_gradient, z, codebook[p.indices], jax.numpy.asarray(p.noise)
            )

        z_q, pullback = jax.vjp(plain, jax.numpy.asarray(p.z), jax.numpy.asarray(p.codebook))
        g_z, g_codebook = pullback(jax.numpy.asarray(p.g))
        got = {"z_q": z_q, "g_z": g_z, "g_codebook": g_codebook}
        for name, value in got.items():
            error = np.abs(np.asarray(value) - getattr(want, name))
            assert np.all(error <= ROUNDINGS * EPS["float64"] * want.sizes[name])


HARD = [case for case in CASES if case.hard]


@pytest.mark.parametrize("case", HARD, ids=repr)
@given(p=problems())
def test_hard_output_is_the_codeword_bit_for_bit(library: Library, case: Case, p: Problem) -> None:
    """Where z + (q - z) is not: at codewords of -0.0, of the smallest normal and of the largest numbers."""
    if case.differentiating_only and not library.differentiates:
        pytest.skip(f"{library.name} has no automatic differentiation for a radius given by its value")
    codebook = p.codebook.astype(np.float32)
    codebook[0] = np.resize(np.array([-0.0, 2.0**-126, -(2.0**127), 1 / 3], np.float32), p.width)
    z, indices = (3 * p.z).astype(np.float32), library.to(p.indices)
    out = dq.quantize(library.to(z), library.to(codebook), case.make(p.width), indices=indices)
    got = library.back(out.z_q)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.uint32), codebook[p.indices].view(np.uint32))
    exact = library.back(dq.lookup(indices, library.to(codebook)))
    np.testing.assert_array_equal(got.view(np.uint32), exact.view(np.uint32))


@pytest.mark.parametrize("name", ["numpy", "array_api_strict", "torch", "mlx"])
def test_hard_output_keeps_subnormal_codewords(name: str) -> None:
    """XLA flushes subnormal numbers to zero on some devices, so JAX is not held to it."""
    library = library_named(name)
    codebook = np.array([[1e-40, -1e-45], [-1e-42, 0.0]], np.float32)
    out = dq.quantize(
        library.to(np.ones((2, 2), np.float32)),
        library.to(codebook),
        dq.DiVeQDetach(),
        indices=library.to(np.array([1, 0])),
    )
    np.testing.assert_array_equal(library.back(out.z_q).view(np.uint32), codebook[[1, 0]].view(np.uint32))


@pytest.mark.parametrize("case", [c for c in CASES if not c.differentiating_only], ids=repr)
@given(p=problems())
def test_a_vector_on_its_codeword_is_straight_through(library: Library, case: Case, p: Problem) -> None:
    """Where rho = 0: z_q = z, g_z = g, g_q = 0 and dz_q = dz, exactly, beside rows that are not there."""
    if not case.of_difference and case.name != "Cosine":
        pytest.skip("this radius has no zero")
    dtype = "float64" if library.float64 else "float32"
    p = p.rounded(dtype)
    on = np.arange(p.indices.size).reshape(p.indices.shape) % 2 == 0
    # Codeword 0 is reached by vectors that sit on it and by no others.
    count = p.codebook.shape[0]
    codebook = np.concatenate([p.codebook, p.codebook[:1] + 1])
    indices = np.where(on, 0, count)
    z = np.where(on[..., None], codebook[0], p.z)
    estimator = case.make(p.width)
    a = {k: to_library(library, v, dtype) for k, v in {"z": z, "e": codebook, "noise": p.noise, "g": p.g}.items()}
    options = {"noise": a["noise"], "indices": library.to(indices)}
    out, pullback = dq.vjp(a["z"], a["e"], estimator, **options)
    g_z, g_codebook = (library.back(x) for x in pullback(a["g"]))
    ones = to_library(library, np.ones_like(codebook), dtype)
    _, tangent = dq.jvp(a["z"], a["e"], a["g"], ones, estimator, **options)
    np.testing.assert_array_equal(library.back(out.z_q)[on], z[on])
    np.testing.assert_array_equal(g_z[on], p.g[on])
    np.testing.assert_array_equal(library.back(tangent)[on], p.g[on])
    np.testing.assert_array_equal(g_codebook[0], 0)
    assert np.all(np.isfinite(g_z))
    assert np.all(np.isfinite(g_codebook))
    assert np.all(np.isfinite(library.back(tangent)))


# Scales whose squares leave the dtype's range, up to where sums of vectors still fit.
EXTREME = [("float32", scale) for scale in (1e-30, 1e-18, 1e15, 1e30)] + [("float64", 1e-150), ("float64", 1e150)]


@by_case
@pytest.mark.parametrize(("dtype", "scale"), EXTREME)
@settings(max_examples=example_count(0.2))
@given(p=problems())
def test_extreme_scales_are_finite_and_right(
    library: Library, case: Case, dtype: str, scale: float, p: Problem
) -> None:
    """Float32 against float64; float64 against the same problem brought to order one by a power of two."""
    if case.differentiating_only and not library.differentiates:
        pytest.skip(f"{library.name} has no automatic differentiation for a radius given by its value")
    if case.name.startswith(("CustomRadius", "callable")):
        pytest.skip("the range of a radius of one's own is its author's affair")
    if dtype not in dtypes_of(library):
        pytest.skip(f"{library.name} has no float64")
    if case.sigma and not np.isinf(case.sigma):
        # sigma is in the units of z: noise in those units is what the float64 reference scales.
        p = Problem(**{**vars(p), "noise": round_to(p.noise, dtype)})
    power = 2.0 ** np.round(np.log2(scale))
    p = p.rounded(dtype).scaled(power)
    reference = p if dtype == "float32" else p.scaled(1 / power)
    estimator = case.make(p.width)
    unscaled = 1.0
    if dtype == "float64":
        unscaled = 1 / power
        if case.sigma and not np.isinf(case.sigma):
            estimator = dq.DiVeQ(case.sigma * power)
        if case.name == "PseudoHuber":
            estimator = dq.Radial(dq.PseudoHuber(0.5 * power))
    want = expected(case, reference)
    with precision(library, dtype):
        a = arrays_of(library, p, dtype)
        options = {"noise": a["noise"], "indices": a["indices"]}
        out, pullback = dq.vjp(a["z"], a["codebook"], estimator, **options)
        g_z, g_codebook = pullback(a["g"])
        _, tangent = dq.jvp(a["z"], a["codebook"], a["dz"], a["dcodebook"], estimator, **options)
        got = {"z_q": out.z_q, "g_z": g_z, "g_codebook": g_codebook, "tangent": tangent}
        for name, value in got.items():
            if name in ("z_q", "tangent") and unscaled != 1:
                value = value * to_library(library, np.array(unscaled), dtype)
            assert_within(value, getattr(want, name), want.sizes[name], dtype, library, ROUNDINGS)


MIXED = [("float16", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float64")]


@pytest.mark.parametrize(("z_dtype", "codebook_dtype"), MIXED)
@pytest.mark.parametrize("case", [case_named("DiVeQ"), case_named("Power(1)"), case_named("STE")], ids=repr)
@given(p=problems())
def test_mixed_dtypes(library: Library, case: Case, z_dtype: str, codebook_dtype: str, p: Problem) -> None:
    """The output has the result dtype, each cotangent its primal's."""
    if not {z_dtype, codebook_dtype} <= set(dtypes_of(library)):
        pytest.skip(f"{library.name} lacks one of the dtypes")
    wide = max(z_dtype, codebook_dtype, key=lambda name: -EPS[name])
    p = Problem(**{**vars(p.rounded(z_dtype)), "codebook": round_to(p.codebook, codebook_dtype)})
    p = Problem(**{**vars(p), "dcodebook": round_to(p.dcodebook, codebook_dtype)})
    want, estimator = expected(case, p), case.make(p.width)
    with precision(library, wide), promoting(library):
        a = arrays_of(library, p, z_dtype)
        a |= {name: to_library(library, getattr(p, name), codebook_dtype) for name in ("codebook", "dcodebook")}
        a["g"] = to_library(library, p.g, wide)
        options = {"noise": a["noise"], "indices": a["indices"]}
        out, pullback = dq.vjp(a["z"], a["codebook"], estimator, **options)
        g_z, g_codebook = pullback(a["g"])
        _, tangent = dq.jvp(a["z"], a["codebook"], a["dz"], a["dcodebook"], estimator, **options)
        got = {"z_q": (out.z_q, wide), "g_z": (g_z, z_dtype), "g_codebook": (g_codebook, codebook_dtype)}
        for name, (value, dtype) in (got | {"tangent": (tangent, wide)}).items():
            assert_within(value, getattr(want, name), want.sizes[name], dtype, library, ROUNDINGS)


def promoting(library: Library) -> Any:
    """The tests make JAX refuse implicit promotion; a user who mixes dtypes has not."""
    import contextlib

    if library.name != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.numpy_dtype_promotion("standard")


@given(p=problems())
def test_same_noise_gives_the_same_numbers_everywhere(library: Library, p: Problem) -> None:
    """Float32 in every library, against NumPy's float32 rather than against the truth."""
    p = p.rounded("float32")
    for case in CASES:
        if case.differentiating_only:
            continue
        want = expected(case, p).sizes
        a, b = arrays_of(library, p, "float32"), arrays_of(library_named("numpy"), p, "float32")
        results = []
        for x in (a, b):
            options = {"noise": x["noise"], "indices": x["indices"]}
            out, pullback = dq.vjp(x["z"], x["codebook"], case.make(p.width), **options)
            results.append(dict(zip(("z_q", "g_z", "g_codebook"), (out.z_q, *pullback(x["g"])), strict=True)))
        for name, value in results[0].items():
            assert_within(value, results[1][name], want[name], "float32", library, ROUNDINGS)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_noise_beyond_all_bounds_is_noise_substitution(library: Library, dtype: str) -> None:
    """DiVeQ tends to NSVQ, also where sigma is out of the dtype's range; space-filling DiVeQ likewise."""
    if dtype == "float64" and not library.float64:
        pytest.skip(f"{library.name} has no float64")
    rng = np.random.default_rng(0)
    shapes = (5, 4), (6, 4), (5, 4), (2, 5, 4), (5, 4)
    with precision(library, dtype):
        z, codebook, noise, ends, g = (library.to(rng.standard_normal(s).astype(dtype)) for s in shapes)
        curve = dq.CurveNoise(library.to(rng.random(5).astype(dtype)), ends)

        def found(estimator: dq.Estimator, noise: Any) -> list[np.ndarray]:
            out, pullback = dq.vjp(z, codebook, estimator, noise=noise)
            return [library.back(x) for x in (out.z_q, *pullback(g))]

        limit, far = found(dq.NSVQ(), noise), found(dq.SFDiVeQ(sigma=1e8), curve)
        for sigma in (1e14, 1e16, 1e30, 1e308):
            # Of order one, and from the limit as far as the error over sigma.
            for a, b in zip(found(dq.DiVeQ(sigma=sigma), noise), limit, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=100 * EPS[dtype] + 100 / sigma)
            for a, b in zip(found(dq.SFDiVeQ(sigma=sigma), curve), far, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=100 * EPS[dtype] + 1e-6)
