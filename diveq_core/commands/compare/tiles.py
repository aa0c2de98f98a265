"""Reconstructions side by side, in as many lines as they need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from diveq_core.commands.compare.recipes import RECIPES
from diveq_core.commands.compare.styles import STYLES

if TYPE_CHECKING:
    from diveq_core.commands.compare.patches import Patches
    from diveq_core.commands.compare.training import Run

_TILE_PIXELS = 128
_PICTURES = 2
_COLUMNS = 9
_HEADING, _TITLES, _GAP, _BOTTOM = 0.3, 0.42, 0.06, 0.08


class Tiles:
    """The layout, in inches: each line has one column per recipe, the first line also the original."""

    def __init__(self, runs: dict[str, list[Run]], patches: Patches) -> None:
        self.runs, self.patches = runs, patches
        self.rows = min(_PICTURES, len(patches.images))
        names: list[str | None] = [None, *runs]
        lines = -(-len(names) // _COLUMNS)
        self.columns = -(-len(names) // lines)
        self.lines = [names[start : start + self.columns] for start in range(0, len(names), self.columns)]
        self.width = max(13.5, 1.5 * self.columns)
        self.tile = min((self.width - 0.4) / self.columns, 2.2)
        self.line_height = _TITLES + self.rows * (self.tile + _GAP) + _BOTTOM
        self.height = _HEADING + self.line_height * len(self.lines)

    def draw(self, figure: Any) -> None:
        """Draw into a figure of this width and height."""
        seed = next(iter(self.runs.values()))[0].seed
        left = 0.012
        figure.suptitle(
            f"Held-out regions, original and reconstructions (seed {seed}; PSNR of all held-out patches)",
            fontsize=10.5,
            x=left,
            y=1 - 0.12 / self.height,
            ha="left",
        )
        right = min(0.988, left + self.columns * self.tile / self.width)
        for number, names in enumerate(self.lines):
            top = self.height - _HEADING - number * self.line_height
            grid = figure.add_gridspec(
                self.rows,
                self.columns,
                left=left,
                right=right,
                top=(top - _TITLES) / self.height,
                bottom=(top - self.line_height + _BOTTOM) / self.height,
                wspace=0.04,
                hspace=0.04,
            )
            for column, name in enumerate(names):
                self._draw_column([figure.add_subplot(grid[row, column]) for row in range(self.rows)], name)

    def _draw_column(self, axes: list[Any], name: str | None) -> None:
        patches = self.patches
        for i, own in enumerate(axes):
            original = patches.assemble(patches.held_out, i)
            square = _square(original, patches.patch)
            shown = original if name is None else patches.assemble(self.runs[name][0].scores.patches, i)
            _show(own, shown[square])
        if name is None:
            axes[0].set_title("Original", fontsize=9, fontweight="bold")
            return
        run = self.runs[name][0]
        reached = "diverged" if run.diverged else f"{run.scores.psnr:.1f} dB"
        title = f"{RECIPES[name].label.partition(' (')[0]}\n{reached}"
        axes[0].set_title(title, fontsize=9, color=STYLES[name][0], fontweight="bold")


def _square(image: np.ndarray, step: int) -> tuple[slice, slice]:
    """The square of at most ``_TILE_PIXELS`` with the most contrast: the rest of a photograph may be sky."""
    height, width, _ = image.shape
    side = min(height, width, _TILE_PIXELS)
    corners = [(top, left) for top in range(0, height - side + 1, step) for left in range(0, width - side + 1, step)]
    top, left = max(corners, key=lambda c: float(np.std(image[c[0] : c[0] + side, c[1] : c[1] + side, 0])))
    return slice(top, top + side), slice(left, left + side)


def _show(axes: Any, image: np.ndarray) -> None:
    known = np.nan_to_num(image, nan=0.5)
    grey = known.shape[2] == 1
    axes.imshow(known[:, :, 0] if grey else known, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
