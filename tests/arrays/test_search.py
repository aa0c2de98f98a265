"""`nearest` against brute force in a wider format, in every library."""

from __future__ import annotations

import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import diveq_core as dq
from libraries import LIBRARIES, Library, assert_close, float64_in, library_named, standard_promotion
from processes import run_python
from searches import EPS32, EPS64, PATHS, assert_nearest, replace, squared_distances

# What the search must not allocate: N x K x 4 bytes is 1 GiB.
N, K, D = 1 << 15, 1 << 13, 4
MEBI = 1 << 20


@pytest.fixture(params=[*LIBRARIES, *PATHS])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Every library, and again where another of its searches takes part."""
    if request.param in LIBRARIES:
        return LIBRARIES[request.param]()
    found = library_named(PATHS[request.param][0])
    replace(request.param, monkeypatch.setattr)
    return found


@st.composite
def problems(draw):
    """Vectors near a codebook far from the origin and close together, some codewords repeated."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Few shapes: JAX compiles each.
    count, width = draw(st.sampled_from([(1, 1), (5, 3), (40, 1), (40, 64)]))
    offset = draw(st.sampled_from([0.0, 1.0, 10.0, 1e2, 1e3, 1e4]))
    spread = draw(st.sampled_from([1e-6, 1e-5, 1e-2, 1.0, 1e2]))
    reach = draw(st.sampled_from([0.1, 1.0, 10.0]))
    codebook = rng.standard_normal((count, width))
    codebook = codebook[rng.integers(0, count, count)] if draw(st.booleans()) else codebook
    z = codebook[rng.integers(0, count, 60)] + reach * rng.standard_normal((60, width))
    z[::7] = codebook[rng.integers(0, count, len(z[::7]))]
    directions = rng.choice([-1.0, 1.0], width)
    return z * spread + offset * directions, codebook * spread + offset * directions


@given(problem=problems())
def test_nearest_is_right_to_rounding_of_centred_data(library: Library, problem):
    z, codebook = (x.astype(np.float32) for x in problem)
    indices = library.back(dq.nearest(library.to(z), library.to(codebook)))
    assert_nearest(indices, z, codebook, EPS32)


@given(problem=problems())
def test_nearest_in_float64(library: Library, problem):
    z, codebook = problem
    with float64_in(library):
        indices = library.back(dq.nearest(library.to(z), library.to(codebook)))
    assert_nearest(indices, z, codebook, EPS64)


@given(problem=problems())
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_compared_in_float32(library: Library, dtype: str, problem):
    z, codebook = sixteen_bits(library, dtype, *problem)
    indices = library.back(dq.nearest(z, codebook))
    wide = [library.back(x).astype(np.float32) for x in (z, codebook)]
    assert_nearest(indices, *wide, EPS32)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_is_compared_in_the_wider(library: Library, dtype: str):
    rng = np.random.default_rng(0)
    z, codebook = rng.standard_normal((200, 16)) + 3, rng.standard_normal((50, 16)) + 3
    (narrow,) = sixteen_bits(library, dtype, codebook)
    z = z.astype(np.float32)
    with standard_promotion():
        indices = library.back(dq.nearest(library.to(z), narrow))
    assert_nearest(indices, z, library.back(narrow).astype(np.float32), EPS32)


def sixteen_bits(library: Library, dtype: str, *arrays: np.ndarray) -> list:
    if dtype == "bfloat16":
        if library.bfloat16 is None:
            pytest.skip(f"{library.name} has no bfloat16")
        return [library.cast(library.to(x.astype(np.float32)), library.bfloat16) for x in arrays]
    if not library.float16:
        pytest.skip(f"{library.name} has no float16")
    return [library.to(x.astype(np.float16)) for x in arrays]


@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
@pytest.mark.parametrize(("rows", "width"), [(300, 1), (300, 2), (10, 2), (300, 5), (300, 40)])
def test_exact_ties_go_to_the_lowest_index(library: Library, offset: float, rows: int, width: int):
    # On a grid of small integers every product is exact, so a tie between different codewords is one too.
    rng = np.random.default_rng(width)
    z = rng.integers(-3, 4, (rows, width)).astype(np.float32) + np.float32(offset)
    codebook = 2 * rng.integers(-2, 3, (40, width)).astype(np.float32) + np.float32(offset)
    expected = squared_distances(z, codebook).argmin(axis=1)
    indices = library.back(dq.nearest(library.to(z), library.to(codebook)))
    np.testing.assert_array_equal(indices, expected)


