"""What the project promises of its speed and memory, each promise one row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import diveq_core as dq
from diveq_core.commands.bench.clusterings import inertia_ratio
from diveq_core.commands.bench.memory import peak_bytes, saved_bytes
from diveq_core.commands.bench.problem import Problem, UnavailableError, has_gpu
from diveq_core.commands.bench.timing import ratio

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diveq_core.commands.bench.comparison import Comparison

_MEBIBYTE = 2**20

_PHOTOGRAPHS = Problem(16384, 256, 3 * 8 * 8)
"""Patches of 8 x 8 pixels in colour."""


@dataclass(frozen=True)
class Bar:
    """One contender may take at most ``limit`` times what another takes, on a problem.

    ``job`` says in which comparison both are timed.
    """

    group: str
    text: str
    job: str
    problem: Problem
    ours: str
    other: str
    limit: float


@dataclass(frozen=True)
class Row:
    """One promise, what was measured, and whether it is kept; None where that cannot be said."""

    group: str
    text: str
    size: str
    limit: float
    unit: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    judged: bool = True
    reason: str | None = None

    @property
    def met(self) -> bool | None:
        """Whether the measured value keeps the promise."""
        return None if self.value is None or not self.judged else self.value <= self.limit


def speed_bars(*, quick: bool = False) -> list[Bar]:
    """The ratios promised on two CPU cores, and on a GPU; in small sizes if ``quick``."""

    def problem(n: int, k: int, d: int, device: str = "cpu") -> Problem:
        return _sized(Problem(n, k, d, device=device), quick=quick)

    bars = []

    def add(group: str, text: str, job: str, at: Problem, pair: tuple[str, str], limit: float) -> None:
        bars.append(Bar(group, text, job, at, *pair, limit))

    medium, wide, deep = problem(65536, 1024, 64), problem(65536, 8192, 64), problem(16384, 8192, 256)
    for at in (medium, deep):
        add("search / matrix product alone", "NumPy", "search", at, ("search-numpy", "product"), 1.35)
    for at, limit in ((medium, 0.50), (wide, 0.55), (deep, 0.80)):
        for library, label in (("numpy", "NumPy"), ("torch", "torch")):
            add("search / torch.cdist + argmin", label, "search", at, (f"search-{library}", "cdist"), limit)
    for at in (medium, wide, deep):
        add("search / whole matrix in JAX", "JAX", "search", at, ("search-jax", "jax-whole"), 0.80)
    for at in (problem(65536, 512, 8), problem(16384, 65536, 8)):
        for library, label in (("numpy", "NumPy"), ("torch", "torch")):
            add("search / faiss IndexFlatL2", label, "search", at, (f"search-{library}", "faiss"), 1.2)
    add("training step / peer", "torch / diveq", "step", medium, ("step-torch", "diveq"), 0.20)
    peer = "vector-quantize-pytorch"
    add("training step / peer", f"torch / {peer}", "step", medium, ("step-torch", peer), 0.12)
    for name, label in (("diveq", "DiVeQ"), ("detach", "DiVeQ-detach")):
        pair = (f"rest-{name}", f"rest-{name}-autodiff")
        add("step less its search / autodiff", f"torch, {label}", "rest", medium, pair, 0.70)
    for n in (1, 128):
        at = Problem(n, 32, 16) if quick else Problem(n, 1024, 64)
        for library, label, limit in (("numpy", "NumPy", 0.8), ("torch", "torch", 1.5)):
            add("small calls / torch.cdist + argmin", label, "search", at, (f"search-{library}", "cdist"), limit)
    few = Problem(64, 32, 8)
    add("small calls / plain autograd", "torch, DiVeQ", "small", few, ("small-torch", "plain"), 1.3)
    add("small calls / by hand", "NumPy, DiVeQ", "small", few, ("small-numpy", "by-hand"), 2.0)
    pair = ("kmeans-numpy", "scikit-learn")
    add("k-means / scikit-learn", "NumPy, time", "kmeans", _sized(_PHOTOGRAPHS, quick=quick), pair, 1.0)
    at = Problem(8192, 16, 16) if quick else Problem(262144, 256, 64)
    add("files / faiss.Kmeans", "fit, time", "fit", at, ("fit-file", "faiss-kmeans"), 0.8)
    add("files / search in memory", "encode, time", "encode", at, ("encode-file", "nearest"), 1 / 0.85)
    gpu = problem(65536, 1024, 64, "cuda")
    add("on a GPU", "torch step / diveq", "step", gpu, ("step-torch", "diveq"), 0.25)
    add("on a GPU", f"torch step / {peer}", "step", gpu, ("step-torch", peer), 0.25)
    add("on a GPU", "torch search / product", "search", gpu, ("search-torch", "product"), 1.3)
    return bars


def _sized(problem: Problem, *, quick: bool) -> Problem:
    return problem.sized(problem.n // 32, max(problem.k // 32, 16), problem.d) if quick else problem


def speed_row(bar: Bar, comparisons: Sequence[Comparison], *, judged: bool) -> Row:
    """The row of a bar, from the comparison that timed its contenders."""
    if bar.problem.device == "cuda" and not has_gpu():
        return _row(bar, reason="no GPU here")
    timings = next(c.timings for c in comparisons if (c.job, c.problem) == (bar.job, bar.problem))
    ours, other = timings[bar.ours], timings[bar.other]
    missing = ours.missing or other.missing
    if missing is not None:
        return _row(bar, reason=missing)
    measured = ratio(ours, other)
    return Row(
        bar.group, bar.text, bar.problem.size, bar.limit, "x", measured.value, measured.low, measured.high, judged
    )


def _row(bar: Bar, reason: str) -> Row:
    return Row(bar.group, bar.text, bar.problem.size, bar.limit, "x", reason=reason)


def inertia_rows(*, quick: bool = False) -> list[Row]:
    """The squared error that k-means leaves on patches of photographs, in units of scikit-learn's."""
    problem = _sized(_PHOTOGRAPHS, quick=quick)
    made = ("k-means / scikit-learn", "NumPy, inertia", problem.size, 1.02, "x")
    try:
        return [Row(*made, inertia_ratio(problem), judged=not quick)]
    except UnavailableError as reason:
        return [Row(*made, reason=str(reason))]


