r"""Codebooks by mini-batches: moving averages, or the gradient that an estimator gives.

.. math:: L = \frac1N \sum_n \|z_n - z_{q,n}\|^2
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

import diveq_core as dq
from diveq_core.arrays.registry import backend_of
from diveq_core.codebook.first_curve import tour
from diveq_core.commands.tokens.streams import clustered

if TYPE_CHECKING:
    from collections.abc import Callable

    from diveq_core.commands.tokens.streams import Look
    from diveq_core.layers.tokenizer import Tokenizer

_BATCHES, _STEPS = (64, 4096), 32
"""Vectors of a step, and steps of a pass, of which few data are to have as many."""

_ITERATIONS = 10

METHODS: dict[str, tuple[Any, str]] = {
    "ema": (dq.STE(), "ema"),
    "ste": (dq.STE(), "gradient"),
    "nsvq": (dq.NSVQ(), "gradient"),
    "diveq": (dq.DiVeQ(), "gradient"),
    "diveq-detach": (dq.DiVeQDetach(), "gradient"),
    "rotation": (dq.Rotation(), "gradient"),
    "sf-diveq": (dq.SFDiVeQ(), "gradient"),
    "sf-diveq-detach": (dq.SFDiVeQDetach(), "gradient"),
}
"""By name, the estimator and what moves the codebook. `STE` and `Rotation` train it by the codebook loss."""


def trained(
    look: Look,
    each_chunk: Callable[[str, Callable[[np.ndarray], None]], None],
    *,
    method: str,
    codewords: int,
    stages: int,
    groups: int,
    passes: int,
    learning_rate: float,
    position_bits: int,
    rng: np.random.Generator,
) -> tuple[Tokenizer, list[float]]:
    """A tokenizer whose codebook begins by k-means of the sample, and the mean squared error of each pass."""
    from diveq_numpy import VectorQuantizer

    estimator, update = METHODS[method]
    sample = look.sample
    begin = look._replace(vectors=len(sample))
    sizes = {"codewords": codewords, "stages": stages, "groups": groups}
    book, _ = clustered(begin, lambda _, function: function(sample), passes=_ITERATIONS, rng=rng, **sizes)
    options: dict[str, Any] = {"heads": groups, "stages": stages, "codebook_update": update}
    options |= {"dtype": sample.dtype, "rng": rng}
    layer = VectorQuantizer(sample.shape[1], codewords, estimator, **options)
    # A curve visits its corners from nearest to nearest.
    layer.codebook = in_order(book) if layer.settings.on_curve else book
    size = min(max(look.vectors // _STEPS, _BATCHES[0]), _BATCHES[1])
    total = passes * math.ceil(look.vectors / size)
    # In units of how far apart the entries lie, since Adam's steps have the size of the rate.
    scale = float(np.mean(sample.std(axis=0))) or 1.0
    done, squares = 0, 0.0
    course: list[float] = []

    def learn(z: np.ndarray) -> None:
        nonlocal done, squares
        z = z[rng.permutation(len(z))]
        for start in range(0, len(z), size):
            batch = z[start : start + size]
            out = layer.forward(batch)
            d = out.z_q - batch
            squares += float(np.sum(np.vecdot(d, d), dtype=np.float64))
            if update == "gradient":
                layer.backward(2 / len(batch) * d)
                layer.step(learning_rate * scale * 0.5 * (1 + math.cos(math.pi * min(done / total, 1))))
            layer.update()
            done += 1

    for number in range(passes):
        squares = 0.0
        each_chunk(f"pass {number + 1} of {passes}", learn)
        course.append(squares / look.vectors)
    curve = layer.settings.on_curve
    return layer.tokenizer(position_bits=position_bits if curve else None), course


def in_order(books: np.ndarray) -> np.ndarray:
    """Codebooks (..., K, D) with their codewords along a short path."""
    lib = backend_of("fit", codebook=books)
    flat = books.reshape(-1, *books.shape[-2:])
    return np.stack([book[tour(lib, book)] for book in flat]).reshape(books.shape)
