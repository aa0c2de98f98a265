"""The command that breaks the mathematics still can: each piece of code is there, and what it breaks is noticed."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest

from mutants import MUTANTS, run
from mutants.anchors import Unanchored, parsed, places, sources, spliced, the_place
from mutants.mutant import Mutant
from mutants.run import broken, main

if TYPE_CHECKING:
    from pathlib import Path

    from mutants.anchors import Source


def test_enough_ways_to_be_wrong() -> None:
    assert len(MUTANTS) >= 218
    assert len({mutant.what for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_each_piece_of_code_is_there_once(mutant: Mutant) -> None:
    """Where this fails it says what stands there instead."""
    before = {source.path: source.text for source in sources()}
    texts = broken(mutant)
    assert texts
    for path, text in texts.items():
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(before[run.ROOT / path]))


def source_of(tmp_path: Path, text: str, module: str = "diveq_core.some") -> Source:
    return parsed(tmp_path / "some.py", module, text)


FIRST = '''"""A module, whose words root(x, floor) do not count."""


class Radius:
    def length(self, x, floor):
        if floor:
            # Why the floor is there: root(x, floor).
            y = root(x, floor)
            return y, -y
        return x
'''
MOVED = """def length(x, floor):
    y = root(
        x,
        # Another remark.
        floor,
    )
    return (
        y,
        -y,
    )
"""


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (FIRST, FIRST.replace("y = root(x, floor)", "y = root(x, other)")),
        (MOVED, MOVED.replace("        floor,", "        other,")),
    ],
    ids=["as it stands", "moved, wrapped and indented anew"],
)
@pytest.mark.parametrize(
    "piece", ["root(x, floor)", "root(x, floor", "y = root(x, floor)\nreturn", "        = root(x,\n            floor)"]
)
def test_lines_may_move(piece: str, text: str, changed: str, tmp_path: Path) -> None:
    source = source_of(tmp_path, text)
    result = spliced(source.text, the_place(piece, "length", [source]), piece.replace("floor", "other"))
    assert ast.dump(ast.parse(result)) == ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))


@pytest.mark.parametrize(("text", "indentation"), [(FIRST, 12), (MOVED, 4)])
def test_what_comes_instead_is_indented_like_what_was_there(text: str, indentation: int, tmp_path: Path) -> None:
    place = the_place("y = root(x, floor)\nreturn", "length", [source_of(tmp_path, text)])
    changed = spliced(text, place, "    if x:\n        y = x\n\n    return").split("\n")
    begin = next(i for i, line in enumerate(changed) if line.strip() == "if x:")
    assert changed[begin : begin + 3] == [" " * indentation + "if x:", " " * (indentation + 4) + "y = x", ""]
    assert changed[begin + 3].startswith(" " * indentation + "return")
    ast.parse("\n".join(changed))


def test_words_and_remarks_are_not_code(tmp_path: Path) -> None:
    assert len(places("root(x, floor)", "", [source_of(tmp_path, FIRST)])) == 1
    assert places("whose words", "", [source_of(tmp_path, FIRST)]) == []
    # A name is whole or is not there.
    assert places("oot(x", "", [source_of(tmp_path, FIRST)]) == []


@pytest.mark.parametrize(
    ("within", "there"),
    [
        ("", True),
        ("length", True),
        ("Radius", True),
        ("Radius.length", True),
        ("diveq_core.Radius", True),
        ("length.Radius", False),
        ("Radi", False),
        ("diveq_numpy", False),
    ],
)
def test_names_around_it_tell_which_is_meant(within: str, there: bool, tmp_path: Path) -> None:
    source = source_of(tmp_path, FIRST)
    if there:
        assert the_place("return x", within, [source]).name == "diveq_core.some.Radius.length"
        return
    with pytest.raises(Unanchored, match=rf"not stand within {within}, but here: 'return x' in .*\.length, line 10"):
        the_place("return x", within, [source])


def test_what_is_missing_is_named_with_what_is_there_instead(tmp_path: Path) -> None:
    source = source_of(tmp_path, FIRST)
    message = r"'y = root\(x, ceiling\)' stands nowhere; the nearest is 'y = root\(x, floor\)' in diveq_core\.some\.R"
    with pytest.raises(Unanchored, match=message):
        the_place("y = root(x, ceiling)", "", [source])
    with pytest.raises(Unanchored, match=r"'return' stands at 2 places: 'return' in .*, line 9; 'return' in .*line 10"):
        the_place("return", "", [source])


def test_a_mutant_that_fits_nowhere_is_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Mutant("lost", "return g, None, None, None, 1", "return g", "test_estimators.py verbs_are_plain")
    monkeypatch.setattr(run, "MUTANTS", [lost])
    assert main([]) == 1
    assert "lost: 'return g, None, None, None, 1' stands nowhere; the nearest is" in capsys.readouterr().out


def test_three_are_caught_and_what_changes_nothing_is_missed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pullback, a pushforward and a repeated index; `python tests/mutants` tries all."""
    names = {"distance: sign of g_q", "distance: dq + dz", "NumPy: repeated indices lost"}
    # The same few tests for all, since what takes time is to start.
    tests = "test_estimators.py verbs_are_plain and numpy and (STE or DiVeQDetach)"
    few = [Mutant(**{**vars(mutant), "tests": tests}) for mutant in MUTANTS if mutant.what in names]
    same = Mutant("the same", "return g, None", "return g + 0, None", tests, within="STE")
    monkeypatch.setattr(run, "MUTANTS", [*few, same])
    assert main(["--jobs", "2"]) == 1
    out = capsys.readouterr().out
    assert "caught 3/4" in out
    assert "MISSED  the same" in out
