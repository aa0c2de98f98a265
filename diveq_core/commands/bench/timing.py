"""Times of several contenders in one run, interleaved, and their ratios with spread."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diveq_core.commands.bench.contenders import CONTENDERS
from diveq_core.commands.bench.memory import free_bytes
from diveq_core.commands.bench.problem import Problem, UnavailableError, load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SHORTEST_SAMPLE = 0.02
"""Seconds that a sample takes at least, by repetition of what is faster."""

_PAUSE = 0.2
"""Seconds before each sample. The threads of the contender before it wait actively for more work: those of
NumPy's OpenBLAS for a tenth of a second, in which whatever else runs takes up to twice as long."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender in each round, of its fastest variant; or the reason why there are none."""

    seconds: tuple[float, ...] = ()
    variant: str = ""
    missing: str | None = None

    @property
    def median(self) -> float:
        """Median over rounds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """Ratio of two medians, and the quartiles of the ratio of each round."""

    value: float
    low: float
    high: float


def ratio(a: Timing, b: Timing) -> Ratio:
    """How long ``a`` takes in units of ``b``."""
    rounds = [x / y for x, y in zip(a.seconds, b.seconds, strict=True)]
    low, _, high = statistics.quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else rounds * 3
    return Ratio(a.median / b.median, low, high)


def interleave(names: tuple[str, ...], problem: Problem, repeats: int) -> dict[str, Timing]:
    """Time the contenders round robin, in a new order each round, after a warm-up of each."""
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    timings: dict[str, Timing] = {}
    with _session(problem):
        for name in names:
            try:
                variants = CONTENDERS[name].prepared(problem, free_bytes(problem.device))
            except UnavailableError as reason:
                timings[name] = Timing(missing=str(reason))
            else:
                runs.update({(name, variant): run for variant, run in variants.items()})
        samples = _rounds(runs, repeats)
    for name in names:
        if name not in timings:
            own = [Timing(tuple(samples[key]), key[1]) for key in runs if key[0] == name]
            timings[name] = min(own, key=lambda timing: timing.median)
    return {name: timings[name] for name in names}


def _rounds(runs: dict[tuple[str, str], Callable[[], object]], repeats: int) -> dict[tuple[str, str], list[float]]:
    calls = {}
    for key, run in runs.items():
        run()
        calls[key] = max(1, min(1000, round(_SHORTEST_SAMPLE / max(_seconds(run, 1), 1e-9))))
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    order, rng = list(runs), random.Random(0)
    for _ in range(repeats):
        rng.shuffle(order)
        for key in order:
            time.sleep(_PAUSE)
            samples[key].append(_seconds(runs[key], calls[key]))
    return samples


def _seconds(run: Callable[[], object], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - began) / calls


@contextlib.contextmanager
def _session(problem: Problem) -> Iterator[None]:
    """No garbage collection, no warnings of the peers, and JAX with float64 where that is asked for."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if problem.dtype == "float64":
            with contextlib.suppress(UnavailableError):
                stack.enter_context(load("jax").enable_x64(True))
        gc.collect()
        if gc.isenabled():
            gc.disable()
            stack.callback(gc.enable)
        yield
