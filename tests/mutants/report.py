"""Rides along in pytest: the copy must be what is imported, failures are recorded by kind, nothing is shrunk."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, settings

if TYPE_CHECKING:
    from collections.abc import Generator

failures = []


def pytest_sessionstart(session: pytest.Session) -> None:
    # The suite's own examples, in its own number: what is caught here plain pytest catches.
    suite = settings.get_profile("default")
    phases = [Phase.explicit, Phase.generate]
    settings.register_profile("mutants", parent=suite, database=None, report_multiple_bugs=False, phases=phases)
    settings.load_profile("mutants")
    here = Path(__file__).resolve().parents[2]
    for name in ("diveq_core", "diveq_numpy", "diveq_torch", "diveq_jax", "diveq_mlx"):
        assert here in Path(importlib.util.find_spec(name).origin).parents, f"{name} is not the copy"


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        failures.append({"test": report.nodeid, "when": "collect", "error": str(report.longrepr)[-200:]})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        failures.append({"test": item.nodeid, "when": report.when, "error": call.excinfo.typename})
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    report = {"status": int(exitstatus), "collected": session.testscollected, "failures": failures}
    Path(os.environ["MUTANT_REPORT"]).write_text(json.dumps(report), encoding="utf-8")
