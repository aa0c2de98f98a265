"""Vectors and codebooks for the upkeep of codebooks."""

from __future__ import annotations

import numpy as np

K, D, N = 6, 4, 40


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def normal32(*shape: int, seed: int = 0) -> np.ndarray:
    return normal(*shape, seed=seed).astype(np.float32)


def batch(seed: int = 0, rows: int = 60, count: int = 6, width: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (N, D), and a codebook (K, D) whose last codeword nobody chooses."""
    rng = np.random.default_rng(seed)
    z, codebook = rng.standard_normal((rows, width)), rng.standard_normal((count, width))
    codebook[-1] = 100
    return z.astype(np.float32), codebook.astype(np.float32)
