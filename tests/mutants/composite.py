"""Residual and product quantization, broken."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "residual: the residual not reduced",
        "residual = residual - stages[-1][0]",
        "residual = residual + 0",
        "test_compose.py autograd",
        within="Residual.quantize",
    ),
    Mutant(
        "residual: chain cut",
        "g_q = g if g_residual is None else g - g_residual",
        "g_q = g",
        "test_compose.py autograd",
    ),
    Mutant(
        "residual: computed in 16 bits",
        "dtype = lib.compute_dtype(lib.result_dtype(z, codebook))",
        "dtype = lib.result_dtype(z, codebook)",
        "test_compose_dtypes.py bit_for_bit and numpy",
        within="Residual._computed",
    ),
    Mutant(
        "residual: decoded in the dtype of the codebook",
        "wide = asked if lib.xp.finfo(asked).bits > lib.xp.finfo(held).bits else held",
        "wide = codebook.dtype",
        "test_compose_dtypes.py bit_for_bit and numpy",
    ),
    Mutant(
        "residual: a dropped stage decodes to NaN",
        "lib.xp.where(dropped, lib.xp.zeros_like(q), q)",
        "q",
        "test_compose_dtypes.py dropped_stage_adds and numpy",
    ),
    Mutant(
        "residual: a later stage that finds nothing is as if dropped",
        "lib.xp.where(found < 0, found, first)",
        "lib.xp.where(found < -1, found, first)",
        "test_compose_dtypes.py finds_nothing and numpy",
    ),
    Mutant(
        "residual: a dropped stage gets the gradient",
        "pullback_of_stage(stage.kept(g_q))",
        "pullback_of_stage(g_q)",
        "test_compose_dtypes.py passes_by_a_dropped and numpy",
    ),
    Mutant(
        "residual: a dropped stage moves what is left",
        "self.lib.xp.where(self.dropped, self.lib.xp.zeros_like(x), x)",
        "x",
        "test_compose_dtypes.py dropped_stage_adds and numpy",
    ),
    Mutant(
        "product: groups overlap",
        "slice(part * width, (part + 1) * width)",
        "slice(0, width)",
        "test_compose.py each_group and numpy",
    ),
    Mutant(
        "residual: tangent of the residual not reduced", "d_residual - moved", "d_residual", "test_compose.py adjoint"
    ),
    Mutant(
        "residual: gradient of the first stages lost",
        "g_in if g_residual is None else g_residual + g_in",
        "g_in",
        "test_compose.py autograd",
    ),
    Mutant(
        "product: tangent of a group lost",
        "verb(z[here], words, dz[here], dwords",
        "verb(z[here], words, 0 * dz[here], dwords",
        "test_compose.py adjoint",
    ),
    Mutant(
        "shared codebook: gradient of the last part alone",
        "total = total + gradient",
        "total = gradient",
        "test_compose.py autograd",
    ),
)
