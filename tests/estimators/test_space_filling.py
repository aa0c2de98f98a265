"""Space-filling DiVeQ: derivatives, decoding, and the nearest point of the whole curve."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import diveq_core as dq
from diveq_core.arrays.registry import backend_of
from libraries import Library, assert_close, generators, standard_promotion
from strategies import to_library

ESTIMATORS = [dq.SFDiVeQDetach(), dq.SFDiVeQ(0.3)]


def draw(seed: int, n: int = 9, k: int = 5, d: int = 3, dtype: type = np.float64) -> tuple[np.ndarray, ...]:
    """z, codebook with equal neighbours, dither, noise of the ends, g, dz, dcodebook; one z on a codeword."""
    rng = np.random.default_rng(seed)
    z, codebook = rng.standard_normal((n, d)), rng.standard_normal((k, d))
    codebook[k // 2] = codebook[k // 2 - 1]
    z[0] = codebook[1]
    rest = (rng.random(k - 1), rng.standard_normal((2, n, d)), rng.standard_normal((n, d)))
    return tuple(
        x.astype(dtype) for x in (z, codebook, *rest, rng.standard_normal((n, d)), rng.standard_normal((k, d)))
    )


def plain(xp: Any, sg: Any, where: Any, z: Any, codebook: Any, t: Any, ends: Any, segments: Any, sigma: float) -> Any:
    """The stop-gradient expression, with a length whose derivative at zero is zero."""

    def length(x: Any) -> Any:
        squared = (x * x).sum(-1)[:, None]
        return where(squared == 0, 0.0, where(squared == 0, 1.0, squared) ** 0.5)

    out = z
    for weight, corner, noise in ((1 - t, codebook[segments], ends[0]), (t, codebook[segments + 1], ends[1])):
        d = corner - z
        noisy = d + sigma * noise
        size = length(noisy)
        out = out + weight * length(d) * sg(noisy / where(size == 0, 1.0, size))
    return out


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(seed=st.integers(0, 10_000))
def test_derivatives_are_those_of_the_plain_expression_in_torch(estimator: Any, seed: int) -> None:
    torch = pytest.importorskip("torch")
    z, codebook, dither, ends, g, dz, dcodebook = draw(seed)
    noise = dq.CurveNoise(dither, ends)
    out, pullback = dq.vjp(z, codebook, estimator, noise=noise)
    tensors = [torch.tensor(x) for x in (dither, ends, g)]
    results = []
    for quantize in ("plain", "ours"):
        tz, twords = torch.tensor(z, requires_grad=True), torch.tensor(codebook, requires_grad=True)
        if quantize == "ours":
            z_q = dq.quantize(tz, twords, estimator, noise=dq.CurveNoise(*tensors[:2])).z_q
        else:
            i = torch.tensor(out.indices)
            t = tensors[0][i][:, None]
            z_q = plain(torch, torch.Tensor.detach, torch.where, tz, twords, t, tensors[1], i, estimator.sigma)
        first = torch.autograd.grad((z_q * tensors[2]).sum(), (tz, twords), create_graph=True)
        penalty = sum((x**2).sum() for x in first)
        results.append([z_q, *first, *torch.autograd.grad(penalty, (tz, twords))])
    # float64 of order one; directions of almost equal points amplify rounding in second order.
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)
    for ours, theirs in zip((out.z_q, *pullback(g)), results[0], strict=False):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-9, atol=1e-9)
    _, tangent = dq.jvp(z, codebook, dz, dcodebook, estimator, noise=noise)
    g_z, g_codebook = pullback(g)
    np.testing.assert_allclose(np.sum(tangent * g), np.sum(g_z * dz) + np.sum(g_codebook * dcodebook), rtol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_derivatives_are_those_of_the_plain_expression_in_jax(estimator: Any) -> None:
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    z, codebook, dither, ends, g, *_ = draw(1)
    out, pullback = dq.vjp(z, codebook, estimator, noise=dq.CurveNoise(dither, ends))
    with jax.enable_x64(True):
        jd, je, jg, i = (jnp.asarray(x) for x in (dither, ends, g, out.indices))

        def ours(z: Any, words: Any) -> Any:
            return (dq.quantize(z, words, estimator, noise=dq.CurveNoise(jd, je)).z_q * jg).sum()

        def theirs(z: Any, words: Any) -> Any:
            t = jd[i][:, None]
            return (plain(jnp, jax.lax.stop_gradient, jnp.where, z, words, t, je, i, estimator.sigma) * jg).sum()

        at = (jnp.asarray(z), jnp.asarray(codebook))
        there = jax.jit(jax.grad(ours, (0, 1)))(*at)
        for a, b, c in zip(there, jax.grad(theirs, (0, 1))(*at), pullback(g), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(a, c, rtol=1e-9, atol=1e-9)
        hessians = [jax.jit(jax.hessian(f))(*at) for f in (ours, theirs)]
        np.testing.assert_allclose(*hessians, rtol=1e-7, atol=1e-7)
        assert np.all(np.isfinite(hessians[0]))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_library_agrees(estimator: Any, library: Library) -> None:
    z, codebook, dither, ends, g, *_ = draw(2, dtype=np.float32)
    out, pullback = dq.vjp(z, codebook, estimator, noise=dq.CurveNoise(dither, ends))
    noise = dq.CurveNoise(library.to(dither), library.to(ends))
    there, there_pullback = dq.vjp(library.to(z), library.to(codebook), estimator, noise=noise)
    np.testing.assert_array_equal(library.back(there.indices), out.indices)
    # A few float32 operations of order one.
    assert_close(there.z_q, out.z_q, library, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(pullback(g), there_pullback(library.to(g)), strict=True):
        assert_close(theirs, ours, library, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_split_and_the_dithered_point_is_the_output() -> None:
    z, codebook, dither, _, g, *_ = draw(3)
    (z_q, i), pullback = dq.vjp(z, codebook, dq.SFDiVeQDetach(), noise=dq.CurveNoise(dither))
    points = (1 - dither)[:, None] * codebook[:-1] + dither[:, None] * codebook[1:]
    np.testing.assert_array_equal(z_q, points[i])
    np.testing.assert_array_equal(z_q, dq.decode_curve(i, dither[i], codebook))
    np.testing.assert_array_equal(i, ((z[:, None] - points) ** 2).sum(-1).argmin(1))
    g_z, g_codebook = pullback(g)
    np.testing.assert_allclose(g_z.sum(0) + g_codebook.sum(0), g.sum(0), atol=1e-12)


def test_noise_is_drawn_once_per_segment_and_independently_per_end(library: Library) -> None:
    z, codebook = library.to(np.zeros((400, 2), np.float32)), library.to(np.float32([[1, 0], [1, 0]]))
    rng = generators(library.name, 0)
    hard = library.back(dq.quantize(z, codebook, dq.SFDiVeQDetach(), rng=rng).z_q)
    np.testing.assert_allclose(hard, np.broadcast_to(np.float32([1, 0]), hard.shape), atol=1e-6)
    soft = library.back(dq.quantize(z, codebook, dq.SFDiVeQ(10.0), rng=rng).z_q)
    # One shared direction would leave every output at distance 1; two independent ones average to less.
    assert np.all(np.linalg.norm(soft, axis=1) <= 1 + 1e-5)
    assert np.linalg.norm(soft, axis=1).mean() < 0.99


@pytest.mark.parametrize("estimator", [dq.SFDiVeQDetach(), dq.SFDiVeQ(), dq.SFDiVeQ(0.0)], ids=repr)
def test_the_output_is_no_codeword(estimator: Any) -> None:
    assert not estimator.hard


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_drawn_dither_is_below_one(dtype: type) -> None:
    """float16 would round one in 4096 of them to one."""
    codebook = np.zeros((50_001, 1), dtype)
    lib = backend_of("test", codebook=codebook)
    rng = np.random.default_rng(0)
    dither = dq.SFDiVeQDetach().draw("test", lib, codebook[:1], codebook, None, rng).dither
    assert dither.shape == (50_000,)
    assert dither.min() >= 0
    assert dither.max() < 1
    assert abs(dither.mean() - 0.5) < 0.01


def test_the_angle_that_would_be_one_is_below(monkeypatch: pytest.MonkeyPatch) -> None:
    codebook = np.zeros((4, 1))
    lib = backend_of("test", codebook=codebook)
    # The pair (0, -1), whose angle is pi.
    monkeypatch.setattr(lib, "standard_normal", lambda function, like, rng: like - np.array([0.0, 1.0]))
    assert dq.SFDiVeQDetach().draw("test", lib, codebook[:1], codebook, None, None).dither.max() < 1


SEGMENTS = 2000


def drawn_dither(library: Library, dtype: str, estimator: Any, rng: Any, vectors: int = 1) -> np.ndarray:
    """The dither of every other segment of a curve between 0 and 1 and back, (vectors, SEGMENTS), float32.

    Those segments begin at 0 and end at 1, so that the point of each is its dither, bit for bit.
    """
    corners = np.arange(2 * SEGMENTS, dtype=np.float32)[:, None] % 2
    codebook = to_library(library, corners, dtype)
    z = library.to(np.zeros((vectors, SEGMENTS, 1), np.float32))
    indices = library.to(np.tile(np.arange(0, 2 * SEGMENTS, 2), (vectors, 1)))
    with standard_promotion():
        z_q = dq.quantize(z, codebook, estimator, rng=rng, indices=indices).z_q
    assert library.back(z_q).dtype == np.float32
    return library.back(z_q)[..., 0]


@pytest.mark.parametrize("dtype", ["float32"])
def test_drawn_dither_is_uniform_in_the_half_open_interval(library: Library, dtype: str) -> None:
    t = drawn_dither(library, dtype, dq.SFDiVeQDetach(), generators(library.name, 0))[0]
    assert t.min() >= 0
    assert t.max() < 1
    # Kolmogorov's statistic exceeds 1.95 / sqrt(n) by chance once in a thousand.
    steps = np.arange(SEGMENTS + 1) / SEGMENTS
    assert np.max(np.abs(np.sort(t) - (steps[:-1] + steps[1:]) / 2)) < 1.95 / SEGMENTS**0.5
    # A draw for each segment, none like its neighbour's: the correlation of independent ones is 0 +- 1 / sqrt(n).
    assert len(np.unique(t)) > 0.99 * SEGMENTS
    assert abs(np.corrcoef(t[1:], t[:-1])[0, 1]) < 4 / SEGMENTS**0.5


def test_dither_is_drawn_once_per_segment_and_anew_each_time(library: Library) -> None:
    t = drawn_dither(library, "float32", dq.SFDiVeQDetach(), generators(library.name, 1), vectors=2)
    np.testing.assert_array_equal(t[0], t[1])
    again = drawn_dither(library, "float32", dq.SFDiVeQDetach(), generators(library.name, 1))
    np.testing.assert_array_equal(again[0], t[0])
    other = drawn_dither(library, "float32", dq.SFDiVeQDetach(), generators(library.name, 2))
    assert (other[0] != t[0]).mean() > 0.99
    if library.name not in ("jax", "mlx"):  # whose keys are values
        rng = generators(library.name, 1)
        first, second = (drawn_dither(library, "float32", dq.SFDiVeQDetach(), rng) for _ in range(2))
        np.testing.assert_array_equal(first[0], t[0])
        assert (first != second).mean() > 0.99


def brute_force(z: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Distance of each vector to the curve, in float64."""
    z, start = z.astype(np.float64)[:, None], codebook.astype(np.float64)[:-1]
    step = codebook.astype(np.float64)[1:] - start
    squared = (step**2).sum(-1)
    t = np.clip(((z - start) * step).sum(-1) / np.where(squared == 0, 1, squared), 0, 1)
    return np.sqrt(((z - start - t[..., None] * step) ** 2).sum(-1)).min(1)


