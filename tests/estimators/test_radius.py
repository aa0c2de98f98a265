"""The radii: ln r and its two gradients, and what each promises besides."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import diveq_core as dq
from diveq_core.arrays.registry import backend_of
from libraries import Library, library_named
from reference import RADIAL_CASES, Case, case_named, expected, matrix
from strategies import EPS, ROUNDINGS, Problem, example_count, problems

torch = pytest.importorskip("torch", reason="torch's automatic differentiation is the reference")

STATED = [case for case in RADIAL_CASES if not case.differentiating_only]


@pytest.mark.parametrize("case", STATED, ids=repr)
@given(p=problems(away=True))
def test_log_and_its_gradients(library: Library, case: Case, p: Problem) -> None:
    """``log`` is ln r itself, and ``log_gradients`` its two gradients by torch's differentiation."""
    if case.name == "Cosine" and p.width == 1:
        pytest.skip("the cosine of one coordinate is constant but for a jump")
    dtype = "float64" if library.float64 else "float32"
    p = p.rounded(dtype)
    rows_z, rows_q = (x.reshape(-1, p.width) for x in (p.z, p.q))
    z, q = (torch.tensor(x).requires_grad_() for x in (rows_z, rows_q))
    log_r = torch.log(case.length(torch, q, z))
    grads = torch.autograd.grad(log_r.sum() + 0 * (q + z).sum(), (q, z))
    radius, a, b = case.make(p.width).radius, library.to(rows_q.astype(dtype)), library.to(rows_z.astype(dtype))
    lib = backend_of("test", z=a)
    value = library.back(radius.log(lib, a, b))
    got = [library.back(x) for x in radius.log_gradients(lib, a, b)]
    d = np.linalg.norm(rows_q - rows_z, axis=1, keepdims=True)
    lossy = 1.0
    if case.name == "Cosine":
        lossy = 1 + 2 / case.length(np, rows_q, rows_z)
        d = np.minimum(d, np.minimum(*(np.linalg.norm(x, axis=1, keepdims=True) for x in (rows_q, rows_z))))
    size = lossy * (np.max(np.abs([g.numpy() for g in grads]), axis=(0, 2))[:, None] + 1 / d)
    assert np.all(np.abs(value - log_r.detach().numpy()) <= ROUNDINGS * EPS[dtype] * (lossy + np.abs(value)))
    for ours, theirs in zip(got, grads, strict=True):
        assert np.all(np.abs(ours - theirs.numpy()) <= ROUNDINGS * EPS[dtype] * size)


def pullback_rows(library: Library, estimator: dq.Estimator, z: np.ndarray, q: np.ndarray, g: np.ndarray) -> Any:
    """(g_z, g_q) in NumPy, each vector with a codeword of its own."""
    indices = library.to(np.arange(len(z)))
    _, pullback = dq.vjp(library.to(z), library.to(q), estimator, indices=indices)
    return [library.back(x) for x in pullback(library.to(g))]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("p", [1.0, 1.25, 1.5, 2.0, 3.0, 8.0])
def test_p_norm_of_coordinates_that_differ_by_the_whole_range(library: Library, p: float, dtype: str) -> None:
    """A coordinate that is small beside the largest, or subnormal, or zero, is no cause for infinity."""
    if dtype == "float64" and not library.float64:
        pytest.skip(f"{library.name} has no float64 here")
    small = [0.0, 1e-10, 1e-20, 1e-30, 1e-37, 1e-40, -1e-25] + ([1e-200, 1e-310] if dtype == "float64" else [])
    d = np.array([[1.0, x] for x in small], dtype)
    z, g = np.zeros_like(d), np.ones_like(d)
    g_z, g_q = pullback_rows(library, dq.Radial(dq.PNorm(p)), z, d, g)
    x = d.astype(np.float64)
    total = np.sum(np.abs(x) ** p, axis=1, keepdims=True)
    want = np.sum(x, axis=1, keepdims=True) * np.sign(x) * np.abs(x) ** (p - 1) / total
    if p == 1:
        # Whether a subnormal coordinate has a sign is up to the library, which may flush it to zero.
        flushed = (np.abs(x) < np.finfo(dtype).smallest_normal) & (g_q == 0)
        want = np.where(flushed, 0, want)
    np.testing.assert_allclose(g_q, want, rtol=0, atol=ROUNDINGS * EPS[dtype])
    np.testing.assert_allclose(g_z, 1 - want, rtol=0, atol=ROUNDINGS * EPS[dtype])


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("small", [0.0, 1e-20, 1e-30, 1e-40])
def test_p_norm_second_derivative_of_unequal_coordinates(p: float, small: float) -> None:
    """Where d_2 -> 0, |d_2|^(p-2) is zero for p = 1, and for p > 1 as the formula has it; it is never NaN."""
    z = torch.zeros(1, 2, requires_grad=True)
    q = torch.tensor([[1.0, small]])
    _, pullback = dq.vjp(z, q, dq.Radial(dq.PNorm(p)), indices=torch.tensor([0]))
    (second,) = torch.autograd.grad(pullback(torch.tensor([[1.0, 0.0]]))[0][0, 0], z)
    assert torch.isfinite(second).all()
    # g_z0 = 1 - d_0 |d_0|^(p-1) / sum |d|^p = 1 - 1 / (1 + small^p) where d_0 = 1, whose slope is of order small^p.
    assert abs(second[0, 0].item()) <= p * (8 * EPS["float32"] + small**p)


