"""One picture of the comparison: loss curves, codeword usage, and reconstructions side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

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

_TILE_PIXELS = 128
_PICTURES = 2


def style(name: str) -> tuple[str, Any]:
    """Colour and line style of a recipe."""
    others = [other for other in RECIPES if other not in STYLES]
    return STYLES[name] if name in STYLES else _SPARE[others.index(name) % len(_SPARE)]


def save_picture(path: Path, runs: dict[str, list[Run]], patches: Patches) -> None:
    """Draw all runs into a PNG file."""
    rows, columns = min(_PICTURES, len(patches.images)), len(runs) + 1
    width, upper_height = max(13.5, 1.5 * columns), 4.7
    tile = min((width - 0.4) / columns, 2.2)
    lower_height = rows * (tile + 0.06) + 0.8
    figure = Figure(figsize=(width, upper_height + lower_height), dpi=110)
    FigureCanvasAgg(figure)
    subfigures: Any = figure.subfigures(2, 1, height_ratios=[upper_height, lower_height])
    upper, lower = subfigures
    curves, detail, usage = upper.subplots(1, 3, gridspec_kw={"width_ratios": [1.15, 1, 1]})
    upper.subplots_adjust(left=0.055, right=0.99, top=0.92, bottom=0.2, wspace=0.23)
    seeds = len(next(iter(runs.values())))
    _draw_curves(curves, runs, "Held-out error through the hard codewords")
    curves.set_ylabel(f"mean squared error{f', mean and range of {seeds} seeds' if seeds > 1 else ''}")
    _draw_curves(detail, runs, "The same, near the best quantizer")
    _zoom(detail, runs)
    _draw_usage(usage, runs)
    handles, labels = curves.get_legend_handles_labels()
    upper.legend(handles, labels, loc="lower center", ncols=min(8, len(labels)), frameon=False, handlelength=2.6)
    _draw_tiles(lower, runs, patches, rows, tile)
    figure.savefig(path, format="png")


def _draw_curves(axes: Any, runs: dict[str, list[Run]], title: str) -> None:
    for name, row in runs.items():
        colour, line = style(name)
        steps = [step for step, _ in min((run.curve for run in row), key=len)]
        errors = np.array([[error for _, error in run.curve[: len(steps)]] for run in row])
        axes.plot(steps, errors.mean(axis=0), color=colour, linestyle=line, linewidth=1.9, label=RECIPES[name].label)
        if len(row) > 1:
            axes.fill_between(steps, errors.min(axis=0), errors.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    # Nothing but runs that diverged at once leaves a logarithm nothing to show.
    if any(error > 0 for row in runs.values() for run in row for _, error in run.curve):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training step with quantizer")
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.margins(x=0.01)
    _tidy(axes)


def _zoom(axes: Any, runs: dict[str, list[Run]]) -> None:
    """Limit the errors shown to those between the best quantizer's and a third more."""
    ends = [
        float(np.mean([run.curve[-1][1] for run in row])) for row in runs.values() if row[0].scores.counts is not None
    ]
    known = [end for end in ends if np.isfinite(end) and end > 0]
    if known:
        axes.set_yscale("linear")
        axes.set_ylim(min(known) * 0.96, min(known) * 1.35)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_usage(axes: Any, runs: dict[str, list[Run]]) -> None:
    quantized = {name: row for name, row in runs.items() if row[0].scores.counts is not None}
    axes.set_title("Codeword usage on held-out patches", fontsize=10.5, loc="left")
    axes.set_xlabel("codeword, most used first")
    axes.set_ylabel("share of patches", labelpad=1)
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
    if any(run.scores.counts is not None and run.scores.counts.any() for row in quantized.values() for run in row):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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


def _draw_tiles(figure: Any, runs: dict[str, list[Run]], patches: Patches, rows: int, tile: float) -> None:
    columns = len(runs) + 1
    axes = figure.subplots(rows, columns, squeeze=False)
    left, height = 0.012, rows * (tile + 0.06) + 0.8
    right = min(0.988, left + columns * tile / figure.bbox.width * figure.dpi)
    figure.subplots_adjust(
        left=left, right=right, top=1 - 0.72 / height, bottom=0.08 / height, wspace=0.04, hspace=0.04
    )
    seed = next(iter(runs.values()))[0].seed
    figure.suptitle(
        f"Held-out regions, original and reconstructions (seed {seed}; PSNR of all held-out patches)",
        fontsize=10.5,
        x=left,
        y=1 - 0.12 / height,
        ha="left",
    )
    for i in range(rows):
        original = patches.assemble(patches.held_out, i)
        square = _square(original, patches.patch)
        _show(axes[i, 0], original[square])
        for j, row in enumerate(runs.values(), start=1):
            _show(axes[i, j], patches.assemble(row[0].scores.patches, i)[square])
    axes[0, 0].set_title("Original", fontsize=9, fontweight="bold")
    for j, (name, row) in enumerate(runs.items(), start=1):
        reached = "diverged" if row[0].diverged else f"{row[0].scores.psnr:.1f} dB"
        title = f"{RECIPES[name].label.partition(' (')[0]}\n{reached}"
        axes[0, j].set_title(title, fontsize=9, color=style(name)[0], fontweight="bold")


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
