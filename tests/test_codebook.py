"""Moving averages and replacement: what they equal, what they never do, on one rank and on several."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import diveq_core as dq
from conftest import Library, assert_close, float64_in, library_named
from ranks import Simulated, in_threads


def batch(seed: int = 0, rows: int = 60, count: int = 6, width: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (N, D), and a codebook (K, D) whose last codeword nobody chooses."""
    rng = np.random.default_rng(seed)
    z, codebook = rng.standard_normal((rows, width)), rng.standard_normal((count, width))
    codebook[-1] = 100
    return z.astype(np.float32), codebook.astype(np.float32)


def averages(codebook, steps, decay):
    """s / n as the papers write it, in float64; codewords never used as they are."""
    n, s = np.zeros(len(codebook)), np.zeros(codebook.shape)
    for z, indices in steps:
        one_hot = np.eye(len(codebook))[indices]
        n = decay * n + (1 - decay) * one_hot.sum(axis=0)
        s = decay * s + (1 - decay) * one_hot.T @ z
    return n, np.where(n[:, None] > 0, s / np.where(n > 0, n, 1)[:, None], codebook)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_moving_averages_are_sums_over_counts(library: Library, decay: float):
    _, first = batch()
    steps, codebook, state = [], library.to(first), dq.ema_init(library.to(first))
    for seed in range(5):
        z, _ = batch(seed)
        indices = dq.nearest(library.to(z), codebook)
        steps.append((z, library.back(indices)))
        state, codebook = dq.ema_update(state, library.to(z), codebook, indices, decay=decay)
    n, expected = averages(first, steps, decay)
    # At decay 0 nothing is remembered of a codeword that the last step did not use: s / n would be 0 / 0.
    kept = (n > 0) | (decay > 0)
    # Five steps of sums of up to sixty numbers of order one, in float32.
    np.testing.assert_allclose(library.back(codebook)[kept], expected[kept], rtol=1e-5, atol=1e-5)
    assert_close(state.counts, n.astype(np.float32), library, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_a_moving_average_is_a_step_of_stochastic_gradient_descent(name: str):
    library = library_named(name)
    z, codebook = batch()
    state = dq.ema_init(library.to(codebook), weight=3.0)
    indices = dq.nearest(library.to(z), library.to(codebook))
    state, moved = dq.ema_update(state, library.to(z), library.to(codebook), indices, decay=0.9)

    def loss(words):
        d = words[indices] - library.to(z)
        return 0.5 * (d * d).sum()

    if name == "torch":
        import torch

        leaf = library.to(codebook).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), [leaf])
    else:
        import jax

        gradient = jax.grad(loss)(library.to(codebook))
    counts = np.bincount(library.back(indices), minlength=6)
    n = 0.9 * 3.0 + (1 - 0.9) * counts
    expected = codebook - ((1 - 0.9) / n)[:, None] * library.back(gradient)
    # Sums of up to sixty numbers of order one.
    assert_close(moved, expected.astype(np.float32), library, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(library.back(state.counts), n, rtol=1e-6)


def test_an_unused_codeword_keeps_its_value_bit_for_bit(library: Library):
    z, first = batch()
    codebook, state = library.to(first), dq.ema_init(library.to(first))
    for seed in range(3):
        z, _ = batch(seed)
        state, codebook = dq.ema_update(state, library.to(z), codebook, dq.nearest(library.to(z), codebook))
    np.testing.assert_array_equal(library.back(codebook)[-1], first[-1])
    assert (library.back(codebook)[:-1] != first[:-1]).any()


@given(seed=st.integers(0, 1000), decay=st.floats(0, 0.999), weight=st.floats(0, 100))
def test_counts_are_conserved_and_codewords_stay_in_the_hull(seed: int, decay: float, weight: float):
    z, codebook = batch(seed)
    indices = dq.nearest(z, codebook)
    state, moved = dq.ema_update(dq.ema_init(codebook, weight=weight), z, codebook, indices, decay=decay)
    # Six numbers are added.
    np.testing.assert_allclose(state.counts.sum(), decay * 6 * weight + (1 - decay) * len(z), rtol=1e-5)
    both = np.concatenate([z, codebook])
    assert (moved >= both.min(axis=0) - 1e-4).all()
    assert (moved <= both.max(axis=0) + 1e-4).all()


def test_a_common_offset_costs_no_digits():
    z, codebook = batch()
    z, codebook = (np.round(x * 64) / 64 for x in (z, codebook))
    indices = dq.nearest(z, codebook)
    _, near = dq.ema_update(dq.ema_init(codebook), z, codebook, indices)
    far, offset = codebook + np.float32(1024), np.float32(1024)
    _, moved = dq.ema_update(dq.ema_init(far), z + offset, far, indices)
    # One unit in the last place of 1024, not of a sum of sixty of them.
    np.testing.assert_allclose(moved - offset, near, atol=1024 * 2**-23, rtol=0)


def test_what_is_not_finite_contributes_nothing(library: Library):
    z, codebook = batch()
    indices = dq.nearest(z, codebook)
    expected = dq.ema_update(dq.ema_init(codebook), z[3:], codebook, indices[3:])
    z[0], z[1, 1], indices[2] = np.nan, np.inf, -1
    actual = dq.ema_update(dq.ema_init(library.to(codebook)), *(library.to(x) for x in (z, codebook, indices)))
    assert_close(actual[1], expected[1], library, rtol=1e-5, atol=1e-6)
    assert_close(actual[0].counts, expected[0].counts, library, rtol=1e-6)


def test_an_overflow_is_never_written(library: Library):
    z = np.full((4, 3), 3e38, np.float32)
    codebook = -z[:2]
    arrays = [library.to(x) for x in (z, codebook, np.array([0, 0, 1, 1]))]
    with np.errstate(all="ignore"):
        state, moved = dq.ema_update(dq.ema_init(arrays[1]), *arrays)
        assert np.isfinite(library.back(moved)).all()
        assert np.isfinite(library.back(state.means)).all()
        replaced = dq.replace_unused(
            arrays[1], library.to(np.array([1, 0], np.float32)), z=arrays[0], noise=library.to(normal(2, 5))
        )
    assert np.isfinite(library.back(replaced.codebook)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_moves_of_16_bits_add_up(library: Library, dtype: str):
    kind = np.float16 if dtype == "float16" and library.float16 else getattr(library, dtype, None)
    if not kind:
        pytest.skip(f"{library.name} has no {dtype}")
    cast = library.to(np.zeros(1, np.float16)).dtype if dtype == "float16" else kind
    codebook = library.cast(library.to(np.ones((1, 2), np.float32)), cast)
    z = library.cast(library.to(np.full((8, 2), 1.25, np.float32)), cast)
    state = dq.ema_init(codebook, weight=8.0)
    for _ in range(500):
        state, codebook = dq.ema_update(state, z, codebook, library.to(np.zeros(8, int)), decay=0.999)
    assert codebook.dtype == cast
    # Each move is a hundredth of what the codebook resolves. Its resolution is left.
    expected = 1.25 - 0.25 * 0.999**500
    np.testing.assert_allclose(library.back(codebook).astype(np.float64), expected, atol=2.0**-8)


def test_a_codebook_changed_in_between_takes_precedence(library: Library):
    z, codebook = batch()
    state = dq.ema_init(library.to(codebook))
    changed = library.to(codebook + 1)
    indices = dq.nearest(library.to(z), changed)
    expected = dq.ema_update(dq.ema_init(changed), library.to(z), changed, indices)
    actual = dq.ema_update(state, library.to(z), changed, indices)
    assert_close(actual[1], library.back(expected[1]), library)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_move_as_one(library: Library, count: int):
    z, codebook = batch(rows=61)
    in_threads(library)
    indices = dq.nearest(z, codebook)
    whole = dq.ema_update(dq.ema_init(codebook), z, codebook, indices)
    simulated = Simulated(count)

    def work(rank, all_reduce):
        mine = slice(rank, None, count)
        arrays = [library.to(x) for x in (z[mine], codebook, indices[mine])]
        return dq.ema_update(dq.ema_init(arrays[1]), *arrays, all_reduce=all_reduce)

    ranks = simulated.run(work)
    assert simulated.calls == 1
    for state, moved in ranks:
        np.testing.assert_array_equal(library.back(moved), library.back(ranks[0][1]))
        # The sums are taken in another order.
        assert_close(moved, whole[1], library, rtol=1e-5, atol=1e-6)
        assert_close(state.counts, whole[0].counts, library, rtol=1e-6)


def test_nothing_to_count(library: Library):
    _, codebook = batch()
    z, indices = library.to(np.zeros((0, 3), np.float32)), library.to(np.zeros(0, int))
    state, moved = dq.ema_update(dq.ema_init(library.to(codebook)), z, library.to(codebook), indices)
    assert_close(moved, codebook, library)
    assert_close(state.counts, np.zeros(6, np.float32), library)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_replacement_by_use(library: Library):
    _, codebook = batch(count=8)
    counts = np.array([6, 0, 2, 0, 0, 4, 0, 0], np.float32)
    state = dq.ema_init(codebook, weight=2.0)
    noise = normal(8, 5)
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
    replaced = dq.replace_unused(codebook, counts, noise=normal(1000, 3), jitter=1e-3)
    sources = np.round(replaced.codebook[3:, 0] / 10)
    # Stratified: each source within two of its share of 997.
    np.testing.assert_allclose(np.bincount(sources.astype(int)), [498.5, 299.1, 199.4], atol=2)


def test_replacement_by_the_batch(library: Library):
    z, codebook = batch(rows=40, count=8)
    z[5] = np.nan
    counts = np.array([1, 0, 1, 0, 0, 0, 0, 0], np.float32)
    arrays = [library.to(x) for x in (codebook, counts, z, normal(8, 5))]
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
    replaced = dq.replace_unused(codebook, counts, noise=normal(8, 5, seed=seed))
    assert len(np.unique(replaced.codebook, axis=0)) == 8
    # So each wins the vectors that lie on it, far from the origin too: there copies lie at least four units in the
    # last place apart in each coordinate, and the search keeps these digits.
    np.testing.assert_array_equal(dq.nearest(replaced.codebook, replaced.codebook), np.arange(8))


def test_thresholds(library: Library):
    _, codebook = batch(count=4)
    for threshold, expected in [(0.0, [0, 0, 0, 1]), (0.1, [0, 0, 1, 1]), (0.5, [0, 1, 1, 1])]:
        counts = library.to(np.array([100, 10, 1, 0], np.float32))
        for scale in (1.0, 0.25):
            replaced = dq.replace_unused(
                library.to(codebook), counts * scale, noise=library.to(normal(4, 5)), threshold=threshold
            )
            assert_close(replaced.rows, np.array(expected, bool), library)


def test_nothing_to_draw_from(library: Library):
    _, codebook = batch()
    zeros, noise = library.to(np.zeros(6, np.float32)), library.to(normal(6, 5))
    nothing = [None, library.to(np.full((2, 3), np.nan, np.float32)), library.to(np.zeros((0, 3), np.float32))]
    for z in nothing:
        replaced = dq.replace_unused(library.to(codebook), zeros, z=z, noise=noise)
        assert_close(replaced.codebook, codebook, library)
        assert_close(replaced.rows, np.zeros(6, bool), library)


def test_codewords_that_are_not_finite_are_replaced(library: Library):
    _, codebook = batch()
    codebook[1, 2] = np.nan
    counts = library.to(np.array([1, 9, 1, 1, 1, np.nan], np.float32))
    replaced = dq.replace_unused(library.to(codebook), counts, noise=library.to(normal(6, 5)))
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
        arrays = [library.to(x) for x in (codebook, counts, normal(8, 5))]
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
        return dq.replace_unused(codebook, counts, z=mine, noise=normal(8, 5), jitter=0.0, all_reduce=all_reduce)

    first, second = (replaced.codebook for replaced in Simulated(2).run(work))
    alone = dq.replace_unused(codebook, counts, z=z, noise=normal(8, 5), jitter=0.0).codebook
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, alone)


def test_under_jit():
    library = library_named("jax")
    import jax

    z, codebook = (library.to(x) for x in batch())
    noise = library.to(normal(6, 5))

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
    replaced = dq.replace_unused(codebook, state.counts, z=z, noise=library.to(normal(6, 5)))
    assert not any(x.requires_grad for x in (moved, *state, replaced.codebook))


def test_errors(library: Library):
    z, codebook = (library.to(x) for x in batch())
    indices, state = dq.nearest(z, codebook), dq.ema_init(codebook)
    for wrong in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"^ema_update: decay must lie in \[0, 1\), got"):
            dq.ema_update(state, z, codebook, indices, decay=wrong)
    with pytest.raises(TypeError, match=r"^ema_update: decay must be a real number, got builtins\.str$"):
        dq.ema_update(state, z, codebook, indices, decay="0.9")
    with pytest.raises(TypeError, match=r"^ema_update: state must be an EMAState, as ema_init gives it, got"):
        dq.ema_update(None, z, codebook, indices)
    with pytest.raises(ValueError, match=r"^ema_update: state.counts must have the shape of codebook without"):
        dq.ema_update(state._replace(counts=state.counts[:2]), z, codebook, indices)
    with pytest.raises(ValueError, match=r"^ema_update: indices must have the shape of z without its last axis"):
        dq.ema_update(state, z, codebook, indices[:2])
    with pytest.raises(TypeError, match=r"^ema_update: indices must have an integer dtype, got"):
        dq.ema_update(state, z, codebook, z[:, 0])
    with pytest.raises(TypeError, match=r"^ema_update: all_reduce must be a function that sums .*, got builtins\.int$"):
        dq.ema_update(state, z, codebook, indices, all_reduce=1)
    with pytest.raises(ValueError, match=r"^ema_update: all_reduce must return an array like its argument, .*, got"):
        dq.ema_update(state, z, codebook, indices, all_reduce=lambda x: x[:1, :])
    with pytest.raises(ValueError, match=r"^ema_init: weight must lie in \[0, inf\), got -1\.0$"):
        dq.ema_init(codebook, weight=-1)
    with pytest.raises(ValueError, match=r"^replace_unused: jitter must be > 0 without z"):
        dq.replace_unused(codebook, state.counts, jitter=0)
    with pytest.raises(ValueError, match=r"^replace_unused: threshold must lie in \[0, 1\), got 1\.0$"):
        dq.replace_unused(codebook, state.counts, threshold=1)
    with pytest.raises(ValueError, match=r"^replace_unused: noise must have shape \(6, 5\), got \(6, 3\)$"):
        dq.replace_unused(codebook, state.counts, noise=codebook)
    with pytest.raises(ValueError, match=r"^replace_unused: counts must have the shape of codebook without"):
        dq.replace_unused(codebook, state.counts[:3], noise=codebook)


def test_numpy_refuses_indices_out_of_range():
    z, codebook = batch()
    for wrong in (6, -7):
        text = (
            rf"^ema_update: indices must lie in \[0, K\) with K = 6, or be -1 .*, got values from {wrong} to {wrong}$"
        )
        with pytest.raises(ValueError, match=text):
            dq.ema_update(dq.ema_init(codebook), z, codebook, np.full(60, wrong))


def test_float64(library: Library):
    with float64_in(library), warnings.catch_warnings():
        z, codebook = (library.to(x.astype(np.float64)) for x in batch())
        indices = dq.nearest(z, codebook)
        state, moved = dq.ema_update(dq.ema_init(codebook), z, codebook, indices)
        n, expected = averages(library.back(codebook), [(library.back(z), library.back(indices))], 0.99)
        assert_close(moved, expected, library, rtol=1e-12, atol=1e-13)
        assert_close(state.counts, n, library, rtol=1e-12)
