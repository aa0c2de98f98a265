"""The search: ours, the bare matrix product that bounds it, and what else finds the nearest codeword."""

from __future__ import annotations

from typing import TYPE_CHECKING

import diveq_core as dq
from diveq_core.commands.bench.problem import Problem, UnavailableError, arrays, load, synchronize

if TYPE_CHECKING:
    from collections.abc import Callable

    Variants = dict[str, Callable[[], object]]

PRODUCT_ROWS = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 4096, 16384, 65536)}
"""Rows that the bare product takes at a time; the fastest counts."""


def ours(library: str) -> Callable[[Problem], Variants]:
    """`diveq_core.nearest`, under ``jax.jit`` in JAX."""

    def prepare(problem: Problem) -> Variants:
        z, codebook, _ = arrays(problem, library)
        if library == "jax":
            nearest = load("jax").jit(lambda z, codebook: dq.nearest(z, codebook))
            return {"jit": lambda: nearest(z, codebook).block_until_ready()}

        def run() -> object:
            found = dq.nearest(z, codebook)
            synchronize(problem, library)
            return found

        return {"": run}

    return prepare


def product(problem: Problem) -> Variants:
    """``z @ codebook.T`` in chunks of rows, each into the same buffer: NumPy's, or torch's on a GPU."""
    if problem.device == "cuda":
        return _product_by_torch(problem)
    import numpy as np

    z, codebook, _ = arrays(problem, "numpy")
    transposed = codebook.T

    def by(rows: int) -> Callable[[], object]:
        buffer = np.empty((min(rows, problem.n), problem.k), codebook.dtype)

        def run() -> None:
            for start in range(0, problem.n, rows):
                chunk = z[start : start + rows]
                np.matmul(chunk, transposed, out=buffer[: len(chunk)])

        return run

    return {f"{rows} rows": by(rows) for rows in _distinct(problem)}


def _product_by_torch(problem: Problem) -> Variants:
    z, codebook, _ = arrays(problem, "torch")
    torch = load("torch")
    transposed = codebook.T

    def by(rows: int) -> Callable[[], object]:
        buffer = torch.empty(min(rows, problem.n), problem.k, dtype=codebook.dtype, device=codebook.device)

        def run() -> None:
            for start in range(0, problem.n, rows):
                chunk = z[start : start + rows]
                torch.mm(chunk, transposed, out=buffer[: len(chunk)])
            synchronize(problem)

        return run

    return {f"{rows} rows": by(rows) for rows in _distinct(problem) if rows * problem.k <= 1 << 30}


def _distinct(problem: Problem) -> tuple[int, ...]:
    """Chunk sizes, only the first of those that take all rows at once."""
    sizes = PRODUCT_ROWS[problem.device]
    return tuple(rows for i, rows in enumerate(sizes) if i == 0 or sizes[i - 1] < problem.n)


def cdist(problem: Problem) -> Variants:
    """``torch.cdist(z, codebook).argmin(dim=1)``, the whole matrix at once."""
    if problem.dtype in ("float16", "bfloat16"):
        raise UnavailableError(f"torch.cdist has no {problem.dtype}")
    z, codebook, _ = arrays(problem, "torch")
    torch = load("torch")

    def run() -> object:
        found = torch.cdist(z, codebook).argmin(dim=1)
        synchronize(problem)
        return found

    return {"": run}


def faiss_flat(problem: Problem) -> Variants:
    """``faiss.IndexFlatL2``, built inside the timing as our search builds everything, with k = 1."""
    if problem.dtype != "float32" or problem.device != "cpu":
        raise UnavailableError("faiss-cpu searches float32 on the CPU only")
    faiss = load("faiss")
    z, codebook, _ = arrays(problem, "numpy")

    def run() -> object:
        index = faiss.IndexFlatL2(problem.d)
        index.add(codebook)
        return index.search(z, 1)[1][:, 0]

    return {"": run}


def jax_whole(problem: Problem) -> Variants:
    """The search by the whole matrix in JAX: ``argmin(|e|^2 / 2 - z e^T)`` under ``jax.jit``."""
    jax = load("jax")
    z, codebook, _ = arrays(problem, "jax")

    @jax.jit
    def nearest(z, codebook):  # type: ignore[no-untyped-def]
        half = 0.5 * (codebook * codebook).sum(axis=1)
        return (half - z @ codebook.T).argmin(axis=1)

    return {"jit": lambda: nearest(z, codebook).block_until_ready()}
