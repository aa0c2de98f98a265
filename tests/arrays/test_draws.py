"""Weighted choice: in proportion to the weights, of any number and range, and never one of weight 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from diveq_core.arrays.draws import pick, running_sums
from diveq_core.arrays.registry import backend_of

if TYPE_CHECKING:
    from libraries import Library

POSITIONS = ((np.arange(1000) + 0.5) / 1000).astype(np.float32)


def picked(library: Library, weights: np.ndarray, positions: np.ndarray) -> np.ndarray:
    weights = library.to(weights.astype(np.float32))
    return library.back(pick(backend_of("test", x=weights), weights, library.to(positions.astype(np.float32))))


@pytest.mark.parametrize("count", [1, 2, 4095, 4096, 4097, 20000])
def test_in_proportion_to_the_weights(library: Library, count: int) -> None:
    weights = np.random.default_rng(count).integers(0, 4, count)
    weights[0] = 1
    # Sums of whole numbers are exact.
    expected = np.searchsorted(np.cumsum(weights), POSITIONS.astype(float) * weights.sum(), side="right")
    np.testing.assert_array_equal(picked(library, weights, POSITIONS), expected)


def test_many_light_weights_beside_a_heavy_one(library: Library) -> None:
    weights = np.ones(1 << 20)
    weights[0] = 2.0**24
    found = picked(library, weights, POSITIONS)
    share = (weights.size - 1) / weights.sum()
    assert abs((found > 0).mean() - share) <= 1 / POSITIONS.size
    # Half of them are in the second half of the light ones.
    assert abs((found > weights.size // 2).mean() - share / 2) <= 1 / POSITIONS.size


def test_the_sums_of_very_many_weights(library: Library) -> None:
    weights = library.to(np.random.default_rng(0).random(1 << 20).astype(np.float32))
    sums = library.back(running_sums(backend_of("test", x=weights), weights))
    # Some thousand additions, each rounded to one part in 2^24; one by one they lose three digits more.
    np.testing.assert_allclose(sums, np.cumsum(library.back(weights), dtype=float), rtol=2e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_weight_of_zero_is_never_picked(library: Library, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.random(200_000) ** 4
    weights[rng.random(weights.size) < 0.5] = 0
    lib = backend_of("test", x=library.to(np.zeros(1, np.float32)))
    sums = library.back(running_sums(lib, library.to(weights.astype(np.float32))))
    # At the edges of the weights rounding decides.
    for positions in (rng.random(200_000), sums / sums[-1]):
        assert (weights[picked(library, weights, positions)] > 0).all()


def test_of_no_weight_at_all_any_is_picked(library: Library) -> None:
    assert set(picked(library, np.zeros(5), POSITIONS)) <= set(range(5))
