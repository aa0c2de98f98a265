"""k-means against its definition and scikit-learn, in every library, on one rank and on several."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import diveq_core as dq
from libraries import Library, assert_close
from ranks import Simulated, in_threads


def clusters(seed: int = 0, count: int = 5, rows: int = 40, width: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Tight clusters, and their centres."""
    rng = np.random.default_rng(seed)
    centres = np.eye(count, width) * 10 + np.arange(count)[:, None] * 20
    z = centres[np.arange(rows) % count] + 0.1 * rng.standard_normal((rows, width))
    return z.astype(np.float32), centres.astype(np.float32)


def inertia_of(z: np.ndarray, codebook: np.ndarray) -> float:
    d = z.astype(np.float64)[:, None] - codebook.astype(np.float64)
    return float((d * d).sum(axis=-1).min(axis=1).sum())


def normal(count: int, seed: int = 0) -> np.ndarray:
    shape = (count, 2 + int(np.log(count)), 2)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_clusters_are_found(library: Library, scale: float, offset: float):
    z, _ = clusters()
    z = ((z + np.float32(offset)) * np.float32(scale)).astype(np.float32)
    found = dq.kmeans(library.to(z.reshape(8, 5, 3)), 5, noise=library.to(normal(5)))
    indices = library.back(found.indices)
    assert indices.shape == (8, 5)
    # One cluster a column, each to itself.
    assert (indices == indices[0]).all()
    assert len(set(indices[0])) == 5
    means = z.reshape(8, 5, 3).astype(np.float64).mean(axis=0)
    words = library.back(found.codebook)[indices[0]]
    # A few units in the last place of numbers of the offset's size.
    np.testing.assert_allclose(words, means, rtol=1e-6, atol=1e-6 * scale * (100 + offset))
    expected = inertia_of(z / scale, means / scale)
    assert float(found.inertia) / scale**2 == pytest.approx(expected, rel=1e-3 if offset == 0 else 1e-1)


def test_the_same_in_every_library(library: Library):
    z = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    noise = normal(16)
    seeds = dq.kmeans_plus_plus(library.to(z), 16, noise=library.to(noise))
    # The frame's way there and back is rounded.
    assert_close(seeds, dq.kmeans_plus_plus(z, 16, noise=noise), library, rtol=1e-5, atol=1e-6)
    expected, found = dq.kmeans(z, 16, noise=noise), dq.kmeans(library.to(z), 16, noise=library.to(noise))
    assert_close(found.codebook, expected.codebook, library, rtol=1e-4, atol=1e-5)
    assert_close(found.inertia, np.asarray(expected.inertia), library, rtol=1e-5)
    # And by definition: the inertia is that of the codebook.
    assert float(found.inertia) == pytest.approx(inertia_of(z, library.back(found.codebook)), rel=1e-5)
    assert float(found.inertia) < inertia_of(z, library.back(seeds))


def test_one_iteration_by_definition(library: Library):
    z = np.random.default_rng(0).standard_normal((100, 3)).astype(np.float32)
    found = dq.kmeans(library.to(z), library.to(z[:4]), iterations=1)
    chosen = dq.nearest(z, z[:4])
    expected = np.stack([z[chosen == k].mean(axis=0) for k in range(4)])
    assert_close(found.codebook, expected, library, rtol=1e-5, atol=1e-6)
    assert_close(dq.kmeans(library.to(z), library.to(z[:4]), iterations=0).codebook, z[:4], library, atol=1e-6)


def test_seeds_are_vectors_and_distinct(library: Library):
    z = np.random.default_rng(0).integers(-9, 9, (50, 2)).astype(np.float32)
    distinct = len(np.unique(z, axis=0))
    seeds = library.back(dq.kmeans_plus_plus(library.to(z), distinct, noise=library.to(normal(distinct))))
    np.testing.assert_array_equal(np.unique(np.round(seeds), axis=0), np.unique(z, axis=0))
    np.testing.assert_allclose(seeds, np.round(seeds), atol=1e-5)


def test_fewer_distinct_vectors_than_codewords(library: Library):
    z = np.array([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]], np.float32)
    found = dq.kmeans(library.to(z), 6, noise=library.to(normal(6)))
    words = library.back(found.codebook)
    assert words.shape == (6, 2)
    np.testing.assert_allclose(words[library.back(found.indices)], z, rtol=1e-6)
    assert float(found.inertia) < 1e-10


@pytest.mark.parametrize("value", [0.0, 7.5])
def test_equal_vectors(library: Library, value: float):
    z = np.full((10, 2), value, np.float32)
    found = dq.kmeans(library.to(z), 3, noise=library.to(normal(3)))
    assert_close(found.codebook, np.full((3, 2), value, np.float32), library)
    assert_close(found.inertia, np.zeros((), np.float32), library)


