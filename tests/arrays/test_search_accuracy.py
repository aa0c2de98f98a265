"""One statement of accuracy for every search, on data that are made to break it.

With c the centre of the codebook's frame, the squared distance of the chosen codeword a exceeds that of the nearest b
by at most ``(2 sqrt(D) + 12) eps (|z - c| + l) l``, l the longer of ``|a - c|`` and ``|b - c|``; see
`diveq_core.arrays.search`. All is measured in extended precision.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import diveq_core as dq
from libraries import LIBRARIES, library_named
from processes import importable, run_python
from searches import PATHS, replace

if TYPE_CHECKING:
    from collections.abc import Callable

EXTENDED = np.longdouble
TINY, EPS = (float(getattr(np.finfo(np.float32), name)) for name in ("smallest_normal", "eps"))

# How many rows a problem has, and codewords and width: few shapes, since JAX compiles each.
ROWS, SHAPES = 64, [(1, 3), (3, 1), (40, 8), (300, 3), (64, 40)]


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape)


def _lengths(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    return 10.0 ** rng.uniform(low, high, (ROWS, 1))


def plain(rng, count, width):
    return _normal(rng, ROWS, width), _normal(rng, count, width)


def usual_start(rng, count, width):
    return 10 * _normal(rng, ROWS, width), rng.uniform(-1 / count, 1 / count, (count, width))


def long_vectors(rng, count, width):
    return _normal(rng, ROWS, width) * _lengths(rng, 0, 38) / 3, _normal(rng, count, width)


def short_vectors(rng, count, width):
    return _normal(rng, ROWS, width) * _lengths(rng, -38, 0), _normal(rng, count, width)


def every_scale(rng, count, width):
    scale = 10.0 ** rng.uniform(-36, 36)
    return _normal(rng, ROWS, width) * scale * _lengths(rng, -1, 1), _normal(rng, count, width) * scale


def two_scales(rng, count, width):
    z, codebook = 10.0 ** rng.uniform(-38, 38, 2) / 4
    return _normal(rng, ROWS, width) * z, _normal(rng, count, width) * codebook


def offset_of_both(rng, count, width):
    offset = 10.0 ** rng.uniform(0, 5) * rng.choice([-1.0, 1.0], width)
    return _normal(rng, ROWS, width) + offset, _normal(rng, count, width) + offset


def offset_of_order_one(rng, count, width):
    offset = 2 * rng.choice([-1.0, 1.0], width)
    return _normal(rng, ROWS, width) + offset, _normal(rng, count, width) + offset


def offset_of_one(rng, count, width):
    offset = 10.0 ** rng.uniform(0, 30) * rng.choice([-1.0, 1.0], width)
    return _normal(rng, ROWS, width) + offset, _normal(rng, count, width)


def far_codeword(rng, count, width):
    z, codebook = plain(rng, count, width)
    codebook[rng.integers(count)] *= 10.0 ** rng.uniform(1, 20)
    return z, codebook


def far_codeword_and_offset(rng, count, width):
    """All about one point but one codeword, which must not draw the centre to where no other is."""
    offset = rng.standard_normal(width) * 10.0 ** rng.uniform(1, 3)
    z, codebook = offset + _normal(rng, ROWS, width), offset + _normal(rng, count, width)
    codebook[rng.integers(count)] *= 10.0 ** rng.uniform(1, 12)
    return z, codebook


def uneven_lengths(rng, count, width):
    return _normal(rng, ROWS, width) * _lengths(rng, -9, 1), _normal(rng, count, width) * np.geomspace(
        1e-9, 1, count
    ).reshape(-1, 1)


def clusters(rng, count, width):
    spread = 10.0 ** rng.uniform(-6, -1)
    middles = _normal(rng, 4, width)
    codebook = middles[rng.integers(0, 4, count)] + spread * _normal(rng, count, width)
    return middles[rng.integers(0, 4, ROWS)] + spread * _normal(rng, ROWS, width), codebook


def near_ties(rng, count, width):
    codebook = _normal(rng, count, width)
    pairs = codebook[rng.integers(0, count, (2, ROWS))]
    reach = 10.0 ** rng.uniform(-8, -2)
    return pairs.mean(axis=0) + reach * _normal(rng, ROWS, width), codebook


def far_ties(rng, count, width):
    codebook = _normal(rng, count, width)
    a, b = codebook[rng.integers(0, count, (2, ROWS))]
    across = (a - b) / np.maximum(np.linalg.norm(a - b, axis=1, keepdims=True), 1e-9)
    away = _normal(rng, ROWS, width)
    away -= (away * across).sum(axis=1, keepdims=True) * across
    return (a + b) / 2 + away * _lengths(rng, 0, 6), codebook


def few_levels(rng, count, width):
    return rng.integers(-3, 4, (ROWS, width)) * 1.0, rng.integers(-2, 3, (count, width)) * 2.0


def subnormal(rng, count, width):
    return _normal(rng, ROWS, width) * TINY * _lengths(rng, -3, 3), _normal(rng, count, width) * TINY * 0.1


def near_overflow(rng, count, width):
    top = 3.4e38
    return rng.uniform(-top, top, (ROWS, width)), rng.uniform(-top, top * rng.choice([-0.9, 0, 1]), (count, width))


KINDS: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    f.__name__.replace("_", " "): f
    for f in (
        *(
            plain,
            usual_start,
            long_vectors,
            short_vectors,
            every_scale,
            two_scales,
            offset_of_both,
            offset_of_one,
            offset_of_order_one,
        ),
        *(
            far_codeword,
            far_codeword_and_offset,
            uneven_lengths,
            clusters,
            near_ties,
            far_ties,
            few_levels,
            subnormal,
            near_overflow,
        ),
    )
}


def drawn(kind: str, shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Float32 vectors and codebook of a kind, all finite."""
    rng = np.random.default_rng([seed, *shape, *kind.encode()])
    z, codebook = KINDS[kind](rng, *shape)
    top = float(np.finfo(np.float32).max)
    return tuple(np.clip(x, -top, top).astype(np.float32) for x in (z, codebook))


