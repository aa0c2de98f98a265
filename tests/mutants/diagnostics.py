"""Diagnostics, broken."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "usage: one sum of ones",
        "dtype=lib.xp.int32, **lib.place(segments)",
        "dtype=lib.xp.float32, **lib.place(segments)",
        "test_diagnostics.py beyond_the_whole",
    ),
    Mutant(
        "coefficient: z added",
        "(lib.astype(q, dtype) - lib.astype(z, dtype))",
        "(lib.astype(q, dtype) + lib.astype(z, dtype))",
        "test_diagnostics.py coefficient and numpy",
    ),
    Mutant(
        "positive share: zero is positive",
        "lib.astype(c > 0,",
        "lib.astype(c >= 0,",
        "test_diagnostics.py nothing_is_not_positive",
    ),
    Mutant(
        "equivalent loss: the coefficient carries gradient",
        "lib.stop_gradient(lib.xp.sum(rows[0] * (rows[2] - rows[1]), axis=-1, keepdims=True))",
        "lib.xp.sum(rows[0] * (rows[2] - rows[1]), axis=-1, keepdims=True)",
        "test_diagnostics.py radial_estimator and torch",
    ),
    Mutant(
        "perplexity: in bits",
        "total * xp.exp(-mean_log)",
        "total * 2.0**-mean_log",
        "test_diagnostics.py perplexity and numpy",
    ),
)