def memory_rows(*, quick: bool = False) -> list[Row]:
    """Extra peak memory of the search in each CPU library, each in its own process."""
    problem = Problem(2048, 2048, 8) if quick else Problem(65536, 65536, 8)
    rows = []
    for library, label in (("numpy", "NumPy"), ("torch", "torch"), ("jax", "JAX")):
        made = ("search: peak memory", label, problem.size, 256.0, "MiB")
        try:
            rows.append(Row(*made, peak_bytes(f"search-{library}", problem) / _MEBIBYTE, judged=not quick))
        except UnavailableError as reason:
            rows.append(Row(*made, reason=str(reason)))
    return rows


def saved_rows(*, quick: bool = False) -> list[Row]:
    """What torch keeps for the backward pass beyond the inputs: what the rule reads, and no more.

    That is nothing for `STE`, for DiVeQ-detach the indices, 8 bytes each, and the codewords themselves where the
    codebook gets no gradient, since it may be overwritten.
    """
    problem = Problem(2048, 32, 64) if quick else Problem(65536, 1024, 64)
    cases = (
        ("torch, STE", dq.STE(), True, 0),
        ("torch, DiVeQ-detach", dq.DiVeQDetach(), True, 8),
        ("torch, DiVeQ-detach, codebook without gradient", dq.DiVeQDetach(), False, problem.d * 4),
    )
    rows = []
    for text, estimator, trained, each in cases:
        made = ("kept for backward beyond z, codebook", text, problem.size, problem.n * each / 1024, "KiB")
        try:
            rows.append(Row(*made, saved_bytes(estimator, problem, trained=trained) / 1024, judged=not quick))
        except UnavailableError as reason:
            rows.append(Row(*made, reason=str(reason)))
    return rows
