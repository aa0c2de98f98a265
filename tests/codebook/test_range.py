"""Upkeep at the ends of the number range."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

import diveq_core as dq
from diveq_core.codebook import spread
from libraries import Library, float64_in, library_named
from ranks import Simulated, in_threads
from vectors import D, K, N, normal


def bounded(rows: int, seed: int = 0) -> np.ndarray:
    """Vectors in [-1.7, 1.7], so that 1e308 of each is a number."""
    return np.random.default_rng(seed).uniform(-1.7, 1.7, (rows, D))


@pytest.mark.parametrize(("dtype", "value"), [("float64", 1e308), ("float32", 2e38), ("float16", 5e4)])
def test_kmeans_of_the_largest_numbers(library: Library, dtype: str, value: float) -> None:
    if dtype == "float16" and not library.float16:
        pytest.skip("no float16")
    z = np.array([[value], [1.1 * value], [-value], [-1.2 * value]], dtype)
    double = float64_in(library) if dtype == "float64" else contextlib.nullcontext()
    # That the inertia overflows array-api-strict says by NumPy's warning.
    with double, np.errstate(over="ignore"):
        found = dq.kmeans(library.to(z), library.to(z[[0, 2]]))
        words, inertia = library.back(found.codebook), float(found.inertia)
    expected = (z[::2].astype("longdouble") + z[1::2]) / 2
    np.testing.assert_allclose(words.astype("longdouble"), expected, rtol=2 * np.finfo(dtype).eps)
    # Beyond the largest number that it is computed in, but for float16, whose values 5.5e4 is not quite one of.
    assert inertia == (pytest.approx(0.025 * value * value, rel=1e-2) if dtype == "float16" else np.inf)


def test_kmeans_of_numbers_whose_differences_overflow(library: Library) -> None:
    z = np.array([[3.3e38], [3.3e38], [3.2e38], [3.2e38], [-3.3e38]], np.float32)
    with np.errstate(over="ignore"):
        found = dq.kmeans(library.to(z), library.to(z[2:]))
    # Its own codeword stays empty: the first three vectors and the fourth share one.
    np.testing.assert_allclose(np.sort(np.unique(library.back(found.codebook)))[[0, -1]], [-3.3e38, 3.3e38], rtol=0.03)
    assert (library.back(found.codebook)[library.back(found.indices)][:, 0] * z[:, 0].astype("f8") > 0).all()


@pytest.mark.parametrize("exponent", [-1074, -1000, 0, 1000])
def test_kmeans_is_the_same_at_every_scale(exponent: int) -> None:
    z = np.round(bounded(400) * 4096) * 2.0**-12
    noise = normal(K, 3, 2)
    expected = dq.kmeans(z, K, noise=noise)
    # Whole numbers of a power of two, so that nothing is rounded on the way down either.
    scaled = np.ldexp(np.round(z * 4), exponent) if exponent < -1022 else np.ldexp(z, exponent)
    if exponent < -1022:
        expected = dq.kmeans(np.round(z * 4), K, noise=noise)
    found = dq.kmeans(scaled, K, noise=noise)
    np.testing.assert_array_equal(found.indices, expected.indices)
    back = np.ldexp(found.codebook, -exponent)
    np.testing.assert_allclose(back, expected.codebook, rtol=1e-12, atol=0.5 if exponent < -1022 else 1e-13)


def test_a_codeword_that_does_not_move_is_as_it_was(library: Library) -> None:
    z = (1000 + normal(N, D)).astype(np.float32)
    begin = np.concatenate([z[:2] / 3, np.full((1, D), 1e30, np.float32)])
    found = dq.kmeans(library.to(z), library.to(begin), iterations=0)
    np.testing.assert_array_equal(library.back(found.codebook), begin)


def test_the_inertia_is_that_of_a_codebook_in_sixteen_bits() -> None:
    z = np.array([[2048], [2050], [2050], [2050]], np.float16)
    found = dq.kmeans(z, 1, rng=np.random.default_rng(0))
    assert (float(found.codebook[0, 0]), float(found.inertia)) == (2050.0, 4.0)


@pytest.mark.parametrize(("dtype", "largest"), [("float64", 1.7e308), ("float32", 3.3e38)])
def test_moving_averages_of_the_largest_numbers(library: Library, dtype: str, largest: float) -> None:
    codebook = np.array([[-largest, largest], [largest, 1.0]], dtype)
    z = np.array([[largest, -largest]] * 50, dtype)
    with float64_in(library) if dtype == "float64" else contextlib.nullcontext():
        words = library.to(codebook)
        state, moved = dq.ema_update(dq.ema_init(words), library.to(z), words, library.to(np.zeros(50, int)))
        moved, means = library.back(moved), library.back(state.means)
    # Fifty differences of twice the size are added.
    np.testing.assert_allclose(moved[0], z[0], rtol=100 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(moved[1], codebook[1])
    np.testing.assert_array_equal(moved, means)


def test_vectors_far_beyond_the_codebook_move_it() -> None:
    z = np.full((50, 2), 3e38, np.float32)
    for value in (0.0, 1.0):
        words = np.full((1, 2), value, np.float32)
        _, moved = dq.ema_update(dq.ema_init(words), z, words, np.zeros(50, int))
        np.testing.assert_allclose(moved, z[:1], rtol=1e-6)


def test_a_mean_beyond_its_dtype_is_not_written() -> None:
    codebook, z = np.ones((2, 2), np.float16), np.full((4, 2), 1e5, np.float32)
    state, moved = dq.ema_update(dq.ema_init(codebook), z, codebook, np.zeros(4, int))
    np.testing.assert_array_equal(moved, codebook)
    np.testing.assert_array_equal(state.means, codebook)


@pytest.mark.parametrize("by_batch", [False, True])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float64", 1.7e308), ("float32", 3.4e38), ("float16", 6.55e4), ("float16", 1e-6), ("float64", 1e-320)],
)
def test_replacements_at_the_ends_of_the_range(dtype: str, size: float, by_batch: bool) -> None:
    signs = np.array([[1, 1], [-1, 1], [1, -1], [-1, -1], [1, 1], [1, 1]])
    codebook = (size * signs).astype(dtype)
    counts = np.array([1e38, 2e38, 1e38, 3e38, 0, 0], np.float32).astype(np.float64 if dtype == "float64" else "f4")
    replaced = dq.replace_unused(
        codebook, counts, z=codebook[:4] if by_batch else None, noise=normal(6, 4), jitter=1e-3
    )
    assert replaced.rows.tolist() == [False] * 4 + [True] * 2
    assert np.isfinite(replaced.codebook).all()
    assert len(np.unique(replaced.codebook[4:], axis=0)) == 2
    wide = np.abs(replaced.codebook.astype("longdouble"))
    # A thousandth of the spread, at four standard deviations, or some units of the smallest numbers.
    tiny = np.finfo(dtype).smallest_subnormal.astype("longdouble")
    np.testing.assert_allclose(wide, np.abs(codebook.astype("longdouble")), rtol=1e-2, atol=10 * tiny)


def test_copies_of_zeros_differ(library: Library) -> None:
    for dtype in ("float32", "float16") if library.float16 else ("float32",):
        codebook = np.array([[0, 0], [1, 1], [5, 5], [6, 6]], dtype)
        counts, noise = np.array([9, 0, 0, 0], "f4"), normal(4, 4).astype("f4")
        options = {"jitter": 1e-9, "noise": library.to(noise)}
        new = library.back(dq.replace_unused(library.to(codebook), library.to(counts), **options).codebook)
        assert len(np.unique(new, axis=0)) == 4


def test_a_curve_through_the_largest_numbers() -> None:
    corners = np.array([[-1.7], [-1.0], [0.0], [1.1], [1.69]])
    noise = normal(5, 3, 2)
    for scale in (1e308, 1e-310, 1.0):
        curve = dq.curve_init(corners * scale, 5, noise=noise)[:, 0] / scale
        np.testing.assert_allclose(curve, corners[:, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weight", [0.0, 1e-3])
def test_a_codeword_far_longer_than_its_vectors_moves_to_their_mean(library: Library, weight: float) -> None:
    z = np.array([[1, 2], [3, 4]], np.float32)
    for far in (1e10, 1e20, 3e37):
        words = np.array([[far, -far], [5, 5]], np.float32)
        arrays = [library.to(x) for x in (z, words, np.array([0, 0]))]
        _, moved = dq.ema_update(dq.ema_init(arrays[1], weight=weight), *arrays, decay=0.5)
        kept = weight / (weight + 2)
        expected = kept * words[0].astype("f8") + (1 - kept) * z.mean(axis=0)
        # A few roundings.
        np.testing.assert_allclose(library.back(moved), [expected, [5, 5]], rtol=1e-6)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("far", [1e10, 3e38])
def test_ranks_move_a_far_codeword_as_one_process_does(library: Library, far: float, count: int) -> None:
    """Also where a rank has no vectors, and where differences, or their sums, overflow."""
    in_threads(library)
    z = np.array([[1, -far], [3, -far]], np.float32)
    words = np.array([[far, far], [5, 5]], np.float32)
    indices = np.array([0, 0])

    def work(rank, all_reduce):
        arrays = [library.to(x) for x in (z[rank::count], words, indices[rank::count])]
        state = dq.ema_init(arrays[1], weight=1.0)
        return dq.ema_update(state, *arrays, decay=0.0, all_reduce=all_reduce)[1]

    _, alone = dq.ema_update(dq.ema_init(words, weight=1.0), z, words, indices, decay=0.0)
    np.testing.assert_allclose(alone[0, 0], 2, rtol=1e-6)
    ranks = [library.back(moved) for moved in Simulated(count).run(work)]
    for moved in ranks:
        np.testing.assert_array_equal(moved, ranks[0])
        np.testing.assert_allclose(moved, alone, rtol=1e-6)


@pytest.mark.parametrize("exponent", [60, 100])
def test_moving_averages_beside_large_numbers_keep_small_ones(library: Library, exponent: int) -> None:
    large = 2.0**exponent
    words, z = (np.array(x, np.float32) for x in ([[large, 1.0], [1.0, 2.0]], [[large, 1e-4], [1e-3, 1e-20]]))
    arrays = [library.to(x) for x in (z, words, np.array([0, 1]))]
    _, moved = dq.ema_update(dq.ema_init(arrays[1]), *arrays)
    # Each codeword moves to its one vector, to a rounding of the larger of the two.
    np.testing.assert_allclose(library.back(moved)[:, 1], z[:, 1], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(library.back(moved)[1, 1], z[1, 1], rtol=1e-6)


def test_sums_of_more_vectors_than_float32_counts() -> None:
    count = (1 << 24) + (1 << 23)
    z = np.full((count, 1), 1.5, np.float32)
    z[count // 2 :] += 1
    codebook = np.zeros((1, 1), np.float32)
    state, moved = dq.ema_update(dq.ema_init(codebook), z, codebook, np.zeros(count, np.int64), decay=0.0)
    assert state.counts.tolist() == [count]
    assert abs(float(moved[0, 0]) - 2) < 1e-4


@pytest.mark.parametrize("name", ["numpy", "torch", "jax", "mlx"])
def test_the_mean_of_many_equal_vectors(name: str) -> None:
    library, count = library_named(name), 1 << 19
    z = np.full((count, 2), 0.1, np.float32)
    z[count // 2 :] = [7.3, -3.1]
    codebook = np.array([[0, 0], [7, -3]], np.float32)
    there, words = library.to(z), library.to(codebook)
    found = dq.kmeans(there, words, iterations=1)
    _, moved = dq.ema_update(dq.ema_init(words), there, words, found.indices, decay=0.0)
    # Added one by one they are off by 3 in a thousand.
    for x in (found.codebook, moved):
        np.testing.assert_allclose(library.back(x), z[[0, -1]], rtol=5e-5)


def test_sums_in_parts_are_those_in_one(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    z, codebook = (library.to(rng.standard_normal((n, 2), dtype=np.float32)) for n in (29, 3))
    indices = library.to(rng.integers(-1, 3, 29))
    made = []
    for rows in (100, 7):
        monkeypatch.setattr(spread, "_SUMMED_AT_ONCE", rows)
        state, moved = dq.ema_update(dq.ema_init(codebook), z, codebook, indices, decay=0.5)
        made.append([library.back(x) for x in (*state, moved, dq.kmeans(z, codebook, iterations=3).codebook)])
    for whole, in_parts in zip(*made, strict=True):
        np.testing.assert_allclose(in_parts, whole, rtol=1e-5, atol=1e-6)
