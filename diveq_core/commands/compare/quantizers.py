"""What stands between encoder and decoder: how a vector is quantized in training, and what it becomes afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from diveq_core.arrays.registry import backend_of
from diveq_core.codebook.averages import EMAState, ema_init, ema_update
from diveq_core.codebook.first_curve import tour
from diveq_core.codebook.linear import linear_codebook, linear_codebook_vjp
from diveq_core.curve import project
from diveq_core.diagnostics import usage
from diveq_core.estimators.space_filling import CurveNoise
from diveq_core.estimators.straight_through import STE
from diveq_core.verbs import quantize, vjp

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.base import Estimator

Arrays = dict[str, "Array"]


class Trained(NamedTuple):
    """One quantization in training."""

    z_q: Array
    indices: Array
    pullback: Callable[[Array], tuple[Array, Arrays]]
    """From the cotangent of ``z_q`` to that of ``z`` and those of the quantizer's own parameters."""


class Quantizer:
    """What the experiment asks of a quantizer."""

    words: str = ""
    """Name of the parameter whose rows are codewords, which replacement may replace; empty if there is none."""

    continuous: bool = False
    """Whether a code comes with a real number, so that bits are more than the logarithm of the number of codes."""

    def sized(self, codewords: int, dim: int) -> Quantizer:
        """The quantizer whose codes are as many as K codewords, or as near as it can; ValueError if it cannot."""
        return self

    def start(self, codewords: np.ndarray) -> dict[str, np.ndarray]:
        """Parameters from K codewords, (K, D), that are encoder's outputs."""
        raise NotImplementedError

    def draw(self, rng: np.random.Generator, count: int, codewords: int, dim: int) -> dict[str, np.ndarray]:
        """Random numbers of one training step with ``count`` vectors."""
        return {}

    def train(self, parameters: Arrays, z: Array, noise: Arrays) -> Trained:
        """Quantize as in training."""
        raise NotImplementedError

    def hard(self, parameters: Arrays, z: Array) -> tuple[Array, Array]:
        """Vectors that a decoder could make of codes, (N, D), and the codes, (N,)."""
        raise NotImplementedError

    def codes(self, parameters: Arrays) -> int:
        """Number of codes."""
        raise NotImplementedError

    def counts(self, parameters: Arrays, indices: Array) -> Array:
        """How often the codewords of ``words`` were used, in the shape of ``words`` without its last axis."""
        raise NotImplementedError

    def keep_up(self, parameters: Arrays, z: Array, indices: Array) -> Arrays:
        """Parameters after what is done beside gradient steps."""
        return parameters


@dataclass(frozen=True)
class Codebook(Quantizer):
    """A codebook trained through an estimator."""

    estimator: Estimator
    words = "codebook"

    def start(self, codewords: np.ndarray) -> dict[str, np.ndarray]:
        return {"codebook": codewords}

    def draw(self, rng: np.random.Generator, count: int, codewords: int, dim: int) -> dict[str, np.ndarray]:
        return {"normal": rng.standard_normal((count, dim))} if self.estimator.noisy else {}

    def train(self, parameters: Arrays, z: Array, noise: Arrays) -> Trained:
        # A run that diverges is reported as such in every library, rather than refused in some.
        out, pullback = vjp(z, parameters["codebook"], self.estimator, noise=self.noise(noise), check_finite=False)

        def pullback_by_name(g: Array) -> tuple[Array, Arrays]:
            g_z, g_codebook = pullback(g)
            return g_z, {"codebook": g_codebook}

        return Trained(out.z_q, out.indices, pullback_by_name)

    def noise(self, noise: Arrays) -> Any:
        """The noise in the estimator's form."""
        return noise.get("normal")

    def hard(self, parameters: Arrays, z: Array) -> tuple[Array, Array]:
        # For a hard estimator z_q is lookup(nearest(z)), bit for bit; and of a diverged run it is NaN, not refused.
        return quantize(z, parameters["codebook"], STE(), check_finite=False)

    def codes(self, parameters: Arrays) -> int:
        return int(parameters["codebook"].shape[0])

    def counts(self, parameters: Arrays, indices: Array) -> Array:
        return usage(indices, self.codes(parameters))


