"""`curve_init`: the corners of k-means, each once, in the order of the nearest one left."""

from __future__ import annotations

import numpy as np
import pytest

import diveq_core as dq
from libraries import Library, assert_close, library_named


def draws(count: int) -> np.ndarray:
    tries = 2 + int(np.log(count))
    return np.random.default_rng(1).standard_normal((count, tries, 2)).astype(np.float32)


def greedy(corners: np.ndarray) -> np.ndarray:
    """The order again, with a list of those left, in float64."""
    wide = corners.astype(np.float64)
    left = list(range(len(wide)))
    order = [left.pop(int(np.argmax(np.linalg.norm(wide - wide.mean(axis=0), axis=1))))]
    while left:
        order.append(left.pop(int(np.argmin([np.linalg.norm(wide[k] - wide[order[-1]]) for k in left]))))
    return corners[order]


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (1e3, 1.0), (0.0, 1e-18), (0.0, 1e15)])
def test_corners_of_kmeans_in_the_order_of_the_nearest_left(library: Library, offset: float, scale: float) -> None:
    z = (np.random.default_rng(0).standard_normal((300, 3)) * scale + offset).astype(np.float32)
    found = dq.kmeans(library.to(z), 12, iterations=10, noise=library.to(draws(12)))
    curve = dq.curve_init(library.to(z), 12, noise=library.to(draws(12)))
    # The same corners, bit for bit: nothing but their order is new.
    assert_close(curve, greedy(library.back(found.codebook)), library)


def test_a_line_of_clusters_becomes_a_short_curve(library: Library) -> None:
    rng = np.random.default_rng(0)
    middles = np.linspace(0, 1, 8)[:, None] * np.array([[30.0, -20.0, 10.0]])
    z = (middles[rng.permutation(np.repeat(np.arange(8), 20))] + 0.01 * rng.standard_normal((160, 3))).astype(
        np.float32
    )
    curve = library.back(dq.curve_init(library.to(z), 8, noise=library.to(draws(8))))
    length = np.linalg.norm(np.diff(curve, axis=0), axis=1).sum()
    shortest = np.linalg.norm(middles[-1] - middles[0])
    assert length < 1.01 * shortest
    rest = library.back(dq.project(library.to(z), library.to(curve)).z_q) - z
    assert np.mean(rest**2) < 2 * 0.01**2


def test_equal_vectors_give_equal_corners(library: Library) -> None:
    z = np.full((5, 2), 3.0, np.float32)
    assert_close(dq.curve_init(library.to(z), 3, noise=library.to(draws(3))), z[:3], library)


def test_vectors_that_are_not_finite_are_left_out() -> None:
    z = np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32)
    z[::7] = np.nan
    assert np.isfinite(dq.curve_init(z, 5, rng=np.random.default_rng(0))).all()


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_16_bits(name: str) -> None:
    library = library_named(name)
    z = np.random.default_rng(0).standard_normal((40, 2)).astype(np.float16)
    curve = dq.curve_init(library.to(z), 4, noise=library.to(draws(4)))
    assert library.back(curve).dtype == np.float16
    assert np.isfinite(library.back(curve)).all()


@pytest.mark.parametrize("count", [1, 0, 2.5, True, None])
def test_bad_count(count: object) -> None:
    with pytest.raises(ValueError, match="curve_init: count must be an integer >= 2"):
        dq.curve_init(np.zeros((4, 2)), count, rng=np.random.default_rng(0))  # type: ignore[arg-type]