@pytest.mark.parametrize("delta", [1e-300, 1e-50, 1e-38, 1e38, 1e50, 1e300])
def test_pseudo_huber_with_delta_out_of_the_dtype_s_range(library: Library, delta: float) -> None:
    """Far below rho it is DiVeQ-detach, far above straight-through, also where float32 cannot hold delta."""
    d = np.array([[0.0, 0.0], [3.0, 4.0], [1e-20, 0.0], [1e30, 1e30]], np.float32)
    z, g = np.zeros_like(d), np.ones_like(d)
    g_z, g_q = pullback_rows(library, dq.Radial(dq.PseudoHuber(delta)), z, d, g)
    u = d / np.maximum(np.linalg.norm(d.astype(np.float64), axis=1, keepdims=True), 1e-300)
    want = np.sum(u, axis=1, keepdims=True) * u if delta < 1 else np.zeros_like(d)
    np.testing.assert_allclose(g_q, want, rtol=0, atol=ROUNDINGS * EPS["float32"])
    np.testing.assert_allclose(g_z, 1 - want, rtol=0, atol=ROUNDINGS * EPS["float32"])


@given(p=problems())
def test_only_the_symmetric_part_of_the_matrix_acts(library: Library, p: Problem) -> None:
    dtype = "float64" if library.float64 else "float32"
    p = p.rounded(dtype)
    m = matrix(p.width)
    both = []
    for each in (m, (m + m.T) / 2):
        estimator = dq.Radial(dq.Mahalanobis(each))
        _, pullback = dq.vjp(
            library.to(p.z.astype(dtype)),
            library.to(p.codebook.astype(dtype)),
            estimator,
            indices=library.to(p.indices),
        )
        both.append([library.back(x) for x in pullback(library.to(p.g.astype(dtype)))])
    for a, b in zip(*both, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_matrix_may_be_of_the_library(library: Library) -> None:
    m = matrix(2).astype(np.float32)
    z, q, g = (np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32) for _ in range(3))
    ours = pullback_rows(library, dq.Radial(dq.Mahalanobis(library.to(m))), z, q, g)
    theirs = pullback_rows(library, dq.Radial(dq.Mahalanobis(m)), z, q, g)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("width", [1, 3, 64])
def test_vectors_along_one_ray_have_no_angle(library: Library, width: int) -> None:
    """The cosine is straight-through there, whatever the lengths: rounding leaves no angle to enlarge."""
    rng = np.random.default_rng(0)
    ray = rng.standard_normal((200, width))
    z, q = ((np.exp(rng.uniform(-9, 9, (200, 1))) * ray).astype(np.float32) for _ in range(2))
    g = rng.standard_normal((200, width)).astype(np.float32)
    g_z, g_q = pullback_rows(library, dq.Radial(dq.Cosine()), z, q, g)
    np.testing.assert_array_equal(g_z, g)
    np.testing.assert_array_equal(g_q, 0)


