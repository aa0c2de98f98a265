"""The table of what works where says what was tried, no more and no less."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from capabilities import ESTIMATORS, PAGE, cell, known_cells

if TYPE_CHECKING:
    from conftest import Library


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_documented_cell_is_what_was_tried(name: str, library: Library) -> None:
    written = known_cells(PAGE.read_text(encoding="utf-8"))[name][library.name]
    assert written == ", ".join(cell(name, library)), "run python tests/capabilities.py"


def test_the_page_has_every_estimator() -> None:
    assert set(known_cells(PAGE.read_text(encoding="utf-8"))) == set(ESTIMATORS)
