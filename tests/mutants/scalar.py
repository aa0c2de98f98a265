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
    Mutant(
        "FSQ: finer levels lie on one side of the cell",
        "lib.xp.round(z * self._steps(lib, z) - self._offset(lib, z))",
        "lib.xp.round(z * self._steps(lib, z))",
        "test_fsq.py divides_the_cells",
    ),
    Mutant(
        "FSQ: stages give None for what there is not",
        "self.of.vjp(lib, z, _unread, None, g)",
        "self.of.vjp(lib, z, None, None, g)",
        "test_fsq.py does_not_say_so and numpy",
    ),
    Mutant(
        "FSQ: stages of any levels",
        "if getattr(type(self), name) is not getattr(FSQ, name):",
        "if False:",
        "test_fsq.py levels_of_its_own",
    ),
    Mutant(
        "FSQ: each stage as coarse as the first",
        "level // 2 * float(level) ** self.depth",
        "level // 2 * float(level) ** 0",
        "test_fsq.py divides_the_cells",
    ),
    Mutant(
        "FSQ: stages of what is not bounded",
        "residual = self._entered().quantize().z_q",
        "residual = self.z",
        "test_fsq.py composites_are_straight and numpy",
    ),
    Mutant(
        "FSQ: stages forget the bound's slope",
        "g_residual, _ = entered(g_residual)",
        "pass",
        "test_fsq.py composites_are_straight and numpy",
    ),
    Mutant(
        "FSQ: stages forget the bound's slope forward",
        "(residual, _), d_residual = self._entered().jvp(d_residual, None)",
        "(residual, _), _ = self._entered().jvp(d_residual, None)",
        "test_fsq.py composites_are_straight and numpy",
    ),
    Mutant(
        "FSQ: an index beyond the last level is one",
        "lib.nan_where((indices < 0) | (indices >= math.prod(self.levels)), z_q)",
        "z_q",
        "test_fsq.py not_finite and numpy",
    ),
)
