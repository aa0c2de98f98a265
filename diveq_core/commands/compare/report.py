"""The comparison as a table for people and as data for programs."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import TYPE_CHECKING, Any

from rich.table import Table

from diveq_core.commands.compare.recipes import RECIPES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diveq_core.commands.compare.libraries import Library
    from diveq_core.commands.compare.patches import Patches
    from diveq_core.commands.compare.settings import Settings
    from diveq_core.commands.compare.training import Run

FIGURES: dict[str, Callable[[Run], float | None]] = {
    "bits": lambda run: run.scores.bits,
    "mse": lambda run: run.scores.error,
    "psnr": lambda run: run.scores.psnr,
    "perplexity": lambda run: run.scores.perplexity,
    "used_share": lambda run: run.scores.used_share,
    "positive_share": lambda run: run.scores.positive_share,
    "seconds": lambda run: run.seconds,
}

_COLUMNS: dict[str, tuple[str, float, str]] = {
    "mse": ("MSE × 10³", 1e3, ".2f"),
    "psnr": ("PSNR (dB)", 1.0, ".2f"),
    "perplexity": ("perplexity", 1.0, ".1f"),
    "used_share": ("codes used", 100.0, ".1f"),
    "positive_share": ("⟨g, q - z⟩ > 0", 100.0, ".1f"),
    "seconds": ("seconds", 1.0, ".1f"),
}
"""Heading, factor and format of each figure."""


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and sample standard deviation where there are at least two values."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def table(runs: dict[str, list[Run]]) -> Table:
    """One row per recipe, mean ± sample standard deviation over seeds."""
    out = Table(title="Held-out patches, through their codes", title_justify="left", header_style="bold")
    out.add_column("estimator", no_wrap=True)
    out.add_column("bits", justify="left", no_wrap=True)
    for heading, _, _ in _COLUMNS.values():
        out.add_column(heading, justify="right", no_wrap=True)
    for name, row in runs.items():
        out.add_row(RECIPES[name].label, *_cells(row, is_continuous(name)))
        if name == "unquantized":
            out.add_section()
    if any(map(is_continuous, runs)):
        out.caption = "bits of a code, per patch; t: and a position on the segment, a real number in [0, 1]"
        out.caption_justify = "left"
    return out


def is_continuous(name: str) -> bool:
    """Whether a code of the recipe comes with a real number."""
    quantizer = RECIPES[name].quantizer
    return quantizer is not None and quantizer.continuous


def _cells(row: list[Run], continuous: bool) -> list[str]:
    bits = row[0].scores.bits
    first = "—" if bits is None else f"{bits:.1f}" + (" + t" if continuous else "")
    diverged = sum(run.diverged for run in row)
    if diverged:
        return [first, f"diverged ({diverged} of {len(row)})", *["—"] * (len(_COLUMNS) - 1)]
    return [first, *(_cell([FIGURES[key](run) for run in row], *_COLUMNS[key][1:]) for key in _COLUMNS)]


def _cell(values: list[float | None], factor: float, form: str) -> str:
    known = [value * factor for value in values if value is not None]
    if not known:
        return "—"
    percent = " %" if factor == 100.0 else ""
    if not all(math.isfinite(value) for value in known):
        return "∞"
    mean, spread = mean_and_spread(known)
    return f"{mean:{form}}" + (f" ± {spread:{form}}" if spread is not None else "") + percent


def as_data(runs: dict[str, list[Run]], patches: Patches, library: Library, settings: Settings) -> dict[str, Any]:
    """Everything the table shows, and each seed's figures and loss curve, for JSON; null where not finite."""
    return {
        "data": patches.source,
        "backend": {"name": library.name, "version": library.version, "device": library.device},
        "settings": dataclasses.asdict(settings),
        "rows": [
            {
                "name": name,
                "label": RECIPES[name].label,
                "quantizer": None if RECIPES[name].quantizer is None else repr(RECIPES[name].quantizer),
                "real_number_too": is_continuous(name),
                "codebook_weight": RECIPES[name].codebook_weight,
                "commitment_weight": RECIPES[name].commitment_weight,
                "seeds": [run.seed for run in row],
                "diverged": [run.diverged for run in row],
                **{key: [_finite(figure(run)) for run in row] for key, figure in FIGURES.items()},
                "curves": [[[step, _finite(error)] for step, error in run.curve] for run in row],
            }
            for name, row in runs.items()
        ],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
