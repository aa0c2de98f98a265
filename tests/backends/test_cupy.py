"""CuPy: what is its own. The rest runs in every test over `library`."""

from __future__ import annotations

import numpy as np
import pytest

import diveq_core as dq
from libraries import library_named


@pytest.fixture
def cupy():
    library_named("cupy")
    import cupy

    return cupy


def test_the_backend_imports_without_a_device():
    pytest.importorskip("cupy", reason="CuPy is not installed")
    from diveq_cupy import backend

    assert repr(backend) == "<diveq_core backend cupy>"
    assert not backend.owns(np.zeros(2))


@pytest.mark.parametrize("kind", ["default_rng", "RandomState"])
def test_generators(cupy, kind: str):
    z, codebook = cupy.zeros((5, 3), "float32"), cupy.ones((4, 3), "float32")
    make = {"default_rng": cupy.random.default_rng, "RandomState": cupy.random.RandomState}[kind]
    first, second = (dq.quantize(z, codebook, dq.NSVQ(), rng=make(0)).z_q for _ in range(2))
    cupy.testing.assert_array_equal(first, second)
    assert first.dtype == cupy.float32


def test_everything_stays_on_the_device(cupy):
    rng = np.random.default_rng(0)
    z, codebook = (cupy.asarray(rng.standard_normal((n, 8)).astype(np.float32)) for n in (1000, 50))
    out, pullback = dq.vjp(z, codebook, dq.DiVeQ())
    for x in (*out, *pullback(z), dq.usage(out.indices, 50)):
        assert isinstance(x, cupy.ndarray)


def test_memory_of_the_search_is_bounded(cupy):
    z, codebook = cupy.zeros((1 << 17, 4), "float32"), cupy.ones((1 << 13, 4), "float32")
    pool = cupy.cuda.MemoryPool()
    cupy.cuda.set_allocator(pool.malloc)
    try:
        dq.nearest(z, codebook)
    finally:
        cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)
    # The matrix of distances would have 4 GiB.
    assert pool.total_bytes() < 1 << 30