def hidden_by_rounding(z: np.ndarray, codebook: np.ndarray, best: np.ndarray) -> np.ndarray:
    """How much further than the nearest point of the curve, at a distance ``best``, float32 may take another, (N,).

    Scores are compared whose terms, twice, add up to less than 9 (|y| + |e|)^2 in the centred frame: |e|^2 from the
    start, 2 |y||e| from the product with it, and at most two of 2 |e| (|y| + |e|) from the step along a segment of
    length 2 |e|. Sums of D products, with roundings that are no conspiracy, are wrong by sqrt(D) units roundoff of
    that; three more for what they are made of. The two scores' error B hides sqrt(best^2 + B) - best of a distance.

    The point found is rounded: (1 - t) c_1 + t c_2 three times in each coordinate, which is relative to the
    codewords where they are, and t, which moves it along a segment, by as many roundings as D + 3.
    """
    u, d = float(np.finfo(np.float32).eps) / 2, z.shape[1]
    centre = codebook.astype(np.float64).mean(axis=0)
    y = np.linalg.norm(z - centre, axis=1)
    e = 2 * np.linalg.norm(codebook - centre, axis=1).max()
    squared = 2 * (np.sqrt(d) + 3) * u * 9 * (y + e) ** 2
    rounded = 3 * u * np.sqrt(d) * np.abs(codebook).max() + (d + 3) * u * (y + e)
    return np.sqrt(best**2 + squared) - best + rounded


