"""What a tokenizer does to data, in one pass: distortion, and how often each token is used."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

import diveq_core as dq

if TYPE_CHECKING:
    from diveq_core.layers.tokenizer import Tokenizer


@dataclass
class Figures:
    r"""Sums over vectors, of which a chunk at a time is added.

    .. math:: \text{distortion} = \frac1N \sum_n \|z_n - \operatorname{decode}(\operatorname{encode}(z_n))\|^2
    """

    tokenizer: Tokenizer
    vectors: int = 0
    skipped: int = 0
    squares: float = 0.0
    _usage: np.ndarray | None = None
    _centre: np.ndarray | None = None
    _sum: np.ndarray = field(default_factory=lambda: np.zeros(()))
    _spread: float = 0.0

    def add(self, z: np.ndarray) -> None:
        """Count vectors; those that are not finite are left out."""
        quantizer = self.tokenizer
        tokens = quantizer.encode(z)
        kept = tokens.reshape(len(z), -1)[:, 0] >= 0
        self.skipped += int(np.count_nonzero(~kept))
        if not kept.all():
            z, tokens = z[kept], tokens[kept]
        if not len(z):
            return
        d = z - quantizer.decode(tokens)
        self.squares += float(np.sum(np.vecdot(d, d), dtype=np.float64))
        self.vectors += len(z)
        if self._centre is None:
            self._centre = z.mean(axis=0, keepdims=True, dtype=np.float64).astype(d.dtype)
        y = z - self._centre
        self._spread += float(np.sum(np.vecdot(y, y), dtype=np.float64))
        self._sum = self._sum + y.sum(axis=0, dtype=np.float64)
        counts = self._counted(tokens)
        self._usage = counts if self._usage is None else self._usage + counts

    def _counted(self, tokens: np.ndarray) -> np.ndarray:
        """How often each codeword was chosen, (parts, K): on a curve each segment."""
        count = self.tokenizer.settings.token_count
        columns = tokens.reshape(len(tokens), -1) >> (self.tokenizer.position_bits or 0)
        return np.stack([np.bincount(column, minlength=count) for column in columns.T])

    @property
    def usage(self) -> np.ndarray:
        """How often each codeword was chosen, (parts, K), a part for each group and stage."""
        count = self.tokenizer.settings.token_count
        parts = math.prod(self.tokenizer.settings.axes)
        return np.zeros((parts, count), np.int64) if self._usage is None else self._usage

    @property
    def distortion(self) -> float:
        return self.squares / self.vectors if self.vectors else math.nan

    @property
    def variance(self) -> float:
        """Mean squared distance to the mean vector, which is the distortion of one codeword."""
        if not self.vectors:
            return math.nan
        mean = self._sum / self.vectors
        return self._spread / self.vectors - float(mean @ mean)

    @property
    def names(self) -> list[str]:
        """What each part is called."""
        settings = self.tokenizer.settings
        words = [f"{kind} {{}}" for kind, count in (("group", settings.heads), ("stage", settings.stages)) if count > 1]
        return [", ".join(words).format(*(i + 1 for i in part)) for part in settings.parts]

    def as_data(self) -> dict[str, Any]:
        """All of it, by name."""
        usage = self.usage
        return {
            "vectors": self.vectors,
            "skipped": self.skipped,
            "distortion": self.distortion,
            "variance": self.variance,
            "parts": [
                {
                    "name": name,
                    "perplexity": perplexity_of(counts),
                    "used": int(np.count_nonzero(counts)),
                    "of": len(counts),
                }
                for name, counts in zip(self.names, usage, strict=True)
            ],
        }


def perplexity_of(counts: np.ndarray) -> float:
    """Effective number of codewords, of counts."""
    return float(dq.perplexity(counts.astype(np.float64))) if counts.any() else 0.0
