"""Training patches from the top of each image, held-out patches from its bottom: no pixel is in both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diveq_core.commands.compare.settings import CompareError

if TYPE_CHECKING:
    from diveq_core.commands.compare.images import Images

HELD_OUT_SHARE = 0.25


class Patches:
    """Patches of side ``patch``, centred and scaled by the training region's mean and standard deviation.

    Parameters
    ----------
    images : Images
    patch : int
        Side of a patch in pixels. Every image must be at least two patches high and one wide.

    Attributes
    ----------
    size : int
        Entries of a patch, P = patch^2 C.
    held_out : array (M, P)
        The bottom quarter of each image, cut into patches without overlap, row by row, image by image.
    """

    def __init__(self, images: Images, patch: int) -> None:
        self.source, self.patch = images.source, patch
        self.images, self.splits = images.images, []
        for image in self.images:
            height, width, _ = image.shape
            if height < 2 * patch or width < patch:
                raise CompareError(
                    f"--data must have images at least two patches high and one wide, {2 * patch} x {patch} pixels "
                    f"(--patch {patch}), got {height} x {width} in {images.source}"
                )
            held_out = max(1, round(HELD_OUT_SHARE * height / patch)) * patch
            self.splits.append(height - held_out)
        self.channels = self.images[0].shape[2]
        self.size = patch * patch * self.channels
        self._index_training_region()
        self.mean, self.std = (
            float(np.mean(self._pixels, dtype=np.float64)),
            float(np.std(self._pixels, dtype=np.float64)),
        )
        if self.std < 1e-6:
            raise CompareError(
                f"--data must have some contrast, got a training region of one colour in {images.source}"
            )
        self.grids = [
            ((image.shape[0] - split) // patch, image.shape[1] // patch)
            for image, split in zip(self.images, self.splits, strict=True)
        ]
        self.held_out = np.concatenate([self.standardized(self._cut(i)) for i in range(len(self.images))])

    def _index_training_region(self) -> None:
        """Lay all training pixels out in one list, so that any patch is one gather."""
        regions = [image[:split] for image, split in zip(self.images, self.splits, strict=True)]
        self._pixels = np.concatenate([region.reshape(-1, self.channels) for region in regions])
        self._widths = np.array([region.shape[1] for region in regions])
        self._columns = self._widths - self.patch + 1
        positions = np.array([region.shape[0] for region in regions]) - self.patch + 1
        self._last = np.cumsum(positions * self._columns)
        self._first_pixel = np.cumsum([0] + [region.shape[0] * region.shape[1] for region in regions[:-1]])
        self.positions = int(self._last[-1])

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Training patches at uniformly random positions, (count, P)."""
        return self.at(rng.integers(self.positions, size=count))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Training patches at numbered positions in [0, ``positions``), (N,) -> (N, P)."""
        return self.standardized(self._pixels[self.pixels_at(positions)].reshape(-1, self.size))

    def pixels_at(self, positions: np.ndarray) -> np.ndarray:
        """Numbers of the training pixels in the patch at each position, (N,) -> (N, patch^2)."""
        image = np.searchsorted(self._last, positions, side="right")
        within = positions - np.concatenate([[0], self._last])[image]
        row, column = np.divmod(within, self._columns[image])
        corner = self._first_pixel[image] + row * self._widths[image] + column
        side = np.arange(self.patch)
        offsets = side[None, :, None] * self._widths[image][:, None, None] + side
        return (corner[:, None, None] + offsets).reshape(len(positions), -1)

    def standardized(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels in [0, 1] to zero mean and unit variance, float64."""
        return (pixels.astype(np.float64) - self.mean) / self.std

    def pixels(self, patches: np.ndarray) -> np.ndarray:
        """The inverse of `standardized`, clipped to [0, 1]."""
        return np.clip(patches * self.std + self.mean, 0.0, 1.0)

    def _cut(self, i: int) -> np.ndarray:
        (rows, columns), p = self.grids[i], self.patch
        region = self.images[i][self.splits[i] :, : columns * p]
        return region.reshape(rows, p, columns, p, self.channels).swapaxes(1, 2).reshape(-1, self.size)

    def assemble(self, patches: np.ndarray, i: int) -> np.ndarray:
        """Held-out region of image ``i``, (H, W, C) in [0, 1], from all held-out patches (M, P)."""
        (rows, columns), p = self.grids[i], self.patch
        start = sum(r * c for r, c in self.grids[:i])
        own = self.pixels(patches[start : start + rows * columns])
        return own.reshape(rows, columns, p, p, self.channels).swapaxes(1, 2).reshape(rows * p, columns * p, -1)
