"""Results have memory of their own, and calls take little of it."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import diveq_core as dq
from capability_rows import ROWS, listed
from libraries import library_named
from vectors import D, K, N, normal


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
