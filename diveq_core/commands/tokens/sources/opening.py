"""What DATA is, by its name: one file, a folder of images, or a folder of files that are one array in parts."""

from __future__ import annotations

import bisect
import itertools
from typing import TYPE_CHECKING

from diveq_core.commands.compare.images import SUFFIXES as IMAGES
from diveq_core.commands.tokens.errors import DataError
from diveq_core.commands.tokens.sources.columns import open_column
from diveq_core.commands.tokens.sources.numpy_files import open_npy, open_npz
from diveq_core.commands.tokens.sources.patches import PATCH, of_array, of_images
from diveq_core.commands.tokens.sources.source import Source
from diveq_core.commands.tokens.sources.stored import Rows, Stored
from diveq_core.commands.tokens.sources.stores import is_zarr, open_safetensors, open_zarr

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np

COLUMNS = (".parquet", ".arrow", ".arrows", ".feather", ".ipc")
SUFFIXES = (".npy", ".npz", ".safetensors", ".zarr", *COLUMNS)
_WHAT = "a .npy, .npz, .safetensors, Zarr, Parquet or Arrow file, an image, or a folder of one kind of them"


def open_data(path: Path, column: str | None = None, patch: int | None = None) -> Source:
    """The vectors of a file or folder.

    Parameters
    ----------
    path : Path
    column : str, optional
        Which column or array, where there are several.
    patch : int, optional
        Side of the patches into which images are cut; arrays are images only if it is given.

    Raises
    ------
    DataError
        If there is nothing to read, or what is there holds no vectors.
    """
    if not path.exists():
        raise DataError(f"DATA must be {_WHAT}, got {path}, which does not exist")
    if not path.is_dir() or is_zarr(path):
        return _file(path, column, patch)
    there = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    images = [file for file in there if file.suffix.lower() in IMAGES]
    parts = [file for file in there if file.suffix.lower() in SUFFIXES]
    if images and parts:
        raise DataError(
            f"DATA must be a folder of one kind of file, got images ({images[0].name}) and arrays ({parts[0].name}) "
            f"in {path}"
        )
    if images:
        _no_column(path, column)
        return of_images(path, images, patch or PATCH)
    if not parts:
        raise DataError(f"DATA must be {_WHAT}, got the folder {path} with none")
    return Parts(path, [_file(part, column, patch) for part in parts])


def open_tokens(path: Path, axes: int) -> Source:
    """Integers of a .npy or .npz file or of a Zarr store, whose last ``axes`` axes belong to one vector."""
    if not path.exists():
        raise DataError(f"TOKENS must be a .npy, .npz or Zarr file, got {path}, which does not exist")
    stored = _array(path, None, axes=axes, vectors=False)
    if stored is None:
        raise DataError(f"TOKENS must be a .npy, .npz or Zarr file, got {path}")
    if not stored.dtype.startswith(("int", "uint")):
        raise DataError(f"TOKENS must hold integers, got {stored.dtype} in {path}")
    return stored if isinstance(stored, Source) else Rows(stored, axes, vectors=False)


def _array(path: Path, column: str | None, *, axes: int = 1, vectors: bool = True) -> Stored | Source | None:
    """What a file or store holds, if it is of a kind that holds arrays."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return open_zarr(path, column) if is_zarr(path) else None
    if suffix == ".npy":
        _no_column(path, column)
        return open_npy(path)
    if suffix == ".npz":
        return open_npz(path, column, axes=axes, vectors=vectors)
    return open_safetensors(path, column) if suffix == ".safetensors" else None


def _file(path: Path, column: str | None, patch: int | None) -> Source:
    suffix = path.suffix.lower()
    if suffix in IMAGES:
        _no_column(path, column)
        return of_images(path, [path], patch or PATCH, single=True)
    if suffix in COLUMNS:
        if patch is not None:
            raise DataError(f"--patch must be left out for columns of vectors, got {patch} for {path}")
        return open_column(path, column)
    found = _array(path, column, vectors=patch is None)
    if found is None:
        raise DataError(f"DATA must be {_WHAT}, got {path}")
    if patch is None:
        return found if isinstance(found, Source) else Rows(found)
    if isinstance(found, Source):
        raise DataError(f"DATA must not be compressed for --patch, got {path}; numpy.savez does not compress")
    return of_array(found, patch)


class Parts(Source):
    """Several sources one after another, as one along the first axis."""

    def __init__(self, path: Path, parts: list[Source]) -> None:
        first = parts[0]
        for part in parts:
            if part.dim != first.dim:
                raise DataError(
                    f"DATA must hold vectors of one length, {first.dim} as in {first.path.name}, got {part.dim} in "
                    f"{part.path}"
                )
        alike = len({part.lead[1:] for part in parts}) == 1 and all(part.lead for part in parts)
        rows = sum(part.rows for part in parts)
        lead = (sum(part.lead[0] for part in parts), *first.lead[1:]) if alike else (rows,)
        kinds = list(dict.fromkeys(part.dtype for part in parts))
        super().__init__(path, lead, first.item, " and ".join(kinds))
        self._parts = parts
        self._begins = [0, *itertools.accumulate(part.rows for part in parts)]

    def files(self) -> list[Path]:
        return [file for part in self._parts for file in part.files()]

    def blocks(self, start: int, most: int) -> Iterator[np.ndarray]:
        number = bisect.bisect_right(self._begins, start) - 1
        for begin, part in zip(self._begins[number:], self._parts[number:], strict=False):
            yield from part.blocks(max(start - begin, 0), most)


def _no_column(path: Path, column: str | None) -> None:
    if column is not None:
        raise DataError(f"--column must be left out where there is one array, got {column!r} for {path}")
