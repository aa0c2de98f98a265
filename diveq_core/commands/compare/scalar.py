"""Finite scalar quantization in the experiment: affine maps to a few coordinates and back, and no codebook."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diveq_core.commands.compare.layers import affine
from diveq_core.commands.compare.quantizers import Arrays, Quantizer, Trained
from diveq_core.estimators.fsq import FSQ
from diveq_core.verbs import quantize, vjp

if TYPE_CHECKING:
    from diveq_core.arrays.rows import Array

LEVELS = range(3, 9)


@dataclass(frozen=True)
class Scalar(Quantizer):
    """FSQ of as many coordinates as there are levels."""

    levels: tuple[int, ...] = ()

    def sized(self, codewords: int, dim: int) -> Scalar:
        return dataclasses.replace(self, levels=chosen_levels(codewords, dim))

    def start(self, codewords: np.ndarray) -> dict[str, np.ndarray]:
        # Principal coordinates of unit variance: the codewords stand for the encoder's outputs.
        mean = codewords.mean(axis=0)
        _, _, directions = np.linalg.svd(codewords - mean)
        basis = directions[: len(self.levels)].T
        spread = np.std((codewords - mean) @ basis, axis=0)
        spread = np.where(spread > 1e-6, spread, 1.0)
        into = basis / spread
        return {
            "fsq.weight_in": into,
            "fsq.bias_in": -mean @ into,
            "fsq.weight_out": (basis * spread).T,
            "fsq.bias_out": mean,
        }

    def train(self, parameters: Arrays, z: Array, noise: Arrays) -> Trained:
        few, in_pullback = affine(z, parameters["fsq.weight_in"], parameters["fsq.bias_in"])
        rounded, round_pullback = vjp(few, None, FSQ(self.levels), check_finite=False)
        z_q, out_pullback = affine(rounded.z_q, parameters["fsq.weight_out"], parameters["fsq.bias_out"])

        def pullback(g: Array) -> tuple[Array, Arrays]:
            g_rounded, g_weight_out, g_bias_out = out_pullback(g)
            g_z, g_weight_in, g_bias_in = in_pullback(round_pullback(g_rounded)[0])
            return g_z, {
                "fsq.weight_in": g_weight_in,
                "fsq.bias_in": g_bias_in,
                "fsq.weight_out": g_weight_out,
                "fsq.bias_out": g_bias_out,
            }

        return Trained(z_q, rounded.indices, pullback)

    def hard(self, parameters: Arrays, z: Array) -> tuple[Array, Array]:
        few, _ = affine(z, parameters["fsq.weight_in"], parameters["fsq.bias_in"])
        rounded = quantize(few, None, FSQ(self.levels), check_finite=False)
        return affine(rounded.z_q, parameters["fsq.weight_out"], parameters["fsq.bias_out"])[0], rounded.indices

    def codes(self, parameters: Arrays) -> int:
        return math.prod(self.levels)


def chosen_levels(codewords: int, dim: int) -> tuple[int, ...]:
    """At most ``dim`` levels with a product near ``codewords``: the nearest, then the largest lowest level."""
    candidates = itertools.chain.from_iterable(
        itertools.combinations_with_replacement(reversed(LEVELS), count) for count in range(1, min(dim, 8) + 1)
    )
    return min(
        candidates, key=lambda levels: (abs(math.log2(math.prod(levels) / codewords)), -min(levels), len(levels))
    )
