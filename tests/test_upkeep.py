"""Upkeep at the ends of the number range, in little memory, of its own arrays, over ranks that differ."""

from __future__ import annotations

import contextlib
import tracemalloc
import warnings

import numpy as np
import pytest

import diveq_core as dq
from capability_rows import OTHERS, ROWS, Estimation, listed
from conftest import Library, float64_in, library_named
from diveq_core.arrays.registry import backend_of
from diveq_core.codebook.ranks import Ranks
from ranks import Simulated, in_threads

K, D, N = 6, 4, 40

SCALES = {"float32": (1e-40, 1e-38, 1e-30, 1.0, 1e30, 1e37), "float64": (1e-310, 1e-300, 1.0, 1e300, 1e307)}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def bounded(rows: int, seed: int = 0) -> np.ndarray:
    """Vectors in [-1.7, 1.7], so that 1e308 of each is a number."""
    return np.random.default_rng(seed).uniform(-1.7, 1.7, (rows, D))


# The ends of the number range


@pytest.mark.parametrize(("dtype", "value"), [("float64", 1e308), ("float32", 2e38), ("float16", 5e4)])
def test_kmeans_of_the_largest_numbers(library: Library, dtype: str, value: float) -> None:
    if dtype == "float16" and not library.float16:
        pytest.skip("no float16")
    z = np.array([[value], [1.1 * value], [-value], [-1.2 * value]], dtype)
    double = float64_in(library) if dtype == "float64" else contextlib.nullcontext()
    # That the inertia overflows array-api-strict says by NumPy's warning.
    with double, np.errstate(over="ignore"):
        found = dq.kmeans(library.to(z), library.to(z[[0, 2]]))
        words, inertia = library.back(found.codebook), float(found.inertia)
    expected = (z[::2].astype("longdouble") + z[1::2]) / 2
    np.testing.assert_allclose(words.astype("longdouble"), expected, rtol=2 * np.finfo(dtype).eps)
    # Beyond the largest number that it is computed in, but for float16, whose values 5.5e4 is not quite one of.
    assert inertia == (pytest.approx(0.025 * value * value, rel=1e-2) if dtype == "float16" else np.inf)


def test_kmeans_of_numbers_whose_differences_overflow(library: Library) -> None:
    z = np.array([[3.3e38], [3.3e38], [3.2e38], [3.2e38], [-3.3e38]], np.float32)
    with np.errstate(over="ignore"):
        found = dq.kmeans(library.to(z), library.to(z[2:]))
    # Its own codeword stays empty: the first three vectors and the fourth share one.
    np.testing.assert_allclose(np.sort(np.unique(library.back(found.codebook)))[[0, -1]], [-3.3e38, 3.3e38], rtol=0.03)
    assert (library.back(found.codebook)[library.back(found.indices)][:, 0] * z[:, 0].astype("f8") > 0).all()


@pytest.mark.parametrize("exponent", [-1074, -1000, 0, 1000])
def test_kmeans_is_the_same_at_every_scale(exponent: int) -> None:
    z = np.round(bounded(400) * 4096) * 2.0**-12
    noise = normal(K, 3, 2)
    expected = dq.kmeans(z, K, noise=noise)
    # Whole numbers of a power of two, so that nothing is rounded on the way down either.
    scaled = np.ldexp(np.round(z * 4), exponent) if exponent < -1022 else np.ldexp(z, exponent)
    if exponent < -1022:
        expected = dq.kmeans(np.round(z * 4), K, noise=noise)
    found = dq.kmeans(scaled, K, noise=noise)
    np.testing.assert_array_equal(found.indices, expected.indices)
    back = np.ldexp(found.codebook, -exponent)
    np.testing.assert_allclose(back, expected.codebook, rtol=1e-12, atol=0.5 if exponent < -1022 else 1e-13)


