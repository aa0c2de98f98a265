"""The mathematics broken on purpose, one line at a time, and a command that shows that the tests notice every time."""

from __future__ import annotations

from mutants import (
    arrays,
    codebook,
    composite,
    curve,
    diagnostics,
    directions,
    distance,
    files,
    gumbel,
    jax,
    layers,
    losses,
    mlx,
    numpy,
    radial,
    rotation,
    rule,
    scalar,
    search,
    torch,
    verbs,
)

ROOMS = (
    *(distance, radial, rotation, curve, composite, scalar, gumbel, rule, verbs),
    *(arrays, search, losses, codebook, directions, diagnostics),
    *(numpy, torch, jax, mlx, layers, files),
)
MUTANTS = tuple(mutant for room in ROOMS for mutant in room.MUTANTS)
