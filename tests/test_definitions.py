"""Edges of definitions that random numbers never meet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import diveq_core as dq

if TYPE_CHECKING:
    from conftest import Library


def test_nothing_is_not_positive(library: Library) -> None:
    """A vector on its codeword, or with a cotangent at right angles, is pulled nowhere."""
    g = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]], np.float32)
    z = np.zeros((4, 2), np.float32)
    q = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]], np.float32)
    arguments = [library.to(x) for x in (g, z, q)]
    np.testing.assert_array_equal(library.back(dq.coefficient(*arguments)), [0, 0, 2, -2])
    assert float(dq.positive_share(*arguments)) == 0.25
