r"""k-means of data on disk, by passes over all of it.

.. math:: E_k \leftarrow \frac{1}{c_k} \sum_{n : i_n = k} z_n, \qquad i_n = \arg\min_k \|z_n - E_k\|

Counts and sums are of float64, about a centre, so that neither many vectors nor an offset cost digits. With them the
squared error of a pass is known without a look at the distances:

.. math:: \sum_n \|z_n - E_{i_n}\|^2 = \sum_n \|z_n\|^2 - 2 \sum_k \langle E_k, S_k\rangle + \sum_k c_k \|E_k\|^2
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import diveq_core as dq

if TYPE_CHECKING:
    from collections.abc import Callable

# Rows whose centred float64 copy stays in cache; not fewer than codewords, as each block writes a sum for each.
_BLOCK = 1 << 13


class Look(NamedTuple):
    """What a first pass over the data finds."""

    sample: np.ndarray
    """Vectors at random, without those that are not finite, (n, D)."""

    centre: np.ndarray
    """A point among the vectors, (D,), in float64."""

    vectors: int
    """Finite vectors."""

    skipped: int
    """The others."""


class Sums:
    """Counts, sums and squared error of vectors by codeword, of one codebook."""

    def __init__(self, codebook: np.ndarray, centre: np.ndarray) -> None:
        self._codebook, self._centre = codebook, centre
        self.counts = np.zeros(len(codebook), np.int64)
        # Entries first, as they are added.
        self._sums = np.zeros(codebook.shape[::-1])
        self._squares = 0.0

    def add(self, z: np.ndarray, indices: np.ndarray) -> None:
        """Vectors (N, D) and their codewords."""
        count = len(self.counts)
        step = max(_BLOCK, count)
        for start in range(0, len(z), step):
            chosen = indices[start : start + step]
            # Entries first, so that each is one weight for all vectors.
            y = z[start : start + step].T.astype(np.float64, order="C")
            y -= self._centre[:, None]
            self._squares += float(np.vdot(y, y))
            self.counts += np.bincount(chosen, minlength=count)
            for entry, weights in enumerate(y):
                self._sums[entry] += np.bincount(chosen, weights, count)

    @property
    def inertia(self) -> float:
        """Squared error of the codebook that the codewords were chosen from."""
        e = self._codebook.astype(np.float64) - self._centre
        return max(self._squares - 2 * float(np.vdot(e, self._sums.T)) + float(self.counts @ np.vecdot(e, e)), 0.0)

    def means(self) -> np.ndarray:
        """The next codebook, where a codeword without vectors stays as it is."""
        there = self.counts > 0
        means = self._codebook.astype(np.float64)
        means[there] = self._sums.T[there] / self.counts[there, None] + self._centre
        return means.astype(self._codebook.dtype)


class Part:
    """A group of entries: its codebooks, stage by stage, and what they leave of the sample."""

    def __init__(self, entries: slice, sample: np.ndarray) -> None:
        self.entries = entries
        self.books: list[np.ndarray] = []
        self._left = np.ascontiguousarray(sample[:, entries])

    def begin(self, codewords: int, rng: np.random.Generator) -> None:
        """Add a codebook, of vectors of the sample that lie apart."""
        with one_thread():
            self.books.append(dq.kmeans_plus_plus(self._left, codewords, rng=rng))

    def left(self, z: np.ndarray) -> np.ndarray:
        """What all stages but the last leave of vectors."""
        left = np.ascontiguousarray(z[:, self.entries])
        for book in self.books[:-1]:
            left = left - book.take(dq.nearest(left, book), axis=0)
        return left

    def fill(self, counts: np.ndarray) -> None:
        """Move codewords without vectors to vectors of the sample far from their codewords, as `dq.kmeans` does."""
        book, empty = self.books[-1], np.flatnonzero(counts == 0)
        if not len(empty):
            return
        d = self._left - book.take(dq.nearest(self._left, book), axis=0)
        cumulative = np.cumsum(np.vecdot(d, d), dtype=np.float64)
        if cumulative[-1] > 0:
            wanted = (np.arange(len(empty)) + 0.5) / len(empty) * cumulative[-1]
            book[empty] = self._left[np.searchsorted(cumulative, wanted)]

    def end(self) -> None:
        """Leave to the next stage what this one leaves."""
        book = self.books[-1]
        self._left = self._left - book.take(dq.nearest(self._left, book), axis=0)


def one_thread() -> AbstractContextManager[object]:
    """Products by one thread, where that can be said: small ones wait for a second longer than they take."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return nullcontext()
    return threadpool_limits(1)


def clustered(
    look: Look,
    each_chunk: Callable[[str, Callable[[np.ndarray], None]], None],
    *,
    codewords: int,
    stages: int,
    groups: int,
    passes: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, list[list[float]]]:
    """Codebooks in the shape that a tokenizer takes, and the mean squared error of each pass, stage by stage.

    ``each_chunk(what, function)`` calls a function on all finite vectors, a chunk at a time.
    """
    width = look.sample.shape[1] // groups
    parts = [Part(slice(i * width, (i + 1) * width), look.sample) for i in range(groups)]
    courses: list[list[float]] = []
    for stage in range(stages):
        for part in parts:
            part.begin(codewords, rng)
        course: list[float] = []
        where = f"stage {stage + 1}, " if stages > 1 else ""
        for number in range(passes):
            # What a stage leaves lies around zero.
            sums = [
                Sums(part.books[-1], look.centre[part.entries] if stage == 0 else np.zeros(width)) for part in parts
            ]

            def add(z: np.ndarray, sums: list[Sums] = sums) -> None:
                for part, own in zip(parts, sums, strict=True):
                    left = part.left(z)
                    own.add(left, dq.nearest(left, part.books[-1]))

            each_chunk(f"{where}pass {number + 1} of {passes}", add)
            course.append(math.fsum(own.inertia for own in sums) / look.vectors)
            moved = False
            for part, own in zip(parts, sums, strict=True):
                before = part.books[-1]
                part.books[-1] = own.means()
                part.fill(own.counts)
                moved = moved or not np.array_equal(before, part.books[-1])
            if not moved:
                break
        for part in parts:
            part.end()
        courses.append(course)
    # (G, S, K, D), without the axes of one.
    books = np.stack([np.stack(part.books) for part in parts])
    return books.reshape(*(n for n in (groups, stages) if n > 1), codewords, width), courses
