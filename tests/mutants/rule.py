"""What every estimator's binding computes, broken."""

from __future__ import annotations

from mutants.mutant import Mutant, verbs

MUTANTS = (
    Mutant(
        "hard: z + (q - z) for q",
        "lib.astype(self.gathered(codebook, indices), self.out_dtype)",
        "lib.astype(z + (self.gathered(codebook, indices) - z), self.out_dtype)",
        "test_estimators.py bit_for_bit and numpy and STE",
    ),
    Mutant(
        "rule: all cotangents to codeword 0",
        "self.lib.segment_add(total, part, chosen)",
        "self.lib.segment_add(total, part, chosen * 0)",
        verbs("DiVeQ"),
    ),
    Mutant(
        "rule: noise lost in the pullback",
        "self.estimator.vjp(lib, z, q, noise, g)",
        "self.estimator.vjp(lib, z, q, g, g)",
        verbs("DiVeQ or NSVQ"),
    ),
    Mutant(
        "rule: the tangent of codeword 0 for all",
        "self.gathered(dcodebook, indices)",
        "self.gathered(dcodebook, indices * 0)",
        verbs("DiVeQ"),
    ),
    Mutant(
        "rule: g_z in the dtype of computation",
        "return lib.astype(g_z, self.z_dtype)",
        "return g_z",
        verbs("DiVeQ"),
        within="pullback.rows",
    ),
    Mutant(
        "rule: g_codebook in the dtype of computation",
        "return g_z, None if total is None else lib.astype(total, self.codebook_dtype)",
        "return g_z, total",
        verbs("DiVeQ"),
    ),
    Mutant(
        "rule: half precision throughout",
        "words, out, lib.compute_dtype(out))",
        "words, out, out)",
        verbs("DiVeQ or Power"),
    ),
    Mutant(
        "rule: few vectors give the codebook nothing",
        "total if g_q is None else self._scattered(total, indices, g_q)",
        "total",
        "test_estimators.py verbs_are_plain and numpy and DiVeQ",
    ),
    Mutant(
        "rule: a codeword's cotangent in a wider dtype than the sum",
        "self.lib.astype(g_q, total.dtype)",
        "self.lib.astype(g_q, g_q.dtype)",
        "test_wider.py an and estimator and jax",
    ),
    Mutant(
        "rule: few vectors keep what they gave",
        "lib.copy(q) if self.hard else",
        "q if self.hard else",
        "test_quantize.py output_may_be_overwritten",
    ),
    Mutant(
        "rule: rules of one's own are passed by",
        "if type(self).forward is not _Distance.forward or type(self).vjp is not _Distance.vjp:",
        "if False:",
        "test_torch.py nobody_else and eager",
    ),
)
