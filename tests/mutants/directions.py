"""Directions and the cosine, broken."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "normalize: the pullback reads its argument late",
        "kept = lib.snapshot(x)",
        "kept = x",
        "test_quantize.py other_pullbacks and numpy and normalize",
    ),
    Mutant(
        "normalize: the part along x stays",
        "(v - lib.dot(v, u) * u)",
        "(v - 0 * u)",
        "test_directions.py pullback_of_normalize and numpy",
    ),
    Mutant(
        "normalize: zeros have a derivative",
        "zero_rows(lib, rho == 0, across)",
        "across",
        "test_directions.py tangent_of_normalize and numpy",
    ),
    Mutant(
        "normalize: the length lost",
        "u) * u) / one_where(lib, rho == 0, rho)",
        "u) * u)",
        "test_directions.py pullback_of_normalize and numpy",
    ),
    Mutant(
        "cosine: a codeword of zeros is any",
        "xp.astype(rho == 0, rho.dtype)",
        "xp.astype(rho < 0, rho.dtype)",
        "test_directions.py zeros_have and numpy",
    ),
    Mutant(
        "normalize: half of the scale",
        "across * half * half",
        "across * half",
        "test_directions.py derivative_of_a_direction",
    ),
)
