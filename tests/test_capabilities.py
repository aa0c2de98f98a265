"""The tables of what works where say what was tried, no more and no less."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

import pytest

import diveq_core as dq
from capabilities import PAGE, cell, known_cells
from capability_rows import ESTIMATORS, ROWS
from layer_drivers import DRIVERS, KERAS_WARNS, KINDS, driver_named, layer_cell
from libraries import jax_checked, library_named
from transformations import FIRST, ON_DEVICES, TRANSFORMATIONS, transformed

if TYPE_CHECKING:
    from libraries import Library

WRITTEN = PAGE.read_text(encoding="utf-8")

# Words of the cells, what one derives from, what is given to a call rather than called, and what takes no array.
NO_ROW = {
    *("quantize", "vjp", "jvp", "decode", "Backend", "Quantizer", "Estimator", "Radius", "register"),
    *("optional_kernels", "set_optional_kernels", "layers", "Prepared"),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_documented_cell_is_what_was_tried(name: str, library: Library) -> None:
    written = known_cells(WRITTEN)[name][library.name]
    with jax_checked() if library.name == "jax" else contextlib.nullcontext():
        assert written == ", ".join(cell(name, library)), "run python tests/support/capabilities.py"


OF_EACH_KIND = [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in ESTIMATORS]


# torch's forward mode compiles decompositions by a function that torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("transformation", [each for each in TRANSFORMATIONS if each not in ON_DEVICES])
@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_the_documented_transformation_is_what_was_tried(name: str, transformation: str) -> None:
    library_named(transformation.partition(":")[0])
    written = known_cells(WRITTEN, 1)[name][transformation]
    assert written == transformed(name, transformation), "run python tests/support/capabilities.py"


ON_FLAX = ("plain", "averages", "stages, averages", "FSQ in stages")


@KERAS_WARNS
@pytest.mark.parametrize(
    ("kind", "framework"),
    [
        # What Flax does to the others is the same, and compiled for seconds each.
        pytest.param(kind, name, marks=pytest.mark.slow if name == "flax" and kind not in ON_FLAX else ())
        for kind in KINDS
        for name in DRIVERS
    ],
)
def test_the_documented_layer_is_what_was_tried(kind: str, framework: str) -> None:
    driver_named(framework)
    written = known_cells(WRITTEN, 2)[kind][framework]
    assert written == ", ".join(layer_cell(framework, kind)), "run python tests/support/capabilities.py"


def test_the_page_has_every_row() -> None:
    assert set(known_cells(WRITTEN, 2)) == set(KINDS)
    assert set(known_cells(WRITTEN)) == set(ROWS)
    assert set(known_cells(WRITTEN, 1)) == set(ESTIMATORS)


@pytest.mark.parametrize("name", sorted(set(dq.__all__) - NO_ROW))
def test_every_public_name_has_a_row(name: str) -> None:
    public = getattr(dq, name)
    if isinstance(public, type) and issubclass(public, tuple):
        pytest.skip("what a call gives")
    own = re.sub("_(vjp|jvp|decode)$", "", name)
    tried = re.findall(r"\w+", " ".join(ROWS))
    assert own in tried or (own != name and any(word.startswith(own) for word in tried))
