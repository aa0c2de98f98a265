"""One way to be wrong, and the tests that should notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One way to be wrong."""

    what: str
    old: str
    """A piece of code that stands once in all sources; how its lines are broken and indented does not matter."""
    new: str
    tests: str
    """A test file's name and a ``-k`` expression that should notice, after a space."""
    within: str = ""
    """Names of classes or functions, outer ones first and with dots between, in which ``old`` stands once."""
    also: tuple[tuple[str, str], ...] = ()
    """More pieces of code ``within`` the same, each with what comes in its place."""

    @property
    def edits(self) -> tuple[tuple[str, str], ...]:
        return ((self.old, self.new), *self.also)


def verbs(cases: str, library: str = "numpy") -> str:
    return f"test_estimators.py verbs_are_plain and {library} and ({cases})"


def second(cases: str, library: str = "torch") -> str:
    return f"test_second_order.py ({'double_backward' if library == 'torch' else 'reverse_over'}) and ({cases})"


def bound(cases: str, library: str) -> str:
    return f"test_estimators.py differentiates_to_the_same and {library} and ({cases})"