@dataclass(frozen=True)
class Averaged(Codebook):
    """A codebook of moving averages; the estimator serves the encoder."""

    decay: float = 0.99

    def start(self, codewords: np.ndarray) -> dict[str, np.ndarray]:
        # The initial codeword counts as one vector: at 0 the first vector alone would take its place.
        return {"codebook": codewords, "ema.counts": ema_init(codewords, weight=1.0).counts}

    def train(self, parameters: Arrays, z: Array, noise: Arrays) -> Trained:
        out = super().train(parameters, z, noise)
        return out._replace(pullback=lambda g: (out.pullback(g)[0], {}))

    def keep_up(self, parameters: Arrays, z: Array, indices: Array) -> Arrays:
        # In float64 the means are the codebook.
        state = EMAState(parameters["ema.counts"], parameters["codebook"])
        state, codebook = ema_update(state, z, parameters["codebook"], indices, decay=self.decay)
        return parameters | {"codebook": codebook, "ema.counts": state.counts}


@dataclass(frozen=True)
class Linear(Codebook):
    r"""A frozen matrix times a trained one, :math:`C = E W`, from the codewords as :math:`E` and :math:`W = I`."""

    # A copy of a row of E is a copy of its codeword.
    words = "frozen"

    def start(self, codewords: np.ndarray) -> dict[str, np.ndarray]:
        return {"frozen": codewords, "weight": np.eye(codewords.shape[1])}

    def train(self, parameters: Arrays, z: Array, noise: Arrays) -> Trained:
        codebook, factors_pullback = linear_codebook_vjp((parameters["frozen"], parameters["weight"]))
        out = super().train({"codebook": codebook}, z, noise)

        def pullback(g: Array) -> tuple[Array, Arrays]:
            g_z, gradients = out.pullback(g)
            return g_z, {"weight": factors_pullback(gradients["codebook"]).weight}

        return out._replace(pullback=pullback)

    def hard(self, parameters: Arrays, z: Array) -> tuple[Array, Array]:
        return super().hard({"codebook": linear_codebook((parameters["frozen"], parameters["weight"]))}, z)

    def codes(self, parameters: Arrays) -> int:
        return int(parameters["frozen"].shape[0])


@dataclass(frozen=True)
class Curve(Codebook):
    """Codewords as corners of a curve; afterwards the nearest point of the whole curve. Codes are segments."""

    continuous = True

    def sized(self, codewords: int, dim: int) -> Curve:
        if codewords < 2:
            raise ValueError(f"--codewords must be at least 2 for a space-filling curve, got {codewords}")
        return self

    def start(self, codewords: np.ndarray) -> dict[str, np.ndarray]:
        return {"codebook": codewords[tour(backend_of("compare", codewords=codewords), codewords)]}

    def draw(self, rng: np.random.Generator, count: int, codewords: int, dim: int) -> dict[str, np.ndarray]:
        ends = {"ends": rng.standard_normal((2, count, dim))} if self.estimator.noisy else {}
        return {"dither": rng.random(codewords - 1)} | ends

    def noise(self, noise: Arrays) -> CurveNoise:
        return CurveNoise(noise["dither"], noise.get("ends"))

    def hard(self, parameters: Arrays, z: Array) -> tuple[Array, Array]:
        out = project(z, parameters["codebook"], check_finite=False)
        return out.z_q, out.segments

    def codes(self, parameters: Arrays) -> int:
        return super().codes(parameters) - 1

    def counts(self, parameters: Arrays, indices: Array) -> Array:
        segments = usage(indices, self.codes(parameters))
        xp = array_namespace(segments)
        none = xp.zeros_like(segments[:1])
        return xp.concat([segments, none]) + xp.concat([none, segments])
