"""The search for few vectors: what it answers is exact, and what it cannot answer it leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_search_accuracy import EXTENDED, KINDS, SHAPES, check, drawn

import diveq_core as dq
from diveq_numpy import backend, few
from libraries import library_named


def nearest(z: np.ndarray, codebook: np.ndarray, product: Any = np.matmul) -> np.ndarray | None:
    """What the search for few finds, or None where it leaves the vectors to another."""
    found = np.full(len(z), -7)
    with np.errstate(all="ignore"):
        return found if few.search(z, backend.prepare(codebook), product, found) else None


def exact(z: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """By differences in extended precision, of numbers that a power of two has brought to order one."""
    z, codebook = z.astype(EXTENDED), codebook.astype(EXTENDED)
    return np.stack([((z - e) ** 2).sum(axis=1) for e in codebook], axis=1).argmin(axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_answered_is_the_nearest(kind: str):
    for shape in SHAPES:
        for seed in range(5):
            z, codebook = drawn(kind, shape, seed)
            found = nearest(z, codebook)
            if found is not None:
                check(found, z, codebook)
                if kind not in ("long vectors", "far ties", "two scales"):
                    # Of vectors far away not even extended precision tells differences of squares.
                    np.testing.assert_array_equal(found, exact(z, codebook))


def test_every_way_out_is_taken(monkeypatch: pytest.MonkeyPatch):
    compared = []
    original = few._compared
    monkeypatch.setattr(few, "_compared", lambda *a: compared.append(len(a[3])) or original(*a))
    ways = {}
    for kind in KINDS:
        for shape in SHAPES:
            compared.clear()
            found = nearest(*drawn(kind, shape, 0))
            ways.setdefault("left" if found is None else "compared" if compared else "at once", []).append(kind)
    assert {"plain", "offset of order one", "usual start"} <= set(ways["at once"])
    assert {"few levels", "near ties", "offset of both"} <= set(ways["compared"])
    assert {"offset of both", "near overflow", "subnormal", "clusters"} <= set(ways["left"])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, ">f4", ">f8"])
@pytest.mark.parametrize("rows", [1, 60])
def test_every_dtype(dtype: Any, rows: int, monkeypatch: pytest.MonkeyPatch):
    answers = []
    original = few.search
    monkeypatch.setattr(few, "search", lambda *a: answers.append(original(*a)) or answers[-1])
    rng = np.random.default_rng(0)
    codebook = rng.standard_normal((40, 8)).astype(dtype)
    # Some lie between two codewords, nearer to the later one by a few units in the last place.
    z = rng.standard_normal((rows, 8)).astype(dtype)
    eps = np.finfo(np.result_type(dtype, np.float32)).eps
    z[::3] = ((0.5 - 8 * eps) * codebook[3].astype(EXTENDED) + (0.5 + 8 * eps) * codebook[7]).astype(dtype)
    np.testing.assert_array_equal(dq.nearest(z, codebook), exact(z, codebook))
    assert answers == [True]


@pytest.mark.parametrize("width", [1, 3, 8, 33])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ties_and_copies_give_the_lowest(width: int, dtype: Any):
    rng = np.random.default_rng(width)
    for rows in (1, 7, 60):
        words = 2 * rng.integers(-2, 3, (12, width)).astype(dtype)
        codebook = np.concatenate([words, words])[rng.permutation(24)]
        z = rng.integers(-3, 4, (rows, width)).astype(dtype)
        found = nearest(z, codebook)
        if found is not None:
            np.testing.assert_array_equal(found, exact(z, codebook))
        np.testing.assert_array_equal(dq.nearest(z, codebook), exact(z, codebook))
    # Copies of numbers whose sums round.
    words = rng.standard_normal((12, width)).astype(dtype)
    codebook = np.concatenate([words, words, words])
    z = (words + 0.01 * rng.standard_normal((12, width))).astype(dtype)
    np.testing.assert_array_equal(nearest(z, codebook), exact(z, codebook))


def test_copies_give_the_first_where_their_products_round_apart():
    def apart(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        np.matmul(a, b, out=out)
        out[:, 37:] -= abs(out[:, 37:]) * np.float32(np.finfo(np.float32).eps)

    rng = np.random.default_rng(1)
    codebook = np.tile(rng.standard_normal((37, 19)), (2, 1)).astype(np.float32)
    z = rng.standard_normal((200, 19)).astype(np.float32)
    np.testing.assert_array_equal(nearest(z, codebook, apart), exact(z, codebook))


def test_the_nearest_of_those_that_a_score_cannot_tell_apart():
    # One offset costs float32's scores all digits, and the differences none.
    codebook = 64 + np.float32([[3, 0], [0, 0], [0, 2.0**-15], [2.0**-16, 0]])
    z = 64 + np.float32([[0, 2.0**-15], [2.0**-16, 0], [0, 0], [0, -1]])
    np.testing.assert_array_equal(nearest(z, codebook), [2, 3, 1, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 5])
def test_what_is_not_finite_is_left(bad: float, dtype: Any, rows: int):
    rng = np.random.default_rng(0)
    z, codebook = rng.standard_normal((rows, 4)).astype(dtype), rng.standard_normal((6, 4)).astype(dtype)
    # Nothing is ambiguous, and two words that are equal stand for one row more.
    codebook[1], z[-1] = codebook[0], codebook[0]
    z[0, 2] = bad
    assert nearest(z, codebook) is None
    np.testing.assert_array_equal(dq.nearest(z, codebook, check_finite=False)[0], -1)
    np.testing.assert_array_equal(dq.nearest(z, codebook, check_finite=False)[1:], exact(z[1:], codebook))
    with pytest.raises(ValueError, match="nearest: z must be finite, got NaN or infinity in z"):
        dq.nearest(z, codebook)
    z[0, 2], codebook[5, 1] = 0, bad
    assert nearest(z, codebook) is None
    np.testing.assert_array_equal(dq.nearest(z, codebook, check_finite=False), -1)
    with pytest.raises(ValueError, match="nearest: codebook must be finite, got NaN or infinity in codebook"):
        dq.nearest(z, codebook)


@pytest.mark.parametrize("rows", [0, 1])
def test_an_empty_batch_does_not_hide_a_codebook_that_is_not_finite(rows: int):
    with pytest.raises(ValueError, match="nearest: codebook must be finite"):
        dq.nearest(np.zeros((rows, 2)), np.array([[0.0, np.nan]]))


@pytest.mark.parametrize("scale", [2.0**64, 2.0**125, 2.0**-80, 2.0**-140])
def test_squares_that_leave_the_range_are_left(scale: float):
    z, codebook = (x * np.float32(scale) for x in drawn("few levels", (40, 8), 0))
    assert nearest(z / 4, codebook / 4) is None
    found = dq.nearest(z / 4, codebook / 4)
    np.testing.assert_array_equal(found, exact(z / 4, codebook / 4))


def test_too_many_to_compare_are_left():
    z = np.float32(1e4) + np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    assert nearest(z, np.repeat(z, 10, axis=0)) is None
    np.testing.assert_array_equal(dq.nearest(z, np.repeat(z, 10, axis=0)), 10 * np.arange(20))


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_it_serves_few_and_no_others(name: str, monkeypatch: pytest.MonkeyPatch):
    asked = []
    original = few.search
    monkeypatch.setattr(few, "search", lambda *a: asked.append(a[0].shape) or original(*a))
    library, codebook = library_named(name), np.eye(4, dtype=np.float32)
    for rows in (0, 1, few.ROWS, few.ROWS + 1):
        library.back(dq.nearest(library.to(np.ones((rows, 4), np.float32)), library.to(codebook)))
    for rows, count, width in [(64, few._SCORES // 32, 1), (16, 2, few._ENTRIES // 8)]:
        dq.nearest(library.to(np.ones((rows, width), np.float32)), library.to(np.ones((count, width), np.float32)))
    assert asked == [(1, 4), (few.ROWS, 4)]
