"""Gumbel-softmax, broken."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "Gumbel: the pullback reads the codebook late",
        "return self.lib.snapshot(codebook), indices",
        "return codebook, indices",
        "test_torch_overwritten.py gumbel",
    ),
    Mutant(
        "Gumbel: temperature lost",
        "y * (x - self.lib.dot(y, x)) / self._temperature(x)",
        "y * (x - self.lib.dot(y, x))",
        "test_gumbel.py torch",
    ),
    Mutant(
        "Gumbel: a temperature that its dtype rounds to zero",
        "max(self.estimator.temperature, float(self.lib.xp.finfo(x.dtype).smallest_normal))",
        "self.estimator.temperature",
        "test_gumbel.py extremes and numpy",
    ),
    Mutant(
        "Gumbel: a row that is not finite in the codebook's gradient",
        "kept = zero_rows(lib, lib.xp.expand_dims(indices < 0, axis=1), g)",
        "kept = g",
        "test_gumbel.py not_finite_adds and jax",
    ),
    Mutant(
        "Gumbel: a codeword excluded loses the row",
        "xp.all(there | (xp.isinf(total) & (total < 0)), axis=-1)",
        "xp.all(there, axis=-1)",
        "test_gumbel.py excludes_its_codeword and torch",
    ),
    Mutant(
        "Gumbel: a row without codewords has a first",
        "& xp.any(there, axis=-1)",
        "",
        "test_gumbel.py nothing_left and numpy",
    ),
    Mutant("Gumbel: y y^T lost", "y * (x - self.lib.dot(y, x))", "y * x", "test_gumbel.py torch"),
    Mutant(
        "Gumbel: tangent of the codewords lost",
        "moved = moved + lib.take_rows(dcodewords, indices)",
        "moved = moved + 0 * lib.take_rows(dcodewords, indices)",
        "test_gumbel.py verbs_are_plain and numpy",
    ),
    Mutant(
        "Gumbel: the tangent's derivative through y lost",
        "moved = moved + lib.matmul(self._live(y, indices), dcodewords)",
        "moved = moved + 0",
        "test_gumbel.py forward_over_forward",
    ),
)