def test_a_codeword_that_does_not_move_is_as_it_was(library: Library) -> None:
    z = (1000 + normal(N, D)).astype(np.float32)
    begin = np.concatenate([z[:2] / 3, np.full((1, D), 1e30, np.float32)])
    found = dq.kmeans(library.to(z), library.to(begin), iterations=0)
    np.testing.assert_array_equal(library.back(found.codebook), begin)


@pytest.mark.parametrize(("dtype", "largest"), [("float64", 1.7e308), ("float32", 3.3e38)])
def test_moving_averages_of_the_largest_numbers(library: Library, dtype: str, largest: float) -> None:
    codebook = np.array([[-largest, largest], [largest, 1.0]], dtype)
    z = np.array([[largest, -largest]] * 50, dtype)
    with float64_in(library) if dtype == "float64" else contextlib.nullcontext():
        words = library.to(codebook)
        state, moved = dq.ema_update(dq.ema_init(words), library.to(z), words, library.to(np.zeros(50, int)))
        moved, means = library.back(moved), library.back(state.means)
    # Fifty differences of twice the size are added.
    np.testing.assert_allclose(moved[0], z[0], rtol=100 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(moved[1], codebook[1])
    np.testing.assert_array_equal(moved, means)


def test_vectors_far_beyond_the_codebook_move_it() -> None:
    z = np.full((50, 2), 3e38, np.float32)
    for value in (0.0, 1.0):
        words = np.full((1, 2), value, np.float32)
        _, moved = dq.ema_update(dq.ema_init(words), z, words, np.zeros(50, int))
        np.testing.assert_allclose(moved, z[:1], rtol=1e-6)


def test_a_mean_beyond_its_dtype_is_not_written() -> None:
    codebook, z = np.ones((2, 2), np.float16), np.full((4, 2), 1e5, np.float32)
    state, moved = dq.ema_update(dq.ema_init(codebook), z, codebook, np.zeros(4, int))
    np.testing.assert_array_equal(moved, codebook)
    np.testing.assert_array_equal(state.means, codebook)


@pytest.mark.parametrize("by_batch", [False, True])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float64", 1.7e308), ("float32", 3.4e38), ("float16", 6.55e4), ("float16", 1e-6), ("float64", 1e-320)],
)
def test_replacements_at_the_ends_of_the_range(dtype: str, size: float, by_batch: bool) -> None:
    signs = np.array([[1, 1], [-1, 1], [1, -1], [-1, -1], [1, 1], [1, 1]])
    codebook = (size * signs).astype(dtype)
    counts = np.array([1e38, 2e38, 1e38, 3e38, 0, 0], np.float32).astype(np.float64 if dtype == "float64" else "f4")
    replaced = dq.replace_unused(
        codebook, counts, z=codebook[:4] if by_batch else None, noise=normal(6, 4), jitter=1e-3
    )
    assert replaced.rows.tolist() == [False] * 4 + [True] * 2
    assert np.isfinite(replaced.codebook).all()
    assert len(np.unique(replaced.codebook[4:], axis=0)) == 2
    wide = np.abs(replaced.codebook.astype("longdouble"))
    # A thousandth of the spread, at four standard deviations, or some units of the smallest numbers.
    tiny = np.finfo(dtype).smallest_subnormal.astype("longdouble")
    np.testing.assert_allclose(wide, np.abs(codebook.astype("longdouble")), rtol=1e-2, atol=10 * tiny)


def test_a_curve_through_the_largest_numbers() -> None:
    corners = np.array([[-1.7], [-1.0], [0.0], [1.1], [1.69]])
    noise = normal(5, 3, 2)
    for scale in (1e308, 1e-310, 1.0):
        curve = dq.curve_init(corners * scale, 5, noise=noise)[:, 0] / scale
        np.testing.assert_allclose(curve, corners[:, 0], rtol=1e-3, atol=1e-3)


