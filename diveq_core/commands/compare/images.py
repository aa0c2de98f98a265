"""Photographs, from scikit-learn or from files, as float arrays (H, W, C) in [0, 1]."""

from __future__ import annotations

import warnings
import zipfile
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from diveq_core.commands.compare.settings import CompareError
from diveq_core.commands.terminal import UsageError

if TYPE_CHECKING:
    from pathlib import Path

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

_SHAPES = "shape (H, W), (N, H, W), (H, W, C) or (N, H, W, C) with C = 1 or 3"

# What white may be: one, the 16 of scikit-learn's digits, or eight bits.
_WHITES = (1, 16, 255)


class Images(NamedTuple):
    """What was read, and what to call it."""

    images: list[np.ndarray]
    """(H, W, C) each, C the same for all, float32 in [0, 1]."""

    source: str


def load_images(path: Path | None) -> Images:
    """The two photographs scikit-learn ships, or those at ``path``: an image, a folder of images or a .npy.

    Raises
    ------
    CompareError
        If there is nothing to read, or what is there is no image.
    """
    if path is None:
        return _sample_images()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise CompareError(f"--data must be a folder with images ({', '.join(SUFFIXES)}), got none in {path}")
        return Images([read_image(file) for file in files], f"{len(files)} images of {path}")
    if not path.exists():
        raise CompareError(
            f"--data must be an image, a folder of images or a .npy file, got {path}, which does not exist"
        )
    if path.suffix.lower() == ".npy":
        return Images(_read_array(path), str(path))
    return Images([read_image(path)], str(path))


def _sample_images() -> Images:
    from sklearn.datasets import load_sample_images

    sample = load_sample_images()
    return Images([_unit(image) for image in sample.images], "china.jpg and flower.jpg of scikit-learn")


def _unit(values: np.ndarray) -> np.ndarray:
    """Unsigned integers of any width to float32 in [0, 1]."""
    return (values / np.iinfo(values.dtype).max).astype(np.float32)


def read_image(path: Path, refused: type[UsageError] = CompareError, option: str = "--data") -> np.ndarray:
    """RGB (H, W, 3) in [0, 1]: grey is repeated, palettes are looked up, transparency is laid over white.

    What cannot be read is ``refused`` by an error that names the ``option``.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
                if image.mode.startswith("I;16"):
                    return np.repeat(_unit(np.asarray(image).astype(np.uint16))[:, :, None], 3, axis=2)
                if image.mode in ("I", "F"):
                    raise refused(
                        f"{option} must have 8 or 16 bits per channel, got {path} in Pillow's mode {image.mode!r}"
                    )
                if image.has_transparency_data:
                    white = Image.new("RGBA", image.size, "white")
                    image = Image.alpha_composite(white, image.convert("RGBA"))
                return _unit(np.asarray(image.convert("RGB")))
    except UsageError:
        raise
    # Pillow reports damaged files by almost any exception, according to the format.
    except Exception as error:
        raise refused(f"{option} must be an image that Pillow can read, got {path}: {_first_line(error)}") from None


def _read_array(path: Path) -> list[np.ndarray]:
    try:
        with path.open("rb") as file:
            values = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CompareError(f"--data must be a .npy file of numbers, got {path}: {_first_line(error)}") from None
    if not isinstance(values, np.ndarray):
        raise CompareError(f"--data must be one array in a .npy file, got an archive of arrays in {path}")
    if not np.issubdtype(values.dtype, np.floating) and not np.issubdtype(values.dtype, np.integer):
        raise CompareError(f"--data must be integers or floating, got dtype {values.dtype} in {path}")
    shape = tuple(values.shape)
    if values.ndim == 2 or (values.ndim == 3 and shape[-1] not in (1, 3)):
        values = values[..., None]
    if values.ndim not in (3, 4) or values.shape[-1] not in (1, 3) or 0 in shape:
        raise CompareError(f"--data must have {_SHAPES}, got {shape} in {path}")
    values = _unit(values) if values.dtype == np.uint8 else _scaled(values, path)
    return list(values) if values.ndim == 4 else [values]


def _scaled(values: np.ndarray, path: Path) -> np.ndarray:
    """Numbers whose white is not known from the dtype, by the smallest white that none exceeds."""
    if not np.isfinite(values).all():
        raise CompareError(f"--data must be finite, got NaN or infinity in {path}")
    lowest, highest = values.min(), values.max()
    if lowest < 0 or highest > _WHITES[-1]:
        raise CompareError(
            f"--data must lie in {' or '.join(f'[0, {white}]' for white in _WHITES)}, got values from {lowest:g} to "
            f"{highest:g} in {path}"
        )
    return (values / next(white for white in _WHITES if highest <= white)).astype(np.float32)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
