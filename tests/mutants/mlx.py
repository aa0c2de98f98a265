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
        "MLX: products of the first parts alone",
        "left = mx.concatenate([a_low, a_mid, a, a_mid, a, a], axis=-1)",
        "left = mx.concatenate([0 * a_low, 0 * a_mid, 0 * a, 0 * a_mid, 0 * a, a], axis=-1)",
        "test_mlx.py tf32",
    ),
    Mutant(
        "MLX: the search multiplies in TF32",
        "if a.dtype == b.dtype == mx.float32 and rounds():",
        "if False:",
        "test_mlx.py tf32",
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