def centre(codebook: np.ndarray) -> np.ndarray:
    """The mean of all but those far from the others, rounded to a multiple of their spread."""
    apart = np.abs(codebook - codebook.mean(axis=0)).max(axis=1)
    near = codebook[apart <= 4 * apart.mean()]
    mean = near.mean(axis=0)
    spread = np.abs(near - mean).max()
    spread = EXTENDED(2) ** np.floor(np.log2(spread)) if spread > 0 else EXTENDED(1)
    return np.round(mean / spread) * spread


def excess(indices: np.ndarray, z: np.ndarray, codebook: np.ndarray, *, flushes: bool) -> np.ndarray:
    """How much further the chosen codewords are, in parts of what is allowed: (N,), at most 1."""
    width = z.shape[1]
    z, codebook = z.astype(EXTENDED), codebook.astype(EXTENDED)
    c = centre(codebook)
    # Squared distances less |z - c|^2, whose digits would hide the rest even here.
    squared = ((codebook - c) ** 2).sum(axis=1) - 2 * np.einsum("nd,kd->nk", z - c, codebook - c)
    rows, best = np.arange(len(z)), squared.argmin(axis=1)
    y, e = (np.sqrt(((x - c) ** 2).sum(axis=1)) for x in (z, codebook))
    longer = np.maximum(e[indices], e[best])
    # Lengths that may count as zero; and what is not normal, in arithmetic that flushes it to zero.
    nothing = e.max() * EXTENDED(2) ** -80 + flushes * 2 * TINY * width**0.5
    allowed = (2 * width**0.5 + 12) * EPS * (y + longer) * longer + 2 * nothing * (y + longer + nothing)
    more = squared[rows, indices] - squared[rows, best]
    return np.where(more == 0, 0.0, more / np.where(allowed == 0, TINY * EXTENDED(TINY), allowed)).astype(float)