def test_copies_give_the_first(library: Library):
    # Enough columns that a blocked matrix product treats equal ones differently.
    rng = np.random.default_rng(1)
    codebook = np.repeat(rng.standard_normal((37, 19)), 29, axis=0).astype(np.float32)
    order = rng.permutation(len(codebook))
    codebook = codebook[order]
    z = rng.standard_normal((513, 19)).astype(np.float32)
    assert_nearest(library.back(dq.nearest(library.to(z), library.to(codebook))), z, codebook, EPS32)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_copies_give_the_first_where_their_products_round_apart(name: str, monkeypatch: pytest.MonkeyPatch):
    # As a blocked product may do with equal columns: the later half comes out a unit in the last place lower.
    rng = np.random.default_rng(1)
    codebook = np.tile(rng.standard_normal((37, 19)), (2, 1)).astype(np.float32)
    z = rng.standard_normal((513, 19)).astype(np.float32)
    product = np.matmul
    if name == "torch":
        library_named("torch")
        import torch

        product = torch.mm

    def apart(a: Any, b: Any, out: Any) -> None:
        product(a, b, out=out)
        later = out[:, 37:]
        later -= abs(later) * EPS32

    if name == "torch":
        monkeypatch.setattr(torch, "mm", apart)
        replace("torch by product", monkeypatch.setattr)
        indices = dq.nearest(torch.tensor(z), torch.tensor(codebook)).numpy()
    else:
        from diveq_numpy import backend, search

        replace("numpy without faiss", monkeypatch.setattr)
        indices = search.nearest_rows(backend, z, codebook, apart)
    assert indices.max() < 37
    assert_nearest(indices, z, codebook, EPS32)


def test_negative_zero_is_a_copy_of_zero(library: Library):
    codebook = np.array([[1.0, 0.0], [1.0, -0.0], [-1.0, 0.0]], np.float32)
    z = np.array([[2.0, 0.0], [2.0, -0.0]], np.float32)
    np.testing.assert_array_equal(library.back(dq.nearest(library.to(z), library.to(codebook))), [0, 0])


@pytest.mark.parametrize("exponent", [-90, -40, -20, 20, 40, 60, 105, 120])
def test_scaling_by_a_power_of_two_changes_nothing(library: Library, exponent: int):
    rng = np.random.default_rng(2)
    z, codebook = (rng.standard_normal((n, 16)).astype(np.float32) for n in (500, 100))
    expected = library.back(dq.nearest(library.to(z), library.to(codebook)))
    scale = np.float32(2.0**exponent)
    indices = library.back(dq.nearest(library.to(z * scale), library.to(codebook * scale)))
    np.testing.assert_array_equal(indices, expected)


@pytest.mark.parametrize("largest", [1e31, 1e35, 1e37, 1.7e38])
def test_near_the_largest_number(library: Library, largest: float):
    # Sums of such codewords overflow, and the inverse of their scale is less than the smallest normal number.
    rng = np.random.default_rng(8)
    for low in (-largest / 2, largest / 2):
        codebook = rng.uniform(low, largest, (300, 4)).astype(np.float32)
        indices = library.back(dq.nearest(library.to(codebook[::3]), library.to(codebook)))
        np.testing.assert_array_equal(indices, np.arange(0, 300, 3))


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_far_outside_the_codebook(library: Library, scale: float):
    # A vector a thousand codebooks away: its digits are spent on its own length, as the tolerance says.
    rng = np.random.default_rng(3)
    codebook = rng.standard_normal((64, 8)) * scale
    z = (rng.standard_normal((200, 8)) * scale * np.geomspace(1, 1e3, 200)[:, None]).astype(np.float32)
    codebook = codebook.astype(np.float32)
    assert_nearest(library.back(dq.nearest(library.to(z), library.to(codebook))), z, codebook, EPS32)


