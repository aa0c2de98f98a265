"""An array in a file of which parts can be read: its shape, its dtype, and a function that reads a part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diveq_core.commands.tokens.errors import DataError
from diveq_core.commands.tokens.sources.source import Source, checked_kind, native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@dataclass(frozen=True)
class Stored:
    """An array in a file.

    Parameters
    ----------
    path : Path
    shape : tuple of int
    dtype : str
    read : callable
        ``read(outer, a, b)`` gives ``array[(*outer, slice(a, b))]``; a single number is read as an array of one.
    grid : tuple of int, optional
        Shape of the pieces in which it is kept, where a piece can only be read as a whole.
    files : tuple of Path
        What is read, if not the path alone.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[tuple[int, ...], int, int], np.ndarray]
    grid: tuple[int, ...] | None = None
    files: tuple[Path, ...] = ()


class Rows(Source):
    """The rows of a stored array: vectors along its last axis, or what lies along its last ``axes`` axes."""

    def __init__(self, stored: Stored, axes: int = 1, *, vectors: bool = True) -> None:
        if vectors:
            checked_kind(stored.path, stored.dtype)
        if len(stored.shape) < axes:
            what = "DATA must have at least one axis" if vectors else f"TOKENS must have at least {axes} axes"
            raise DataError(f"{what}, got shape {stored.shape} in {stored.path}")
        cut = len(stored.shape) - axes
        super().__init__(stored.path, stored.shape[:cut], stored.shape[cut:], stored.dtype)
        self.stored = stored

    def files(self) -> list[Path]:
        return list(self.stored.files) or [self.path]

    def blocks(self, start: int, most: int) -> Iterator[np.ndarray]:
        shape, lead = self.stored.shape, self.lead
        if not lead:
            # The one that there is.
            yield native(np.ascontiguousarray(self.stored.read((), 0, (shape or (1,))[0]))).reshape(1, *self.item)
            return
        # The first axis whose entries are few enough rows to be read together.
        axis = next(i for i in range(len(lead)) if math.prod(lead[i + 1 :]) <= most)
        inner = math.prod(lead[axis + 1 :])
        along = most // inner
        if self.stored.grid is not None:
            # A piece is read once rather than for each part of it.
            piece = self.stored.grid[axis]
            along = max(along // piece, 1) * piece
        row = start
        while row < self.rows:
            entry, offset = divmod(row, inner)
            *outer, a = (int(i) for i in np.unravel_index(entry, lead[: axis + 1]))
            b = min((a // along + 1) * along, lead[axis])
            part = np.ascontiguousarray(self.stored.read(tuple(outer), a, b))
            block = native(part).reshape(-1, *self.item)[offset:]
            yield block
            row += len(block)
