"""MLX, broken."""

from __future__ import annotations

from mutants.mutant import Mutant, bound

MUTANTS = (
    Mutant(
        "MLX: the gradient flows through a stop-gradient",
        "return mx.stop_gradient(x)",
        "return x",
        "test_mlx.py losses",
    ),
    Mutant(
        "MLX: the codebook's cotangent lost",
        "known = [g_z] if g_codebook is None else [g_z, g_codebook]",
        "known = [g_z]",
        bound("DiVeQ", "mlx"),
    ),
    Mutant(
        "MLX: vmap takes the first codebook for all",
        "if whole is not None and axes[whole] is not None:",
        "if whole is not None and axes[whole] is not None and not (operands := (operands[0], batched[whole][0])):",
        "test_mlx.py vmap",
    ),
    Mutant(
        "MLX: an index out of range reads other memory",
        "mx.where(indices < codebook.shape[0], indices, -1)",
        "mx.where(indices < codebook.shape[0], indices, 0)",
        "test_compose_dtypes.py out_of_range and mlx",
    ),
)
