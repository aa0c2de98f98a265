"""Where tokens and vectors go: a file that appears whole or not at all, and that a later run can go on with.

What is not yet whole lies in a folder beside it, ``NAME.partial``, with a record of what it is made of and how many
rows are safe on the disk. Rows after those are written again, so that a kill at any moment loses nothing and doubles
nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from diveq_core.commands.tokens.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BETWEEN = 1.0
"""Seconds between two records."""

# Bytes of an entry along the first axis, above which no store is written, since it is kept in memory until it is whole.
_LARGEST = 1 << 28

_CHUNK_BYTES = 1 << 22


class Sink(ABC):
    """An array on disk, written row by row.

    Parameters
    ----------
    path : Path
        The file or store.
    lead, item : tuple of int
        The shape is ``(*lead, *item)``, and a row is of shape ``item``.
    dtype : dtype
    made_of : dict
        What the rows are computed from: a run goes on only with what is the same.
    """

    def __init__(
        self, path: Path, lead: tuple[int, ...], item: tuple[int, ...], dtype: Any, made_of: dict[str, Any]
    ) -> None:
        self.path, self.lead, self.item, self.dtype = path, lead, item, np.dtype(dtype)
        self.rows = math.prod(lead)
        self.made_of = made_of
        self.skipped = 0
        """Marks among the rows that are recorded."""
        self.folder = path.with_name(path.name + ".partial")
        self._record = self.folder / "progress.json"
        self._data = self.folder / path.name
        self._lock: Any = None
        self._noted = 0.0
        # Rows that are there already and will come again, and those that came; whether each since the record is marked.
        self._again = self._added = self._recorded = 0
        self._marks: list[np.ndarray] = []
        self._begun = False

    def begin(self, grid: int, *, resume: bool) -> int:
        """Make ready, and say with which row to begin: a multiple of ``grid``, or none is left."""
        self.folder.mkdir(exist_ok=True)
        self._lock = locked(self.folder / "lock")
        earlier = self._earlier()
        if earlier is not None and not resume:
            raise DataError(
                f"{self.folder} holds {earlier['rows']:,} of {self.rows:,} rows of an earlier run: --resume goes on "
                "with it; remove the folder to begin again"
            )
        if earlier is not None and earlier["made_of"] != self.made_of:
            changed = [name for name, value in self.made_of.items() if earlier["made_of"].get(name) != value]
            raise DataError(
                f"--resume must go on with what {self.folder} was begun with, got another "
                f"{' and another '.join(changed)}; remove the folder to begin again"
            )
        there = self._data.exists()
        if earlier is not None and earlier["rows"] == self.rows and self.path.exists() and not there:
            # It was moved to its place, and the folder is what is left.
            self.skipped, self._begun = earlier["skipped"], True
            return self.rows
        self._check_place()
        if earlier is None or not there:
            self._record.unlink(missing_ok=True)
            self._clear()
            self._create()
            # Last, so that what lies there without it is nothing.
            self._note(self._safe())
        else:
            self.skipped, self._added = earlier["skipped"], earlier["rows"]
            self._recorded = self._added
            self._again = self._added % grid if self._added < self.rows else 0
            self._reopen()
        self._begun = True
        return self._added - self._again

    def _check_place(self) -> None:  # noqa: B027 - most can be
        """Refuse what is in the place and cannot be replaced."""

    def _earlier(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._record.read_text(encoding="utf-8"))
            return found if {"rows", "skipped", "made_of"} <= found.keys() else None
        except (FileNotFoundError, ValueError):
            return None

    def _clear(self) -> None:
        if self._data.is_dir():
            shutil.rmtree(self._data)
        self._data.unlink(missing_ok=True)

    @abstractmethod
    def _create(self) -> None:
        """An array without rows."""

    @abstractmethod
    def _reopen(self) -> None:
        """The array with the rows that were added to it."""

    @abstractmethod
    def _write(self, rows: np.ndarray) -> None:
        """Add the next rows."""

    @abstractmethod
    def _safe(self) -> int:
        """Bring what was added to the disk, and say how many rows are there."""

    @abstractmethod
    def _close(self) -> None:
        """Let go of files."""

    def write(self, rows: np.ndarray, marks: np.ndarray) -> None:
        """Add the next rows, and whether each is a mark; now and then record how far this is."""
        again = min(self._again, len(rows))
        self._again -= again
        rows, marks = rows[again:], marks[again:]
        self._write(rows)
        self._added += len(rows)
        self._marks.append(marks)
        if time.monotonic() - self._noted >= BETWEEN:
            self._note(self._safe())

    def _note(self, rows: int) -> None:
        marks = np.concatenate([np.zeros(0, bool), *self._marks])
        count = rows - self._recorded
        skipped = self.skipped + int(np.count_nonzero(marks[:count]))
        found = {"rows": rows, "skipped": skipped, "made_of": self.made_of}
        replaced(self._record, lambda file: file.write(json.dumps(found)))
        self.skipped, self._recorded, self._marks = skipped, rows, [marks[count:]]
        self._noted = time.monotonic()

    def finish(self) -> None:
        """Move the whole array to its place."""
        if self._data.exists():
            self._note(self._safe())
            self._close()
            self._move()
            synced(self.path.parent)
        # The record last, without which the rest counts for nothing.
        self._clear()
        self._record.unlink(missing_ok=True)
        shutil.rmtree(self.folder)
        self._let_go()

    def _move(self) -> None:
        os.replace(self._data, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        held = self._lock is not None
        if error is not None and self._begun:
            # What was added is kept as far as the disk takes it.
            with contextlib.suppress(Exception):
                if self._data.exists():
                    self._note(self._safe())
        with contextlib.suppress(OSError):
            self._close()
        if error is not None and held and self._earlier() is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._let_go()

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


class NpyFile(Sink):
    """A .npy file."""

    _file: Any = None
    _ahead = 0

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.item) * self.dtype.itemsize

    def _create(self) -> None:
        self._file = self._data.open("wb")
        described = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": described, "fortran_order": False, "shape": (*self.lead, *self.item)}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._ahead = self._file.tell()

    def _reopen(self) -> None:
        with self._data.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            self._ahead = file.tell()
        self._file = self._data.open("r+b")
        self._file.truncate(self._ahead + self._added * self._row_bytes)
        self._file.seek(0, 2)

    def _write(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, self.dtype).data)

    def _safe(self) -> int:
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._added

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()


class ZarrStore(Sink):
    """A Zarr store, a piece of some entries of the first axis at a time."""

    _array: Any = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if not self.lead:
            raise DataError(f"-o must end in .npy for a single vector, got {self.path}")
        # Rows of an entry of the first axis.
        self._each = math.prod(self.lead[1:])
        size = max(self._each * math.prod(self.item) * self.dtype.itemsize, 1)
        if size > _LARGEST:
            raise DataError(
                f"-o must end in .npy for entries of {size >> 20} MiB along the first axis, got {self.path}"
            )
        self._entries = min(max(_CHUNK_BYTES // size, 1), self.lead[0])
        self._kept: list[np.ndarray] = []
        self._written = 0
        self._new: list[Path] = []

    def _check_place(self) -> None:
        if self.path.exists():
            raise DataError(f"-o must be a store that does not exist, got {self.path}, which does; remove it first")

    def _create(self) -> None:
        import zarr

        shape = (*self.lead, *self.item)
        chunks = (self._entries, *shape[1:])
        zarr.create_array(os.fspath(self._data), shape=shape, chunks=chunks, dtype=self.dtype, zarr_format=3)
        self._new = [self._data]
        self._reopen()

    def _reopen(self) -> None:
        import zarr

        # What a run left that ended while zarr wrote a piece, which it does under another name first.
        for file in self._data.rglob("*.partial"):
            file.unlink()
        self._array = zarr.open_array(os.fspath(self._data), mode="r+")
        self._written = self._added

    def _write(self, rows: np.ndarray) -> None:
        self._kept.append(rows)
        piece, count = self._entries * self._each, sum(map(len, self._kept))
        if count < piece and self._written + count < self.rows:
            return
        left = np.concatenate(self._kept)
        while len(left) >= piece or (len(left) and self._written + len(left) == self.rows):
            part, left = left[:piece], left[piece:]
            first = self._written // self._each
            entries = part.reshape(-1, *self.lead[1:], *self.item)
            self._array[first : first + len(entries)] = entries
            self._new.append(self._data / "c" / str(first // self._entries))
            self._written += len(part)
        self._kept = [left]

    def _safe(self) -> int:
        for path in self._new:
            for file in [path, *path.rglob("*")]:
                synced(file)
        self._new = []
        return self._written

    def _close(self) -> None:
        self._array = None


def open_sink(path: Path, *arguments: Any) -> Sink:
    """The sink for a name that ends in .npy or .zarr."""
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".zarr"):
        raise DataError(f"-o must be a name ending in .npy or .zarr, got {path}")
    if not path.parent.is_dir():
        raise DataError(f"-o must be in a folder that exists, got {path}")
    if suffix == ".npy" and path.is_dir():
        raise DataError(f"-o must be a file, got the folder {path}")
    if suffix == ".npy":
        return NpyFile(path, *arguments)
    try:
        import zarr  # noqa: F401
    except ImportError:
        raise DataError(f'-o needs zarr for {path}, not installed here: pip install "diveq-core[data]"') from None
    return ZarrStore(path, *arguments)


def replaced(path: Path, write: Callable[[Any], object]) -> None:
    """Write a text file that is at any moment the old one or the new one."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def synced(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def locked(path: Path) -> Any:
    """A file that no other run holds; given up by closing it, or by the end of the process."""
    file = path.open("a")
    try:
        import fcntl
    except ImportError:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise DataError(f"{path.parent} must not be in use, got another run that writes there") from None
    return file