@pytest.mark.parametrize(
    ("k", "d", "offset"), [(2, 1, 0.0), (33, 2, 0.0), (64, 8, 0.0), (64, 8, 1000.0), (300, 3, 10.0)]
)
def test_projection_finds_the_nearest_point_of_the_whole_curve(k: int, d: int, offset: float, library: Library) -> None:
    rng = np.random.default_rng(k)
    z = (offset + rng.standard_normal((500, d))).astype(np.float32)
    codebook = (offset + rng.standard_normal((k, d))).astype(np.float32)
    codebook[k // 2] = codebook[k // 2 - 1]
    out = dq.project(library.to(z), library.to(codebook))
    z_q = library.back(out.z_q)
    distance, best = np.linalg.norm(z.astype(np.float64) - z_q, axis=1), brute_force(z, codebook)
    assert np.all(distance - best <= hidden_by_rounding(z, codebook, best))
    decoded = dq.decode_curve(out.segments, out.positions, library.to(codebook))
    np.testing.assert_array_equal(library.back(decoded), z_q)
    segments, positions = library.back(out.segments), library.back(out.positions)
    assert segments.min() >= 0
    assert segments.max() < k - 1
    assert positions.min() >= 0
    assert positions.max() <= 1


@pytest.mark.parametrize("cases", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_projection_is_right_on_unordered_codebooks_in_every_case(cases: int) -> None:
    """A search of the segments next to the nearest codeword misses about half of these."""
    rng = np.random.default_rng(0)
    missed = neighbours_missed = 0
    for _ in range(cases // 1000):
        codebook = rng.standard_normal((64, 4)).astype(np.float32)
        z = rng.standard_normal((1000, 4)).astype(np.float32)
        best = brute_force(z, codebook)
        distance = np.linalg.norm(z.astype(np.float64) - dq.project(z, codebook).z_q, axis=1)
        missed += np.sum(distance > best * (1 + 1e-4) + 1e-4)
        nearest = dq.nearest(z, codebook)
        near = [brute_force(z[n : n + 1], codebook[max(i - 1, 0) : i + 2])[0] for n, i in enumerate(nearest[:50])]
        neighbours_missed += np.sum(np.array(near) > best[:50] * (1 + 1e-4) + 1e-4)
    assert missed == 0
    assert neighbours_missed > 0.3 * 50 * cases / 1000


def test_training_vectors_that_are_not_finite_show() -> None:
    library_torch = pytest.importorskip("torch")
    z = library_torch.tensor([[0.0, float("nan")], [0.5, 0.0]])
    codebook = library_torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    z_q, i = dq.quantize(z, codebook, dq.SFDiVeQDetach())
    assert i[0] == -1
    assert library_torch.isnan(z_q[0]).all()
    out = dq.project(z, codebook)
    assert out.segments.tolist() == [-1, 0]
    assert library_torch.isnan(out.z_q[0]).all()
    assert out.z_q[1].tolist() == [0.5, 0.0]


def test_no_vectors_at_all(library: Library) -> None:
    z, codebook = library.to(np.zeros((0, 3), np.float32)), library.to(np.eye(3, dtype=np.float32))
    assert dq.project(z, codebook).z_q.shape == (0, 3)
    noise = dq.CurveNoise(library.to(np.float32([0.5, 0.5])))
    out, pullback = dq.vjp(z, codebook, dq.SFDiVeQDetach(), noise=noise)
    assert out.indices.shape == (0,)
    np.testing.assert_array_equal(library.back(pullback(z)[1]), np.zeros((3, 3), np.float32))


def test_compiled_in_torch() -> None:
    torch = pytest.importorskip("torch")
    z, codebook, dither, ends, *_ = (torch.tensor(x) for x in draw(4))

    def loss(z: Any, codebook: Any, dither: Any, ends: Any) -> Any:
        return dq.quantize(z, codebook, dq.SFDiVeQ(0.3), noise=dq.CurveNoise(dither, ends)).z_q.square().sum()

    leaves = [z.requires_grad_(), codebook.requires_grad_()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(z, codebook, dither, ends), leaves) for f in (loss, compiled)]
    # The same operations, possibly in blocks or not.
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "error", "parts"),
    [
        (lambda z, e: dq.quantize(z, e[:1], dq.SFDiVeQDetach()), ValueError, ["quantize", "K >= 2", "(1, 3)"]),
        (lambda z, e: dq.project(z, e[:1]), ValueError, ["project", "K >= 2", "(1, 3)"]),
        (lambda z, e: dq.decode_curve(np.zeros(3, int), np.zeros(3), e[:1]), ValueError, ["K >= 2", "(1, 3)"]),
        (lambda z, e: dq.decode_curve(np.zeros(3, int), np.zeros(3), e[:, :0]), ValueError, ["D >= 1", "(5, 0)"]),
        (
            lambda z, e: dq.decode_curve(np.array([0, 4]), np.zeros(2), e),
            ValueError,
            ["decode_curve", "segments must lie in [0, K - 1) with K - 1 = 4, or be -1", "from 0 to 4"],
        ),
        (
            lambda z, e: dq.decode_curve(np.array([-5, 1]), np.zeros(2), e),
            ValueError,
            ["decode_curve", "segments must lie in", "from -5 to 1"],
        ),
        (
            lambda z, e: dq.decode_curve(np.array([0, 1]), np.array([np.nan, 1.5]), e),
            ValueError,
            ["decode_curve", "positions must lie in [0, 1], or be NaN", "from 0.5 to 1.5"],
        ),
        (
            lambda z, e: dq.decode_curve(np.array([0, 1]), np.array([-0.25, 1.0]), e),
            ValueError,
            ["decode_curve", "positions must lie in [0, 1], or be NaN", "from -0.25 to 1.0"],
        ),
        (
            lambda z, e: dq.quantize(z, e, dq.SFDiVeQDetach(), indices=np.full(4, 4)),
            ValueError,
            ["quantize", "[0, K - 1) with K - 1 = 4", "from 4 to 4"],
        ),
        (
            lambda z, e: dq.decode(np.zeros(4, int), e, dq.SFDiVeQDetach()),
            TypeError,
            ["decode: estimator must be one whose output is a codeword", "SFDiVeQDetach; use project and decode_curve"],
        ),
        (
            lambda z, e: dq.decode(np.zeros((4, 2), int), e, dq.Residual(dq.SFDiVeQ(0.0), 2)),
            TypeError,
            ["decode: estimator must be one whose output is a codeword", "SFDiVeQ; use project and decode_curve"],
        ),
        (
            lambda z, e: dq.decode(np.zeros((4, 1), int), e, dq.Product(dq.SFDiVeQ(), 1)),
            TypeError,
            ["decode: estimator must be one whose output is a codeword", "SFDiVeQ; use project and decode_curve"],
        ),
        (lambda z, e: dq.project(z[:, :2], e), ValueError, ["project", "D = 3", "(4, 2)"]),
        (lambda z, e: dq.vjp(z, e, dq.SFDiVeQ(), noise=z), TypeError, ["vjp", "CurveNoise", "ndarray"]),
        (
            lambda z, e: dq.vjp(z, e, dq.SFDiVeQ(), noise=dq.CurveNoise(np.ones(5))),
            ValueError,
            ["vjp", "dither", "(4,)", "(5,)"],
        ),
        (
            lambda z, e: dq.vjp(z, e, dq.SFDiVeQ(), noise=dq.CurveNoise(np.ones(4))),
            TypeError,
            ["vjp", "noise.ends", "(2, ..., D)", "None"],
        ),
        (lambda z, e: dq.SFDiVeQ(-1.0), ValueError, ["SFDiVeQ", "sigma", ">= 0", "-1"]),
        (lambda z, e: dq.project(z * np.nan, e), ValueError, ["project", "z", "finite", "NaN"]),
        (
            lambda z, e: dq.decode_curve(np.zeros(3), np.zeros(3), e),
            TypeError,
            ["decode_curve", "integer", "float64"],
        ),
        (
            lambda z, e: dq.decode_curve(np.zeros(3, int), np.zeros(4), e),
            ValueError,
            ["decode_curve", "positions", "(3,)", "(4,)"],
        ),
    ],
)
def test_errors_say_what_was_expected_and_what_was_got(make: Any, error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        make(np.ones((4, 3)), np.ones((5, 3)))
    for part in parts:
        assert part in str(caught.value)


def test_numpy_decodes_what_was_not_finite() -> None:
    codebook = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    with np.errstate(invalid="ignore"):
        out = dq.project(np.array([[0.0, np.nan], [0.5, 0.0]]), codebook, check_finite=False)
    points = dq.decode_curve(out.segments, out.positions, codebook)
    np.testing.assert_array_equal(points, [[np.nan, np.nan], [0.5, 0.0]])


@pytest.mark.parametrize(("size", "length"), [(1e-20, 1e20), (2e-38, 3e38), (1.0, 3e38), (2e38, -2e38)])
def test_vectors_far_beyond_a_curve_go_to_its_ends(library: Library, size: float, length: float) -> None:
    corners = np.array([[0, 0], [1, 0], [1, 1]], np.float32) * np.float32(size)
    z = np.array([[1, 0.5]], np.float32) * np.float32(length)
    with np.errstate(all="ignore"):
        out = dq.project(library.to(z), library.to(corners))
    np.testing.assert_array_equal(library.back(out.z_q), corners[[2 if length > 0 else 0]])


def test_a_corner_is_the_start_of_its_segment(library: Library) -> None:
    """Whatever the batch: rounding must not choose between the end of one segment and the start of the next."""
    rng = np.random.default_rng(0)
    corners = rng.standard_normal((9, 6)).astype(np.float32)
    z = library.to(rng.standard_normal((300, 6)).astype(np.float32))
    out = dq.project(z, library.to(corners))
    segments, positions = library.back(out.segments), library.back(out.positions)
    assert (segments[positions == 1] == 7).all()
    at_corners = dq.project(library.to(corners), library.to(corners))
    np.testing.assert_array_equal(library.back(at_corners.segments), [*range(8), 7])
    np.testing.assert_array_equal(library.back(at_corners.positions), [*[0] * 8, 1])
    for row in np.flatnonzero(positions == 0):
        alone = dq.project(z[int(row) : int(row) + 1, :], library.to(corners))
        assert library.back(alone.segments)[0] == segments[row]


def test_the_position_on_a_long_segment_does_not_underflow(library: Library) -> None:
    corners = np.array([[1.2, 2.2], [1.2, -5], [0, -5], [0, 0], [1e23, 0]], np.float32)
    out = dq.project(library.to(np.array([[1.0, 1.0]], np.float32)), library.to(corners))
    assert library.back(out.segments)[0] == 0
    np.testing.assert_allclose(library.back(out.z_q), [[1.2, 1.0]], rtol=1e-6)
