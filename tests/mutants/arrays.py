"""Rows: their lengths, directions and zeros; dtypes and sums of segments, broken."""

from __future__ import annotations

from mutants.mutant import Mutant, second, verbs

MUTANTS = (
    Mutant(
        "direction: u has a derivative at zero",
        "u, one = zero_rows(lib, zero, y / length), lib",
        "u, one = y / length, lib",
        second("NSVQ"),
    ),
    Mutant(
        "direction: the root sees zero",
        "lib.xp.sqrt(one_where(lib, zero, squared))",
        "lib.xp.sqrt(squared)",
        second("DiVeQDetach"),
    ),
    Mutant(
        "direction: the scale is not taken back",
        "zero_rows(lib, zero, length / scale)",
        "zero_rows(lib, zero, length)",
        "test_estimators.py extreme and numpy and NSVQ",
    ),
    Mutant(
        "row_scale: small rows stay small",
        "xp.where(small, one * 2.0**half_range,",
        "xp.where(small, one,",
        "test_estimators.py extreme and numpy and DiVeQDetach",
    ),
    Mutant(
        "row_scale: large rows stay large",
        "xp.where(large, one * 2.0**-half_range, one)",
        "one",
        "test_estimators.py extreme and numpy and DiVeQDetach",
    ),
    Mutant(
        "row_scale: no power of two",
        "half_range = 80.0 if",
        "half_range = 80.5 if",
        "test_identities.py power_of_two_is_exact_elsewhere and strict",
    ),
    Mutant("safe_log: the logarithm sees zero", "log(one_where(lib, r == 0, r))", "log(r)", second("Power")),
    Mutant(
        "safe_inverse: infinite in third order",
        "1 / one_where(lib, length == 0, xp.where(length < floor, floor, length))",
        "1 / xp.where(length < floor, floor, length)",
        "test_second_order.py nan_at_zero and torch and Power",
    ),
    Mutant(
        "second order: squares of lengths in the open",
        "return row_scale(lib, x) if lib.records(x) else 1.0",
        "return 1.0",
        "test_second_order.py extreme and (Power or Cosine)",
    ),
    Mutant(
        "float64 computed in float32",
        'self.xp.float64 if dtype == getattr(self.xp, "float64", None) else self.xp.float32',
        "self.xp.float32",
        verbs("DiVeQ or Power", "strict"),
    ),
    Mutant(
        "standard: segments at and above",
        "xp.expand_dims(numbers, axis=1) == xp",
        "xp.expand_dims(numbers, axis=1) >= xp",
        verbs("DiVeQ", "strict"),
    ),
    Mutant(
        "standard: only the last chunk of a segment sum",
        "total = total + lib.matmul",
        "total = lib.matmul",
        "test_identities.py across_chunks and strict",
    ),
    Mutant(
        "checks: the marks of a search are not read",
        "or lib.any_negative(found)",
        "or False",
        "test_search_few.py test",
    ),
    Mutant(
        "checks: a codebook beside no vectors is not looked at",
        "(math.prod(found.shape) == 0 or lib.any_negative(found))",
        "lib.any_negative(found)",
        "test_search_few.py test",
    ),
)
