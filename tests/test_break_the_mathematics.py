"""The script that breaks the mathematics still can: its texts are there, and what it breaks is noticed."""

from __future__ import annotations

import pytest

import break_the_mathematics
from break_the_mathematics import MUTANTS, Mutant, main, times_there


def test_enough_ways_to_be_wrong() -> None:
    assert len(MUTANTS) >= 30
    assert len({mutant.what for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_the_text_to_replace_is_there_once(mutant: Mutant) -> None:
    assert times_there(mutant) == 1
    assert mutant.new != mutant.old


def test_three_are_caught(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pullback, a pushforward and a repeated index; `python tests/break_the_mathematics.py` tries all."""
    names = {"distance: sign of g_q", "distance: dq + dz", "NumPy: repeated indices lost"}
    # The same few tests for all, since what takes time is to start.
    tests = "test_estimators.py verbs_are_plain and numpy and DiVeQDetach"
    few = [Mutant(**{**vars(mutant), "tests": tests}) for mutant in MUTANTS if mutant.what in names]
    monkeypatch.setattr(break_the_mathematics, "MUTANTS", few)
    assert main(["--jobs", "2"]) == 0
    assert "caught 3/3" in capsys.readouterr().out


def test_a_mutant_that_changes_nothing_is_missed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = "test_estimators.py verbs_are_plain and numpy and STE"
    same = Mutant(
        "the same", "diveq_core/estimators/straight_through.py", "return g, None", "return g + 0, None", tests
    )
    monkeypatch.setattr(break_the_mathematics, "MUTANTS", [same])
    assert main([]) == 1
    assert "caught 0/1" in capsys.readouterr().out