def test_empty_clusters_go_to_far_vectors(library: Library):
    z, _ = clusters()
    # All vectors are nearest to the first codeword.
    begin = np.concatenate([z[:1], np.full((4, 3), 1e4, np.float32)])
    found = dq.kmeans(library.to(z), library.to(begin))
    assert len(np.unique(library.back(found.indices))) == 5
    # Not the best five, but far better than one.
    assert float(found.inertia) < 0.25 * inertia_of(z, z.mean(axis=0, keepdims=True))


def test_what_is_not_finite_is_left_out(library: Library):
    z, _ = clusters()
    bad = np.concatenate([z, np.array([[np.nan, 0, 0], [0, np.inf, 0], [-np.inf, np.nan, 0]], np.float32)])
    expected = dq.kmeans(z, z[:5])
    begin = z[:5].copy()
    found = dq.kmeans(library.to(bad), library.to(begin))
    assert_close(found.codebook, expected.codebook, library, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(library.back(found.indices)[40:], [-1, -1, -1])
    begin[2, 1] = np.nan
    assert np.isfinite(library.back(dq.kmeans(library.to(bad), library.to(begin)).codebook)).all()


def test_a_traced_batch_without_a_finite_vector_gives_a_finite_codebook():
    jax = pytest.importorskip("jax")
    z, noise = jax.numpy.full((4, 2), jax.numpy.nan), jax.numpy.asarray(normal(3))
    begin = jax.numpy.asarray(np.arange(6, dtype=np.float32).reshape(3, 2))
    for found in (
        jax.jit(lambda z: dq.kmeans(z, 3, noise=noise, iterations=2))(z),
        jax.jit(lambda z: dq.kmeans(z, begin, iterations=2))(z),
    ):
        assert np.isfinite(found.codebook).all()
        np.testing.assert_array_equal(found.indices, [-1, -1, -1, -1])
        assert float(found.inertia) == 0
    assert np.isfinite(jax.jit(lambda z: dq.kmeans_plus_plus(z, 3, noise=noise))(z)).all()


@given(seed=st.integers(0, 1000), exponent=st.integers(-38, 38), count=st.integers(1, 9))
def test_codewords_are_finite_and_in_the_hull(seed: int, exponent: int, count: int):
    rng = np.random.default_rng(seed)
    z = (rng.standard_normal((rng.integers(1, 12), 2)) * 10.0**exponent).clip(-3e38, 3e38).astype(np.float32)
    with np.errstate(all="ignore"):
        # The sum of squares may overflow; the codebook may not.
        codebook = dq.kmeans(z, count, noise=normal(count, seed)).codebook
    assert np.isfinite(codebook).all()
    room = 1e-5 * np.abs(z.astype(np.float64)).max()
    assert (codebook >= z.min(axis=0) - room).all()
    assert (codebook <= z.max(axis=0) + room).all()


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_dtypes(dtype: str):
    z, _ = clusters()
    found = dq.kmeans(z.astype(dtype), 5, rng=np.random.default_rng(0))
    assert found.codebook.dtype == dtype
    assert found.inertia.dtype == ("float64" if dtype == "float64" else "float32")


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_are_one(library: Library, count: int):
    in_threads(library)
    z, _ = clusters(rows=45)
    whole = dq.kmeans(z, 5, noise=normal(5))

    def work(rank, all_reduce):
        mine = library.to(z[slice(rank * 45 // count, (rank + 1) * 45 // count)])
        return dq.kmeans(mine, 5, noise=library.to(normal(5)), all_reduce=all_reduce)

    ranks = Simulated(count).run(work)
    for found in ranks:
        np.testing.assert_array_equal(library.back(found.codebook), library.back(ranks[0].codebook))
        # The ranks' order decides which draws are made; the clusters found are the same.
        words = library.back(found.codebook)
        order, expected = np.argsort(words[:, 2]), np.argsort(whole.codebook[:, 2])
        np.testing.assert_allclose(words[order], whole.codebook[expected], rtol=1e-5, atol=1e-4)
        assert_close(found.inertia, np.asarray(whole.inertia), library, rtol=1e-3)


def patches(size: int = 8, every: int = 16) -> np.ndarray:
    """Patches of scikit-learn's two photographs, flattened, in [0, 1]."""
    datasets = pytest.importorskip("sklearn.datasets")
    views = [np.lib.stride_tricks.sliding_window_view(image, (size, size, 3)) for image in _images(datasets)]
    return np.concatenate([view[::every, ::every, 0].reshape(-1, size * size * 3) for view in views]) / np.float32(255)


def _images(datasets):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return datasets.load_sample_images().images


@pytest.mark.parametrize("every", [16, pytest.param(8, marks=pytest.mark.slow)])
def test_inertia_is_scikit_learns_on_patches_of_photographs(every: int):
    z = patches(every=every)
    cluster = pytest.importorskip("sklearn.cluster")
    ours, theirs = [], []
    for seed in range(2):
        ours.append(float(dq.kmeans(z, 256, iterations=10, rng=np.random.default_rng(seed)).inertia))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that ten iterations do not converge
            model = cluster.KMeans(256, n_init=1, max_iter=10, tol=0, algorithm="lloyd", random_state=seed)
            theirs.append(model.fit(z).inertia_)
    assert np.mean(ours) <= 1.02 * np.mean(theirs)


def test_errors(library: Library):
    z = library.to(np.ones((3, 2), np.float32))
    for wrong in (0, True, -1):
        with pytest.raises(ValueError, match=r"^kmeans_plus_plus: the size of the codebook must be an integer"):
            dq.kmeans_plus_plus(z, wrong)
    for wrong in (True, False):
        with pytest.raises(
            ValueError, match=rf"^kmeans: the size of the codebook must be an integer >= 1, got {wrong}$"
        ):
            dq.kmeans(z, wrong)
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match=r"^kmeans: iterations must be an integer >= 0, got"):
            dq.kmeans(z, z, iterations=wrong)
    with pytest.raises(ValueError, match=r"^kmeans: z must have shape .* and at least one vector, got \(0, 2\)$"):
        dq.kmeans(library.to(np.ones((0, 2), np.float32)), 2)
    with pytest.raises(ValueError, match=r"^kmeans: z must have at least one finite vector, got none of 2$"):
        dq.kmeans(library.to(np.full((2, 2), np.nan, np.float32)), 2)
    with pytest.raises(ValueError, match=r"^kmeans: z must have shape \(\.\.\., D\) with D = 3 as in the codebook"):
        dq.kmeans(z, library.to(np.ones((2, 3), np.float32)))
    with pytest.raises(ValueError, match=r"^kmeans: noise must have shape \(2, 2, 2\), got \(3, 2\)$"):
        dq.kmeans(z, 2, noise=z)
    with pytest.raises(TypeError, match=r"^kmeans: z must be an array"):
        dq.kmeans([1.0], 2)


def test_plus_plus_by_definition():
    """Greedy k-means++ in float64: of the candidates drawn in proportion to squared distances, the best."""
    rng = np.random.default_rng(0)
    z, noise = rng.standard_normal((300, 3)) * np.geomspace(0.1, 10, 300)[:, None], rng.standard_normal((9, 4, 2))
    positions = np.arctan2(noise[..., 0], noise[..., 1]) / (2 * np.pi) + 0.5
    chosen = [int(positions[0, 0] * 300)]
    squares = ((z - z[chosen[0]]) ** 2).sum(axis=1)
    for k in range(1, 9):
        cumulative = np.cumsum(squares)
        candidates = np.searchsorted(cumulative, positions[k] * cumulative[-1], side="right")
        left = [np.minimum(squares, ((z - z[c]) ** 2).sum(axis=1)) for c in candidates]
        best = int(np.argmin([x.sum() for x in left]))
        chosen.append(int(candidates[best]))
        squares = left[best]
    # The frame's way there and back is rounded; which vectors they are is not.
    np.testing.assert_allclose(dq.kmeans_plus_plus(z, 9, noise=noise), z[chosen], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("far", [1e10, 1e14])
def test_a_far_vector_does_not_cost_the_digits_of_the_others(library: Library, far: float) -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2000, 4)).astype(np.float32)
    z[0] = far
    start = np.concatenate([z[1:17], z[:1]])

    def inertia(codebook: np.ndarray) -> float:
        return float(((z[1:, None].astype(float) - codebook.astype(float)) ** 2).sum(-1).min(1).sum())

    plain = start.astype(float)
    for _ in range(25):
        chosen = ((z[:, None].astype(float) - plain) ** 2).sum(-1).argmin(1)
        plain = np.stack([z[chosen == k].astype(float).mean(0) if (chosen == k).any() else plain[k] for k in range(17)])
    found = library.back(dq.kmeans(library.to(z), library.to(start)).codebook)
    # Ties and rounding lead Lloyd's iterations elsewhere; one codeword for all would be three times as far.
    assert inertia(found) < 1.05 * inertia(plain)
