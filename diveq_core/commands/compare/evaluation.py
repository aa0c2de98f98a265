"""How good a trained autoencoder is on patches it has not seen, through the codes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from array_api_compat import array_namespace

from diveq_core.commands.compare.autoencoder import reconstruct
from diveq_core.diagnostics import perplexity, positive_share, usage, used_share

if TYPE_CHECKING:
    from diveq_core.commands.compare.libraries import Library
    from diveq_core.commands.compare.patches import Patches
    from diveq_core.commands.compare.quantizers import Arrays
    from diveq_core.commands.compare.recipes import Recipe

CURVE_PATCHES = 1024
"""Held-out patches, evenly spaced, on which a loss curve is measured."""

_CHUNK = 8192


@dataclass(frozen=True)
class Scores:
    """Figures of one run on held-out patches; NaN where a run diverged, None where there is no quantizer."""

    error: float
    """Mean squared error of pixels in [0, 1]."""

    perplexity: float | None
    used_share: float | None
    positive_share: float | None
    """Share of vectors with <g, q - z> > 0, g the reconstruction loss's gradient at q."""

    counts: np.ndarray | None
    """How many held-out patches got each code."""

    patches: np.ndarray
    """Reconstructed patches, standardized, (M, P)."""

    @property
    def bits(self) -> float | None:
        """Bits of a code, the logarithm of the number of codes."""
        return None if self.counts is None else math.log2(len(self.counts))

    @property
    def psnr(self) -> float:
        r"""Peak signal-to-noise ratio in dB, :math:`-10 \log_{10}` of the error: the peak is 1."""
        if self.error > 0:
            return -10 * math.log10(self.error)
        return math.inf if self.error == 0 else math.nan


def pixel_error(y: np.ndarray, x: np.ndarray, patches: Patches) -> float:
    """Mean squared error of pixels in [0, 1]; NaN if a reconstruction is not finite."""
    if not np.isfinite(y).all():
        return math.nan
    return float(np.mean((patches.pixels(y) - patches.pixels(x)) ** 2))


def curve_error(parameters: Arrays, recipe: Recipe, patches: Patches, library: Library) -> float:
    """The error on some of the held-out patches."""
    x = patches.held_out[:: math.ceil(len(patches.held_out) / CURVE_PATCHES)]
    return pixel_error(library.numpy(reconstruct(parameters, library.array(x), recipe).y), x, patches)


def evaluate(parameters: Arrays, recipe: Recipe, patches: Patches, library: Library) -> Scores:
    """All figures on all held-out patches."""
    x = patches.held_out
    chunks = [
        reconstruct(parameters, library.array(x[start : start + _CHUNK]), recipe) for start in range(0, len(x), _CHUNK)
    ]
    y = np.concatenate([library.numpy(chunk.y) for chunk in chunks])
    error = pixel_error(y, x, patches)
    if recipe.quantizer is None:
        return Scores(error, None, None, None, None, y)
    xp = array_namespace(chunks[0].z)
    z, q, g, codes = (xp.concat([getattr(chunk, name) for chunk in chunks]) for name in ("z", "q", "g", "codes"))
    counts = usage(codes, recipe.quantizer.codes(parameters))
    return Scores(
        error,
        float(perplexity(counts)),
        float(used_share(counts)),
        float(positive_share(g, z, q)),
        library.numpy(counts),
        y,
    )
