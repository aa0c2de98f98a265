"""What is done between steps: averages, counts, replacement, a start from data; over ranks; and nothing breaks it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import diveq_core as dq
from diveq_core.arrays.registry import backend_of
from diveq_core.layers import auxiliary
from layer_cases import DIM, LAYERS, Case, K, plain
from libraries import library_named
from ranks import Simulated, in_threads

if TYPE_CHECKING:
    from libraries import Library


def trained(settings: dq.layers.Settings, state: dict, batches: list, **options) -> dict:
    """The state after a step for each batch, without gradients."""
    for z in batches:
        statistics = LAYERS.forward(settings, state, z, train=True).statistics
        state = LAYERS.update(settings, state, statistics, **options)
    return state


def test_averages_are_those_of_ema_update() -> None:
    settings = LAYERS.Settings(DIM, K, dq.STE(), codebook_update="ema", ema_decay=0.8, replace_every=0, init="normal")
    state = LAYERS.init(settings, np.zeros(()), rng=np.random.default_rng(0))
    codebook = state["codewords"]
    averages = dq.ema_init(codebook)
    batches = [plain(seed, np.float64) for seed in range(4)]
    for z in batches:
        averages, codebook = dq.ema_update(averages, z, codebook, dq.nearest(z, codebook), decay=0.8)
    state = trained(settings, state, batches)
    np.testing.assert_allclose(state["codewords"], codebook, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(state["counts"], averages.counts, rtol=1e-12)
    assert int(state["steps"]) == 4
    assert state["usage"].sum() == 4 * 64


@pytest.mark.parametrize("update", ["gradient", "ema", "linear"])
def test_replacement_is_that_of_replace_unused(update: str) -> None:
    settings = LAYERS.Settings(
        DIM, K, dq.STE(), codebook_update=update, replace_every=3, replace_threshold=0.1, init="normal"
    )
    state = LAYERS.init(settings, np.zeros(()), rng=np.random.default_rng(0))
    name = "embedding" if update == "linear" else "codewords"
    state[name][3:] += 100.0
    if update == "ema":
        state["averages"][...] = state[name]
    noise = np.random.default_rng(1).standard_normal((1, K, DIM + 2))
    batches = [plain(seed, np.float64) for seed in range(3)]
    before = trained(settings, state, batches[:2], noise=noise)
    np.testing.assert_array_equal(before[name][3:], state[name][3:])
    statistics = LAYERS.forward(settings, before, batches[2], train=True).statistics
    after = LAYERS.update(settings, before, statistics, noise=noise)
    plainly = LAYERS.update(settings, before, statistics, replace=False)
    # Eight of the 64 vectors, one from each of eight equal parts.
    z = None if update == "linear" else batches[2][::8]
    expected = dq.replace_unused(plainly[name], plainly["usage"], z=z, threshold=0.1, noise=noise[0])
    assert expected.rows.sum() == K - 3
    np.testing.assert_array_equal(after[name], expected.codebook)
    assert (after["usage"] == 0).all()
    if update == "ema":
        np.testing.assert_array_equal(after["averages"], after[name])
        assert (after["counts"][3:] == 0).all()


def test_a_corner_is_used_by_both_its_segments() -> None:
    settings = LAYERS.Settings(1, 4, dq.SFDiVeQDetach(), init="normal")
    state = LAYERS.init(settings, np.zeros(()), rng=np.random.default_rng(0))
    state["codewords"] = np.array([[0.0], [1.0], [2.0], [3.0]])
    noise = dq.CurveNoise(np.full(3, 0.5))
    out = LAYERS.forward(settings, state, np.array([[0.5], [2.5], [2.4]]), train=True, noise=noise)
    np.testing.assert_array_equal(out.indices, [0, 2, 2])
    np.testing.assert_array_equal(out.statistics.counts, [1, 1, 2, 2])


def test_a_later_stage_starts_with_what_is_left() -> None:
    settings = LAYERS.Settings(DIM, K, dq.STE(), stages=2)
    state = LAYERS.init(settings, np.zeros(()), rng=np.random.default_rng(0))
    # Far from zero, where only what is left is small.
    z = np.random.default_rng(1).standard_normal((200, DIM)) + 100.0
    started = LAYERS.start(settings, state, z, rng=np.random.default_rng(2))
    assert np.abs(started["codewords"][0]).min() > 90
    assert np.abs(started["codewords"][1]).max() < 10


def test_replacement_waits_until_a_codeword_can_be_called_unused() -> None:
    settings = LAYERS.Settings(DIM, 256, dq.STE(), replace_every=1, init="normal")
    state = LAYERS.init(settings, np.zeros(()), rng=np.random.default_rng(0))
    first = state["codewords"]
    # 64 vectors a step, so ten times each of 256 codewords takes 40 steps.
    state = trained(settings, state, [plain(seed, np.float64) for seed in range(39)], rng=np.random.default_rng(1))
    np.testing.assert_array_equal(state["codewords"], first)
    state = trained(settings, state, [plain(39, np.float64)], rng=np.random.default_rng(1))
    assert (state["codewords"] != first).any()


def test_statistics_add_up() -> None:
    case = Case.of("stages, averages", replace_every=0)
    steps = [LAYERS.forward(case.settings, case.state, z, train=True).statistics for z in (case.z, 2 * case.z)]
    added = LAYERS.added(*steps)
    joined = LAYERS.forward(case.settings, case.state, np.concatenate([case.z, 2 * case.z]), train=True).statistics
    for ours, whole in zip(added[1:3], joined[1:3], strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-12, atol=1e-12)
    once = LAYERS.update(case.settings, case.state, added)
    whole = LAYERS.update(case.settings, case.state, joined)
    np.testing.assert_allclose(once["codewords"], whole["codewords"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["numpy", "jax", "mlx"])
def test_a_sample_of_many_vectors_for_many_codewords(name: str) -> None:
    library, count, rows = library_named(name), 1 << 16, (1 << 15) + 1
    settings = LAYERS.Settings(1, count, dq.STE(), init="normal")
    z, tokens = (library.to(x) for x in (np.arange(rows, dtype=np.float32)[:, None], np.zeros(rows, np.int32)))
    lib = backend_of("test", z=z)
    sample = library.back(auxiliary.statistics(lib, settings, {}, [z], tokens, z[0, 0]).sample)
    # The product of both numbers does not fit 32 bits, in which two of these libraries count.
    np.testing.assert_array_equal(sample[:, 0], np.arange(count, dtype=np.int64) * rows // count)


@pytest.mark.parametrize("kind", ["averages", "plain", "linear", "stages"])
def test_of_no_step_nothing_changes(kind: str, library: Library) -> None:
    case = Case.of(kind, np.float32).to(library)
    statistics = case.step().statistics
    before = LAYERS.update(case.settings, case.state, statistics, noise=case.update_noise)
    nothing = LAYERS.Statistics(*(None if x is None else 0 * x for x in statistics))
    state = LAYERS.update(case.settings, before, nothing, noise=case.update_noise)
    for name, x in state.items():
        np.testing.assert_array_equal(library.back(x), library.back(before[name]))


@pytest.mark.parametrize("init", ["data", "kmeans"])
@pytest.mark.parametrize("kind", ["plain", "stages", "heads", "heads, shared", "curve", "linear", "cosine", "averages"])
def test_a_start_from_data(kind: str, init: str) -> None:
    rng = np.random.default_rng(0)
    case = Case.of(kind, init=init)
    settings, z = case.settings, rng.standard_normal((200, DIM)) + 5.0
    state = LAYERS.init(settings, np.zeros(()), rng=rng)
    started = LAYERS.start(settings, state, z, rng=rng)
    assert bool(started["started"])
    assert not bool(state["started"])
    hard, ours = settings.hard, started
    book = ours["embedding"] if kind == "linear" else ours["codewords"]
    x = z / np.linalg.norm(z, axis=1, keepdims=True) if settings.cosine else z
    if settings.on_curve:
        error = np.mean((dq.project(x, book).z_q - x) ** 2)
    else:
        error = np.mean((dq.quantize(x, book, hard).z_q - x) ** 2)
    # Eight vectors of the data, or their k-means, leave less than the mean alone does.
    assert error < np.mean((x - x.mean(axis=0)) ** 2)
    first = book.reshape(-1, *book.shape[-2:])[0]
    if init == "data" and not settings.cosine:
        rows = x.reshape(-1, first.shape[1]) if kind == "heads, shared" else x[:, : first.shape[1]]
        assert (np.abs(first[:, None] - rows[None]).max(axis=2).min(axis=1) == 0).all(), "vectors of the batch"
    if kind == "averages":
        np.testing.assert_array_equal(ours["averages"], ours["codewords"])


@pytest.mark.parametrize("init", ["data", "kmeans"])
@pytest.mark.parametrize(
    "z",
    [np.full((5, DIM), np.nan), np.zeros((0, DIM)), np.full((5, DIM), np.inf)],
    ids=["NaN", "empty", "infinite"],
)
def test_a_batch_without_vectors_starts_nothing(z: np.ndarray, init: str, library: Library) -> None:
    settings = LAYERS.Settings(DIM, K, init=init, not_finite="skip")
    noise = np.random.default_rng(0).standard_normal(LAYERS.noise_size(settings)).astype(np.float32)
    state = LAYERS.init(settings, library.to(np.zeros(1, np.float32)), noise=library.to(noise))
    draws = library.to(np.zeros((1, K, 2), np.float32))
    after = LAYERS.start(settings, state, library.to(z.astype(np.float32)), noise=draws)
    for name, x in after.items():
        np.testing.assert_array_equal(library.back(x), library.back(state[name]))


HARMFUL = {
    "NaN": np.full((8, DIM), np.nan, np.float32),
    "infinite": np.full((8, DIM), np.inf, np.float32),
    "huge": np.full((8, DIM), 3e38, np.float32),
    "partly NaN": np.where(np.arange(64)[:, None] % 2 == 0, np.float32(np.nan), plain()),
    "empty": np.zeros((0, DIM), np.float32),
    "equal": np.ones((8, DIM), np.float32),
    "few": plain()[:3],
}


@pytest.mark.parametrize("harm", HARMFUL)
@pytest.mark.parametrize("kind", ["averages", "plain", "stages, averages", "heads", "linear"])
@pytest.mark.parametrize("init", ["data", "kmeans"])
def test_nothing_breaks_a_codebook(harm: str, kind: str, init: str) -> None:
    settings = Case.of(kind, np.float32, init=init, not_finite="skip", replace_every=2).settings
    rng = np.random.default_rng(0)
    state = LAYERS.init(settings, np.zeros((), np.float32), rng=rng)

    def step(state: dict, z: np.ndarray) -> dict:
        if not bool(state["started"]):
            state = LAYERS.start(settings, state, z, rng=rng)
        out = LAYERS.forward(settings, state, z, train=True, rng=rng)
        return LAYERS.update(settings, state, out.statistics, rng=rng)

    def error(state: dict) -> float:
        return float(np.mean((LAYERS.forward(settings, state, plain(), train=False).z_q - plain()) ** 2))

    for batches in ([HARMFUL[harm], *(plain(seed) for seed in range(6))], [plain(), HARMFUL[harm], plain(1)]):
        new = state
        for z in batches:
            new = step(new, z)
            assert all(np.isfinite(x).all() for x in new.values())
        assert bool(new["started"])
    if harm in ("NaN", "infinite", "empty"):
        # Nothing of it is left.
        assert error(new) < np.mean(plain() ** 2)


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("kind", ["averages", "plain", "stages, averages", "heads"])
@pytest.mark.parametrize("init", ["data", "kmeans"])
@pytest.mark.parametrize("first", [40, 0], ids=["", "nothing at first"])
def test_ranks_end_with_one_state(name: str, kind: str, init: str, first: int) -> None:
    library = library_named(name)
    in_threads(library)
    case = Case.of(kind, np.float32, init=init, not_finite="skip", replace_every=2)
    settings = case.settings
    state = LAYERS.init(settings, library.to(np.zeros(1, np.float32)))
    z = np.random.default_rng(3).standard_normal((6, 120, DIM)).astype(np.float32)
    # Of each batch the second rank has none, once it is not finite, and otherwise a third.
    parts = [(batch[:80], batch[80:]) for batch in z]
    parts[0] = (z[0], z[0][: 0 if first == 0 else first])
    parts[1] = (z[1], z[1][:0])
    parts[2] = (z[2], np.full_like(z[2][:4], np.nan))
    draws = np.random.default_rng(4).standard_normal((len(settings.codebooks), K, 2)).astype(np.float32)

    def run(batches: list, all_reduce=None) -> dict:
        new = state
        for number, batch in enumerate(batches):
            batch = library.to(batch)
            if number == 0:
                new = LAYERS.start(settings, new, batch, noise=library.to(draws), all_reduce=all_reduce)
            out = LAYERS.forward(settings, new, batch, train=True)
            new = LAYERS.update(
                settings, new, out.statistics, noise=library.to(case.update_noise), all_reduce=all_reduce
            )
        return {key: library.back(x) for key, x in new.items()}

    one, second = Simulated(2).run(lambda rank, sum_: run([pair[rank] for pair in parts], sum_))
    for key, x in one.items():
        np.testing.assert_array_equal(x, second[key], err_msg=key)
    if init == "kmeans":
        return  # the joined batch draws other first vectors
    alone = run([np.concatenate(pair) for pair in parts])
    assert int(one["steps"]) == int(alone["steps"])
    np.testing.assert_allclose(one["usage"].sum(), alone["usage"].sum())


def test_ranks_add_up_to_the_joined_batch() -> None:
    case = Case.of("stages, averages", replace_every=0)
    z = np.random.default_rng(3).standard_normal((5, 40, DIM))

    def run(batches: list, all_reduce=None) -> dict:
        new = case.state
        for batch in batches:
            new = LAYERS.update(
                case.settings,
                new,
                LAYERS.forward(case.settings, new, batch, train=True).statistics,
                all_reduce=all_reduce,
            )
        return new

    alone = run(list(z))
    for ranks in (2, 4):
        states = Simulated(ranks).run(lambda rank, sum_, n=ranks: run([batch[rank::n] for batch in z], sum_))
        for state in states:
            for name in ("codewords", "counts", "usage"):
                np.testing.assert_allclose(state[name], alone[name], rtol=1e-11, atol=1e-12)
                np.testing.assert_array_equal(state[name], states[0][name])


def test_wrong_arguments_say_what_is_wrong() -> None:
    case = Case.of("plain")
    with pytest.raises(TypeError, match="update: statistics must be a Statistics"):
        LAYERS.update(case.settings, case.state, (1, 2, 3))
    settings = LAYERS.Settings(DIM, K, init="normal")
    state = LAYERS.init(settings, case.z, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="start: settings must have init data or kmeans"):
        LAYERS.start(settings, state, case.z)
    with pytest.raises(TypeError, match="init: like must have a real floating dtype"):
        LAYERS.init(case.settings, np.zeros(1, int))
    with pytest.raises(TypeError, match=r"init: settings must be a Settings, got builtins\.dict"):
        LAYERS.init({}, np.zeros(1))
    statistics = case.step().statistics
    for replace in (1, np.ones(2), "no"):
        with pytest.raises(TypeError, match="update: replace must be True, False or None, got "):
            LAYERS.update(case.settings, case.state, statistics, replace=replace)
