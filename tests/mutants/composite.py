"""Residual and product quantization, broken."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "residual: the residual not reduced",
        "residual = residual - z_q",
        "residual = residual + 0",
        "test_compose.py autograd",
        within="_Stages",
    ),
    Mutant(
        "residual: chain cut",
        "g_q = g if g_residual is None else g - g_residual",
        "g_q = g",
        "test_compose.py autograd",
    ),
    Mutant(
        "residual: computed in 16 bits",
        "dtype = lib.compute_dtype(out)",
        "dtype = out",
        "test_compose_dtypes.py bit_for_bit and numpy",
        within="Residual.call",
    ),
    Mutant(
        "residual: decoded in the dtype of the codebook",
        "wide = wide if lib.xp.finfo(wide).bits > lib.xp.finfo(held).bits else held",
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
        "xp.where(later < 0, later, found[0])",
        "xp.where(later < -1, later, found[0])",
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
        "x if dropped is None else lib.xp.where(dropped, lib.xp.zeros_like(x), x)",
        "x",
        "test_compose_dtypes.py dropped_stage_adds and numpy",
    ),
    Mutant(
        "product: groups overlap",
        "x[..., part * width : (part + 1) * width]",
        "x[..., 0:width]",
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
        "call.jvp(of.group(dz, part), of.words(dcodebook, part))",
        "call.jvp(0 * of.group(dz, part), of.words(dcodebook, part))",
        "test_compose.py adjoint",
    ),
    Mutant(
        "shared codebook: gradient of the last part alone",
        "total = total + gradient",
        "total = gradient",
        "test_compose.py autograd",
    ),
)
