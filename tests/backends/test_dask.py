"""Dask arrays: block by block, one task for each, the tokens and vectors that NumPy gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import diveq_core as dq

da = pytest.importorskip("dask.array")

RNG = np.random.default_rng(0)
Z, CODEBOOK = (RNG.standard_normal((n, 8), dtype=np.float32) for n in (1000, 32))


@pytest.mark.parametrize("chunks", [(300, 8), (1000, 3), (1, 8), (1000, 8)], ids=str)
def test_tokens_and_codewords_are_those_of_numpy(chunks: tuple[int, int]) -> None:
    z, codebook = da.from_array(Z[:40] if chunks[0] == 1 else Z, chunks=chunks), da.from_array(CODEBOOK, chunks=(7, 5))
    expected = dq.nearest(Z, CODEBOOK)[: z.shape[0]]
    found = dq.nearest(z, codebook)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(found.compute(), expected)
    words = dq.lookup(found, codebook)
    assert (words.dtype, words.shape) == (CODEBOOK.dtype, z.shape)
    np.testing.assert_array_equal(words.compute(), CODEBOOK[expected])


def test_leading_axes_and_marks() -> None:
    z = Z.reshape(10, 100, 8).copy()
    z[2, 3, 4] = np.nan
    found = dq.nearest(da.from_array(z, chunks=(3, 100, 8)), da.from_array(CODEBOOK))
    np.testing.assert_array_equal(found.compute(), dq.nearest(z, CODEBOOK, check_finite=False))
    assert np.isnan(dq.lookup(found, da.from_array(CODEBOOK)).compute()[2, 3]).all()


TOKENIZERS: dict[str, Any] = {
    "plain": lambda: dq.Tokenizer(CODEBOOK),
    "stages": lambda: dq.Tokenizer(np.stack([CODEBOOK, CODEBOOK / 2]), dq.Residual(dq.STE(), 2)),
    "groups": lambda: dq.Tokenizer(CODEBOOK[:, :4], dq.Product(dq.STE(), 2)),
    "cosine": lambda: dq.Tokenizer(CODEBOOK, cosine=True),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer(kind: str) -> None:
    tokenizer, z = TOKENIZERS[kind](), da.from_array(Z, chunks=(300, 8))
    tokens = tokenizer.encode(z)
    np.testing.assert_array_equal(tokens.compute(), tokenizer.encode(Z))
    # Sums of float32 in another order.
    np.testing.assert_allclose(tokenizer.decode(tokens).compute(), tokenizer.decode(tokenizer.encode(Z)), rtol=1e-6)
    np.testing.assert_allclose(tokenizer.distortion(z).compute(), tokenizer.distortion(Z), rtol=1e-5)


def test_a_billion_vectors_are_planned_without_a_look_at_one() -> None:
    def never(*shape: Any) -> Any:
        raise AssertionError("nothing was to be computed")

    blocks = 1000
    z = da.map_blocks(never, chunks=((10**6,) * blocks, (8,)), dtype="f4", meta=np.empty((0, 0), "f4"))
    codebook, tokenizer = da.from_array(CODEBOOK), dq.Tokenizer(CODEBOOK)
    for tokens in (dq.nearest(z, codebook), tokenizer.encode(z)):
        assert len(dict(tokens.__dask_graph__())) <= 2 * blocks + 4
        assert len(dict(tokenizer.decode(tokens).__dask_graph__())) <= 3 * blocks + 8


def test_what_does_not_fit_is_refused_before_anything_is_computed() -> None:
    z = da.from_array(Z, chunks=(300, 8))
    with pytest.raises(ValueError, match=r"nearest: "):
        dq.nearest(z, da.from_array(CODEBOOK[:, :3]))
    with pytest.raises(TypeError, match=r"nearest: expected all arrays of one library"):
        dq.nearest(z, CODEBOOK)
    with pytest.raises(TypeError, match=r"nearest: z must be a dense array .* compute_chunk_sizes"):
        dq.nearest(z[z[:, 0] > 0], da.from_array(CODEBOOK))