@pytest.mark.parametrize("name", ["torch", "jax"])
@settings(max_examples=example_count(0.3))
@given(p=problems())
def test_custom_radius_that_is_zero_where_rho_is(name: str, p: Problem) -> None:
    """The user's own square root has no derivative at zero; the estimator is straight-through there."""
    library = library_named(name)
    p = p.rounded("float32")
    case, codebook = case_named("DiVeQDetach"), p.codebook
    on = np.arange(p.indices.size).reshape(p.indices.shape) % 2 == 0
    p = Problem(**{**vars(p), "z": np.where(on[..., None], codebook[p.indices], p.z)})
    estimator = dq.Radial(lambda q, z: ((q - z) ** 2).sum(-1) ** 0.5)
    _, pullback = dq.vjp(
        library.to(p.z.astype(np.float32)),
        library.to(codebook.astype(np.float32)),
        estimator,
        indices=library.to(p.indices),
    )
    got = [library.back(x) for x in pullback(library.to(p.g.astype(np.float32)))]
    want = expected(case, p)
    for name, value in zip(("g_z", "g_codebook"), got, strict=True):
        error = np.abs(value - getattr(want, name))
        assert np.all(error <= ROUNDINGS * EPS["float32"] * want.sizes[name])


@pytest.mark.parametrize("shape", ["(N,)", "(N, 1)"])
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_custom_radius_by_row_or_column(name: str, shape: str) -> None:
    library = library_named(name)
    rng = np.random.default_rng(0)
    z, q, g = (rng.standard_normal((4, 3)).astype(np.float32) for _ in range(3))
    custom = dq.Radial(lambda q, z: ((q - z) ** 2).sum(-1) if shape == "(N,)" else ((q - z) ** 2).sum(-1)[:, None])
    got = pullback_rows(library, custom, z, q, g)
    want = pullback_rows(library, dq.Radial(dq.Power(2.0)), z, q, g)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDINGS * EPS["float32"] * np.max(np.abs(b)))


@given(p=problems(away=True))
def test_family_members_that_coincide(p: Problem) -> None:
    """Power(1), PNorm(2), Mahalanobis(identity) and a pseudo-Huber of small delta are DiVeQ-detach."""
    same = [dq.Power(1.0), dq.PNorm(2.0), dq.Mahalanobis(np.eye(p.width)), dq.PseudoHuber(1e-9)]
    _, pullback = dq.vjp(p.z, p.codebook, dq.DiVeQDetach(), indices=p.indices)
    want, sizes = pullback(p.g), expected(case_named("DiVeQDetach"), p).sizes
    for radius in same:
        _, pullback = dq.vjp(p.z, p.codebook, dq.Radial(radius), indices=p.indices)
        for name, a, b in zip(("g_z", "g_codebook"), pullback(p.g), want, strict=True):
            # rho is above 1/4 here, so delta^2 / rho^2 is below 2^-53 / 8.
            assert np.all(np.abs(a - b) <= ROUNDINGS * EPS["float64"] * sizes[name]), radius


def test_power_two_reflects() -> None:
    """alpha = 2 mirrors g in the plane across u: length kept, and twice is the identity."""
    rng = np.random.default_rng(0)
    z, q, g = (rng.standard_normal((5, 4)) for _ in range(3))
    once, _ = pullback_rows(library_named("numpy"), dq.Radial(dq.Power(2.0)), z, q, g)
    twice, _ = pullback_rows(library_named("numpy"), dq.Radial(dq.Power(2.0)), z, q, once)
    np.testing.assert_allclose(np.linalg.norm(once, axis=1), np.linalg.norm(g, axis=1), rtol=ROUNDINGS * EPS["float64"])
    np.testing.assert_allclose(twice, g, rtol=0, atol=ROUNDINGS * EPS["float64"] * np.max(np.abs(g)))
    assert not math.isclose(once[0, 0], g[0, 0])


def test_equal_matrices_are_one_radius(library: Library) -> None:
    m = matrix(2).astype(np.float32)
    of_numpy, of_library = dq.Mahalanobis(m), dq.Mahalanobis(library.to(m))
    others = [dq.Mahalanobis(m.copy()), dq.Mahalanobis(m.astype(np.float64)), of_library, copy.copy(of_library)]
    # array_api_strict's arrays cannot be pickled.
    others += [] if library.name == "array_api_strict" else [pickle.loads(pickle.dumps(of_library))]
    for other in others:
        assert other == of_numpy
        assert hash(other) == hash(of_numpy)
        assert dq.Radial(other) == dq.Radial(of_numpy)
    assert copy.deepcopy(of_numpy) == of_numpy
    assert of_numpy != dq.Mahalanobis(m * np.float32(1 + 1e-6))
    assert of_numpy != dq.Mahalanobis(np.eye(3))
    np.testing.assert_array_equal(library.back(of_library.matrix), m)


