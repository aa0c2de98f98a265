"""A column of vectors in a Parquet file, or in an Arrow file or stream."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from diveq_core.commands.tokens.errors import DataError, RunError
from diveq_core.commands.tokens.sources.numpy_files import only
from diveq_core.commands.tokens.sources.source import Source, checked_kind
from diveq_core.commands.tokens.sources.stores import missing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_KINDS = {"halffloat": "float16", "float": "float32", "double": "float64"}


def open_column(path: Path, name: str | None) -> Source:
    """The only column of lists, or the one of a name."""
    try:
        import pyarrow
    except ImportError:
        raise missing(path, "pyarrow", "data") from None
    try:
        return Parquet(path, name) if path.suffix.lower() == ".parquet" else Arrow(path, name)
    except (OSError, pyarrow.ArrowException) as error:
        kind = "Parquet" if path.suffix.lower() == ".parquet" else "Arrow"
        raise DataError(f"DATA must be a whole {kind} file, got {path}: {_line(error)}") from None


class Column(Source):
    """Vectors of a column; one that is null is one that is not finite."""

    def __init__(self, path: Path, schema: Any, rows: int, name: str | None) -> None:
        fits = [field.name for field in schema if _numbers_of(field.type) is not None]
        self.column = only(path, fits, name, "a column of lists of numbers")
        kind = _storage(schema.field(self.column).type)
        dtype = checked_kind(path, _KINDS.get(str(kind.value_type), str(kind.value_type)))
        self._numpy = np.dtype(dtype)
        super().__init__(path, (rows,), (kind.list_size if hasattr(kind, "list_size") else self._width(),), dtype)

    @abstractmethod
    def pieces(self, start: int, most: int) -> Iterator[tuple[int, Any]]:
        """Arrays of the column and the row that each begins with, from the one on that holds row ``start``."""

    def _width(self) -> int:
        for _, piece in self.pieces(0, 1):
            lengths = np.asarray(_plain(piece).value_lengths().drop_null())
            if len(lengths):
                return int(lengths[0])
        raise DataError(f"DATA must hold at least one vector, got nulls alone in {self.path}")

    def blocks(self, start: int, most: int) -> Iterator[np.ndarray]:
        import pyarrow

        try:
            for first, piece in self.pieces(start, most):
                begin = max(start - first, 0)
                for a in range(begin, len(piece), most):
                    yield self._vectors(_plain(piece).slice(a, most), first + a)
        except (OSError, pyarrow.ArrowException) as error:
            raise RunError(f"DATA must stay as it is while it is read, got {self.path}: {_line(error)}") from None

    def _vectors(self, part: Any, first: int) -> np.ndarray:
        import pyarrow

        there = np.asarray(part.is_valid())
        if not pyarrow.types.is_fixed_size_list(part.type):
            lengths = part.value_lengths().fill_null(self.dim).to_numpy(zero_copy_only=False)
            if (lengths != self.dim).any():
                row = int(np.flatnonzero(lengths != self.dim)[0])
                raise DataError(
                    f"DATA must hold vectors of one length, {self.dim} as the first, got {lengths[row]} in row "
                    f"{first + row} of {self.path}"
                )
        # Without what a null may hide.
        numbers = part.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dim)
        numbers = numbers.astype(self._numpy, copy=False)
        if there.all():
            return numbers
        vectors = np.full((len(part), self.dim), np.nan, self._numpy)
        vectors[there] = numbers
        return vectors


class Parquet(Column):
    """A column of a Parquet file."""

    def __init__(self, path: Path, name: str | None) -> None:
        import pyarrow.parquet

        self._file = pyarrow.parquet.ParquetFile(os.fspath(path), memory_map=False)
        super().__init__(path, self._file.schema_arrow, self._file.metadata.num_rows, name)

    def pieces(self, start: int, most: int) -> Iterator[tuple[int, Any]]:
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups)]
        first, group = 0, 0
        while group < len(sizes) and first + sizes[group] <= start:
            first, group = first + sizes[group], group + 1
        groups = list(range(group, len(sizes)))
        for batch in self._file.iter_batches(most, row_groups=groups, columns=[self.column], use_threads=False):
            if first + len(batch) > start:
                yield first, batch.column(0)
            first += len(batch)


class Arrow(Column):
    """A column of an Arrow file (also called Feather), or of an Arrow stream."""

    def __init__(self, path: Path, name: str | None) -> None:
        import pyarrow

        self._random = _is_file(path)
        with pyarrow.memory_map(os.fspath(path)) as file:
            if self._random:
                reader = pyarrow.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                reader = batches = pyarrow.ipc.open_stream(file)
            schema, rows = reader.schema, sum(len(batch) for batch in batches)
        self._path = path
        super().__init__(path, schema, rows, name)

    def pieces(self, start: int, most: int) -> Iterator[tuple[int, Any]]:
        import pyarrow

        first = 0
        with pyarrow.memory_map(os.fspath(self._path)) as file:
            if self._random:
                reader = pyarrow.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                batches = pyarrow.ipc.open_stream(file)
            for batch in batches:
                if first + len(batch) > start:
                    yield first, batch.column(self.column)
                first += len(batch)


def _is_file(path: Path) -> bool:
    """Whether it is one with an index at its end, rather than a stream."""
    with path.open("rb") as file:
        return file.read(6) == b"ARROW1"


def _storage(kind: Any) -> Any:
    """What a column is kept as; tensors of a fixed shape are lists."""
    return getattr(kind, "storage_type", kind)


def _plain(piece: Any) -> Any:
    return getattr(piece, "storage", piece)


def _numbers_of(kind: Any) -> Any:
    import pyarrow.types as types

    kind = _storage(kind)
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    number = kind.value_type if lists else None
    return number if lists and (types.is_floating(number) or types.is_integer(number)) else None


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
