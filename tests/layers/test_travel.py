"""A layer's state travels: a file from each framework is read by every other, token for token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from layer_drivers import DRIVERS, KERAS_WARNS, driver_named, same_tokens, trained, vectors

if TYPE_CHECKING:
    from pathlib import Path

KINDS = ("stages, averages", "cosine in heads", "curve")


@KERAS_WARNS
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # By default each framework writes one kind, and all of them each kind.
        pytest.param(name, kind, marks=() if KINDS.index(kind) == number % len(KINDS) else pytest.mark.slow)
        for number, name in enumerate(DRIVERS)
        for kind in KINDS
    ],
)
def test_a_file_is_read_by_all(name: str, kind: str, tmp_path: Path) -> None:
    writer, z, path = trained(name, kind), vectors(kind, 9), tmp_path / "layer"
    writer.save(path)
    tokens, read = writer.tokens(z), 0
    for other in DRIVERS:
        try:
            kind_of_reader = driver_named(other)
        except pytest.skip.Exception:
            continue
        reader = kind_of_reader.load(path)
        same_tokens(reader, tokens, writer, z)
        for key, x in writer.arrays().items():
            np.testing.assert_array_equal(reader.arrays()[key], x)
        read += 1
    assert read >= 1
