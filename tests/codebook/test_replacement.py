"""Replacement of unused codewords: by use, by the batch, on one rank and on several."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import diveq_core as dq
from libraries import Library, assert_close, library_named
from ranks import Simulated, in_threads
from vectors import D, K, batch, normal, normal32


def test_replacement_by_use(library: Library):
    _, codebook = batch(count=8)
    counts = np.array([6, 0, 2, 0, 0, 4, 0, 0], np.float32)
    state = dq.ema_init(codebook, weight=2.0)
    noise = normal32(8, 5)
    expected = dq.replace_unused(codebook, counts, noise=noise, state=state)
    on = [library.to(x) for x in (codebook, counts)]
    actual = dq.replace_unused(*on, noise=library.to(noise), state=dq.ema_init(on[0], weight=2.0))
    # The angle and the jitter are rounded.
    assert_close(actual.codebook, expected.codebook, library, rtol=1e-5, atol=1e-6)
    assert_close(actual.rows, counts == 0, library)
    assert_close(actual.state.counts, np.where(counts == 0, 0, 2).astype(np.float32), library)
    assert_close(actual.state.means, expected.codebook, library, rtol=1e-5, atol=1e-6)
    used = counts > 0
    np.testing.assert_array_equal(library.back(actual.codebook)[used], codebook[used])
    # Near a used codeword, and none of them.
    d = np.abs(expected.codebook[~used][:, None] - codebook[used]).max(axis=-1)
    assert (d.min(axis=1) < 0.1).all()
    assert (d.min(axis=1) > 0).all()


def test_replacement_by_use_is_in_proportion():
    codebook = np.arange(1000, dtype=np.float32)[:, None] * 10
    counts = np.zeros(1000, np.float32)
    counts[:3] = [5, 3, 2]
    replaced = dq.replace_unused(codebook, counts, noise=normal32(1000, 3), jitter=1e-3)
    sources = np.round(replaced.codebook[3:, 0] / 10)
    # Stratified: each source within two of its share of 997.
    np.testing.assert_allclose(np.bincount(sources.astype(int)), [498.5, 299.1, 199.4], atol=2)


def test_replacement_by_the_batch(library: Library):
    z, codebook = batch(rows=40, count=8)
    z[5] = np.nan
    counts = np.array([1, 0, 1, 0, 0, 0, 0, 0], np.float32)
    arrays = [library.to(x) for x in (codebook, counts, z, normal32(8, 5))]
    replaced = dq.replace_unused(*arrays[:2], z=arrays[2], noise=arrays[3], jitter=0.0)
    words = library.back(replaced.codebook)
    np.testing.assert_array_equal(words[counts > 0], codebook[counts > 0])
    rows = [np.flatnonzero((z == word).all(axis=1)) for word in words[counts == 0]]
    assert all(len(row) == 1 for row in rows)
    assert len({int(row[0]) for row in rows}) == 6
    # With jitter, a hundredth of the data's spread away.
    near = library.back(dq.replace_unused(*arrays[:2], z=arrays[2], noise=arrays[3]).codebook)
    d = np.abs(near - words)[counts == 0]
    assert 0 < d.max() < 0.05


@given(seed=st.integers(0, 1000), exponent=st.integers(-25, 25), offset=st.sampled_from([0.0, 1.0, 1e4]))
def test_copies_are_never_exact(seed: int, exponent: int, offset: float):
    _, codebook = batch(seed, count=8)
    codebook[-1] = 0.5
    codebook = ((codebook + offset) * 10.0**exponent).astype(np.float32)
    counts = np.array([1, 0, 0, 3, 0, 0, 0, 0], np.float32)
    replaced = dq.replace_unused(codebook, counts, noise=normal32(8, 5, seed=seed))
    assert len(np.unique(replaced.codebook, axis=0)) == 8
    # So each wins the vectors that lie on it, far from the origin too: there copies lie at least four units in the
    # last place apart in each coordinate, and the search keeps these digits.
    np.testing.assert_array_equal(dq.nearest(replaced.codebook, replaced.codebook), np.arange(8))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_copies_are_near_their_source_however_many(library: Library, dtype: str, offset: float):
    if (dtype == "float16" and not library.float16) or (dtype == "bfloat16" and library.bfloat16 is None):
        pytest.skip(f"{library.name} has no {dtype}")
    to_dtype = library.bfloat16 if dtype == "bfloat16" else library.to(np.zeros(1, dtype)).dtype
    codebook = library.cast(library.to(normal32(1024, 8) + np.float32(offset)), to_dtype)
    given = library.back(codebook).astype(np.float64)
    noise, eps = normal32(1024, 10, seed=1), 2.0**-7 if dtype == "bfloat16" else float(np.finfo(dtype).eps)
    units = eps * np.abs(given).max(axis=1)
    # One source of all the others, and several.
    for used in (1, 64):
        counts = library.to((np.arange(1024) < used).astype(np.float32))
        for jitter in (1e-9, 0.01):
            replaced = dq.replace_unused(codebook, counts, noise=library.to(noise), jitter=jitter)
            new = library.back(replaced.codebook).astype(np.float64)
            assert len(np.unique(new[used:], axis=0)) == 1024 - used
            moves = np.abs(new[used:, None] - given[:used])
            assert moves.max(axis=-1).min(axis=1).min() > 0
            # The deviation of a single source is its size. Four digits' steps of two units, and rounding.
            deviation = np.abs(given).max() if used == 1 else np.abs(given - given.mean(axis=0)).max()
            allowed = jitter * deviation * np.abs(noise[used:, None, :8]) + 9.5 * units[:used, None]
            assert (moves <= allowed).all(axis=-1).any(axis=1).all()


@pytest.mark.parametrize("width", [1, 2])
def test_copies_in_few_dimensions_are_as_near_as_their_number_allows(width: int):
    codebook, counts = np.ones((64, width), np.float32), np.zeros(64, np.float32)
    counts[0] = 1
    new = dq.replace_unused(codebook, counts, noise=normal32(64, width + 2), jitter=1e-9).codebook
    assert len(np.unique(new, axis=0)) == 64
    furthest = 2 * 63 + 2 if width == 1 else 2 * 8 + 2
    assert np.abs(new - 1).max() <= (furthest + 0.5) * np.finfo(np.float32).eps


def test_copies_differ_next_to_the_largest_number(library: Library):
    if library.bfloat16 is None:
        pytest.skip(f"{library.name} has no bfloat16")
    codebook = library.cast(library.to(np.full((64, 4), 3.38e38, np.float32)), library.bfloat16)
    counts, noise = library.to((np.arange(64) < 1).astype(np.float32)), library.to(normal32(64, 6))
    new = library.back(dq.replace_unused(codebook, counts, noise=noise, jitter=1e-9).codebook)
    assert np.isfinite(new).all()
    assert len(np.unique(new, axis=0)) == 64


def test_thresholds(library: Library):
    _, codebook = batch(count=4)
    for threshold, expected in [(0.0, [0, 0, 0, 1]), (0.1, [0, 0, 1, 1]), (0.5, [0, 1, 1, 1])]:
        counts = library.to(np.array([100, 10, 1, 0], np.float32))
        for scale in (1.0, 0.25):
            replaced = dq.replace_unused(
                library.to(codebook), counts * scale, noise=library.to(normal32(4, 5)), threshold=threshold
            )
            assert_close(replaced.rows, np.array(expected, bool), library)


def test_nothing_to_draw_from(library: Library):
    _, codebook = batch()
    zeros, noise = library.to(np.zeros(6, np.float32)), library.to(normal32(6, 5))
    nothing = [None, library.to(np.full((2, 3), np.nan, np.float32)), library.to(np.zeros((0, 3), np.float32))]
    for z in nothing:
        replaced = dq.replace_unused(library.to(codebook), zeros, z=z, noise=noise)
        assert_close(replaced.codebook, codebook, library)
        assert_close(replaced.rows, np.zeros(6, bool), library)


def test_codewords_that_are_not_finite_are_replaced(library: Library):
    _, codebook = batch()
    codebook[1, 2] = np.nan
    counts = library.to(np.array([1, 9, 1, 1, 1, np.nan], np.float32))
    replaced = dq.replace_unused(library.to(codebook), counts, noise=library.to(normal32(6, 5)))
    assert np.isfinite(library.back(replaced.codebook)).all()
    assert_close(replaced.rows, np.array([0, 1, 0, 0, 0, 1], bool), library)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("by_batch", [False, True])
def test_ranks_replace_as_one(library: Library, count: int, by_batch: bool):
    z, codebook = batch(rows=31, count=8)
    in_threads(library)
    counts = np.array([1, 0, 1, 0, 0, 0, 0, 0], np.float32)
    simulated = Simulated(count)

    def work(rank, all_reduce):
        mine = library.to(z[slice(rank, None, count)]) if by_batch else None
        arrays = [library.to(x) for x in (codebook, counts, normal32(8, 5))]
        return dq.replace_unused(*arrays[:2], z=mine, noise=arrays[2], jitter=1e-6, all_reduce=all_reduce)

    ranks = [library.back(replaced.codebook) for replaced in simulated.run(work)]
    for words in ranks:
        np.testing.assert_array_equal(words, ranks[0])
    sources = z if by_batch else codebook[counts > 0]
    d = np.abs(ranks[0][counts == 0][:, None] - sources).max(axis=-1)
    # Vectors of the batch and not mixtures of several.
    assert (d.min(axis=1) < 1e-4).all()
    if by_batch:
        assert len(set(d.argmin(axis=1))) == 6
        assert len(set(d.argmin(axis=1) % count)) == count


def test_a_rank_without_vectors_agrees():
    z, codebook = batch(rows=31, count=8)
    counts = np.array([1, 0, 1, 0, 0, 0, 0, 0], np.float32)

    def work(rank, all_reduce):
        mine = z[: 31 * rank]
        return dq.replace_unused(codebook, counts, z=mine, noise=normal32(8, 5), jitter=0.0, all_reduce=all_reduce)

    first, second = (replaced.codebook for replaced in Simulated(2).run(work))
    alone = dq.replace_unused(codebook, counts, z=z, noise=normal32(8, 5), jitter=0.0).codebook
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, alone)


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


def test_under_jit():
    library = library_named("jax")
    import jax

    z, codebook = (library.to(x) for x in batch())
    noise = library.to(normal32(6, 5))

    @jax.jit
    def step(state, codebook, z):
        indices = dq.nearest(z, codebook)
        state, codebook = dq.ema_update(state, z, codebook, indices)
        return dq.replace_unused(codebook, dq.usage(indices, 6), z=z, noise=noise, state=state)

    replaced = step(dq.ema_init(codebook), codebook, z)
    plain = step.__wrapped__(dq.ema_init(codebook), codebook, z)
    for a, b in zip(jax.tree.leaves(replaced), jax.tree.leaves(plain), strict=True):
        # XLA fuses multiplications with additions.
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)
    assert bool(replaced.rows[5])


def test_no_gradient_flows_through_upkeep():
    library = library_named("torch")
    z, codebook = (library.to(x).requires_grad_() for x in batch())
    state, moved = dq.ema_update(dq.ema_init(codebook), z, codebook, dq.nearest(z, codebook))
    replaced = dq.replace_unused(codebook, state.counts, z=z, noise=library.to(normal32(6, 5)))
    assert not any(x.requires_grad for x in (moved, *state, replaced.codebook))


def test_errors(library: Library):
    codebook = library.to(batch()[1])
    counts = library.to(np.ones(6, np.float32))
    with pytest.raises(ValueError, match=r"^replace_unused: jitter must be > 0 without z"):
        dq.replace_unused(codebook, counts, jitter=0)
    with pytest.raises(ValueError, match=r"^replace_unused: threshold must lie in \[0, 1\), got 1\.0$"):
        dq.replace_unused(codebook, counts, threshold=1)
    with pytest.raises(ValueError, match=r"^replace_unused: noise must have shape \(6, 5\), got \(6, 3\)$"):
        dq.replace_unused(codebook, counts, noise=codebook)
    with pytest.raises(ValueError, match=r"^replace_unused: counts must have the shape of codebook without"):
        dq.replace_unused(codebook, counts[:3], noise=codebook)
