"""Layers of every kind, with the same state, vectors and noise in every library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import diveq_core as dq
from vectors import normal

if TYPE_CHECKING:
    from libraries import Library

DIM, K, BATCH = 6, 8, (4, 5)
LAYERS = dq.layers

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "STE": {"estimator": dq.STE()},
    "both losses": {"codebook_weight": 0.5, "commitment_weight": 0.3},
    "averages": {"estimator": dq.STE(), "codebook_update": "ema"},
    "linear": {"codebook_update": "linear"},
    "linear, both factors": {"codebook_update": "linear", "linear_factors": "both", "estimator": dq.Rotation()},
    "frozen": {"codebook_update": "frozen"},
    "cosine": {"cosine": True, "estimator": dq.STE()},
    "cosine in heads": {"cosine": True, "heads": 2, "codebook_dim": 4, "codebook_weight": 1.0},
    "projected": {"codebook_dim": 3, "estimator": dq.STE()},
    "heads": {"heads": 2, "estimator": dq.STE()},
    "heads, shared": {"heads": 2, "shared": True, "codebook_update": "ema", "estimator": dq.NSVQ()},
    "stages": {"stages": 3, "estimator": dq.STE()},
    "stages, averages": {"stages": 3, "estimator": dq.STE(), "codebook_update": "ema"},
    "stages, shared": {"stages": 3, "shared": True, "commitment_weight": 0.3, "codebook_weight": 1.0},
    "stages in heads": {"stages": 2, "heads": 2, "codebook_update": "linear"},
    "dropout": {"stages": 3, "quantizer_dropout": True, "estimator": dq.STE()},
    "dropout in heads": {"stages": 3, "heads": 2, "quantizer_dropout": True},
    "curve": {"estimator": dq.SFDiVeQ()},
    "Gumbel": {"estimator": dq.GumbelST(0.7)},
    "Gumbel in heads": {"estimator": dq.GumbelST(0.7), "heads": 2, "codebook_dim": 4},
    "FSQ": {"codebook_size": None, "estimator": dq.FSQ([5, 4, 3])},
    "FSQ in stages": {"codebook_size": None, "estimator": dq.FSQ([5, 4, 3]), "stages": 2},
    "channels first": {"channel_axis": 1, "estimator": dq.Radial(dq.PseudoHuber())},
    "skip": {"not_finite": "skip", "estimator": dq.STE(), "codebook_dim": 3},
}


def settings_of(kind: str, **options: Any) -> dq.layers.Settings:
    given = {"codebook_size": K} | KINDS[kind] | options
    return LAYERS.Settings(DIM, given.pop("codebook_size"), **given)


@dataclass(frozen=True)
class Case:
    """A layer's settings, and everything that a step of it takes, as arrays of NumPy."""

    settings: dq.layers.Settings
    state: dict[str, np.ndarray]
    z: np.ndarray
    mask: np.ndarray
    noise: Any
    kept_stages: np.ndarray | None
    g: np.ndarray
    update_noise: np.ndarray | None

    @classmethod
    def of(cls, kind: str, dtype: Any = np.float64, seed: int = 0, **options: Any) -> Case:
        settings = settings_of(kind, **options)
        rng = np.random.default_rng(seed)
        shape = (*BATCH, DIM) if settings.channel_axis == -1 else (BATCH[0], DIM, BATCH[1])
        z = rng.standard_normal(shape).astype(dtype)
        initial = rng.standard_normal(LAYERS.noise_size(settings)).astype(dtype)
        state = LAYERS.init(settings, np.zeros((), dtype), noise=initial)
        for name in ("in_bias", "out_bias"):
            if name in state:
                state[name] = rng.standard_normal(state[name].shape).astype(dtype)
        if settings.from_data:
            draws = rng.standard_normal((len(settings.codebooks), K, 2)).astype(dtype)
            # Other vectors than the step's, which would otherwise have no error to speak of.
            state = LAYERS.start(settings, state, rng.standard_normal(shape).astype(dtype), noise=draws)
        stages = rng.integers(1, settings.stages + 1, BATCH[0]) if settings.quantizer_dropout else None
        upkeep = None
        if settings.has_codebook:
            count, width = settings.codebook_shape[-2:]
            upkeep = rng.standard_normal((len(settings.codebooks), count, width + 2)).astype(dtype)
        noise, g = _noise(settings, rng, dtype), rng.standard_normal(shape).astype(dtype)
        return cls(settings, state, z, rng.random(BATCH) < 0.7, noise, stages, g, upkeep)

    def to(self, library: Library) -> Case:
        """The same in another library."""

        def convert(x: Any) -> Any:
            if x is None:
                return None
            if isinstance(x, dq.CurveNoise):
                return dq.CurveNoise(*map(convert, x))
            if isinstance(x, list):
                return [convert(y) for y in x]
            return library.to(x)

        state = {name: library.to(x) for name, x in self.state.items()}
        others = (self.z, self.mask, self.noise, self.kept_stages, self.g, self.update_noise)
        return Case(self.settings, state, *map(convert, others))

    def step(self, **options: Any) -> Any:
        given = {"mask": self.mask, "noise": self.noise, "kept_stages": self.kept_stages} | options
        return LAYERS.forward(self.settings, self.state, self.z, train=True, **given)


def _noise(settings: dq.layers.Settings, rng: np.random.Generator, dtype: Any) -> Any:
    width = settings.shapes["in_weight"][1] if "in_weight" in settings.shapes else DIM

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    if settings.on_curve:
        return dq.CurveNoise(rng.random(K - 1).astype(dtype), draw(2, *BATCH, width))
    if not getattr(settings.estimator, "noisy", False):
        return None
    if settings.stages == 1:
        return draw(*BATCH, width)
    by_stage = [draw(settings.stages, *BATCH, width // settings.heads) for _ in range(settings.heads)]
    return by_stage if settings.heads > 1 else by_stage[0]


def plain(seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Vectors (64, DIM)."""
    return normal(64, DIM, seed=seed).astype(dtype)
