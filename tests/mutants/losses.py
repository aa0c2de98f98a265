"""Losses, broken."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "codebook loss: the pullback reads the codebook late",
        "call.lib.snapshot(codebook)",
        "codebook",
        "test_quantize.py other_pullbacks and numpy and codebook_loss",
        within="codebook_loss_vjp",
    ),
    Mutant(
        "commitment loss: the pullback reads the codebook late",
        "call.lib.snapshot(codebook)",
        "codebook",
        "test_quantize.py other_pullbacks and numpy and commitment_loss",
        within="commitment_loss_vjp",
    ),
    Mutant(
        "losses: the codebook's gradient of the encoder",
        "rows = -call.slope(",
        "rows = call.slope(",
        "test_losses.py plain_automatic and numpy and codebook",
    ),
    Mutant(
        "losses: the mark of what is masked makes NaN",
        "indices = lib.xp.where(self.mask[:, 0], indices, lib.xp.zeros_like(indices))",
        "indices = lib.xp.where(self.mask[:, 0], indices, indices)",
        "test_jax_settings.py make_no_nan",
    ),
    Mutant(
        "losses: half the gradient",
        "(2 * self.lib.astype(g",
        "(self.lib.astype(g",
        "test_losses.py plain_automatic and numpy",
    ),
    Mutant(
        "losses: masked vectors counted",
        "xp.astype(self.mask, self.compute_dtype)",
        "xp.ones_like(xp.astype(self.mask, self.compute_dtype))",
        "test_losses.py masked_is_the_subset and numpy",
    ),
    Mutant(
        "losses: codebook loss moves the encoder",
        "call.value(call.lib.stop_gradient(z), codebook)",
        "call.value(z, codebook)",
        "test_losses.py both_orders and torch",
    ),
    Mutant(
        "codebook loss: the vectors are live beside the pullback",
        "z = call.lib.stop_gradient(z)",
        "pass",
        "test_values_beside_pullbacks.py losses and torch",
    ),
    Mutant(
        "commitment loss: the codewords are live beside the pullback",
        "codebook = call.lib.stop_gradient(codebook)",
        "pass",
        "test_values_beside_pullbacks.py losses and torch",
    ),
)
