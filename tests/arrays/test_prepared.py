"""A codebook that was prepared for many searches: the same indices, whatever happens to the array that was given."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import diveq_core as dq
from libraries import Library, library_named


def _drawn(rows: int, count: int, width: int, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows + count + width)
    codebook = rng.standard_normal((count, width)) + 3
    # Copies, of which the first is to be found.
    codebook[count // 2 :] = codebook[: count - count // 2]
    return (rng.standard_normal((rows, width)) + 3).astype(dtype), codebook.astype(dtype)


# One vector; few; many, by product and, where it is installed, by faiss.
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (64, 8), (3000, 40), (3000, 8)])
def test_the_indices_are_those_of_the_codebook(library: Library, rows: int, width: int) -> None:
    z, codebook = _drawn(rows, 30, width)
    expected = dq.nearest(z, codebook)
    words = dq.prepare(library.to(codebook))
    for _ in range(2):
        np.testing.assert_array_equal(library.back(dq.nearest(library.to(z), words)), expected)
    np.testing.assert_array_equal(library.back(words.codebook), codebook)


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("rows", [5, 3000])
def test_wider_vectors_are_searched_in_their_own_dtype(name: str, rows: int) -> None:
    library = library_named(name)
    codebook = np.float32([[0.0], [1.0]])
    words = dq.prepare(library.to(codebook))
    # Above the middle by less than float32 can tell.
    z = np.full((rows, 1), 0.5 + 1e-12)
    np.testing.assert_array_equal(library.back(dq.nearest(library.to(z), words)), 1)
    # And the other way round.
    words = dq.prepare(library.to(np.float64([[0.0], [1.0 - 1e-12]])))
    np.testing.assert_array_equal(library.back(dq.nearest(library.to(np.full((rows, 1), 0.5, np.float32)), words)), 1)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_it_holds_a_copy(name: str) -> None:
    library = library_named(name)
    z, codebook = _drawn(20, 6, 3)
    given = np.array(codebook) if name == "numpy" else library.to(codebook)
    words = dq.prepare(given)
    expected = library.back(dq.nearest(library.to(z), words))
    given[...] = 0
    np.testing.assert_array_equal(library.back(dq.nearest(library.to(z), words)), expected)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_it_is_copied_and_pickled(name: str) -> None:
    library = library_named(name)
    z, codebook = _drawn(20, 6, 3)
    words = dq.prepare(library.to(codebook))
    expected = library.back(dq.nearest(library.to(z), words))
    for other in (copy.deepcopy(words), pickle.loads(pickle.dumps(words))):
        np.testing.assert_array_equal(library.back(dq.nearest(library.to(z), other)), expected)


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"prepare: codebook"):
        dq.prepare(np.zeros((0, 3)))
    with pytest.raises(TypeError, match=r"prepare: codebook"):
        dq.prepare(np.zeros((2, 3), int))
    with pytest.raises(ValueError, match=r"nearest: "):
        dq.nearest(np.zeros((2, 4)), dq.prepare(np.zeros((2, 3))))
    with pytest.raises(ValueError, match=r"nearest: codebook must be finite"):
        dq.nearest(np.zeros((2, 3)), dq.prepare(np.full((2, 3), np.nan)))
    with pytest.raises(TypeError, match=r"nearest: "):
        dq.nearest(np.zeros((2, 3)), dq.prepare(library_named("torch").to(np.zeros((2, 3)))))
