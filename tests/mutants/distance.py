"""The straight-through estimator and the distance family, broken."""

from __future__ import annotations

from mutants.mutant import Mutant, second, verbs

MUTANTS = (
    Mutant("STE: g_z is -g", "return g, None", "return -g, None", verbs("STE"), within="STE.vjp"),
    Mutant("STE: g_z halved", "return g, None", "return g / 2, None", verbs("STE"), within="STE.vjp"),
    Mutant(
        "STE: the codebook gets g too",
        "return frozenset() if type(self) is STE else super().reads",
        "return super().reads",
        verbs("STE"),
        within="STE",
        also=(("return type(self) is not STE", "return True"), ("return g, None", "return g, g")),
    ),
    Mutant(
        "distance: sign of g_q", "g_q = u.times(w.dot(lib, g))", "g_q = u.times(-w.dot(lib, g))", verbs("DiVeQ or NSVQ")
    ),
    Mutant(
        "distance: <g, u> for <g, w>",
        "g_q = u.times(w.dot(lib, g))",
        "g_q = u.times(u.dot(lib, g))",
        verbs("DiVeQ or NSVQ"),
    ),
    Mutant(
        "distance: g_q along w", "g_q = u.times(w.dot(lib, g))", "g_q = w.times(w.dot(lib, g))", verbs("DiVeQ or NSVQ")
    ),
    Mutant("distance: g_z gains g_q", "return g - g_q, g_q", "return g + g_q, g_q", verbs("DiVeQ")),
    Mutant("distance: g_z stays g", "return g - g_q, g_q", "return g, g_q", verbs("DiVeQ")),
    Mutant("distance: g_q doubled", "return g - g_q, g_q", "return g - g_q, 2 * g_q", verbs("DiVeQ")),
    Mutant("distance: g_z lacks g", "return g - g_q, g_q", "return -g_q, g_q", verbs("DiVeQDetach")),
    Mutant(
        "STE: tangent of q",
        "return frozenset() if type(self) is STE else super().reads",
        "return super().reads",
        verbs("STE"),
        within="STE",
        also=(("return type(self) is not STE", "return True"), ("return dz", "return dq")),
    ),
    Mutant("distance: dq + dz", "u.dot(lib, dq - dz)", "u.dot(lib, dq + dz)", verbs("DiVeQ")),
    Mutant(
        "distance: tangent along u", "w.added_to(lib, dz, u.dot", "u.added_to(lib, dz, u.dot", verbs("DiVeQ or NSVQ")
    ),
    Mutant("distance: drho by w", "u.dot(lib, dq - dz)", "w.dot(lib, dq - dz)", verbs("DiVeQ or NSVQ")),
    Mutant("distance: dz lost", "w.added_to(lib, dz, u.dot", "w.added_to(lib, 0 * dz, u.dot", verbs("DiVeQ or NSVQ")),
    Mutant("DiVeQ: sigma squared", "d, noise, self.sigma)", "d, noise, self.sigma**2)", verbs("DiVeQ")),
    Mutant("DiVeQ: noise subtracted", "d, noise, self.sigma)", "d, noise, -self.sigma)", verbs("DiVeQ")),
    Mutant(
        "DiVeQ: a sigma beyond the dtype's range",
        "if sigma > _LARGE:",
        "if sigma < 0:",
        "test_estimators.py beyond_all_bounds and numpy",
    ),
    Mutant(
        "DiVeQ: the error divided by no sigma",
        "lib.add_scaled(d * 2.0**-half * 2.0 ** (half - exponent), noise, mantissa)",
        "lib.add_scaled(d, noise, mantissa)",
        "test_estimators.py beyond_all_bounds and numpy",
    ),
    Mutant("DiVeQ: no noise", "d, noise, self.sigma)", "d, noise, 0.0)", verbs("DiVeQ")),
    Mutant(
        "distance: rho lost",
        "added_to(lib, z, rho)",
        "added_to(lib, z, rho / rho)",
        verbs("DiVeQ"),
        within="_Distance.forward",
    ),
    Mutant(
        "distance: from q, not from z",
        "added_to(lib, z, rho)",
        "added_to(lib, q, rho)",
        verbs("DiVeQ"),
        within="_Distance.forward",
    ),
    Mutant("NSVQ: away from the noise", "lib.direction(noise)[1]", "lib.direction(-noise)[1]", verbs("NSVQ")),
    Mutant(
        "distance: w carries gradient",
        "self.w(lib, d, u, noise).stopped(lib)",
        "self.w(lib, d, u, noise)",
        second("DiVeQ"),
        within="_Distance.vjp",
    ),
    Mutant(
        "distance: u is held constant",
        "g_q = u.times(w.dot(lib, g))",
        "g_q = u.stopped(lib).times(w.dot(lib, g))",
        second("DiVeQ or NSVQ"),
    ),
    Mutant(
        "distance: rho lost of few vectors",
        "added_to(lib, z, rho)",
        "added_to(lib, z, rho / rho)",
        "test_estimators.py verbs_are_plain and numpy and (DiVeQ)",
        within="_Distance.linearized",
    ),
)
