"""The rotation trick, broken."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "torch: gradients of zeros for a codebook that gets none",
        "return type(self) is not Rotation",
        "return True",
        "test_torch_overwritten.py weight_decay",
    ),
    Mutant("rotation: R for its transpose", "(g, -1.0), None", "(g, 1.0), None", "test_rotation.py torch"),
    Mutant(
        "rotation: s inverted",
        "s = long_q / one_where(lib, lost, long_z)",
        "s = long_z / one_where(lib, lost, long_q)",
        "test_rotation.py torch",
    ),
    Mutant(
        "rotation: pushforward by the transpose",
        "_rotation(lib, z, q)(dz, 1.0)",
        "_rotation(lib, z, q)(dz, -1.0)",
        "test_rotation.py verbs_are_plain and numpy",
    ),
)
