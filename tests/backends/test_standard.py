"""Libraries without a backend of their own: the array API standard alone."""

from __future__ import annotations

import numpy as np
import pytest

import diveq_core as dq
from diveq_core.arrays.registry import backend_of
from libraries import library_named

ESTIMATORS = [dq.STE(), dq.NSVQ(), dq.DiVeQ(), dq.Radial(dq.PseudoHuber(0.3)), dq.Radial(dq.Cosine())]
IDS = {"ids": repr}


def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((n, 3)).astype(np.float32) for n in (20, 6, 20)]


def everything(z, codebook, noise, estimator, to=lambda x: x):
    """Every verb and diagnostic, flattened."""
    z, codebook, noise = (to(x) for x in (z, codebook, noise))
    out, pullback = dq.vjp(z, codebook, estimator, noise=noise)
    _, tangent = dq.jvp(z, codebook, noise, codebook, estimator, noise=noise)
    rows = dq.lookup(out.indices, codebook)
    counts = dq.usage(out.indices, 6)
    return [
        *out,
        *pullback(noise),
        tangent,
        rows,
        counts,
        dq.perplexity(counts),
        dq.used_share(counts),
        dq.positive_share(noise, z, rows),
    ]


def assert_same(actual, expected) -> None:
    for x, same in zip(actual, expected, strict=True):
        # The same operations on numbers of order one, summed in another order.
        np.testing.assert_allclose(np.asarray(x), same, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
def test_the_same_numbers(estimator: dq.Estimator):
    library = library_named("array_api_strict")
    assert type(backend_of("test", x=library.to(np.zeros(1, np.float32)))).__module__.startswith("diveq_core.")
    assert_same(everything(*arrays(), estimator, library.to), everything(*arrays(), estimator))


@pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
def test_dask(estimator: dq.Estimator):
    dask_array = pytest.importorskip("dask.array")
    chunked = everything(*arrays(), estimator, lambda x: dask_array.from_array(x, chunks=(7, 3)))
    assert_same([x.compute() for x in chunked], everything(*arrays(), estimator))


@pytest.mark.parametrize("version", ["2022.12", "2023.12", "2024.12"])
@pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
def test_nothing_optional_of_the_standard_is_used(estimator: dq.Estimator, version: str):
    strict = pytest.importorskip("array_api_strict")
    with strict.ArrayAPIStrictFlags(
        api_version=version, boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
    ):
        assert_same(everything(*arrays(), estimator, strict.asarray), everything(*arrays(), estimator))


@pytest.mark.parametrize("version", ["2022.12", "2024.12"])
def test_the_upkeep_of_a_codebook_neither(version: str):
    strict = pytest.importorskip("array_api_strict")
    z, codebook, noise = arrays()

    def upkeep(to):
        found = dq.kmeans(to(z), to(codebook), iterations=3)
        counts = dq.usage(found.indices, 6)
        state, words = dq.ema_update(dq.ema_init(to(codebook)), to(z), to(codebook), found.indices)
        replaced = dq.replace_unused(
            words, counts, z=to(z), threshold=0.9, noise=to(np.hstack([noise[:6], noise[6:12, :2]]))
        )
        seeds = dq.kmeans_plus_plus(to(z), 4, noise=to(noise.reshape(-1)[:24].reshape(4, 3, 2)))
        return [*found, *state, words, replaced.codebook, seeds, dq.nearest_cosine(to(z), to(codebook))]

    with strict.ArrayAPIStrictFlags(api_version=version, boolean_indexing=False, data_dependent_shapes=False):
        found = upkeep(strict.asarray)
    assert_same(found, upkeep(lambda x: x))


@pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
def test_the_array_stays_on_its_device(estimator: dq.Estimator):
    strict = pytest.importorskip("array_api_strict")
    # The strict library's pretended devices refuse to be mixed.
    device = strict.Device("device1")
    results = everything(*arrays(), estimator, lambda x: strict.asarray(x, device=device))
    assert {x.device for x in results} == {device}


def test_any_object_that_draws_standard_normal_numbers_is_a_generator():
    library = library_named("array_api_strict")

    class Ones:
        def standard_normal(self, shape):
            return np.ones(shape)

    z, codebook, _ = (library.to(x) for x in arrays())
    actual = dq.quantize(z, codebook, dq.DiVeQ(), rng=Ones()).z_q
    expected = dq.quantize(*arrays()[:2], dq.DiVeQ(), noise=np.ones((20, 3), np.float32)).z_q
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-6)
