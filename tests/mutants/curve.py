"""Curves through the codebook, broken."""

from __future__ import annotations

from mutants.mutant import Mutant

CURVE = "test_space_filling.py torch or dithered"
MUTANTS = (
    Mutant("curve: the ends exchanged", "return (1 - t) * c_1 + t * c_2", "return t * c_1 + (1 - t) * c_2", CURVE),
    Mutant("curve: the first codeword twice", "indices, indices + corner)", "indices, indices)", CURVE),
    Mutant("curve: weight of the first end", "g_1 = u_1.times((1 - t) * w_1", "g_1 = u_1.times(w_1", CURVE),
    Mutant("curve: g_2 stays with z", "return g - g_1 - g_2", "return g - g_1", CURVE),
    Mutant(
        "curve: the second end gets no gradient",
        "side_by_side(lib, g_1, g_2)",
        "side_by_side(lib, g_1, 0 * g_2)",
        CURVE,
    ),
    Mutant("curve: w carries gradient", "lib.direction(x)[1].stopped(lib)", "lib.direction(x)[1]", CURVE),
    Mutant(
        "curve: position not clipped",
        "return within(lib, t, 0.0, 1.0)[:, 0]",
        "return t[:, 0]",
        "test_space_filling.py projection",
    ),
    Mutant("curve: tangent of the first end and of z added", "dc_1 - dz", "dc_1 + dz", CURVE),
    Mutant("curve: tangent along u", "w_2.times(t * u_2.dot", "u_2.times(t * u_2.dot", CURVE),
    Mutant("curve: tangent of one end twice", "u_2.dot(lib, dc_2 - dz)", "u_2.dot(lib, dc_1 - dz)", CURVE),
    Mutant(
        "curve: an end is not the next start",
        "at_end = (position >= 1) & (segment < codebook.shape[0] - 2)",
        "at_end = (position > 1) & (segment < codebook.shape[0] - 2)",
        "test_space_filling.py a_corner and numpy",
    ),
)
