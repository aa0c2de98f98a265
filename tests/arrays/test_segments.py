"""Segment sums: each library's own, and the one by the standard alone."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from diveq_core.arrays.registry import backend_of
from diveq_core.arrays.segments import segment_sum
from libraries import Library, assert_close, float64_in, library_named


def expected_sum(values: np.ndarray, segments: np.ndarray, count: int) -> np.ndarray:
    total = np.zeros((count, values.shape[1]), values.dtype)
    for row, segment in zip(values, segments, strict=True):
        if segment >= 0:
            total[segment] += row
    return total


def both(library: Library, values: np.ndarray, segments: np.ndarray, count: int) -> list:
    lib = backend_of("test", values=library.to(values))
    arguments = library.to(values), library.to(segments), count
    return [lib.segment_sum(*arguments), segment_sum(lib, *arguments)]


@pytest.mark.parametrize("rows", [0, 1, 500])
@pytest.mark.parametrize(("count", "width"), [(1, 1), (1, 4), (7, 3), (600, 2)])
def test_repeated_segments_add_up(library: Library, rows: int, count: int, width: int):
    rng = np.random.default_rng(0)
    # Small integers, so that every order of addition gives the same.
    values = rng.integers(-9, 10, (rows, width)).astype(np.float32)
    segments = rng.integers(0, count, rows)
    for total in both(library, values, segments, count):
        assert_close(total, expected_sum(values, segments, count), library)


def test_negative_segments_are_dropped(library: Library):
    values = np.arange(8, dtype=np.float32).reshape(4, 2)
    for segments in ([-1, 0, -1, 2], [-1, -1, -1, -1]):
        for total in both(library, values, np.array(segments), 3):
            assert_close(total, expected_sum(values, np.array(segments), 3), library)


def test_a_dropped_row_does_not_spread(library: Library):
    values = np.array([[np.nan], [1.0], [2.0]], np.float32)
    lib = backend_of("test", values=library.to(values))
    total = library.back(lib.segment_sum(library.to(values), library.to(np.array([-1, 0, 0])), 2))
    np.testing.assert_array_equal(total, [[3.0], [0.0]])


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_index_dtypes(library: Library, dtype: str):
    with float64_in(library) if dtype == "int64" and library.name == "jax" else np.errstate():
        values = np.ones((4, 1), np.float32)
        for total in both(library, values, np.array([1, 1, 0, 1], dtype), 3):
            assert_close(total, np.array([[1.0], [3.0], [0.0]], np.float32), library)


def test_float64(library: Library):
    with float64_in(library):
        values = np.full((10, 1), 1 / 3)
        for total in both(library, values, np.zeros(10, int), 1):
            # Ten additions, each rounding to half a unit in the last place of a number below four.
            assert_close(total, np.array([[10 / 3]]), library, atol=10 * 4 * float(np.finfo(float).eps))


def test_the_one_hot_matrix_never_exists():
    library = library_named("array_api_strict")
    # 512 MiB of it in float32 against 64 MiB.
    rng = np.random.default_rng(1)
    values, segments = library.to(np.ones((1 << 14, 2), np.float32)), library.to(rng.integers(0, 1 << 13, 1 << 14))
    lib = backend_of("test", values=values)
    tracemalloc.start()
    try:
        total = segment_sum(lib, values, segments, 1 << 13)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert library.back(total).sum() == 2 << 14
    assert peak < 64 << 20
