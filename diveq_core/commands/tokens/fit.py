"""``fit``: a tokenizer from vectors on disk, which need not fit in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diveq_core.commands.terminal import check_integer, check_output
from diveq_core.commands.tokens.coding import check_report, chunk_rows, not_finite
from diveq_core.commands.tokens.errors import DataError
from diveq_core.commands.tokens.figures import Figures
from diveq_core.commands.tokens.progress import Display
from diveq_core.commands.tokens.sources import open_data
from diveq_core.commands.tokens.streams import Look, clustered
from diveq_core.commands.tokens.training import METHODS, trained
from diveq_core.estimators.product import Product
from diveq_core.estimators.residual import Residual
from diveq_core.estimators.straight_through import STE
from diveq_core.layers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diveq_core.commands.tokens.sources import Source
    from diveq_core.estimators.base import Quantizer

_SAMPLE, _FOR_EACH = 1 << 14, 4
"""Vectors of a sample: so many, and so many for each codeword. What k-means++ costs grows with both."""


@dataclass(frozen=True)
class Settings:
    """The options of ``fit``.

    Parameters
    ----------
    codewords : int
        K, in each group and stage.
    stages, groups : int
        Stages, each of which quantizes what those before it left; groups of entries with a token each.
    method : str
        "kmeans", or one of `diveq_core.commands.tokens.training.METHODS`.
    passes : int
        Over all of the data, in each stage of k-means.
    sample : int, optional
        Vectors that the codebook begins with.
    learning_rate : float
        Of Adam, in units of the standard deviation of an entry.
    position_bits : int
        On a curve, bits of a position.
    seed : int
    """

    codewords: int = 1024
    stages: int = 1
    groups: int = 1
    method: str = "kmeans"
    passes: int = 10
    sample: int | None = None
    learning_rate: float = 0.01
    position_bits: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("codewords", "stages", "groups", "passes", "position_bits"):
            check_integer(DataError, name, getattr(self, name), 1)
        check_integer(DataError, "seed", self.seed, 0, below=None)
        if self.sample is not None:
            check_integer(DataError, "sample", self.sample, 1, below=None)
        if self.method not in ("kmeans", *METHODS):
            raise DataError(f"--method must be among kmeans, {', '.join(METHODS)}, got {self.method!r}")
        if not 0 < self.learning_rate < np.inf:
            raise DataError(f"--learning-rate must be a finite number > 0, got {self.learning_rate}")
        if self.method.startswith("sf-") and self.codewords < 2:
            raise DataError(f"--codewords must be at least 2 on a curve, got {self.codewords}")

    @property
    def sample_rows(self) -> int:
        return self.sample or max(_SAMPLE, _FOR_EACH * self.codewords)


def fit(
    data: Path,
    out: Path,
    settings: Settings,
    *,
    column: str | None = None,
    patch: int | None = None,
    skip_bad: bool = False,
    report: Path | None = None,
) -> dict[str, Any]:
    """Fit a tokenizer to all vectors and write it; what was found, by name.

    Raises
    ------
    DataError
        If an option or a file cannot be used.
    """
    began = time.perf_counter()
    check_output(DataError, "-o", out, ".safetensors")
    if report is not None:
        check_report(report)
    source = open_data(data, column, patch)
    if source.dim % settings.groups:
        raise DataError(f"--groups must divide the {source.dim} entries of a vector, got {settings.groups}")
    rng = np.random.default_rng(settings.seed)
    with Display() as display:
        look = looked(source, settings.sample_rows, rng, display, skip_bad=skip_bad)

        def each_chunk(what: str, function: Callable[[np.ndarray], None]) -> None:
            display.stage(what, source.rows)
            for z in source.chunks(chunk_rows(source.dim)):
                function(_finite(z) if look.skipped else _wide(z))
                display.advance(len(z))

        sizes: dict[str, Any] = {"codewords": settings.codewords, "stages": settings.stages, "groups": settings.groups}
        if settings.method == "kmeans":
            codebook, courses = clustered(look, each_chunk, passes=settings.passes, rng=rng, **sizes)
            tokenizer = Tokenizer(codebook, _estimator(settings))
        else:
            tokenizer, course = trained(
                *(look, each_chunk),
                method=settings.method,
                passes=settings.passes,
                learning_rate=settings.learning_rate,
                position_bits=settings.position_bits,
                rng=rng,
                **sizes,
            )
            courses = [course]
        figures = Figures(tokenizer)
        each_chunk("figures", figures.add)
    tokenizer.save(out)
    if report is not None:
        from diveq_core.commands.tokens.picture import save_picture

        save_picture(report, tokenizer, figures, sample=look.sample, courses=courses)
    return {
        "command": "fit",
        "data": str(source),
        "out": str(out),
        "tokenizer": repr(tokenizer),
        "method": settings.method,
        "bits_per_vector": tokenizer.bits,
        **figures.as_data(),
        "skipped": look.skipped,
        "passes": courses,
        "seconds": time.perf_counter() - began,
        "report": None if report is None else str(report),
    }


def looked(source: Source, count: int, rng: np.random.Generator, display: Display, *, skip_bad: bool) -> Look:
    """Read all vectors once: which are finite, where they lie, and so many of them at random."""
    # Rows that are drawn beforehand, as a reservoir would end up with, since their number is known.
    wanted = np.sort(rng.choice(source.rows, min(count, source.rows), replace=False, shuffle=False))
    display.stage("first look", source.rows)
    kept: list[np.ndarray] = []
    skipped = row = 0
    for z in source.chunks(chunk_rows(source.dim)):
        # A sum is one pass without a temporary; only where it is not finite are rows looked at.
        with np.errstate(all="ignore"):
            whole = bool(np.isfinite(np.sum(z)))
        finite = np.ones(len(z), bool) if whole else np.isfinite(z).all(axis=1)
        if not finite.all():
            if not skip_bad:
                raise not_finite(source.path, row + int(np.argmin(finite)), source.lead)
            skipped += int(np.count_nonzero(~finite))
        first, last = np.searchsorted(wanted, (row, row + len(z)))
        drawn = wanted[first:last] - row
        kept.append(_wide(z[drawn[finite[drawn]]]))
        row += len(z)
        display.advance(len(z))
    if row != source.rows:
        raise DataError(f"DATA must hold {source.rows} vectors as its header says, got {row} in {source.path}")
    sample = np.concatenate(kept)
    if not len(sample):
        raise DataError(f"DATA must have finite vectors, got none among the {len(wanted)} drawn from {source.path}")
    return Look(sample, sample.mean(axis=0, dtype=np.float64), row - skipped, skipped)


def _wide(z: np.ndarray) -> np.ndarray:
    """In the dtype of the codebook: float64 if the vectors are, else float32."""
    return z.astype(np.float64 if z.dtype == np.float64 else np.float32, copy=False)


def _finite(z: np.ndarray) -> np.ndarray:
    return _wide(z[np.isfinite(z).all(axis=1)])


def _estimator(settings: Settings) -> Quantizer:
    inner = STE() if settings.stages == 1 else Residual(STE(), settings.stages)
    return inner if settings.groups == 1 else Product(inner, settings.groups)
