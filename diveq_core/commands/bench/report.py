"""The measurements as tables for people and as data for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from diveq_core.commands.bench.contenders import CONTENDERS, TITLES
from diveq_core.commands.bench.timing import Timing, ratio

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diveq_core.commands.bench.bars import Row
    from diveq_core.commands.bench.comparison import Comparison

_MET = {True: ("yes", "green"), False: ("NO", "bold red"), None: ("-", "dim")}


def bars_table(rows: Sequence[Row]) -> Table:
    """One row per promise, grouped."""
    table = _table("Promises: ratio of medians in this run [quartiles of the ratio in each round]")
    table.add_column("what", no_wrap=True)
    table.add_column("N x K x D", justify="right", no_wrap=True)
    table.add_column("bar", justify="right", no_wrap=True)
    table.add_column("measured", justify="right")
    table.add_column("met", justify="center", no_wrap=True)
    group = None
    for row in rows:
        if row.group != group:
            if group is not None:
                table.add_section()
            table.add_row(Text(row.group, style="bold"))
            group = row.group
        table.add_row(
            f"  {row.text}", row.size, f"<= {_number(row.limit, row.unit)}", _measured(row), Text(*_MET[row.met])
        )
    return table


def comparison_table(comparison: Comparison) -> Table:
    """One row per contender; those that did not take part say why."""
    problem, reference = comparison.problem, comparison.reference
    table = _table(f"{TITLES[comparison.job]}\n{problem.size}, {problem.where}")
    table.add_column("contender", no_wrap=True)
    table.add_column("median", justify="right", no_wrap=True)
    other = "" if reference is None else f" / {CONTENDERS[reference].name}"
    table.add_column(f"ratio{other}", justify="right")
    if comparison.memory:
        table.add_column("peak memory", justify="right")
    for name, timing in comparison.timings.items():
        label = CONTENDERS[name].name
        if timing.missing is not None:
            table.add_row(label, "-", Text(timing.missing, style="dim"))
            continue
        assert reference is not None
        cells = [label, _duration(timing.median), _ratio(timing, comparison.timings[reference])]
        table.add_row(*cells, *([_memory(comparison.memory.get(name))] if comparison.memory else []))
    return table


def as_data(
    found: dict[str, Any], rows: Sequence[Row], comparisons: Sequence[Comparison], growth: Sequence[Comparison]
) -> dict[str, Any]:
    """Everything measured, for JSON."""
    return {
        "machine": found,
        "bars": [
            {
                "group": row.group,
                "what": row.text,
                "size": row.size,
                "bar": row.limit,
                "unit": row.unit,
                "measured": row.value,
                "quartiles": None if row.low is None else [row.low, row.high],
                "met": row.met,
                "reason": row.reason,
            }
            for row in rows
        ],
        "comparisons": [_comparison_data(comparison) for comparison in comparisons],
        "growth": [_comparison_data(comparison) for comparison in growth],
    }


def _comparison_data(comparison: Comparison) -> dict[str, Any]:
    p = comparison.problem
    return {
        "job": comparison.job,
        "n": p.n,
        "k": p.k,
        "d": p.d,
        "dtype": p.dtype,
        "device": p.device,
        "contenders": {
            name: {
                "label": CONTENDERS[name].name,
                "variant": timing.variant,
                "seconds": list(timing.seconds),
                "missing": timing.missing,
                "peak_bytes": comparison.memory.get(name),
            }
            for name, timing in comparison.timings.items()
        },
    }


def _table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", title_style="bold", header_style="bold")


def _number(value: float, unit: str) -> str:
    return f"{value:.2f}" if unit == "x" else f"{value:.0f} {unit}"


def _measured(row: Row) -> Text | str:
    if row.value is None:
        return Text(row.reason or "", style="dim")
    spread = "" if row.low is None or row.high is None else f" [{row.low:.2f}, {row.high:.2f}]"
    return _number(row.value, row.unit) + spread


def _ratio(timing: Timing, reference: Timing) -> str:
    if timing is reference:
        return "1"
    measured = ratio(timing, reference)
    return f"{measured.value:.3g} [{measured.low:.3g}, {measured.high:.3g}]"


def _duration(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 999.5 else f"{seconds * factor:.0f} {unit}"
    return f"{seconds * 1e6:.3g} µs" if seconds * 1e6 < 999.5 else "1 ms"


def _memory(used: int | str | None) -> Text | str:
    if used is None or isinstance(used, str):
        return Text(used or "-", style="dim")
    return f"{used / 2**20:.0f} MiB"
