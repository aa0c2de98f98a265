"""NumPy, and its search, broken."""

from __future__ import annotations

from mutants.mutant import Mutant, verbs

MUTANTS = (
    Mutant(
        "NumPy: repeated indices lost",
        "np.add.at(total.reshape(-1), entries.reshape(-1), values.reshape(-1))",
        "total.reshape(-1)[entries.reshape(-1)] += values.reshape(-1)",
        verbs("DiVeQ"),
    ),
    Mutant("NumPy: direction of any length", "Direction(x, inverse)", "Direction(x, rho**0)", verbs("DiVeQ")),
    Mutant("NumPy's product: not centred", "if centred:", "if False:", "test_search.py nearest_is_right and without"),
    Mutant(
        "NumPy's product: a lost row finds something",
        "np.where(np.isfinite(best), chosen, -1)",
        "chosen",
        "test_search.py minus_one and without",
    ),
    Mutant(
        "NumPy's product: a chunk's remainder lost",
        "range(0, z.shape[0], rows or 1)",
        "range(0, z.shape[0] - rows + 1, rows or 1)",
        "test_search.py number_of_rows and without",
        within="diveq_numpy",
    ),
    Mutant(
        "faiss: vectors not centred",
        "np.subtract(z[start : start + rows], centre, dtype=e.dtype)",
        "np.subtract(z[start : start + rows], 0 * centre, dtype=e.dtype)",
        "test_search_accuracy.py statement and numpy and order",
    ),
    Mutant(
        "NumPy: wider vectors in the dtype of what was prepared",
        "ready = isinstance(codebook, Prepared) and words.dtype == dtype",
        "ready = isinstance(codebook, Prepared)",
        "test_prepared.py wider and numpy",
    ),
    Mutant(
        "NumPy's product: any copy",
        "if prepared.canonical is not None:",
        "if False:",
        "test_search.py round_apart and numpy",
    ),
    Mutant(
        "NumPy's product: far vectors not brought back",
        "if not near:\n    y[here, :-1], y[here, -1:] =",
        "if False:\n    y[here, :-1], y[here, -1:] =",
        "test_search_accuracy.py (never_lost or statement) and numpy",
    ),
    Mutant(
        "NumPy's product: a weight left behind",
        "if not near:\n    y[:, -1] = 1",
        "if False:\n    y[:, -1] = 1",
        "test_search_accuracy.py left_behind",
    ),
    Mutant(
        "faiss: believed for any vector",
        'far = np.flatnonzero(~(squares <= np.take(limit, chosen, mode="clip")) | (chosen < 0))',
        "far = np.flatnonzero(chosen < 0)",
        "test_search_accuracy.py (with_and_without or statement) and numpy",
    ),
    Mutant(
        "faiss: its lost vectors are lost",
        "| (chosen < 0))",
        "& (chosen >= 0))",
        "test_search_accuracy.py never_lost and numpy",
    ),
    Mutant(
        "NumPy: another byte order in float32",
        "np.float64 if dtype.itemsize == 8 else np.float32",
        "np.float64 if dtype == np.dtype(np.float64) else np.float32",
        "test_search_accuracy.py byte_order",
    ),
    Mutant(
        "NumPy: underflow is raised",
        'with np.errstate(all="ignore"):',
        'with np.errstate(over="ignore", invalid="ignore"):',
        "test_errstate.py nothing_is_raised and GumbelST",
        within="NumPyBackend.call",
    ),
    Mutant(
        "few: what is lost below the normal numbers alone",
        "size * factor + smallest",
        "smallest",
        "test_search_few.py test",
    ),
    Mutant(
        "few: the highest of equal codewords",
        "(words, further, rows)",
        "(-words, further, rows)",
        "test_search_few.py test",
    ),
    Mutant(
        "few: differences from the vector alone",
        "(other - here) + (reference - here)",
        "2 * (other - here)",
        "test_search_few.py test",
    ),
    Mutant("few: scores that overflow", "if not size < largest:", "if False:", "test_search_few.py test"),
    Mutant(
        "few: half of the product",
        "product(z * -2, codebook.T, out=scores)",
        "product(z * -1, codebook.T, out=scores)",
        "test_search_few.py test",
    ),
    Mutant(
        "few: compared again in the same format",
        "np.float64 if codebook.dtype == np.float32 else np.longdouble",
        "codebook.dtype",
        "test_search_few.py test",
    ),
)
