"""Comparisons: all contenders of a job on one problem, timed together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diveq_core.commands.bench.contenders import taking_part
from diveq_core.commands.bench.memory import peak_bytes
from diveq_core.commands.bench.problem import Problem, UnavailableError
from diveq_core.commands.bench.timing import Timing, interleave

if TYPE_CHECKING:
    from collections.abc import Iterable

REFERENCES = {
    "search": "product",
    "step": "step-torch",
    "rest": "rest-diveq-autodiff",
    "small": "plain",
    "kmeans": "scikit-learn",
    "fit": "faiss-kmeans",
    "encode": "nearest",
}
"""Of what the ratios in a comparison are; of the first that took part where this one did not."""


_ON = {"cpu": ("numpy", "torch", "jax"), "cuda": ("torch", "jax", "cupy")}


@dataclass(frozen=True)
class Comparison:
    """Times, and where asked for the peak memory, of the contenders on one problem."""

    job: str
    problem: Problem
    timings: dict[str, Timing]
    memory: dict[str, int | str] = field(default_factory=dict)
    """Bytes, or the reason why there are none."""

    @property
    def reference(self) -> str | None:
        """The contender to which the ratios refer."""
        timed = [name for name, timing in self.timings.items() if timing.missing is None]
        return REFERENCES[self.job] if REFERENCES[self.job] in timed else next(iter(timed), None)


def compare(
    job: str, problem: Problem, repeats: int, *, backends: tuple[str, ...] = (), memory: bool = False
) -> Comparison:
    """Time the contenders of a job on a problem, and measure their memory if asked to.

    Ours take part in ``backends``, or in all that compute on the device.
    """
    timings = interleave(taking_part(job, backends or _ON[problem.device]), problem, repeats)
    used: dict[str, int | str] = {}
    if memory:
        for name in (name for name, timing in timings.items() if timing.missing is None):
            try:
                used[name] = peak_bytes(name, problem)
            except UnavailableError as reason:
                used[name] = str(reason)
    return Comparison(job, problem, timings, used)


def growth_problems(*, quick: bool = False) -> list[Problem]:
    """Problems along K and along N, for the picture; both lines share one."""
    if quick:
        along_k = [Problem(1024, k, 16) for k in (16, 64, 256)]
        return [*along_k, *(Problem(n, 64, 16) for n in (64, 256, 4096))]
    along_k = [Problem(8192, k, 64) for k in (64, 256, 1024, 4096, 16384)]
    return [*along_k, *(Problem(n, 1024, 64) for n in (128, 512, 2048, 32768))]


def lines(comparisons: Iterable[Comparison]) -> dict[tuple[str, str], list[Comparison]]:
    """The longest line of comparisons along each axis, the rest equal, by job and axis (``"k"``, ``"n"``, ``"d"``).

    Of lines of one length, that of the largest problems.
    """
    families: dict[tuple[str, str, tuple[object, ...]], dict[int, Comparison]] = {}
    for comparison in comparisons:
        p = comparison.problem
        values = {"k": p.k, "n": p.n, "d": p.d}
        for axis, value in values.items():
            others = (*(v for name, v in values.items() if name != axis), p.dtype, p.device)
            families.setdefault((comparison.job, axis, others), {})[value] = comparison
    best: dict[tuple[str, str], list[Comparison]] = {}
    for (job, axis, _), members in families.items():
        line = [members[value] for value in sorted(members)]
        if len(line) > 1 and _extent(line) > _extent(best.get((job, axis), [])):
            best[job, axis] = line
    return best


def _extent(line: list[Comparison]) -> tuple[int, float]:
    return len(line), sum(math.log(c.problem.n * c.problem.k * c.problem.d) for c in line)
