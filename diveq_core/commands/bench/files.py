"""The commands ``fit`` and ``encode`` on a file, beside faiss and the bare search of the same vectors in memory."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import diveq_core as dq
from diveq_core.commands.bench.problem import Problem, UnavailableError, arrays, load

if TYPE_CHECKING:
    from collections.abc import Callable

    Variants = dict[str, Callable[[], object]]

PASSES = 10
"""Over the data, of both."""


def fit_file(problem: Problem) -> Variants:
    """``fit``: a first look, k-means++ on its sample, the passes, and one more for the figures."""
    from diveq_core.commands.tokens.fit import Settings, fit

    folder, settings = _folder(problem), Settings(codewords=problem.k, passes=PASSES)
    return {"": lambda: fit(folder / "z.npy", folder / "fitted.safetensors", settings)}


def faiss_kmeans(problem: Problem) -> Variants:
    """``faiss.Kmeans`` on all of the vectors, begun by some of them."""
    faiss = load("faiss")
    z, _, _ = arrays(problem, "numpy")

    def run() -> object:
        options = {"niter": PASSES, "max_points_per_centroid": problem.n, "seed": 0}
        clustering = faiss.Kmeans(problem.d, problem.k, **options)
        clustering.train(z)
        return clustering

    return {"": run}


def encode_file(problem: Problem) -> Variants:
    """``encode``, from one .npy to another."""
    from diveq_core.commands.tokens.coding import encode

    folder = _folder(problem)
    return {"": lambda: encode(folder / "tok.safetensors", folder / "z.npy", folder / "tokens.npy")}


def nearest(problem: Problem) -> Variants:
    """`diveq_core.nearest` of all vectors at once."""
    z, codebook, _ = arrays(problem, "numpy")
    return {"": lambda: dq.nearest(z, codebook)}


def _folder(problem: Problem) -> Path:
    load("safetensors")
    if problem.device != "cpu" or problem.dtype != "float32":
        raise UnavailableError("files are timed in float32 on the CPU only")
    return _written(problem)


_made: list[Path] = []


@atexit.register
def _remove() -> None:
    while _made:
        shutil.rmtree(_made.pop(), ignore_errors=True)


@functools.lru_cache(maxsize=1)
def _written(problem: Problem) -> Path:
    """The vectors and a tokenizer in a folder that lasts as long as the process, or the next problem."""
    _remove()
    folder = Path(tempfile.mkdtemp())
    _made.append(folder)
    z, codebook, _ = arrays(problem, "numpy")
    np.save(folder / "z.npy", z)
    dq.Tokenizer(codebook).save(folder / "tok.safetensors")
    return folder
