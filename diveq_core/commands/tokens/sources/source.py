"""Vectors on disk as rows in one order, of which any part can be read without the rest."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from diveq_core.commands.tokens.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KINDS = "float16, bfloat16, float32 or float64"


class Source(ABC):
    """Vectors (..., D) on disk.

    Parameters
    ----------
    path : Path
        Of the file or folder.
    lead : tuple of int
        The shape without its last axis. Rows are counted along it, the last axis first.
    dim : int
        Entries of a vector, D.
    dtype : str
        What the numbers are stored as.
    """

    item: tuple[int, ...]
    """What a row is made of, (D,); () for tokens of one number each."""

    def __init__(self, path: Path, lead: tuple[int, ...], item: tuple[int, ...], dtype: str) -> None:
        self.path, self.lead, self.item, self.dtype = path, lead, item, dtype
        if 0 in item or not self.rows:
            raise DataError(f"DATA must hold at least one vector, got shape {(*lead, *item)} in {path}")

    @property
    def rows(self) -> int:
        """How many vectors there are, N."""
        return math.prod(self.lead)

    @property
    def dim(self) -> int:
        """Entries of a vector, D."""
        return math.prod(self.item)

    @abstractmethod
    def blocks(self, start: int, most: int) -> Iterator[np.ndarray]:
        """All rows from ``start`` on, in order, some at a time: about ``most`` of them, or as many as lie together."""

    def files(self) -> list[Path]:
        """All files that are read."""
        return [self.path]

    def chunks(self, rows: int, start: int = 0) -> Iterator[np.ndarray]:
        """All rows from ``start`` on, so many at a time; fewer only at the end."""
        kept: list[np.ndarray] = []
        count = 0
        for block in self.blocks(start, rows):
            while len(block):
                part, block = block[: rows - count], block[rows - count :]
                kept.append(part)
                count += len(part)
                if count == rows:
                    yield kept[0] if len(kept) == 1 else np.concatenate(kept)
                    kept, count = [], 0
        if kept:
            yield kept[0] if len(kept) == 1 else np.concatenate(kept)

    def identity(self) -> str:
        """A digest of what tells these data from others: names, sizes and times of the files, and how they are read."""
        found = hashlib.sha256(repr((self.lead, self.item, self.dtype)).encode())
        for file in self.files():
            try:
                facts = file.stat()
            except OSError as error:
                raise DataError(f"DATA must be files that can be read, got {file}: {error.strerror}") from None
            found.update(repr((file.name, facts.st_size, facts.st_mtime_ns)).encode())
        return found.hexdigest()

    def __str__(self) -> str:
        return f"{self.path}, {self.rows:,} vectors of {self.dim} entries, {self.dtype}"


def native(block: np.ndarray) -> np.ndarray:
    """Numbers in the machine's byte order; bfloat16, which NumPy keeps as two bytes without a meaning, as float32."""
    if block.dtype.kind == "V":
        return (block.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return block.astype(block.dtype.newbyteorder("="), copy=False)


def stored_as(dtype: np.dtype) -> str:
    """The name of a dtype, of two bytes that NumPy does not know too, which is how bfloat16 is saved."""
    return "bfloat16" if dtype == np.dtype("V2") else dtype.name


def checked_kind(path: Path, dtype: str, what: str = "DATA") -> str:
    """A dtype that vectors may have."""
    if dtype not in ("float16", "bfloat16", "float32", "float64"):
        hint = "; --patch cuts images into vectors" if dtype.startswith("uint") else ""
        raise DataError(f"{what} must hold {KINDS}, got {dtype} in {path}{hint}")
    return dtype
