"""Images cut into square patches, each a vector of its pixels: from files, or from an array that is a stack."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diveq_core.commands.compare.images import read_image
from diveq_core.commands.tokens.errors import DataError, RunError
from diveq_core.commands.tokens.sources.source import Source, native
from diveq_core.commands.tokens.sources.stores import missing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from diveq_core.commands.tokens.sources.stored import Stored

PATCH = 4
"""Side of a patch if none is given."""


class Patches(Source):
    r"""Vectors of patches of p x p pixels, :math:`D = p^2 C`, from left to right and top to bottom.

    Pixels at the right and the bottom that fill no patch are left out. Images of one size give an array of rows and
    columns of vectors for each; of several sizes all vectors lie along one axis.

    Parameters
    ----------
    path : Path
    sizes : list of (int, int)
        Height and width of each image.
    channels : int
    patch : int
        Side p.
    image : callable
        Pixels (H, W, C) of the image of a number.
    dtype : str
    single : bool
        Whether it is one image, and not a stack of one.
    """

    def __init__(
        self,
        path: Path,
        sizes: list[tuple[int, int]],
        channels: int,
        patch: int,
        image: Callable[[int], np.ndarray],
        dtype: str,
        *,
        files: list[Path] | None = None,
        single: bool = False,
    ) -> None:
        self._cut, self._image, self._files = patch, image, files or [path]
        grids = [(height // patch, width // patch) for height, width in sizes]
        for i, (rows, columns) in enumerate(grids):
            if rows * columns == 0:
                where = self._files[i] if len(self._files) == len(sizes) else path
                raise DataError(
                    f"--patch must be at most the sides of an image, {sizes[i][0]} x {sizes[i][1]} in {where}, got "
                    f"{patch}"
                )
        self._ends = np.cumsum([rows * columns for rows, columns in grids])
        if len(set(grids)) == 1:
            lead: tuple[int, ...] = grids[0] if single else (len(grids), *grids[0])
        else:
            lead = (int(self._ends[-1]),)
        super().__init__(path, lead, (patch * patch * channels,), dtype)

    def files(self) -> list[Path]:
        return self._files

    def blocks(self, start: int, most: int) -> Iterator[np.ndarray]:
        first = int(np.searchsorted(self._ends, start, side="right"))
        for number in range(first, len(self._ends)):
            begin = int(self._ends[number - 1]) if number else 0
            vectors = cut(self._image(number), self._cut)
            if begin + len(vectors) != self._ends[number]:
                raise RunError(f"DATA must stay as it is while it is read, got other images in {self.path}")
            yield vectors[max(start - begin, 0) :]


def cut(image: np.ndarray, patch: int) -> np.ndarray:
    """Patches (n, p p C) of an image (H, W, C)."""
    rows, columns, channels = image.shape[0] // patch, image.shape[1] // patch, image.shape[2]
    whole = image[: rows * patch, : columns * patch]
    parts = whole.reshape(rows, patch, columns, patch, channels).swapaxes(1, 2)
    return parts.reshape(rows * columns, patch * patch * channels)


def of_images(path: Path, files: list[Path], patch: int, *, single: bool = False) -> Patches:
    """Patches of image files, RGB in [0, 1]."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise missing(path, "pillow", "data") from None

    def image(number: int) -> np.ndarray:
        return read_image(files[number], DataError, "DATA")

    sizes = [_size(file) for file in files]
    return Patches(path, sizes, 3, patch, image, "float32", files=files, single=single)


def _size(path: Path) -> tuple[int, int]:
    """Height and width, without reading the pixels."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            # Orientations from here on are turned by a quarter.
            turned = image.getexif().get(0x0112, 1) >= 5
    except Exception as error:
        raise DataError(f"DATA must be images that Pillow can read, got {path}: {error}") from None
    return (width, height) if turned else (height, width)


def of_array(stored: Stored, patch: int) -> Patches:
    """Patches of an array (H, W), (N, H, W), (H, W, C) or (N, H, W, C) with C = 1 or 3."""
    shape = stored.shape
    coloured = len(shape) in (3, 4) and shape[-1] in (1, 3)
    pixels = shape[:-1] if coloured else shape
    if len(pixels) not in (2, 3) or 0 in shape:
        raise DataError(
            "DATA must have shape (H, W), (N, H, W), (H, W, C) or (N, H, W, C) with C = 1 or 3 for --patch, got "
            f"{shape} in {stored.path}"
        )
    if stored.dtype not in ("float16", "bfloat16", "float32", "float64", "uint8", "uint16"):
        raise DataError(
            f"DATA must hold floating numbers, uint8 or uint16 for --patch, got {stored.dtype} in {stored.path}"
        )
    single = len(pixels) == 2
    channels = shape[-1] if coloured else 1

    def image(number: int) -> np.ndarray:
        part = stored.read((), 0, shape[0]) if single else stored.read((), number, number + 1)
        values = native(np.ascontiguousarray(part)).reshape(*pixels[-2:], channels)
        # Integers of a known white; floating numbers are taken as they are.
        return values if values.dtype.kind == "f" else (values / np.iinfo(values.dtype).max).astype(np.float32)

    count = 1 if single else pixels[0]
    sizes = [(pixels[-2], pixels[-1])] * count
    kept = stored.dtype if stored.dtype.startswith(("float", "bfloat")) else "float32"
    return Patches(
        stored.path, sizes, channels, patch, image, kept, files=list(stored.files) or [stored.path], single=single
    )
