"""The verbs, broken."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "the pullback reads the indices late",
        "lib.snapshot(x) if read and x is not None else None",
        "(x if x is self.chosen else lib.snapshot(x)) if read and x is not None else None",
        "test_memory.py indices_given_back",
    ),
    Mutant(
        "the pullback reads the codebook late",
        "lib.snapshot(x) if read and x is not None else None",
        "(x if x is self.codebook else lib.snapshot(x)) if read and x is not None else None",
        "test_quantize.py was_used and numpy",
    ),
)
