"""Finite scalar quantization, broken."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS = (
    Mutant("FSQ: the paper's tan", "math.atanh(o / h)", "math.tan(o / h)", "test_fsq.py numpy"),
    Mutant(
        "FSQ: scale of the gradient",
        "((1 - tanh) * (1 + tanh)) / halves",
        "((1 - tanh) * (1 + tanh))",
        "test_fsq.py torch",
    ),
    Mutant(
        "FSQ: slope of z itself",
        "flat_rows(call.lib, dz), call.grid)",
        "call.z, call.grid)",
        "test_fsq.py verbs_are_plain and numpy",
    ),
)
