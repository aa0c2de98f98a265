"""Every promise of speed and memory, by the code of ``python -m diveq_core bench``.

Small by default, to show that each can be measured; at the sizes of the promise with ``-m slow -s``, which prints
the rows. Times depend on the machine and on who else uses it, so none decides whether a test passes.
"""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from diveq_core.commands.bench import timing
from diveq_core.commands.bench.bars import memory_rows, saved_rows, speed_bars, speed_row
from diveq_core.commands.bench.comparison import compare
from diveq_core.commands.bench.report import bars_table, comparison_table


def comparisons_of(bars):
    return list(dict.fromkeys((bar.job, bar.problem) for bar in bars if bar.problem.device == "cpu"))


def one_of_each_job():
    """The others differ in size alone, and JAX would compile for each."""
    return list({job: (job, problem) for job, problem in comparisons_of(speed_bars(quick=True))}.values())


def measure(job, problem, bars, repeats, *, judged):
    comparison = compare(job, problem, repeats)
    mine = [bar for bar in bars if (bar.job, bar.problem) == (job, problem)]
    rows = [speed_row(bar, [comparison], judged=judged) for bar in mine]
    Console(width=110).print(comparison_table(comparison), bars_table(rows))
    return rows


@pytest.mark.parametrize(("job", "problem"), one_of_each_job(), ids=str)
def test_each_speed_bar_can_be_measured(job, problem, monkeypatch):
    monkeypatch.setattr(timing, "_PAUSE", 0.0)
    monkeypatch.setattr(timing, "_SHORTEST_SAMPLE", 0.0)
    for row in measure(job, problem, speed_bars(quick=True), 1, judged=False):
        assert row.reason is not None or (math.isfinite(row.value) and row.value > 0)
        assert row.met is None


@pytest.mark.slow
@pytest.mark.parametrize(("job", "problem"), comparisons_of(speed_bars()), ids=str)
def test_speed_bars(job, problem):
    for row in measure(job, problem, speed_bars(), 9, judged=True):
        assert row.reason is not None or row.met is not None


@pytest.mark.slow
def test_memory_bars():
    rows = [*memory_rows(), *saved_rows()]
    Console(width=110).print(bars_table(rows))
    assert all(row.met or row.reason for row in rows)
