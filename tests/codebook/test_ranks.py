"""Sums over ranks: in place or not, of any seed, and what is said where ranks differ."""

from __future__ import annotations

import numpy as np
import pytest

import diveq_core as dq
from capability_rows import OTHERS
from diveq_core.arrays.registry import backend_of
from diveq_core.codebook.ranks import Ranks
from libraries import Library, library_named
from ranks import Simulated, in_threads
from vectors import D, K, N, normal


def in_place(all_reduce):
    """The same sum, into its argument, as torch.distributed and MPI do it."""

    def reduce(x):
        if isinstance(x, np.generic):
            # Nothing to write to.
            return all_reduce(x)
        x[...] = all_reduce(x + 0)
        return x

    return reduce


def everything(library: Library, rank: int, all_reduce, seed: int | None = None, own: slice | None = None):
    """Every function that sums, on a rank's part of the vectors; its arguments, and what it gives."""
    z = normal(2 * N, D)[slice(rank, None, 2) if own is None else own].astype(np.float32)
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


def test_every_summing_function_is_here() -> None:
    assert {"ema_update", "replace_unused", "kmeans", "kmeans_plus_plus", "curve_init"} <= set(OTHERS)


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


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_rank_without_vectors_takes_part(name: str) -> None:
    """It ends with what a rank that has them all does; had it refused, the other would wait for good."""
    library = library_named(name)
    _, alone = everything(library, 0, None, own=slice(0, None))
    ranks = Simulated(2).run(lambda rank, sum_: everything(library, rank, sum_, own=slice(0, -rank * 2 * N or None)))
    for full, nothing, expected in zip(ranks[0][1], ranks[1][1], alone, strict=True):
        np.testing.assert_array_equal(library.back(nothing), library.back(full))
        np.testing.assert_allclose(library.back(full), library.back(expected), rtol=1e-5, atol=1e-6)


def test_clusters_of_a_rank_without_vectors() -> None:
    z = [np.ones((2, 1, D)), np.ones((2, 0, D))]
    found = Simulated(2).run(lambda rank, sum_: dq.kmeans(z[rank], np.zeros((1, D)), all_reduce=sum_))
    assert [each.indices.shape for each in found] == [(2, 1), (2, 0)]
    np.testing.assert_array_equal(found[1].codebook, np.ones((1, D)))
    with pytest.raises(ValueError, match=r"^kmeans: z must have at least one finite vector, got none of 0$"):
        dq.kmeans(z[1], 2, all_reduce=lambda x: x)


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
        (lambda x: x.astype("f4"), r"got float32 \(1, 4\)"),
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
