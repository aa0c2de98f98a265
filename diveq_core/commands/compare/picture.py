"""One picture of the comparison: loss curves, codeword usage, and reconstructions side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from diveq_core.commands.compare.recipes import RECIPES
from diveq_core.commands.compare.styles import STYLES
from diveq_core.commands.compare.tiles import Tiles

if TYPE_CHECKING:
    from pathlib import Path

    from diveq_core.commands.compare.patches import Patches
    from diveq_core.commands.compare.training import Run

_IN_ONE_LINE, _WRAPPED = 8, 6
"""Entries of a legend that fit in one line, and in each of several."""


def save_picture(path: Path, runs: dict[str, list[Run]], patches: Patches) -> None:
    """Draw all runs into a PNG file."""
    layout = Tiles(runs, patches)
    legend_columns = len(runs) if len(runs) <= _IN_ONE_LINE else _WRAPPED
    legend_rows = -(-len(runs) // legend_columns)
    # Beyond what one line of legend needs, panels grow with the number of curves in them.
    below, panel = 0.74 + 0.2 * legend_rows, 3.38 + 0.7 * (legend_rows - 1)
    upper_height = 0.38 + panel + below
    figure = Figure(figsize=(layout.width, upper_height + layout.height), dpi=110)
    FigureCanvasAgg(figure)
    subfigures: Any = figure.subfigures(2, 1, height_ratios=[upper_height, layout.height])
    upper, lower = subfigures
    curves, detail, usage = upper.subplots(1, 3, gridspec_kw={"width_ratios": [1.15, 1, 1]})
    upper.subplots_adjust(left=0.055, right=0.99, top=1 - 0.38 / upper_height, bottom=below / upper_height, wspace=0.23)
    seeds = len(next(iter(runs.values())))
    _draw_curves(curves, runs, "Held-out error through the codes")
    curves.set_ylabel(f"mean squared error{f', mean and range of {seeds} seeds' if seeds > 1 else ''}")
    _draw_curves(detail, runs, "The same, near the best quantizer")
    _zoom(detail, runs)
    _draw_usage(usage, runs)
    handles, labels = curves.get_legend_handles_labels()
    upper.legend(handles, labels, loc="lower center", ncols=legend_columns, frameon=False, handlelength=2.6)
    layout.draw(lower)
    figure.savefig(path, format="png")


def _draw_curves(axes: Any, runs: dict[str, list[Run]], title: str) -> None:
    # Many ranges on top of each other would hide the curves.
    shade = 0.15 if len(runs) <= _IN_ONE_LINE else 0.05
    for name, row in runs.items():
        colour, line = STYLES[name]
        steps = [step for step, _ in min((run.curve for run in row), key=len)]
        errors = np.array([[error for _, error in run.curve[: len(steps)]] for run in row])
        axes.plot(steps, errors.mean(axis=0), color=colour, linestyle=line, linewidth=1.9, label=RECIPES[name].label)
        if len(row) > 1:
            axes.fill_between(steps, errors.min(axis=0), errors.max(axis=0), color=colour, alpha=shade, linewidth=0)
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
    axes.set_title("Usage of codes on held-out patches", fontsize=10.5, loc="left")
    axes.set_xlabel("code, most used first")
    axes.set_ylabel("share of patches", labelpad=1)
    _tidy(axes)
    if not quantized:
        axes.text(0.5, 0.5, "no quantizer among the estimators", ha="center", va="center", transform=axes.transAxes)
        return
    most = max(len(row[0].scores.counts) for row in quantized.values() if row[0].scores.counts is not None)
    for name, row in quantized.items():
        colour, line = STYLES[name]
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
    axes.set_xlim(0, most * 1.01 + 1)
    axes.axhline(1 / most, color="#444444", linewidth=0.8, linestyle=":")
    axes.annotate(
        "all used equally",
        (1.0, 1 / most),
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
