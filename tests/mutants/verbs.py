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
    Mutant(
        "the output beside a pullback has the derivative of the forward pass",
        "return lib.bind(rule, z, codebook, self.chosen, self.noise)",
        "return rule.forward(z, codebook, self.chosen, self.noise)",
        "test_values_beside_pullbacks.py quantize and torch and STE",
    ),
    Mutant(
        "residuals between stages have the derivative of the forward pass",
        "return self._shaped(few[0] if few else self._value()), pullback",
        "return self._shaped(rule.forward(z, self.codebook, self.chosen, noise)), pullback",
        "test_values_beside_pullbacks.py differentiated_again and torch",
    ),
    Mutant(
        "the output beside a tangent has the derivative of the forward pass",
        "out = self._shaped(self._value())",
        "out = self._shaped(self.rule.forward(self.z, self.codebook, self.chosen, self.noise))",
        "test_values_beside_pullbacks.py quantize and torch and STE",
    ),
)
