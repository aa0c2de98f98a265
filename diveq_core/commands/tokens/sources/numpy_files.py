"""Arrays in .npy and .npz files, memory-mapped a part at a time, so that what was read does not stay in memory."""

from __future__ import annotations

import zipfile
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from diveq_core.commands.tokens.errors import DataError, RunError
from diveq_core.commands.tokens.sources.source import native, stored_as
from diveq_core.commands.tokens.sources.stored import Rows, Stored

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diveq_core.commands.tokens.sources.source import Source

_LOCAL_HEADER = 30


def mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype, offset: int, fortran: bool = False) -> Stored:
    """An array that lies in a file as it would in memory."""
    order: Any = "F" if fortran else "C"

    def read(outer: tuple[int, ...], a: int, b: int) -> np.ndarray:
        try:
            # Mapped for this part alone: pages that were read would stay with a mapping.
            whole: Any = np.memmap(path, dtype, "r", offset, shape or (1,), order)
        except (OSError, ValueError) as error:
            raise RunError(f"DATA must stay as it is while it is read, got {path}: {error}") from None
        return whole[(*outer, slice(a, b))]

    return Stored(path, shape, stored_as(dtype), read)


def open_npy(path: Path) -> Stored:
    """The array of a .npy file."""
    try:
        with path.open("rb") as file:
            shape, fortran, dtype = _header(file)
            offset = file.tell()
            file.seek(0, 2)
            there = file.tell() - offset
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"DATA must be a .npy file of numbers, got {path}: {_line(error)}") from None
    needed = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if there < needed:
        raise DataError(f"DATA must be a whole .npy file, got {path} with {there} of its {needed} bytes")
    return mapped(path, shape, _numbers(path, dtype), offset, fortran)


def open_npz(path: Path, name: str | None, *, vectors: bool = True, axes: int = 1) -> Source | Stored:
    """An array of a .npz file: mapped if it is kept as it is, else read from front to back."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            chosen = only(path, list(members), name)
            member = members[chosen]
            with archive.open(member) as file:
                shape, fortran, dtype = _header(file)
                ahead = file.tell()
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"DATA must be a .npz file of arrays, got {path}: {_line(error)}") from None
    dtype = _numbers(path, dtype)
    if member.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as raw:
            raw.seek(member.header_offset)
            header = raw.read(_LOCAL_HEADER)
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return mapped(path, shape, dtype, member.header_offset + _LOCAL_HEADER + names + ahead, fortran)
    if fortran:
        raise DataError(f"DATA must keep vectors one after another where it is compressed, got columns in {path}")
    stored = Stored(path, shape, stored_as(dtype), _not_read)
    return Compressed(stored, member.filename, ahead, dtype, axes, vectors=vectors)


class Compressed(Rows):
    """A compressed array of a .npz file, which can only be read from front to back."""

    def __init__(self, stored: Stored, member: str, ahead: int, dtype: np.dtype, axes: int, *, vectors: bool) -> None:
        super().__init__(stored, axes, vectors=vectors)
        self._member, self._ahead, self._dtype = member, ahead, dtype

    def blocks(self, start: int, most: int) -> Iterator[np.ndarray]:
        row = self.dim * self._dtype.itemsize
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self._member) as file:
                file.seek(self._ahead + start * row)
                for first in range(start, self.rows, most):
                    count = min(most, self.rows - first)
                    data = file.read(count * row)
                    if len(data) < count * row:
                        raise EOFError("it ends early")
                    yield native(np.frombuffer(data, self._dtype)).reshape(count, *self.item)
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            raise RunError(f"DATA must be a whole .npz file, got {self.path}: {_line(error)}") from None


def only(path: Path, names: list[str], chosen: str | None, what: str = "an array") -> str:
    """The name that was chosen, or the only one there is."""
    if chosen is not None and chosen not in names:
        raise DataError(f"--column must name {what} of {path}, {_listed(names)}, got {chosen!r}")
    if chosen is None and len(names) != 1:
        raise DataError(f"DATA must hold {what} and no other, or --column say which, got {_listed(names)} in {path}")
    return names[0] if chosen is None else chosen


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return shown or "none"


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _numbers(path: Path, dtype: np.dtype) -> np.dtype:
    if dtype.hasobject or (dtype.kind not in "fiu" and dtype != np.dtype("V2")):
        raise DataError(f"DATA must hold numbers, got {dtype} in {path}")
    return dtype


def _not_read(outer: tuple[int, ...], a: int, b: int) -> np.ndarray:
    raise NotImplementedError


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
