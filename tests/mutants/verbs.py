"""The verbs, broken."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "the pullback reads the indices late",
        "else (lib.snapshot(codebook), lib.snapshot(call.indices))",
        "else (lib.snapshot(codebook), call.indices)",
        "test_memory.py indices_given_back",
    ),
    Mutant(
        "the pullback reads the codebook late",
        "else (lib.snapshot(codebook), lib.snapshot(call.indices))",
        "else (codebook, lib.snapshot(call.indices))",
        "test_quantize.py was_used and numpy",
    ),
)
