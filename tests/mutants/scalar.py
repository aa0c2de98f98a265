"""Finite scalar quantization, broken."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS = (
    Mutant("FSQ: the paper's tan", "math.atanh(o / h)", "math.tan(o / h)", "test_fsq.py numpy"),
    Mutant(
        "FSQ: scale of the gradient",
        "((1 - tanh) * (1 + tanh)) / self.row(lib, [level // 2 for level in self.levels], z)",
        "((1 - tanh) * (1 + tanh))",
        "test_fsq.py torch",
    ),
    Mutant(
        "FSQ: slope of z itself",
        "return self._slope(lib, z) * dz",
        "return self._slope(lib, z) * z",
        "test_fsq.py verbs_are_plain and numpy",
    ),
)