def test_the_derivative_of_a_direction_at_every_length() -> None:
    x, g = normal(8, D), normal(8, D, seed=1)
    expected = dq.normalize_vjp(x)[1](g)
    for a, b in [(-1000, -1000), (1000, 1000), (-1020, -900), (1020, 900), (1000, 0), (-900, 0), (0, 1000), (0, -1000)]:
        g_x = dq.normalize_vjp(np.ldexp(x, a))[1](np.ldexp(g, b))
        np.testing.assert_allclose(np.ldexp(g_x, a - b), expected, rtol=1e-12, atol=1e-13)
    # Its length is beyond the largest number, and below the normal ones.
    g_x = dq.normalize_vjp(np.full((1, 2), 1.7e308))[1](np.array([[1e300, 0.0]]))
    np.testing.assert_allclose(g_x, np.array([[1.0, -1.0]]) * (0.5e300 / 1.7e308 / np.sqrt(2)), rtol=1e-12)
    g_x = dq.normalize_vjp(np.array([[0.0, 1e-310]]))[1](np.array([[1e-20, 0.0]]))
    np.testing.assert_allclose(g_x, [[1e290, 0.0]], rtol=1e-12)


# What NumPy is told to raise


def scaled_inputs(name: str, dtype: str, scale: float) -> list[np.ndarray]:
    """A row's inputs, its floating arrays but the noise times a scale."""
    inputs = ROWS[name].draw(np.random.default_rng(0))
    vectors = {"linear_codebook_init": 1, "kmeans": 1, "kmeans_plus_plus": 1, "curve_init": 1}.get(name)
    count = 2 if isinstance(ROWS[name], Estimation) or name.startswith("gumbel") else vectors or len(inputs)
    return [
        x.astype(dtype) * (scale if position < count else 1) if x.dtype.kind == "f" else x
        for position, x in enumerate(inputs)
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ROWS)
def test_nothing_is_raised_for_overflow_or_underflow(name: str, dtype: str) -> None:
    row = ROWS[name]
    for scale in SCALES[dtype]:
        inputs = scaled_inputs(name, dtype, scale)
        with np.errstate(all="raise"), warnings.catch_warnings():
            warnings.simplefilter("error")
            outs = listed(row.forward(*inputs))
            if row.vjp is not None:
                *primal, pullback = row.vjp(*inputs)
                outs += listed(pullback(primal[0].z_q if hasattr(primal[0], "z_q") else primal[0]))
            if row.jvp is not None:
                outs += listed(row.jvp(*inputs, *(inputs[i] for i in row.to)))
            if row.decode is not None:
                outs += listed(row.decode(*inputs))
        if scale == 1.0:
            assert all(np.isfinite(x).all() for out in outs for x in listed(out))


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_nor_in_libraries_that_search_by_numpy(name: str) -> None:
    library = library_named(name)
    z, codebook = (library.to((x * 1e-30).astype(np.float32)) for x in (normal(N, D), normal(K, D)))
    with np.errstate(all="raise"):
        found = dq.kmeans(z, codebook, iterations=2)
        assert np.isfinite(library.back(found.codebook)).all()


def test_overflow_shows_in_the_result() -> None:
    g, z, q = (np.full((1, 2), x) for x in (1e300, -1e300, 1e300))
    with np.errstate(all="raise"):
        assert dq.coefficient(g, z, q) == np.inf


# Memory of its own


