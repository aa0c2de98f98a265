"""The search, broken."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "search: a far codeword draws the centre",
        "far = relative > _FAR * xp.sum(relative * share)",
        "far = relative < 0 * xp.sum(relative * share)",
        "test_search_accuracy.py one_statement and strict and far and offset",
    ),
    Mutant(
        "search: no centring",
        "centre = xp.where(xp.isfinite(rounded), rounded, mean)",
        "centre = 0 * mean",
        "test_search.py nearest_is_right and strict",
    ),
    Mutant(
        "search: centre anywhere",
        "rounded = xp.round(mean / near) * near",
        "rounded = mean",
        "test_search.py (ties or hides) and strict",
    ),
    Mutant(
        "search: no scale",
        "return centre, xp.where(spread < 1,",
        "return centre, xp.ones_like(spread) + 0 * xp.where(spread < 1,",
        "test_search.py (scaling_by or largest) and strict",
    ),
    Mutant(
        "search: half a square too much",
        "keepdims=True) * 0.5",
        "keepdims=True)",
        "test_search.py nearest_is_right and strict",
    ),
    Mutant(
        "search: the last of copies",
        "first = lib.as_indices(lib.first_equal(keys))",
        "first = lib.as_indices(xp.arange(codebook.shape[0]))",
        "test_search.py copies_give and strict",
    ),
    Mutant(
        "search: keys that meet by chance stay so",
        "_ROUNDS = 64",
        "_ROUNDS = 1",
        "test_search_accuracy.py meet_by_chance",
    ),
    Mutant(
        "search: a lost row finds something",
        "return xp.where(xp.isfinite(xp.min(scores, axis=1)), chosen, xp.full_like(chosen, -1))",
        "return chosen",
        "test_search.py minus_one and strict",
    ),
    Mutant(
        "search: far vectors not brought back",
        "inside = size * scale <= 2.0 ** (REACH - 2)",
        "inside = size >= 0",
        "test_search_accuracy.py (never_lost or statement) and strict",
    ),
    Mutant(
        "search: far vectors without their weight",
        "xp.where(inside, xp.ones_like(size), (0.25 / scale) / own)",
        "xp.ones_like(size)",
        "test_search_accuracy.py (never_lost or statement) and strict",
    ),
    Mutant(
        "search: differences of the largest codewords overflow",
        "part = xp.where(scale < 1, xp.full_like(scale, 0.25), xp.ones_like(scale))",
        "part = xp.ones_like(scale)",
        "test_search_accuracy.py statement and strict and overflow",
    ),
    Mutant(
        "search: an infinite spread",
        "apart = smaller(lib, apart, xp.full_like(apart, float(xp.finfo(apart.dtype).max)))",
        "apart = apart + 0",
        "test_search_accuracy.py statement and strict and overflow",
    ),
)
