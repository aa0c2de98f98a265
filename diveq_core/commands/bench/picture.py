"""How cost grows: one log-log panel per job and axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from diveq_core.commands.bench.comparison import lines
from diveq_core.commands.bench.contenders import CONTENDERS, TITLES

if TYPE_CHECKING:
    from pathlib import Path

    from diveq_core.commands.bench.comparison import Comparison

# Okabe and Ito's colours, which people with any colour vision tell apart; ours solid, others dashed, and each with
# a marker of its own.
_STYLES: dict[str, tuple[str, str, str]] = {
    "product": ("#000000", ":", ""),
    "search-numpy": ("#0072B2", "-", "o"),
    "search-torch": ("#D55E00", "-", "s"),
    "search-jax": ("#009E73", "-", "^"),
    "search-cupy": ("#CC79A7", "-", "D"),
    "cdist": ("#E69F00", "--", "v"),
    "faiss": ("#56B4E9", "--", "P"),
    "jax-whole": ("#7F7F7F", "--", "X"),
    "step-numpy": ("#0072B2", "-", "o"),
    "step-torch": ("#D55E00", "-", "s"),
    "step-jax": ("#009E73", "-", "^"),
    "step-cupy": ("#CC79A7", "-", "D"),
    "autodiff": ("#000000", ":", ""),
    "diveq": ("#E69F00", "--", "v"),
    "vector-quantize-pytorch": ("#56B4E9", "--", "P"),
}

_AXES = {"k": "codewords K", "n": "vectors N", "d": "dimension D"}


def save_picture(path: Path, comparisons: list[Comparison], caption: str) -> bool:
    """Draw the comparisons into a PNG file, if any lie on a line; whether they do."""
    drawn = lines(comparisons)
    if not drawn:
        return False
    jobs = [job for job in TITLES if any(key[0] == job for key in drawn)]
    axes_names = [axis for axis in _AXES if any(key[1] == axis for key in drawn)]
    columns, rows = len(axes_names), len(jobs)
    figure = Figure(figsize=(5.0 * columns + 2.6, 3.9 * rows + 0.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(rows, columns, squeeze=False, sharey="row")
    for i, job in enumerate(jobs):
        for j, axis in enumerate(axes_names):
            _draw(grid[i, j], axis, drawn.get((job, axis), []))
        grid[i, 0].set_ylabel("seconds, median")
        grid[i, 0].set_title(TITLES[job], fontsize=11, loc="left", fontweight="bold", pad=22)
        handles, labels = _legend(grid[i])
        grid[i, -1].legend(
            handles, labels, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, handlelength=3.2, fontsize=9
        )
    figure.supxlabel(caption, fontsize=8, color="#444444", x=0.01, ha="left")
    figure.savefig(path, format="png")
    return True


def _draw(axes: Any, axis: str, line: list[Comparison]) -> None:
    if not line:
        axes.set_axis_off()
        return
    values = [getattr(comparison.problem, axis) for comparison in line]
    for name in line[0].timings:
        known = [
            (value, comparison.timings[name].median)
            for value, comparison in zip(values, line, strict=True)
            if name in comparison.timings and comparison.timings[name].missing is None
        ]
        if known:
            colour, style, marker = _STYLES.get(name, ("#332288", "-.", "."))
            x, y = zip(*known, strict=True)
            label = CONTENDERS[name].name
            axes.plot(x, y, color=colour, linestyle=style, marker=marker, markersize=5, linewidth=1.7, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(values, [f"{value}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_seconds))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(_AXES[axis])
    p = line[0].problem
    fixed = ", ".join(f"{name.upper()} = {getattr(p, name)}" for name in _AXES if name != axis)
    axes.text(0, 1.02, f"{fixed}, {p.where}", transform=axes.transAxes, fontsize=9, color="#444444", va="bottom")
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(row: Any) -> tuple[list[Any], list[str]]:
    """Contenders of all panels of a row, each once."""
    found: dict[str, Any] = {}
    for axes in row:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _seconds(value: float, _position: int) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 0.999:
            return f"{value * factor:g} {unit}"
    return f"{value * 1e9:g} ns"
