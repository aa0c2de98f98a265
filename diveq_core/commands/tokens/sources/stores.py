"""Arrays in safetensors files and in Zarr stores."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from diveq_core.commands.tokens.errors import DataError, RunError
from diveq_core.commands.tokens.sources.numpy_files import mapped, only
from diveq_core.commands.tokens.sources.stored import Stored

if TYPE_CHECKING:
    from pathlib import Path

_DTYPES = {
    "F16": "<f2",
    "BF16": "V2",
    "F32": "<f4",
    "F64": "<f8",
    "U8": "u1",
    "U16": "<u2",
}


def open_safetensors(path: Path, name: str | None) -> Stored:
    """An array of a safetensors file, which keeps it as memory would."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise missing(path, "safetensors", "files") from None
    try:
        # The library looks at the whole header, and whether the file is as long as it says.
        with safe_open(os.fspath(path), framework="numpy") as file:
            chosen = only(path, sorted(file.keys()), name)
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            entry = json.loads(raw.read(length))[chosen]
    except (OSError, SafetensorError) as error:
        raise DataError(f"DATA must be a whole safetensors file, got {path}: {error}") from None
    if entry["dtype"] not in _DTYPES:
        raise DataError(f"DATA must hold numbers of NumPy or bfloat16, got {entry['dtype']} in {path}")
    shape = tuple(entry["shape"])
    return mapped(path, shape, np.dtype(_DTYPES[entry["dtype"]]), 8 + length + entry["data_offsets"][0])


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr store."""
    return any((path / name).exists() for name in ("zarr.json", ".zarray", ".zgroup"))


def open_zarr(path: Path, name: str | None) -> Stored:
    """An array of a Zarr store."""
    try:
        import zarr
    except ImportError:
        raise missing(path, "zarr", "data") from None
    try:
        node: Any = zarr.open(os.fspath(path), mode="r")
        if isinstance(node, zarr.Group):
            node = node[only(path, sorted(key for key, _ in node.arrays()), name)]
    except DataError:
        raise
    # What zarr raises on a damaged store depends on where it is damaged.
    except Exception as error:
        raise DataError(f"DATA must be a Zarr store, got {path}: {error}") from None

    def read(outer: tuple[int, ...], a: int, b: int) -> np.ndarray:
        try:
            return np.asarray(node[(*outer, slice(a, b))] if node.shape else node[()][None])
        except Exception as error:
            raise RunError(f"DATA must be a whole Zarr store, got {path}: {error}") from None

    files = tuple(sorted(file for file in path.rglob("*") if file.is_file()))
    return Stored(path, tuple(node.shape), np.dtype(node.dtype).name, read, tuple(node.chunks), files)


def missing(path: Path, package: str, extra: str) -> DataError:
    """A package that a file needs is not installed."""
    return DataError(f'DATA needs {package} for {path}, not installed here: pip install "diveq-core[{extra}]"')
