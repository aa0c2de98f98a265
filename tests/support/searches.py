"""What searches in each library, and what the nearest codeword is, to rounding."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

# What searches besides each library's own choice, (library, what is switched off): NumPy has a way for few vectors,
# and after it faiss; torch on a CPU has NumPy's ways, and of many vectors a product of its own.
PATHS = {
    "numpy of many": ("numpy", ["few"]),
    "numpy without faiss": ("numpy", ["few", "faiss"]),
    "torch without faiss": ("torch", ["few", "faiss", "NumPy's product"]),
    "torch by product": ("torch", ["numpy"]),
}


def replace(path: str, setattr: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let a library search by a path."""
    for switched_off in PATHS[path][1]:
        if switched_off == "few":
            setattr(importlib.import_module("diveq_numpy.few"), "ROWS", 0)
        elif switched_off == "faiss":
            setattr(importlib.import_module("diveq_numpy.search"), "_faiss", lambda: None)
        elif switched_off == "NumPy's product":
            setattr(importlib.import_module("diveq_torch.search"), "_UNTHREADED", 0)
        else:
            here, lib = (importlib.import_module(name) for name in ("diveq_torch.search", "diveq_torch"))
            product = here._nearest_by_product
            setattr(here, "_nearest_by_numpy", lambda z, codebook, words: product(lib.backend, z, codebook))


def squared_distances(z: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """All squared distances, by differences (no expansion), in the next wider format."""
    wide = np.float64 if z.dtype != np.float64 else np.longdouble
    z, codebook = z.astype(wide), codebook.astype(wide)
    return np.stack([((z - e) ** 2).sum(axis=1) for e in codebook], axis=1)


def rounding(z: np.ndarray, codebook: np.ndarray, eps: float) -> np.ndarray:
    """How much of the squared distance to each codeword rounding of the centred data may hide, (N, K).

    A score |e|^2 / 2 - <y, e> is a sum of D + 1 products. Added in any order, with roundings that are no
    conspiracy, it is wrong by about sqrt(D + 1) units roundoff of |y||e| + |e|^2 / 2, and in squared distance (twice
    a score) of (|y| + |e|)^2; rounding y, e and |e|^2 themselves adds three at most. The unit is eps / 2.

    The centre is a multiple of the codebook's spread, so y and e may be that much longer than what is about the mean.
    """
    mean = codebook.mean(axis=0)
    spread = np.abs(codebook - mean).max()
    spread = 2.0 ** np.floor(np.log2(spread)) if spread > 0 else 1.0
    centre = np.round(mean / spread) * spread
    y, e = (np.linalg.norm(x - centre, axis=1) for x in (z, codebook))
    return (z.shape[1] ** 0.5 + 3) * eps / 2 * (y[:, None] + e) ** 2


def assert_nearest(indices: np.ndarray, z: np.ndarray, codebook: np.ndarray, eps: float) -> None:
    """The codeword is the nearest to rounding of the centred data, and the first of its copies.

    With B the rounding of the squared distances to both, its distance is at most sqrt(d^2 + B) for a least distance d:
    d + B / (2 d) where vectors lie away from their codewords, and never more than d + sqrt(B).
    """
    assert indices.min() >= 0
    assert indices.max() < len(codebook)
    all_squared = squared_distances(z, codebook)
    rows, best = np.arange(len(z)), all_squared.argmin(axis=1)
    least = all_squared[rows, best]
    hidden = rounding(z.astype(np.float64), codebook.astype(np.float64), eps)
    excess = np.sqrt(all_squared[rows, indices]) - np.sqrt(least)
    allowed = np.sqrt(least + hidden[rows, indices] + hidden[rows, best]) - np.sqrt(least)
    assert (excess <= allowed).all(), f"{excess.max():g} further, allowed {allowed[excess.argmax()]:g}"
    _, first, copy_of = np.unique(codebook, axis=0, return_index=True, return_inverse=True)
    np.testing.assert_array_equal(indices, first[copy_of.reshape(-1)][indices])


EPS32 = float(np.finfo(np.float32).eps)
EPS64 = float(np.finfo(np.float64).eps)
