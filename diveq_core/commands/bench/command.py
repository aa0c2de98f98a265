"""The command: check everything, time with a display of progress, print the tables and save the picture."""

from __future__ import annotations

import itertools
import json
import time
from typing import TYPE_CHECKING

from rich.console import Console

from diveq_core.commands.bench.bars import inertia_rows, memory_rows, saved_rows, speed_bars, speed_row
from diveq_core.commands.bench.comparison import Comparison, compare, growth_problems
from diveq_core.commands.bench.machine import busy, described, machine
from diveq_core.commands.bench.picture import save_picture
from diveq_core.commands.bench.problem import Problem, has_gpu
from diveq_core.commands.bench.report import as_data, bars_table, comparison_table
from diveq_core.commands.bench.settings import BenchError, Settings
from diveq_core.commands.terminal import check_output, wide_console

if TYPE_CHECKING:
    from pathlib import Path

    from diveq_core.commands.bench.bars import Bar, Row

_NARROWEST = 100


class Bench:
    """One run of the benchmark: what it measures, and the display of its progress."""

    def __init__(self, settings: Settings) -> None:
        assert settings.repeats is not None
        self.settings = settings
        self.repeats = settings.repeats
        self._console = Console(stderr=True)

    def bars(self) -> tuple[list[Row], list[Comparison]]:
        """All promises, and the comparisons behind those of speed."""
        quick = self.settings.quick
        bars = speed_bars(quick=quick)
        problems = dict.fromkeys((bar.job, bar.problem) for bar in bars if bar.problem.device == "cpu" or has_gpu())
        memory = self.settings.memory and not quick
        comparisons = [self._compare(*key, memory=memory and _first(bars, *key)) for key in problems]
        rows = [speed_row(bar, comparisons, judged=not quick) for bar in bars]
        self._say("peak memory")
        used = memory_rows(quick=quick) if self.settings.memory else []
        on_cpu = [row for row, bar in zip(rows, bars, strict=True) if bar.problem.device == "cpu"]
        return [*on_cpu, *inertia_rows(quick=quick), *used, *saved_rows(quick=quick), *rows[len(on_cpu) :]], comparisons

    def growth(self) -> list[Comparison]:
        """The comparisons of the picture."""
        repeats = max(self.repeats // 2, 1)
        problems = growth_problems(quick=self.settings.quick)
        return [self._compare(job, problem, repeats=repeats) for job in ("search", "step") for problem in problems]

    def grid(self) -> list[Comparison]:
        """Searches and steps over all combinations of the options."""
        s = self.settings
        problems = [
            Problem(n, k, d, dtype, device)
            for device, dtype, d, n, k in itertools.product(s.device, s.dtype, s.d, s.n, s.k)
        ]
        return [
            self._compare(job, problem, memory=self.settings.memory)
            for job in ("search", "step")
            for problem in problems
        ]

    def _compare(self, job: str, problem: Problem, *, repeats: int | None = None, memory: bool = False) -> Comparison:
        self._say(f"{job} {problem.size}, {problem.where}")
        backends = self.settings.backend
        return compare(job, problem, repeats or self.repeats, backends=backends, memory=memory)

    def _say(self, what: str) -> None:
        if self._console.is_terminal:
            self._console.print(f"{time.strftime('%H:%M:%S')}  {what}", style="dim", highlight=False)


def bench(settings: Settings, out: Path, data_out: Path | None) -> None:
    """Run the benchmark that ``settings`` describe.

    Raises
    ------
    BenchError
        Before any timing, if an option or an output file is not usable.
    """
    check_output(BenchError, "--out", out, ".png")
    if data_out is not None:
        check_output(BenchError, "--json", data_out, ".json")
    if "cuda" in settings.device and not has_gpu():
        raise BenchError("--device cuda needs torch with a CUDA device, got none")
    console = wide_console(_NARROWEST)
    found = machine()
    about = described(found)
    console.print(about, highlight=False)
    if busy(found):
        console.print("This machine is busy with something else: the ratios will be off.", style="bold")
    began = time.perf_counter()
    run = Bench(settings)
    rows, comparisons = ([], run.grid()) if settings.grid else run.bars()
    growth = [] if settings.grid else run.growth()
    for comparison in comparisons:
        console.print(comparison_table(comparison))
    if rows:
        console.print(bars_table(rows))
        console.print(_verdict(rows, quick=settings.quick), highlight=False)
    if save_picture(out, growth or comparisons, about):
        console.print(f"Picture: {out}", highlight=False, soft_wrap=True)
    else:
        console.print("No picture: it takes two values of N, K or D", highlight=False)
    if data_out is not None:
        data = as_data(found, rows, comparisons, growth)
        data_out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        console.print(f"All figures: {data_out}", highlight=False, soft_wrap=True)
    console.print(f"{time.perf_counter() - began:.0f} s in all", highlight=False)


def _first(bars: list[Bar], job: str, problem: Problem) -> bool:
    """Whether this is the first problem of its job on the CPU, whose memory is measured."""
    return job not in ("rest", "small") and problem == next(bar.problem for bar in bars if bar.job == job)


def _verdict(rows: list[Row], *, quick: bool) -> str:
    if quick:
        return "Small sizes: the ratios say that everything runs, not whether a bar is met."
    met = [row.met for row in rows if row.met is not None]
    return f"{sum(met)} of {len(met)} bars met; {len(rows) - len(met)} not measured here"