def share(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.shares_memory(a, b)
    if hasattr(a, "untyped_storage"):
        return a.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    if hasattr(a, "unsafe_buffer_pointer"):
        return a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer()
    return False


@pytest.mark.parametrize("library_name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("name", ROWS)
def test_results_have_memory_of_their_own(name: str, library_name: str) -> None:
    library, row = library_named(library_name), ROWS[name]
    inputs = [library.to(x) for x in row.draw(np.random.default_rng(0))]
    outs = listed(row.forward(*inputs)) + (listed(row.decode(*inputs)) if row.decode is not None else [])
    assert not any(share(out, x) for out in outs for x in inputs)
    assert not any(share(a, b) for k, a in enumerate(outs) for b in outs[:k])


@pytest.mark.parametrize("library_name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize(
    "estimator",
    [
        *(dq.STE(), dq.Rotation(), dq.DiVeQDetach(), dq.DiVeQ(0.1), dq.NSVQ(), dq.Radial(dq.Cosine())),
        *(dq.Residual(dq.STE(), 1), dq.Residual(dq.STE(), 2), dq.Product(dq.STE(), 1), dq.Product(dq.STE(), 2)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("rows", [5, 30000])
def test_derivatives_and_given_indices_are_no_views(rows: int, estimator: object, library_name: str) -> None:
    library = library_named(library_name)
    rng = np.random.default_rng(0)
    parts = estimator.parts if isinstance(estimator, dq.Residual | dq.Product) else None
    width = D // parts if isinstance(estimator, dq.Product) else D
    z, g, dz = (library.to(rng.standard_normal((rows, D)).astype("f4")) for _ in range(3))
    codebook, dcodebook = (library.to(rng.standard_normal((K, width)).astype("f4")) for _ in range(2))
    given = dq.quantize(z, codebook, dq.STE()).indices if parts is None else None
    given = library.to(np.zeros((rows, parts), int)) if given is None else given
    noise = rng.standard_normal((rows, D)).astype("f4")
    noise = library.to(np.stack([noise] * parts) if isinstance(estimator, dq.Residual) else noise)
    options = {"noise": noise, "indices": given}
    out, pullback = dq.vjp(z, codebook, estimator, **options)
    moved, tangent = dq.jvp(z, codebook, dz, dcodebook, estimator, **options)
    results = [*dq.quantize(z, codebook, estimator, **options), *out, *pullback(g), *pullback(g), *moved, tangent]
    assert not any(share(x, y) for x in results for y in (z, g, dz, codebook, dcodebook, noise, given))
    assert not any(share(x, y) for k, x in enumerate(results) for y in results[:k])


@pytest.mark.parametrize("library_name", ["numpy", "torch", "jax"])
def test_upkeep_that_changes_nothing_is_a_copy(library_name: str) -> None:
    library = library_named(library_name)
    z, codebook = (library.to(x.astype(np.float32)) for x in (normal(N, D), normal(K, D)))
    nobody, counts = library.to(np.full(N, -1)), library.to(np.ones(K, np.float32))
    state = dq.ema_init(codebook)
    later, moved = dq.ema_update(state, z, codebook, nobody)
    replaced = dq.replace_unused(codebook, counts, noise=library.to(normal(K, D + 2).astype("f4")), state=state)
    found = dq.kmeans(z, codebook, iterations=0)
    outs = [*state, *later, moved, replaced.codebook, *replaced.state, found.codebook]
    assert not any(share(out, x) for out in outs for x in (z, codebook, counts))
    assert not any(share(a, b) for k, a in enumerate(outs) for b in outs[:k])
    np.testing.assert_array_equal(library.back(moved), library.back(codebook))


def test_both_of_a_new_state_can_be_donated() -> None:
    library_named("jax")
    import jax

    codebook = jax.numpy.asarray(normal(K, D), "float32")
    step = jax.jit(lambda state, words: (state.means + words, 3 * words, state.counts), donate_argnums=(0, 1))
    doubled, _, _ = step(dq.ema_init(codebook), codebook + 0)
    np.testing.assert_array_equal(doubled, 2 * codebook)


# Sums over ranks


def in_place(all_reduce):
    """The same sum, into its argument, as torch.distributed and MPI do it."""

    def reduce(x):
        if isinstance(x, np.generic):
            # Nothing to write to.
            return all_reduce(x)
        x[...] = all_reduce(x + 0)
        return x

    return reduce


def everything(library: Library, rank: int, all_reduce, seed: int | None = None):
    """Every function that sums, on a rank's part of the vectors; its arguments, and what it gives."""
    z = normal(2 * N, D)[rank::2].astype(np.float32)
    codebook = normal(K, D, seed=1).astype(np.float32)
    codebook[-2:] = 100
    z, codebook = library.to(z), library.to(codebook)
    indices, counts = dq.nearest(z, codebook), library.to(np.array([3, 1, 0, 2, 0, 0], np.float32))
    state = dq.ema_init(codebook, weight=1.0)
    arguments = [z, codebook, indices, counts, *state]

    def draws(*shape):
        if seed is None:
            return {"noise": library.to(normal(*shape).astype(np.float32))}
        if library.name == "torch":
            import torch

            return {"rng": torch.Generator().manual_seed(seed)}
        if library.name == "jax":
            import jax

            return {"rng": jax.random.key(seed)}
        return {"rng": np.random.default_rng(seed)}

    options = {"all_reduce": all_reduce}
    later, moved = dq.ema_update(state, z, codebook, indices, **options)
    by_use = dq.replace_unused(codebook, counts, state=state, **draws(K, D + 2), **options)
    by_batch = dq.replace_unused(codebook, counts, z=z, **draws(K, D + 2), **options)
    found = dq.kmeans(z, codebook, iterations=2, **options)
    seeds = dq.kmeans_plus_plus(z, K, **draws(K, 3, 2), **options)
    curve = dq.curve_init(z, K, iterations=2, **draws(K, 3, 2), **options)
    replaced = [by_use.codebook, *by_use.state, by_batch.codebook]
    return arguments, [*later, moved, *replaced, found.codebook, found.inertia, seeds, curve]


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_sum_in_place_writes_to_no_argument(name: str) -> None:
    library = library_named(name)
    plain = Simulated(2).run(lambda rank, sum_: everything(library, rank, sum_))
    before = [[np.array(library.back(x)) for x in arguments] for arguments, _ in plain]
    ranks = Simulated(2).run(lambda rank, sum_: everything(library, rank, in_place(sum_)))
    for (arguments, outs), (_, expected), unchanged in zip(ranks, plain, before, strict=True):
        for x, y in zip(arguments, unchanged, strict=True):
            np.testing.assert_array_equal(library.back(x), y)
        for x, y in zip(outs, expected, strict=True):
            np.testing.assert_array_equal(library.back(x), library.back(y))


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_sum_is_given_a_copy(name: str) -> None:
    library = library_named(name)
    x = library.to(np.arange(3.0)) * 1

    def double(x):
        x *= 2
        return x

    total = Ranks(backend_of("test", x=x), "test", double).sum(x)
    np.testing.assert_array_equal(library.back(x), [0, 1, 2])
    np.testing.assert_array_equal(library.back(total), [0, 2, 4])


@pytest.mark.parametrize("seeds", [(0, 1), (3, 3)])
@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_ranks_of_any_seed_stay_together(name: str, seeds: tuple[int, int]) -> None:
    library = library_named(name)
    (_, first), (_, second) = Simulated(2).run(lambda rank, sum_: everything(library, rank, sum_, seeds[rank]))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(library.back(x), library.back(y))


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_ranks_agree_on_is_standard_normal(count: int, alike: bool) -> None:
    codebook, counts = np.zeros((400, 50)), np.zeros(400)
    codebook[0, 0], counts[0] = 1.0, 1

    def jitter(all_reduce, seed):
        return dq.replace_unused(
            codebook, counts, jitter=1e6, rng=np.random.default_rng(seed), all_reduce=all_reduce
        ).codebook[1:]

    ranks = Simulated(count).run(lambda rank, sum_: jitter(sum_, 0 if alike else rank))
    alone = jitter(None, 0)
    # 19,950 numbers: their deviation is known to half a percent.
    assert np.std(ranks[0]) == pytest.approx(np.std(alone), rel=0.03)
    if alike or count == 1:
        np.testing.assert_allclose(ranks[0], alone, rtol=1e-12)


def told(work) -> str:
    """What a rank is told; nothing if all is well."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_differ_are_told_so(library: Library) -> None:
    in_threads(library)
    codebook, counts = normal(K, D).astype(np.float32), np.array([3, 1, 0, 2, 0, 0], np.float32)
    noise = normal(K, D + 2).astype(np.float32)

    def run(**differs):
        def work(rank, all_reduce):
            options = {name: values[rank] for name, values in differs.items() if name != "codebook"}
            words = codebook * (1 + rank * 1e-4) if "codebook" in differs else codebook
            arrays = [library.to(x) for x in (words.astype(np.float32), counts, noise)]
            return told(lambda: dq.replace_unused(*arrays[:2], noise=arrays[2], all_reduce=all_reduce, **options))

        return Simulated(2).run(work)

    assert run() == ["", ""]
    for differs in ({"threshold": (0.0, 0.5)}, {"jitter": (0.1, 0.2)}, {"codebook": None}):
        for text in run(**differs):
            assert text.startswith("replace_unused: codebook, threshold and jitter must be the same on all ranks")

    def cluster(rank, all_reduce):
        z = library.to(normal(N, D).astype(np.float32))
        begin = library.to(normal(K, D, seed=rank).astype(np.float32))
        return told(lambda: dq.kmeans(z, begin, all_reduce=all_reduce))

    for text in Simulated(2).run(cluster):
        assert text.startswith("kmeans: iterations and the codebook to begin with must be the same on all ranks")


def test_a_wrong_sum_is_refused() -> None:
    z, codebook = normal(N, D), normal(K, D)
    state, indices = dq.ema_init(codebook), dq.nearest(z, codebook)
    for wrong, text in [
        (lambda x: None, "got None; one that sums in place must return its argument"),
        (lambda x: x.astype("f4"), r"got float32 \(6, 5\)"),
        (lambda x: x[:1], r"got float64 \(1, 5\)"),
        (lambda x: x * np.nan, "sums of what it is given, got NaN"),
    ]:
        with pytest.raises(ValueError, match=f"^ema_update: all_reduce must return .*{text}"):
            dq.ema_update(state, z, codebook, indices, all_reduce=wrong)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_nothing_that_is_not_finite_enters_the_state(name: str) -> None:
    library = library_named(name)
    z, codebook = (library.to(x.astype(np.float32)) for x in (normal(N, D), normal(K, D)))
    state = dq.ema_init(codebook, weight=1.0)
    later, moved = dq.ema_update(state, z, codebook, dq.nearest(z, codebook), all_reduce=lambda x: x * float("nan"))
    np.testing.assert_array_equal(library.back(moved), library.back(codebook))
    assert np.isfinite(library.back(later.counts)).all()
    spoilt = state._replace(counts=state.counts * float("nan"), means=state.means * float("nan"))
    expected = dq.ema_update(dq.ema_init(codebook), z, codebook, dq.nearest(z, codebook))
    actual = dq.ema_update(spoilt, z, codebook, dq.nearest(z, codebook))
    np.testing.assert_array_equal(library.back(actual[1]), library.back(expected[1]))
    np.testing.assert_array_equal(library.back(actual[0].counts), library.back(expected[0].counts))


# Little memory


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_are_taken_in_blocks(dtype: str) -> None:
    count = 100_000
    z, codebook = normal(count, 16).astype(dtype), normal(32, 16).astype(dtype)
    z[7] = np.nan
    indices = np.arange(count) % 32
    size = count * 16 * 4
    state, noise = dq.ema_init(codebook), normal(32, 18).astype("f4")
    unused, start = np.zeros(32, np.float32), np.nan_to_num(z[:32].astype("f4")).astype(dtype)
    calls = [
        (0.7, lambda: dq.ema_update(state, z, codebook, indices)),
        (0.7, lambda: dq.replace_unused(codebook, unused, z=z, noise=noise)),
        (0.7, lambda: dq.replace_unused(codebook, unused, z=z, noise=noise, all_reduce=lambda x: x)),
        (0.7, lambda: dq.usage(indices, 32)),
        # Its own copy of the vectors, the search's, and a chunk of scores of 8 MiB.
        (3.3, lambda: dq.kmeans(z, start, iterations=1)),
    ]
    for share_of_it, call in calls:
        tracemalloc.start()
        try:
            call()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < share_of_it * size + (4 << 20)


def test_counts_beyond_the_whole_numbers_of_float32() -> None:
    assert dq.usage(np.zeros((1 << 24) + 4, np.int32), 2).tolist() == [(1 << 24) + 4, 0]


# Counts, and codebooks of several stages


def test_counts_may_be_integers(library: Library) -> None:
    codebook, counts = library.to(normal(K, D).astype("f4")), np.array([3, 1, 0, 2, 0, 5])
    noise = library.to(normal(K, D + 2).astype("f4"))
    expected = dq.replace_unused(codebook, library.to(counts.astype(np.float32)), noise=noise)
    for dtype in ("int32", "int64", "uint8"):
        if library.name == "jax" and dtype == "int64":
            continue
        actual = dq.replace_unused(codebook, library.to(counts.astype(dtype)), noise=noise)
        np.testing.assert_array_equal(library.back(actual.codebook), library.back(expected.codebook))


def test_an_infinite_count_is_a_used_codeword(library: Library) -> None:
    counts = library.to(np.array([np.inf, 1, 0, 2, 0, 5], np.float32))
    codebook, noise = (library.to(normal(K, width).astype("f4")) for width in (D, D + 2))
    replaced = dq.replace_unused(codebook, counts, noise=noise)
    assert library.back(replaced.rows).tolist() == [False, False, True, False, True, False]


def test_a_codebook_of_stages_is_told_what_to_do() -> None:
    codebook, z, indices = normal(2, K, D), normal(N, D), np.zeros((N, 2), int)
    state = dq.ema_init(codebook[0])
    calls = [
        lambda: dq.ema_init(codebook),
        lambda: dq.ema_update(state, z, codebook, indices),
        lambda: dq.replace_unused(codebook, np.ones((2, K)), rng=np.random.default_rng(0)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"codebook must have shape \(K, D\), got \(2, 6, 4\); call it for each"):
            call()


def test_every_summing_function_is_here() -> None:
    assert {"ema_update", "replace_unused", "kmeans", "kmeans_plus_plus", "curve_init"} <= set(OTHERS)


def test_copies_of_zeros_differ(library: Library) -> None:
    for dtype in ("float32", "float16") if library.float16 else ("float32",):
        codebook = np.array([[0, 0], [1, 1], [5, 5], [6, 6]], dtype)
        counts, noise = np.array([9, 0, 0, 0], "f4"), normal(4, 4).astype("f4")
        options = {"jitter": 1e-9, "noise": library.to(noise)}
        new = library.back(dq.replace_unused(library.to(codebook), library.to(counts), **options).codebook)
        assert len(np.unique(new, axis=0)) == 4


def test_the_inertia_is_that_of_a_codebook_in_sixteen_bits() -> None:
    z = np.array([[2048], [2050], [2050], [2050]], np.float16)
    found = dq.kmeans(z, 1, rng=np.random.default_rng(0))
    assert (float(found.codebook[0, 0]), float(found.inertia)) == (2050.0, 4.0)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_the_indices_given_back_may_be_overwritten(name: str) -> None:
    library = library_named(name)
    z, codebook, g = (library.to(normal(n, D).astype("f4")) for n in (N, K, N))
    for estimator in (dq.DiVeQDetach(), dq.Rotation(), dq.Radial(dq.Power(2.0))):
        out, pullback = dq.vjp(z, codebook, estimator)
        before = [library.back(x).copy() for x in pullback(g)]
        out.indices[...] = -1
        for found, want in zip(pullback(g), before, strict=True):
            np.testing.assert_array_equal(library.back(found), want)


def test_the_perplexity_of_counts_whose_sum_overflows(library: Library) -> None:
    # array-api-strict lets NumPy warn of the sum.
    with np.errstate(over="ignore"):
        assert abs(float(dq.perplexity(library.to(np.full(4, 2e38, np.float32)))) - 4) < 1e-5
