"""Quantizers of two small codebooks, whose pairs of indices are as many codes as one large codebook has."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from array_api_compat import array_namespace

from diveq_core.commands.compare.quantizers import Arrays, Quantizer, Trained
from diveq_core.diagnostics import usage
from diveq_core.estimators.product import Product
from diveq_core.estimators.residual import Residual
from diveq_core.estimators.straight_through import STE
from diveq_core.tokens import nearest
from diveq_core.verbs import quantize, vjp

if TYPE_CHECKING:
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.base import Estimator
    from diveq_core.estimators.composite import Composite

PARTS = 2


@dataclass(frozen=True)
class Composed(Quantizer):
    """Two codebooks of ``size`` codewords each."""

    estimator: Estimator
    size: int = 16
    words = "codebook"

    def composite(self, estimator: Estimator) -> Composite:
        """What the library's verbs take in place of an estimator."""
        raise NotImplementedError

    def sized(self, codewords: int, dim: int) -> Quantizer:
        return dataclasses.replace(self, size=max(1, round(math.sqrt(codewords))))

    def train(self, parameters: Arrays, z: Array, noise: Arrays) -> Trained:
        codebook = parameters["codebook"]
        composite = self.composite(self.estimator)
        out, pullback = vjp(z, codebook, composite, noise=noise.get("normal"), check_finite=False)

        def pullback_by_name(g: Array) -> tuple[Array, Arrays]:
            g_z, g_codebook = pullback(g)
            return g_z, {"codebook": g_codebook}

        return Trained(out.z_q, out.indices, pullback_by_name)

    def hard(self, parameters: Arrays, z: Array) -> tuple[Array, Array]:
        # The choice of the second stage depends on what the first gives: without noise, the codeword.
        q, indices = quantize(z, parameters["codebook"], self.composite(STE()), check_finite=False)
        xp = array_namespace(z)
        code = indices[:, 0] * self.size + indices[:, 1]
        return q, xp.where(code < 0, xp.full_like(code, -1), code)

    def codes(self, parameters: Arrays) -> int:
        return self.size**PARTS

    def counts(self, parameters: Arrays, indices: Array) -> Array:
        return array_namespace(indices).stack([usage(indices[:, part], self.size) for part in range(PARTS)])


@dataclass(frozen=True)
class InStages(Composed):
    """Residual quantization: the second codebook quantizes what the first left."""

    def composite(self, estimator: Estimator) -> Residual:
        return Residual(estimator, PARTS)

    def start(self, codewords: np.ndarray) -> dict[str, np.ndarray]:
        first, others = codewords[: self.size], np.roll(codewords, -self.size, axis=0)[: self.size]
        return {"codebook": np.stack([first, others - first[nearest(others, first)]])}

    def draw(self, rng: np.random.Generator, count: int, codewords: int, dim: int) -> dict[str, np.ndarray]:
        return {"normal": rng.standard_normal((PARTS, count, dim))} if self.estimator.noisy else {}


@dataclass(frozen=True)
class InGroups(Composed):
    """Product quantization: each half of the entries has its codebook."""

    def composite(self, estimator: Estimator) -> Product:
        return Product(estimator, PARTS)

    def sized(self, codewords: int, dim: int) -> Quantizer:
        if dim % PARTS:
            raise ValueError(f"--dim must be even for product quantization, got {dim}")
        return super().sized(codewords, dim)

    def start(self, codewords: np.ndarray) -> dict[str, np.ndarray]:
        return {"codebook": np.stack(np.split(codewords[: self.size], PARTS, axis=1))}

    def draw(self, rng: np.random.Generator, count: int, codewords: int, dim: int) -> dict[str, np.ndarray]:
        return {"normal": rng.standard_normal((count, dim))} if self.estimator.noisy else {}
