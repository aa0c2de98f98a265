"""A picture of a tokenizer: how often its codewords are used, its distortion by pass, and where its codewords lie."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diveq_core.commands.tokens.figures import perplexity_of

if TYPE_CHECKING:
    from pathlib import Path

    from diveq_core.commands.tokens.figures import Figures
    from diveq_core.layers.tokenizer import Tokenizer

# Lines with a legend of their own, and vectors that are drawn.
_NAMED, _DRAWN = 8, 4096


def save_picture(
    path: Path,
    tokenizer: Tokenizer,
    figures: Figures | None,
    *,
    sample: np.ndarray | None = None,
    courses: list[list[float]] | None = None,
) -> None:
    """Draw what is known into a PNG file."""
    panels: list[Any] = []
    if figures is not None:
        panels.append(lambda axes: _usage(axes, figures))
    if courses is not None:
        panels.append(lambda axes: _courses(axes, courses, figures))
    if tokenizer.codebook is not None:
        panels.append(lambda axes: _directions(axes, tokenizer, figures, sample))
    figure = Figure(figsize=(5.2 * max(len(panels), 1), 4.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, draw in zip(figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels, strict=False):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{tokenizer!r}", fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    path.write_bytes(picture.getvalue())


def _usage(axes: Any, figures: Figures) -> None:
    """Each part's share of vectors by codeword, the most used first, in units of an even share."""
    usage = figures.usage
    several = len(usage) > 1
    for name, counts in zip(figures.names, usage, strict=True):
        share = np.sort(counts)[::-1] / max(counts.sum(), 1) * len(counts)
        text = f"perplexity {perplexity_of(counts):.0f} of {len(counts)}, {np.count_nonzero(counts)} used"
        label = f"{name}: {text}" if several else text
        axes.plot(np.arange(1, len(share) + 1), share, linewidth=1.6, label=label)
    axes.axhline(1, color="0.6", linewidth=1, linestyle=":")
    axes.set_title("How often each codeword is used", fontsize=11)
    axes.set_xlabel("codewords, the most used first")
    axes.set_ylabel("use / even use")
    axes.set_ylim(bottom=0)
    if len(usage) <= _NAMED:
        axes.legend(fontsize=8, frameon=False)


def _courses(axes: Any, courses: list[list[float]], figures: Figures | None) -> None:
    """Distortion along the passes of all stages."""
    first = 1
    for number, course in enumerate(courses):
        label = f"stage {number + 1}" if len(courses) > 1 else "while learning"
        axes.plot(range(first, first + len(course)), course, marker="o", markersize=3.5, linewidth=1.6, label=label)
        first += len(course)
    if figures is not None:
        axes.axhline(
            figures.distortion, color="0.4", linewidth=1, linestyle="--", label=f"in the end {figures.distortion:.4g}"
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Distortion in each pass", fontsize=11)
    axes.set_xlabel("pass over the data")
    axes.set_ylabel("mean squared distance")
    if len(courses) <= _NAMED:
        axes.legend(fontsize=8, frameon=False)


def drawn(sample: np.ndarray) -> np.ndarray:
    """Some vectors of a sample, from all of it: it is in the order of the data, the first of which may be alike."""
    return sample[np.linspace(0, len(sample) - 1, min(_DRAWN, len(sample))).astype(int)]


def _directions(axes: Any, tokenizer: Tokenizer, figures: Figures | None, sample: np.ndarray | None) -> None:
    """The first codebook and the vectors, in the two directions in which these, or codewords, spread most."""
    codebook = tokenizer.codebook
    book = codebook.reshape(-1, *codebook.shape[-2:])[0].astype(np.float64)
    settings = tokenizer.settings
    alike = sample is not None and not settings.projected and not settings.cosine
    vectors = drawn(sample)[:, : book.shape[1]].astype(np.float64) if alike and sample is not None else book
    centre = vectors.mean(axis=0)
    _, sizes, directions = np.linalg.svd(vectors - centre, full_matrices=False)
    # Of one entry or one vector there is one direction.
    directions = np.concatenate([directions, np.zeros((2, book.shape[1]))])[:2]
    share = np.concatenate([sizes, (0.0, 0.0)])[:2] ** 2 / max(float(sizes @ sizes), np.finfo(float).tiny)
    if alike:
        x, y = directions @ (vectors - centre).T
        axes.scatter(x, y, s=3, color="0.75", linewidths=0, label="vectors")
    x, y = directions @ (book - centre).T
    used = None if figures is None else figures.usage[0]
    if used is None or len(used) != len(book):
        axes.scatter(x, y, s=10, color="C0", linewidths=0, label="codewords")
    else:
        dead = used == 0
        size = 4 + 20 * used / max(used.mean(), 1e-30)
        axes.scatter(x[~dead], y[~dead], s=np.minimum(size[~dead], 200), color="C0", alpha=0.6, linewidths=0,
                     label="codewords, by use")  # fmt: skip
        if dead.any():
            axes.scatter(x[dead], y[dead], s=18, color="C3", marker="x", linewidths=1, label=f"{dead.sum()} not used")
    if settings.on_curve:
        axes.plot(x, y, color="C0", linewidth=0.5, alpha=0.6)
    of = "" if len(tokenizer.settings.axes) == 0 else " of the first codebook"
    axes.set_title(f"Codewords{of} in two principal directions", fontsize=11)
    axes.set_xlabel(f"first, {share[0]:.0%} of the variance")
    axes.set_ylabel(f"second, {share[1]:.0%}")
    axes.legend(fontsize=8, frameon=False, markerscale=1.2)
