r"""The tokens of a layer in evaluation: the nearest codeword in each head, stage by stage.

.. math:: i_s = \arg\min_k \|r_s - E^{(s)}_k\|, \qquad r_1 = x, \qquad r_{s+1} = r_s - E^{(s)}_{i_s}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diveq_core.arrays.checks import flat_rows, shaped
from diveq_core.layers.auxiliary import of_head
from diveq_core.layers.words import at

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.base import Shape
    from diveq_core.layers.settings import Settings

Books = dict["Shape", tuple["Array", Any]]
"""Each codebook by its place, and what the search takes in its place."""


def prepared(lib: Backend, settings: Settings, book: Array) -> Books:
    """The codebooks for searches that read the same ones again and again."""
    held = lib.astype(book, lib.compute_dtype(book.dtype))
    pieces = {own: at(held, own) for own in settings.codebooks}
    return {own: (piece, lib.prepare(piece)) for own, piece in pieces.items()}


def as_they_are(settings: Settings, book: Array) -> Books:
    """The codebooks for one search."""
    return {own: (at(book, own), at(book, own)) for own in settings.codebooks}


def tokens(lib: Backend, settings: Settings, x: Array, books: Books) -> Array:
    """Indices (...), with axes for heads and stages, of vectors (..., width); -1 for one that is not finite."""
    found: list[Array] = []
    left: Any = None
    codewords: Any = None
    for part in settings.parts:
        if settings.stages == 1 or part[-1] == 0:
            left = flat_rows(lib, x if settings.heads == 1 else of_head(settings, x, part[0]))
        else:
            left = left - lib.astype(lib.take_rows(codewords, found[-1]), left.dtype)
        codewords, searched = books[settings.own(part)]
        found.append(lib.search(left, searched))
    for count in reversed(settings.axes):
        found = [lib.xp.stack(found[i : i + count], axis=1) for i in range(0, len(found), count)]
    return shaped(lib, found[0], (*x.shape[:-1], *settings.axes))
