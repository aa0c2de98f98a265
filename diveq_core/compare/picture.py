"""One picture of the comparison: loss curves, codeword usage, and reconstructions side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from diveq_core.compare.recipes import RECIPES

if TYPE_CHECKING:
    from pathlib import Path

    from diveq_core.compare.patches import Patches
    from diveq_core.compare.training import Run

# Okabe and Ito's colours, which people with any colour vision tell apart; line styles repeat the distinction.
STYLES: dict[str, tuple[str, Any]] = {
    "unquantized": ("#000000", (0, (1, 1.2))),
    "vq-vae": ("#E69F00", "-"),
    "ste": ("#7F7F7F", "-"),
    "nsvq": ("#56B4E9", "-"),
    "diveq": ("#0072B2", "-"),
    "diveq-detach": ("#009E73", (0, (5, 2))),
    "radial-0.5": ("#CC79A7", (0, (4, 1.5, 1, 1.5))),
    "radial-2": ("#D55E00", (0, (4, 1.5, 1, 1.5))),
}
_SPARE = [("#332288", "-"), ("#882255", "--"), ("#117733", "-."), ("#AA4499", ":")]

_TILE_PIXELS = 160
_PICTURES = 2


def style(name: str) -> tuple[str, Any]:
    """Colour and line style of a recipe."""
    others = [other for other in RECIPES if other not in STYLES]
    return STYLES[name] if name in STYLES else _SPARE[others.index(name) % len(_SPARE)]


def save_picture(path: Path, runs: dict[str, list[Run]], patches: Patches) -> None:
    """Draw all runs into a PNG file."""
    tiles = min(_PICTURES, len(patches.images))
    columns = len(runs) + 1
    width = max(12.0, 1.55 * columns)
    tile = (width - 0.6) / columns
    height = 4.9 + tiles * (tile + 0.08) + 0.75
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    subfigures: Any = figure.subfigures(2, 1, height_ratios=[4.9, height - 4.9])
    upper, lower = subfigures
    curves, usage = upper.subplots(1, 2, gridspec_kw={"width_ratios": [1.25, 1]})
    upper.subplots_adjust(left=0.065, right=0.985, top=0.93, bottom=0.24, wspace=0.17)
    _draw_curves(curves, runs)
    _draw_usage(usage, runs)
    handles, labels = curves.get_legend_handles_labels()
    upper.legend(
        handles,
        labels,
        loc="lower center",
        ncols=min(8, len(labels)),
        frameon=False,
        fontsize=9.5,
        handlelength=2.6,
        columnspacing=1.6,
    )
    _draw_tiles(lower, runs, patches, tiles)
    figure.savefig(path, format="png")


def _draw_curves(axes: Any, runs: dict[str, list[Run]]) -> None:
    for name, row in runs.items():
        colour, line = style(name)
        steps = [step for step, _ in min((run.curve for run in row), key=len)]
        errors = np.array([[error for _, error in run.curve[: len(steps)]] for run in row])
        axes.plot(steps, errors.mean(axis=0), color=colour, linestyle=line, linewidth=1.9, label=RECIPES[name].label)
        if len(row) > 1:
            axes.fill_between(steps, errors.min(axis=0), errors.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training step with quantizer")
    axes.set_ylabel("held-out mean squared error")
    seeds = len(next(iter(runs.values())))
    spread = f" (mean and range of {seeds} seeds)" if seeds > 1 else ""
    axes.set_title(f"Reconstruction through the hard codewords{spread}", fontsize=11, loc="left")
    _tidy(axes)
    axes.margins(x=0.01)


def _draw_usage(axes: Any, runs: dict[str, list[Run]]) -> None:
    quantized = {name: row for name, row in runs.items() if row[0].scores.counts is not None}
    axes.set_title("Codeword usage on held-out patches", fontsize=11, loc="left")
    axes.set_xlabel("codeword, most used first")
    axes.set_ylabel("share of patches")
    _tidy(axes)
    if not quantized:
        axes.text(0.5, 0.5, "no quantizer among the estimators", ha="center", va="center", transform=axes.transAxes)
        return
    for name, row in quantized.items():
        colour, line = style(name)
        counts = np.mean([np.sort(run.scores.counts)[::-1] for run in row if run.scores.counts is not None], axis=0)
        share = counts / max(counts.sum(), 1)
        axes.plot(
            np.arange(1, len(share) + 1),
            np.where(share > 0, share, np.nan),
            color=colour,
            linestyle=line,
            linewidth=1.9,
            marker="." if (share > 0).sum() == 1 else None,
        )
    axes.set_yscale("log")
    axes.set_xlim(0, len(share) * 1.01 + 1)
    axes.axhline(1 / len(share), color="#444444", linewidth=0.8, linestyle=":")
    axes.annotate(
        "all used equally",
        (1.0, 1 / len(share)),
        (-3, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8.5,
        color="#444444",
    )


def _tidy(axes: Any) -> None:
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_tiles(figure: Any, runs: dict[str, list[Run]], patches: Patches, rows: int) -> None:
    axes = figure.subplots(rows, len(runs) + 1, squeeze=False)
    figure.subplots_adjust(left=0.012, right=0.988, top=0.84, bottom=0.02, wspace=0.04, hspace=0.04)
    seed = next(iter(runs.values()))[0].seed
    figure.suptitle(
        f"Held-out region, original and reconstructions (seed {seed}, PSNR of all held-out patches)",
        fontsize=11,
        x=0.012,
        ha="left",
        y=0.985,
    )
    for i in range(rows):
        _show(axes[i, 0], patches.assemble(patches.held_out, i))
        for j, row in enumerate(runs.values(), start=1):
            _show(axes[i, j], patches.assemble(row[0].scores.patches, i))
    axes[0, 0].set_title("Original", fontsize=9, fontweight="bold")
    for j, (name, row) in enumerate(runs.items(), start=1):
        figure_of_merit = "diverged" if row[0].diverged else f"{row[0].scores.psnr:.1f} dB"
        axes[0, j].set_title(
            f"{_short(RECIPES[name].label)}\n{figure_of_merit}", fontsize=9, color=style(name)[0], fontweight="bold"
        )


def _short(label: str) -> str:
    """A label without its parenthesis."""
    return label.partition(" (")[0]


def _show(axes: Any, image: np.ndarray) -> None:
    """The middle square of an image, as large as it is, at most ``_TILE_PIXELS``."""
    side = min(image.shape[0], image.shape[1], _TILE_PIXELS)
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = np.nan_to_num(image[top : top + side, left : left + side], nan=0.5)
    axes.imshow(
        square if square.shape[2] == 3 else square[:, :, 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set_axis_off()