def test_a_single_far_codeword_hides_no_other(library: Library):
    # Codewords 2 apart, and vectors less than 1 from theirs in each coordinate: 1e6 away, the squares of which are
    # 1e12, nothing of that may be lost. The centre stays a multiple of the spread, here 0, so the others keep
    # their digits: so it is from six codewords on, where what they share is small beside the spread too.
    rng = np.random.default_rng(4)
    grid = 2.0 * np.stack(np.meshgrid(*[[-1, 0, 1]] * 4), axis=-1).reshape(-1, 4)
    codebook = rng.permutation(grid).astype(np.float32)
    codebook[17] = 1e6
    own = rng.integers(0, len(codebook), 300)
    z = codebook[own] + rng.uniform(-0.95, 0.95, (300, 4)).astype(np.float32)
    assert (own == 17).any()
    np.testing.assert_array_equal(library.back(dq.nearest(library.to(z), library.to(codebook))), own)


@pytest.mark.parametrize("count", [1, 3, 4096])
@pytest.mark.parametrize("rows", [0, 1, 127, 1031])
def test_every_number_of_rows(library: Library, rows: int, count: int):
    # Whatever the chunk, some of these leave a remainder.
    rng = np.random.default_rng(5)
    z, codebook = (rng.standard_normal((n, 6)).astype(np.float32) for n in (rows, count))
    indices = library.back(dq.nearest(library.to(z), library.to(codebook)))
    assert indices.shape == (rows,)
    assert rows == 0 or assert_nearest(indices, z, codebook, EPS32) is None


def test_all_codewords_equal(library: Library):
    codebook = np.full((9, 3), 0.1, np.float32)
    z = np.random.default_rng(6).standard_normal((20, 3)).astype(np.float32)
    indices = library.back(dq.nearest(library.to(z), library.to(codebook)))
    np.testing.assert_array_equal(indices, np.zeros(20))


def test_all_zero(library: Library):
    indices = library.back(
        dq.nearest(library.to(np.zeros((3, 2), np.float32)), library.to(np.zeros((4, 2), np.float32)))
    )
    np.testing.assert_array_equal(indices, np.zeros(3))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@np.errstate(invalid="ignore")  # NumPy says so besides
def test_not_finite_is_minus_one(library: Library, bad: float):
    z = np.zeros((4, 3), np.float32)
    z[2, 1] = bad
    codebook = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(
        library.back(dq.nearest(library.to(z), library.to(codebook), check_finite=False)), [0, 0, -1, 0]
    )
    codebook[1, 0] = bad
    np.testing.assert_array_equal(
        library.back(dq.nearest(library.to(z), library.to(codebook), check_finite=False)), [-1] * 4
    )


def test_index_dtype(library: Library):
    z = library.to(np.zeros((2, 3), np.float32))
    indices = dq.nearest(z, z)
    assert_close(indices, np.zeros(2, library.back(indices).dtype), library)
    assert np.issubdtype(library.back(indices).dtype, np.signedinteger)


@pytest.mark.parametrize("faiss", [True, False])
@pytest.mark.parametrize("name", ["numpy", "array_api_strict"])
def test_no_distance_matrix_in_memory(name: str, faiss: bool, monkeypatch: pytest.MonkeyPatch):
    # 64 MiB against 1 GiB, or 256 MiB by the standard alone, which is slower: room for chunks and copies of the
    # inputs, none for the matrix.
    library = library_named(name)
    if not faiss:
        if name != "numpy":
            pytest.skip("only NumPy searches by faiss")
        replace("numpy without faiss", monkeypatch.setattr)
    rng = np.random.default_rng(7)
    rows = N if name == "numpy" else N // 4
    z, codebook = (library.to(rng.standard_normal((n, D)).astype(np.float32)) for n in (rows, K))
    tracemalloc.start()
    try:
        dq.nearest(z, codebook)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * MEBI


@pytest.mark.parametrize("path", ["numpy", "torch", "jax", "mlx", *PATHS])
def test_no_distance_matrix_in_the_process(path: str):
    name = PATHS[path][0] if path in PATHS else path
    library_named(name)
    # The second call is measured, after the library's own start-up and compilation at a small size. 256 MiB against
    # 1 GiB: thread pools and allocators keep some memory for themselves.
    code = f"""
        import resource
        import numpy as np
        import diveq_core as dq
        from libraries import LIBRARIES
        from searches import PATHS, replace

        library = LIBRARIES[{name!r}]()
        if {path!r} in PATHS:
            replace({path!r})
        rng = np.random.default_rng(0)

        def search(n, k):
            z, codebook = (library.to(rng.standard_normal((m, {D})).astype(np.float32)) for m in (n, k))
            return library.back(dq.nearest(z, codebook))

        search(1000, 500)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        search({N}, {K})
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(run_python(code)) * unit < 256 * MEBI