def check(indices: np.ndarray, z: np.ndarray, codebook: np.ndarray, *, flushes: bool = False) -> None:
    assert indices.shape == (len(z),)
    assert indices.min() >= 0, f"{np.sum(indices < 0)} finite vectors were taken for lost"
    assert indices.max() < len(codebook)
    worst = excess(indices, z, codebook, flushes=flushes)
    assert worst.max() <= 1, f"row {worst.argmax()} is {worst.max():.3g} times what is allowed further away"
    _, first, copy_of = np.unique(codebook + 0.0, axis=0, return_index=True, return_inverse=True)
    np.testing.assert_array_equal(indices, first[copy_of.reshape(-1)][indices])


@pytest.fixture(params=[*LIBRARIES, *PATHS])
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., np.ndarray]:
    """Each way to search, NumPy in and out."""
    name = PATHS[request.param][0] if request.param in PATHS else request.param
    library = library_named(name)
    if request.param in PATHS:
        replace(request.param, monkeypatch.setattr)

    def found(z: np.ndarray, codebook: np.ndarray) -> np.ndarray:
        # Overflow on the way is expected; array-api-strict lets NumPy warn of it.
        with np.errstate(all="ignore"):
            return library.back(dq.nearest(library.to(z), library.to(codebook)))

    return found


def _flushes(request: pytest.FixtureRequest) -> bool:
    """Whether the path's arithmetic takes numbers that are not normal for zero."""
    return request.node.callspec.params["search"] in ("jax", "mlx", "cupy")


@pytest.mark.parametrize("kind", KINDS)
def test_every_search_keeps_to_one_statement(search: Callable[..., np.ndarray], kind: str, request: Any):
    for shape in SHAPES:
        for seed in range(3):
            z, codebook = drawn(kind, shape, seed)
            check(search(z, codebook), z, codebook, flushes=_flushes(request))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_million_rows(search: Callable[..., np.ndarray], kind: str, request: Any):
    # Seeds that the test by default has not seen; 17 kinds, 5 shapes and 64 rows make a million over all.
    for seed, shape in itertools.product(range(1000, 1190), SHAPES):
        z, codebook = drawn(kind, shape, seed)
        check(search(z, codebook), z, codebook, flushes=_flushes(request))


