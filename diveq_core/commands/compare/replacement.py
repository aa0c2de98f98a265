"""Replacement of codewords that training does not use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from array_api_compat import array_namespace

from diveq_core.codebook.replacement import replace_unused

if TYPE_CHECKING:
    from diveq_core.arrays.rows import Array
    from diveq_core.commands.compare.quantizers import Arrays, Quantizer
    from diveq_core.layers.adam import Moments

THRESHOLD = 0.01
"""Share of the mean use up to which a codeword counts as unused."""


def noise_shape(parameters: Arrays, quantizer: Quantizer) -> tuple[int, ...]:
    """Shape of the normal numbers that `replace` takes."""
    *leading, width = parameters[quantizer.words].shape
    return (*leading, width + 2)


def replace(
    parameters: Arrays, moments: Moments, counts: Array, noise: Array, quantizer: Quantizer
) -> tuple[Arrays, Moments]:
    """Replace unused codewords by used ones nearly, and forget what Adam and moving averages knew of them.

    Parameters
    ----------
    parameters : dict of array
    moments : Moments
    counts : array (..., K)
        Use of each codeword since the last replacement.
    noise : array (..., K, D + 2)
        Standard normal.
    quantizer : Quantizer
        Its ``words`` names the codewords, (..., K, D).

    Returns
    -------
    parameters, moments
        New ones; the arguments keep their values.
    """
    words = parameters[quantizer.words]
    xp = array_namespace(words)
    counts = xp.astype(counts, words.dtype)
    if words.ndim == 2:
        new, _, rows = replace_unused(words, counts, noise=noise, threshold=THRESHOLD)
    else:
        parts = [
            replace_unused(words[part, ...], counts[part, ...], noise=noise[part, ...], threshold=THRESHOLD)
            for part in range(words.shape[0])
        ]
        new, rows = xp.stack([part.codebook for part in parts]), xp.stack([part.rows for part in parts])

    def begun_anew(memory: Arrays) -> Arrays:
        own = memory[quantizer.words]
        return memory | {quantizer.words: xp.where(rows[..., None], xp.zeros_like(own), own)}

    changed = {quantizer.words: new}
    if "ema.counts" in parameters:
        kept = parameters["ema.counts"]
        changed["ema.counts"] = xp.where(rows, xp.zeros_like(kept), kept)
    moments = moments._replace(first=begun_anew(moments.first), second=begun_anew(moments.second))
    return parameters | changed, moments