def test_a_matrix_in_another_precision(library: Library) -> None:
    """Which no library factors, though all compute with it."""
    # Twice the largest is no number of 16 bits.
    m = np.array([[4e4, 2.0], [0.0, 3e4]])
    given = [library.to(m.astype(np.float16))] if library.float16 else []
    given += [library.cast(library.to(m.astype(np.float32)), library.bfloat16)] if library.bfloat16 else []
    given += [m.astype(np.longdouble)] if library.name == "numpy" else []
    for each in given:
        radius = dq.Mahalanobis(each)
        assert radius.matrix.dtype == each.dtype
        with pytest.raises(ValueError, match=r"^Mahalanobis: matrix must be positive definite"):
            dq.Mahalanobis(-each)
    assert given or library.name == "array_api_strict"


def test_a_matrix_that_is_overwritten_was_copied() -> None:
    m = np.eye(2)
    radius = dq.Mahalanobis(m)
    m[0, 0] = 5.0
    assert radius == dq.Mahalanobis(np.eye(2))
    np.testing.assert_array_equal(radius.matrix, np.eye(2))
    assert radius == dq.Mahalanobis(np.array([[1.0, -0.0], [-0.0, 1.0]]))


def test_copies_are_traced_once_in_jax() -> None:
    jax = pytest.importorskip("jax")
    traced = []

    @functools.partial(jax.jit, static_argnums=2)
    def f(z: Any, codebook: Any, estimator: Any) -> Any:
        traced.append(estimator)
        return jax.grad(lambda z: (dq.quantize(z, codebook, estimator).z_q ** 2).sum())(z)

    z, codebook = np.random.default_rng(0).standard_normal((2, 4, 2), dtype=np.float32)
    estimator = dq.Radial(dq.Mahalanobis(matrix(2)))
    for each in (estimator, copy.deepcopy(estimator), dq.Radial(dq.Mahalanobis(matrix(2)))):
        f(z, codebook, each)
    assert len(traced) == 1
    other = dq.Radial(dq.Mahalanobis(np.diag([1.0, 9.0])))
    expected = dq.vjp(z, codebook, other)[1](2 * codebook[dq.nearest(z, codebook)])[0]
    np.testing.assert_allclose(f(z, codebook, other), expected, rtol=1e-5, atol=1e-5)
    assert len(traced) == 2


def test_a_matrix_of_another_size_is_refused_at_the_first_call() -> None:
    estimator = dq.Radial(dq.Mahalanobis(np.eye(3)))
    for whole, words in ((estimator, np.ones((4, 2))), (dq.Residual(estimator, 2), np.ones((2, 4, 2)))):
        with pytest.raises(ValueError, match=r"^Mahalanobis: matrix must have shape \(D, D\) with D = 2"):
            dq.quantize(np.ones((3, 2)), words, whole)


def test_a_radius_may_have_a_width_of_its_own() -> None:
    class Wide(dq.PseudoHuber):
        width = 0.5

    z, codebook = np.ones((3, 2)), np.zeros((4, 2))
    np.testing.assert_array_equal(dq.quantize(z, codebook, dq.Radial(Wide())).z_q, 0)


def test_what_is_no_function_and_what_gives_no_arrays() -> None:
    with pytest.raises(TypeError, match=r"^CustomRadius: log_r_gradients must be callable .*, got builtins\.dict$"):
        dq.CustomRadius(abs, {})
    with pytest.raises(TypeError, match=r"^CustomRadius: r must be callable .*, got numpy\.ndarray$"):
        dq.CustomRadius(np.ones(3))
    x, q = np.ones((2, 3)), np.zeros((2, 3))
    with pytest.raises(TypeError, match=r"^CustomRadius: r\(q, z\) must give an array .*, got builtins\.float$"):
        dq.equivalent_loss(x, x, q, lambda q, z: 1.0)
    radius = dq.CustomRadius(lambda q, z: q[:, 0], lambda q, z: (1, 2))
    with pytest.raises(TypeError, match=r"^CustomRadius: log_r_gradients\(q, z\) must give two arrays"):
        dq.vjp(x, q, dq.Radial(radius))[1](x)