@functools.cache
def _long_beside_a_small_codebook(width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors, a codebook, and the nearest in float64."""
    rng, count = np.random.default_rng(0), 16384
    codebook = rng.uniform(-1 / count, 1 / count, (count, width)).astype(np.float32)
    z = (10 * rng.standard_normal((2000, width))).astype(np.float32)
    exact = np.concatenate(
        [
            ((part.astype(float)[:, None] - codebook[None].astype(float)) ** 2).sum(2).argmin(1)
            for part in z.reshape(-1, 20, width)
        ]
    )
    return z, codebook, exact


@pytest.mark.parametrize("width", [8, 40])
@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.skipif(not importable("faiss"), reason="faiss is not installed")
def test_tokens_are_the_same_with_and_without_faiss(name: str, width: int):
    """The usual start of a VQ-VAE: a small codebook beside long vectors."""
    library, (z, codebook, exact) = library_named(name), _long_beside_a_small_codebook(width)
    arrays = library.to(z), library.to(codebook)
    found = library.back(dq.nearest(*arrays))
    before = dq.set_optional_kernels(False)
    try:
        without = library.back(dq.nearest(*arrays))
    finally:
        dq.set_optional_kernels(before)
    # Two of float64's answers are nearer than the next by less than float32's rounding.
    for indices in (found, without):
        assert np.mean(indices != exact) <= 0.002
        check(indices[:64], z[:64], codebook)
    assert np.mean(found != without) <= 0.002
    if width == 8:
        assert found[17] == without[17] == 10874


@pytest.mark.parametrize("scale", [2e-38, 1e-28, 1.0, 1e28])
@pytest.mark.parametrize("length", [1.0, 1e25, 1e30, 3e38])
def test_a_finite_vector_is_never_lost(search: Callable[..., np.ndarray], length: float, scale: float):
    codebook = np.float32([[0, 1, 0], [1, 0, 0], [0, 0, 1]]) * np.float32(scale)
    z = np.float32([[length, 0, 0], [0, length, 0], [0, 0, length]])
    expected = [1, 0, 2]
    if length == 1.0 and scale == 1e28:
        # All are as far as rounding can tell.
        expected = [0, 0, 0]
    np.testing.assert_array_equal(search(z, codebook), expected)


def test_faiss_is_not_asked_twice_for_what_it_cannot_tell(monkeypatch: pytest.MonkeyPatch):
    faiss = pytest.importorskip("faiss")
    replace("numpy of many", monkeypatch.setattr)
    asked = []
    knn = faiss.knn
    monkeypatch.setattr("diveq_numpy.search._FUSED_ENTRIES", 1024 * 8)
    monkeypatch.setattr(faiss, "knn", lambda y, e, k: asked.append(len(y)) or knn(y, e, k))
    rng = np.random.default_rng(0)
    codebook = rng.standard_normal((100, 8), dtype=np.float32)
    near, far = codebook[rng.integers(0, 100, 5000)], 1e6 * rng.standard_normal((5000, 8), dtype=np.float32)
    dq.nearest(near, codebook)
    assert sum(asked) == 5000
    asked.clear()
    dq.nearest(far, codebook)
    # A first block, and the rest by the product.
    assert sum(asked) == 1024


def test_the_weight_of_a_far_vector_is_not_left_behind(monkeypatch: pytest.MonkeyPatch):
    # One chunk with far vectors, the next without.
    replace("numpy without faiss", monkeypatch.setattr)
    rng = np.random.default_rng(0)
    codebook = rng.standard_normal((4096, 8), dtype=np.float32)
    near = codebook[rng.integers(0, 4096, 4096)]
    far = np.float32(1e30) * rng.standard_normal((2048, 8), dtype=np.float32)
    found = dq.nearest(np.concatenate([far, near]), codebook)
    np.testing.assert_array_equal(codebook[found[2048:]], near)


@pytest.mark.parametrize("dtype", [">f8", ">f4", ">f2", "longdouble"])
def test_any_byte_order_and_width_of_numpy(dtype: str):
    wide = dtype in (">f8", "longdouble")
    step = 1e-12 if wide else 1.0
    codebook = (1 + step * np.arange(4)[:, None] * np.ones((4, 2))).astype(dtype)
    z = codebook[[3, 1, 2]]
    np.testing.assert_array_equal(dq.nearest(z, codebook), [3, 1, 2])
    for estimator in (dq.STE(), dq.DiVeQ(), dq.Radial(dq.Power(2)), dq.Rotation()):
        out, pullback = dq.vjp(z, codebook, estimator, rng=np.random.default_rng(0))
        assert out.z_q.dtype == np.dtype(dtype)
        assert all(g.dtype == np.dtype(dtype) for g in pullback(np.ones_like(z)))
        np.testing.assert_allclose(out.z_q, z, rtol=1e-6)
    # Of numbers about 1e9, half units are lost in float32.
    if wide:
        found = dq.kmeans(
            (1e9 + np.float64([[0.0], [1.0], [10.0], [11.0]])).astype(dtype), 2, rng=np.random.default_rng(0)
        )
        assert found.codebook.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(np.sort(found.codebook.ravel().astype(float)) - 1e9, [0.5, 10.5])


@pytest.mark.parametrize("kind", ["signs", "powers of two", "large and close", "small integers"])
def test_equal_codewords_give_the_lowest_index_whatever_their_bits(search: Callable[..., np.ndarray], kind: str):
    """Keys of rows with bits of few patterns must not meet, nor those of rows that differ in their last digits."""
    for seed, (count, width) in itertools.product(range(4), [(7, 33), (37, 8), (37, 40), (200, 16)]):
        rng = np.random.default_rng([seed, count, width])
        half = {
            "signs": lambda n, d, r=rng: r.choice([-1.0, 1.0], (n, d)),
            "powers of two": lambda n, d, r=rng: 2.0 ** r.integers(-3, 4, (n, d)),
            "large and close": lambda n, d, r=rng: 1e6 + r.integers(-3, 4, (n, d)),
            "small integers": lambda n, d, r=rng: r.integers(-2, 3, (n, d)) * 1.0,
        }[kind]((count + 1) // 2, width)
        codebook = np.concatenate([half, half])[:count][rng.permutation(count)].astype(np.float32)
        z = codebook[rng.integers(0, count, ROWS)] + 0.3 * rng.standard_normal((ROWS, width)).astype(np.float32)
        found = search(z, codebook)
        _, first, copy_of = np.unique(codebook, axis=0, return_index=True, return_inverse=True)
        np.testing.assert_array_equal(found, first[copy_of.reshape(-1)][found])


def test_rows_whose_keys_meet_by_chance(monkeypatch: pytest.MonkeyPatch):
    from diveq_core.arrays.search import first_copies
    from diveq_numpy import backend

    codebook = np.float32([[4, 1], [1, 2], [1, 2], [4, 1], [3, 3], [1, 2]])
    monkeypatch.setattr(type(backend), "row_keys", lambda self, codebook: np.zeros(len(codebook), np.uint64))
    np.testing.assert_array_equal(first_copies(backend, codebook), [0, 1, 1, 0, 4, 1])


@pytest.mark.parametrize("name", ["array_api_strict", "mlx", "jax"])
def test_first_copies_beside_a_far_codeword_and_among_many(name: str):
    from diveq_core.arrays.registry import backend_of
    from diveq_core.arrays.search import first_copies

    library, rng = library_named(name), np.random.default_rng(0)
    for count in (500, 131071) if name == "jax" else (500,):
        codebook = rng.standard_normal((count, 3)).astype(np.float32)
        codebook[0] = 1e8
        codebook[-200:] = codebook[1:201]
        found = library.back(first_copies(backend_of("test", x=library.to(codebook)), library.to(codebook)))
        np.testing.assert_array_equal(found[-200:], np.arange(1, 201))


class TestOption:
    def test_it_turns_faiss_off(self, monkeypatch: pytest.MonkeyPatch):
        faiss = pytest.importorskip("faiss")

        def knn(*_: Any) -> Any:
            raise AssertionError("faiss was used")

        monkeypatch.setattr(faiss, "knn", knn)
        replace("numpy of many", monkeypatch.setattr)
        z = np.ones((3, 4), np.float32)
        with pytest.raises(AssertionError, match="faiss was used"):
            dq.nearest(z, z)
        before = dq.set_optional_kernels(False)
        try:
            assert not dq.optional_kernels()
            np.testing.assert_array_equal(dq.nearest(z, z), 0)
        finally:
            dq.set_optional_kernels(before)
        assert dq.optional_kernels() is before

    def test_by_the_environment(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("DIVEQ_CORE_OPTIONAL_KERNELS", "0")
        assert run_python("import diveq_core as dq; print(dq.optional_kernels())") == "False\n"

    @pytest.mark.parametrize("enabled", [1, None, "no"])
    def test_only_a_bool(self, enabled: Any):
        with pytest.raises(TypeError, match="set_optional_kernels: enabled must be a bool, got"):
            dq.set_optional_kernels(enabled)
