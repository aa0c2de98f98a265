"""``inspect``: what a tokenizer is, how far its codewords lie apart, and what it does to data."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from diveq_core.commands.tokens.coding import check_report, check_width, chunk_rows, load, not_finite
from diveq_core.commands.tokens.figures import Figures
from diveq_core.commands.tokens.progress import Display
from diveq_core.commands.tokens.sources import open_data

if TYPE_CHECKING:
    from pathlib import Path

# Codewords whose nearest neighbours are looked for, and how many distances exist at a time.
_LOOKED_AT, _AT_ONCE = 1 << 13, 1 << 22

_SAMPLE = 1 << 12


def inspect(
    tokenizer: Path,
    *,
    data: Path | None = None,
    column: str | None = None,
    patch: int | None = None,
    skip_bad: bool = False,
    report: Path | None = None,
) -> dict[str, Any]:
    """What is known of a tokenizer, by name.

    Raises
    ------
    DataError
        If an option or a file cannot be used.
    """
    began = time.perf_counter()
    if report is not None:
        check_report(report)
    quantizer = load(tokenizer)
    books = codebooks(quantizer.codebook)
    figures = Figures(quantizer)
    found = {
        "command": "inspect",
        "tokenizer": repr(quantizer),
        "file": str(tokenizer),
        "bits_per_vector": quantizer.bits,
        "tokens_per_vector": int(np.prod(quantizer.settings.axes, dtype=int)),
        "values_per_token": quantizer.token_count,
        "codebooks": [spacing(book) for book in books],
    }
    sample = None
    if data is not None:
        source = open_data(data, column, patch)
        check_width(quantizer, source, tokenizer)
        kept: list[np.ndarray] = []
        # Vectors for the picture, evenly spread.
        step = max(source.rows // _SAMPLE, 1)
        with Display() as display:
            display.stage("figures", source.rows)
            row = 0
            for z in source.chunks(chunk_rows(source.dim)):
                before = figures.skipped
                figures.add(z)
                if figures.skipped > before and not skip_bad:
                    raise not_finite(data, row + int(np.argmin(np.isfinite(z).all(axis=1))), source.lead)
                part = z[-row % step :: step]
                kept.append(part[np.isfinite(part).all(axis=1)].astype(np.float32))
                row += len(z)
                display.advance(len(z))
        sample = np.concatenate(kept)
        found |= {"data": str(source), **figures.as_data()}
        found["dead"] = [np.flatnonzero(counts == 0).tolist() for counts in figures.usage]
    if report is not None:
        from diveq_core.commands.tokens.picture import save_picture

        save_picture(report, quantizer, figures if data is not None else None, sample=sample)
    return {**found, "seconds": time.perf_counter() - began, "report": None if report is None else str(report)}


def codebooks(codebook: np.ndarray | None) -> list[np.ndarray]:
    """Each codebook (K, D), of groups and stages in order."""
    return [] if codebook is None else list(codebook.reshape(-1, *codebook.shape[-2:]))


def spacing(book: np.ndarray) -> dict[str, Any]:
    """How far codewords lie from their nearest neighbours, and how many are copies; of many, of some spread evenly."""
    e = book.astype(np.float64)
    e -= e.mean(axis=0)
    count = len(e)
    rows = np.unique(np.linspace(0, count - 1, min(count, _LOOKED_AT)).astype(int))
    nearest = np.full(len(rows), np.inf)
    if count > 1:
        squares = np.vecdot(e, e)
        step = max(_AT_ONCE // count, 1)
        for start in range(0, len(rows), step):
            here = rows[start : start + step]
            distances = squares[here, None] - 2 * e[here] @ e.T + squares
            distances[np.arange(len(here)), here] = np.inf
            # The product rounds, so the distance to the one that it finds is computed anew.
            d = e[here] - e[distances.argmin(axis=1)]
            nearest[start : start + step] = np.sqrt(np.vecdot(d, d))
    found = {"codewords": count, "dimension": book.shape[1], "copies": count - len(np.unique(book, axis=0))}
    if count == 1:
        return found
    low, middle, high = np.quantile(nearest, (0, 0.5, 1))
    return found | {"nearest": {"least": float(low), "median": float(middle), "most": float(high)}}
