"""Break the mathematics on purpose, one line at a time, and show that the tests notice every time.

Each mutant replaces a piece of code that stands once in all sources, in a copy of the project, and the tests named
for it must fail by their assertions: not at import, and not in code that no longer runs at all.

    python tests/mutants [--jobs 2] [--only SUBSTRING]

Prints a line for each, then ``caught N/N``; exit status 1 unless every mutant is caught and the copy without a
mutant passes the same tests.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from mutants import MUTANTS
from mutants.anchors import ROOT, Unanchored, sources, spliced, the_place

if TYPE_CHECKING:
    from mutants.mutant import Mutant

# Errors of code that no longer runs, which any call would have shown.
NOT_MATHEMATICS = {
    *("NameError", "SyntaxError", "ImportError", "ModuleNotFoundError", "AttributeError"),
    *("TypeError", "RuntimeError"),
}


def broken(mutant: Mutant, root: Path = ROOT) -> dict[Path, str]:
    """The sources that a mutant changes, changed; an error if a piece of code does not stand there once."""
    among = sources(root)
    edits = [(the_place(old, mutant.within, among), new) for old, new in mutant.edits]
    texts: dict[Path, str] = {}
    # From the end, so that what is still to be replaced stays where it is.
    for place, new in sorted(edits, key=lambda edit: edit[0].first, reverse=True):
        path = place.source.path.relative_to(root)
        texts[path] = spliced(texts.get(path, place.source.text), place, new)
    return texts


def snapshot(folder: Path) -> None:
    """What the tests need of the project, so that edits meanwhile change nothing."""
    ignore = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for name in ("diveq_core", "backends", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)


def run(project: Path, mutant: Mutant | None, tests: str) -> dict:
    """The report of pytest on a copy of the project, with the mutant if there is one."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder) / "project"
        shutil.copytree(project, copy)
        for path, text in broken(mutant, project).items() if mutant else ():
            (copy / path).write_text(text, encoding="utf-8")
        name, expression = tests.split(" ", 1)
        # A test file's name is unique, so that it may move.
        (file,) = (copy / "tests").rglob(name)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(str(copy / name) for name in ("", "backends", "tests")),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HYPOTHESIS_PROFILE": "default",
            "MUTANT_REPORT": str(copy / "report.json"),
        }
        command = [sys.executable, "-m", "pytest", "-p", "mutants.report", "-p", "no:cacheprovider", "-x", "-q"]
        command += ["--tb=no", str(file), "-k", expression]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        report = copy / "report.json"
        if not report.exists():
            return {"status": -1, "collected": 0, "failures": [], "output": done.stdout[-500:] + done.stderr[-500:]}
        return json.loads(report.read_text(encoding="utf-8"))


def verdict(project: Path, mutant: Mutant) -> tuple[bool, str]:
    """Whether the tests caught it, and how."""
    report = run(project, mutant, mutant.tests)
    if not report["failures"]:
        return False, report.get("output", f"{report['collected']} tests pass")
    failure = report["failures"][0]
    if failure["when"] != "call" or failure["error"] in NOT_MATHEMATICS:
        return False, f"NOT RUN: {failure['when']} {failure['error']} {failure['test']}"
    return True, f"{failure['error']} in {failure['test'].split('::')[-1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="mutants to try at a time")
    parser.add_argument("--only", action="append", help="only mutants whose name contains this, or one of several")
    options = parser.parse_args(arguments)
    mutants = [mutant for mutant in MUTANTS if any(part in mutant.what for part in options.only or [""])]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(options.jobs) as pool:
        project = Path(folder)
        snapshot(project)
        for mutant in mutants:
            try:
                broken(mutant, project)
            except Unanchored as error:
                print(f"{mutant.what}: {error}")
                return 1
        # Starting takes most of the time, so what is expected to pass runs together.
        selections: dict[str, set[str]] = {}
        for mutant in mutants:
            file, expression = mutant.tests.split(" ", 1)
            selections.setdefault(file, set()).add(expression)
        together = [f"{file} {' or '.join(f'({e})' for e in sorted(chosen))}" for file, chosen in selections.items()]
        reports = pool.map(lambda tests: run(project, None, tests), together)
        for tests, report in zip(together, reports, strict=True):
            if report["status"] != 0:
                print(f"not green without a mutant: {tests}: {report}")
                return 1
            print(f"green without a mutant: {report['collected']} tests of {tests.split()[0]}", flush=True)
        caught = 0
        verdicts = pool.map(lambda mutant: verdict(project, mutant), mutants)
        for mutant, (good, how) in zip(mutants, verdicts, strict=True):
            caught += good
            print(f"{'caught' if good else 'MISSED':7} {mutant.what:50} {how}", flush=True)
    print(f"caught {caught}/{len(mutants)}")
    return 0 if caught == len(mutants) and mutants else 1
