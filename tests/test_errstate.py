"""Overflow and underflow are not raised, whatever NumPy is told to raise; they show in the result."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import diveq_core as dq
from capability_rows import ROWS, Estimation, listed
from libraries import library_named
from vectors import D, K, N, normal

SCALES = {"float32": (1e-40, 1e-38, 1e-30, 1.0, 1e30, 1e37), "float64": (1e-310, 1e-300, 1.0, 1e300, 1e307)}


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


def test_nor_in_a_library_that_computes_by_numpy() -> None:
    library = library_named("array_api_strict")
    x = library.to(np.array([[3e38, 3e38], [1e-38, 1e38]], np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, pullback = dq.vjp(x, x[:1, :], dq.DiVeQ(), noise=x)
        pullback(x)
        assert library.back(dq.codebook_loss(x, -x, dq.nearest(x, x))) == np.inf
