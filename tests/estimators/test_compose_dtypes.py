"""Residual and product quantization in every mixture of dtypes, and with stages that were dropped."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np
import pytest

import diveq_core as dq
from libraries import Library, library_named, standard_promotion

K, D, N = 6, 8, 40

COMPOSITES = {
    "residual": (dq.Residual(dq.STE(), 3), (3, K, D)),
    "one codebook": (dq.Residual(dq.STE(), 3), (K, D)),
    "product": (dq.Product(dq.STE(), 2), (2, K, D // 2)),
    "residual of products": (dq.Residual(dq.Product(dq.STE(), 2), 3), (3, 2, K, D // 2)),
    "product of residuals": (dq.Product(dq.Residual(dq.STE(), 3), 2), (2, 3, K, D // 2)),
    "residual of residuals": (dq.Residual(dq.Residual(dq.STE(), 2), 2), (2, 2, K, D)),
}


def dtypes(library: Library) -> list[Any]:
    of = [np.float32, *([np.float16] if library.float16 else []), *([np.float64] if library.float64 else [])]
    found = [library.to(np.zeros(1, dtype)).dtype for dtype in of]
    return found + ([library.bfloat16] if library.bfloat16 is not None else [])


def wide(library: Library) -> contextlib.AbstractContextManager[Any]:
    """float64 also in JAX."""
    if library.name != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.enable_x64(True)


@pytest.mark.parametrize("name", COMPOSITES)
def test_decoding_to_the_dtype_of_the_output_is_bit_for_bit(name: str, library: Library) -> None:
    """Whatever the dtypes of vectors and codebook are: sums are computed alike, and rounded once."""
    estimator, shape = COMPOSITES[name]
    rng = np.random.default_rng(0)
    z, words = rng.standard_normal((N, D)).astype("f4"), rng.standard_normal(shape).astype("f4")
    with wide(library), standard_promotion():
        for one, other in itertools.product(dtypes(library), repeat=2):
            z_, words_ = library.cast(library.to(z), one), library.cast(library.to(words), other)
            out = dq.quantize(z_, words_, estimator)
            decoded = dq.decode(out.indices, words_, estimator, dtype=out.z_q.dtype)
            assert decoded.dtype == out.z_q.dtype
            np.testing.assert_array_equal(library.back(decoded), library.back(out.z_q), err_msg=f"{one} {other}")
            plain = dq.decode(out.indices, words_, estimator)
            if "Residual" in name or library.back(words_).dtype.itemsize > 2:
                assert library.back(plain).dtype.itemsize >= 4
            if library.back(out.z_q).dtype.itemsize <= library.back(plain).dtype.itemsize:
                # By default a sum has the digits of float32, which z_q rounds if it has fewer.
                rounded = library.cast(plain, out.z_q.dtype)
                np.testing.assert_array_equal(library.back(rounded), library.back(out.z_q), err_msg=f"{one} {other}")


@pytest.mark.parametrize("estimator", [dq.STE(), dq.Residual(dq.STE(), 3)], ids=["STE", "residual"])
def test_decoding_to_another_dtype_rounds_once(estimator: Any, library: Library) -> None:
    if not library.float16:
        pytest.skip(f"{library.name} has no float16")
    rng = np.random.default_rng(1)
    staged = isinstance(estimator, dq.Residual)
    words = rng.standard_normal((3, K, D) if staged else (K, D)).astype(np.float16)
    indices = rng.integers(0, K, (N, 3) if staged else (N,))
    exact = sum(words[s].astype(float)[indices[:, s]] for s in range(3)) if staged else words.astype(float)[indices]
    words_, indices_ = library.to(words), library.to(indices)
    # Sums of three float16 numbers of order one are exact in float32.
    half = library.to(np.zeros(1, np.float16)).dtype
    want = exact.astype(np.float16)
    np.testing.assert_array_equal(library.back(dq.decode(indices_, words_, estimator, dtype=half)), want)
    single = dq.decode(indices_, words_, estimator, dtype=library.to(np.zeros(1, np.float32)).dtype)
    assert library.back(single).dtype == np.float32
    np.testing.assert_array_equal(library.back(single), exact.astype(np.float32))


def test_gradients_of_sixteen_bits_are_those_of_float32_rounded_once(library: Library) -> None:
    if not library.float16:
        pytest.skip(f"{library.name} has no float16")
    rng = np.random.default_rng(2)
    estimator = dq.Residual(dq.Rotation(), 3)
    z, g, dz = (rng.standard_normal((N, D)).astype(np.float16) for _ in range(3))
    words, dwords = (rng.standard_normal((3, K, D)).astype(np.float16) for _ in range(2))
    single = [x.astype(np.float32) for x in (z, words, dz, dwords, g)]
    want_out, want_pullback = dq.vjp(*single[:2], estimator)
    want = [want_out.z_q, want_pullback(single[4])[0], dq.jvp(*single[:4], estimator)[1]]
    half = [library.to(x) for x in (z, words, dz, dwords, g)]
    out, pullback = dq.vjp(*half[:2], estimator)
    got = [out.z_q, pullback(half[4])[0], dq.jvp(*half[:4], estimator)[1]]
    for ours, theirs in zip(got, want, strict=True):
        back = library.back(ours)
        assert back.dtype == np.float16
        # One rounding to float16, and one to the other side where float32 differs in its last digits.
        np.testing.assert_allclose(back, theirs, rtol=1.1 * 2.0**-11, atol=1e-5)


# Stages that were dropped


def test_a_dropped_stage_adds_nothing(library: Library) -> None:
    rng = np.random.default_rng(3)
    words = rng.standard_normal((3, K, D)).astype("f4")
    indices = np.array([[3, -1, -1], [3, -1, 2], [1, 4, -1], [-1, 2, 2], [-1, -1, -1], [1, 2, 3]])
    lost = np.full(D, np.nan)
    first, second, third = words
    want = np.stack([first[3], first[3] + third[2], first[1] + second[4], lost, lost, first[1] + second[2] + third[3]])
    estimator = dq.Residual(dq.STE(), 3)
    decoded = dq.decode(library.to(indices), library.to(words), estimator)
    np.testing.assert_array_equal(library.back(decoded), want)
    z = library.to(rng.standard_normal((6, D)).astype("f4"))
    out = dq.quantize(z, library.to(words), estimator, indices=library.to(indices))
    np.testing.assert_array_equal(library.back(out.z_q), want)
    np.testing.assert_array_equal(library.back(out.indices), indices)


def test_dropped_in_parts(library: Library) -> None:
    """A group of a product is lost by itself, and a residual with its first stage."""
    words = np.arange(2 * 2 * K * 2).reshape(2, 2, K, 2).astype("f4")
    nan = [np.nan] * 2
    products, residuals = dq.Residual(dq.Product(dq.STE(), 2), 2), dq.Product(dq.Residual(dq.STE(), 2), 2)
    doubly = dq.Residual(dq.Residual(dq.STE(), 2), 2)
    cases = [
        (products, [[1, 2], [3, -1]], [*(words[0, 0, 1] + words[1, 0, 3]), *words[0, 1, 2]]),
        (products, [[-1, 2], [3, -1]], [*nan, *words[0, 1, 2]]),
        (residuals, [[1, -1], [2, 3]], [*words[0, 0, 1], *(words[1, 0, 2] + words[1, 1, 3])]),
        (residuals, [[-1, 1], [2, -1]], [*nan, *words[1, 0, 2]]),
        (doubly, [[1, -1], [2, -1]], words[0, 0, 1] + words[1, 0, 2]),
        (doubly, [[1, 2], [-1, 3]], words[0, 0, 1] + words[0, 1, 2]),
        (doubly, [[-1, 2], [1, 3]], nan),
    ]
    for estimator, indices, want in cases:
        there = library.to(np.array([indices]))
        decoded = dq.decode(there, library.to(words), estimator)
        np.testing.assert_array_equal(library.back(decoded)[0], want)
        z = library.to(np.zeros((1, len(want)), "f4"))
        out = dq.quantize(z, library.to(words), estimator, indices=there)
        np.testing.assert_array_equal(library.back(out.z_q)[0], want)
        np.testing.assert_array_equal(library.back(out.indices)[0], indices)


ESTIMATORS = [dq.STE(), dq.DiVeQDetach(), dq.NSVQ(), dq.Rotation(), dq.Radial(dq.Cosine()), dq.Radial(dq.Power(0.5))]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_the_gradient_passes_by_a_dropped_stage(estimator: Any, library: Library) -> None:
    """Each vector's derivatives are those of the stages that it kept."""
    rng = np.random.default_rng(4)
    z, g, dz = (rng.standard_normal((3, D)).astype("f4") for _ in range(3))
    words, dwords = (rng.standard_normal((3, K, D)).astype("f4") for _ in range(2))
    noise = rng.standard_normal((3, 3, D)).astype("f4")
    indices = np.array([[0, -1, 2], [1, -1, -1], [3, 0, -1]])
    arrays = [library.to(x) for x in (z, words, dz, dwords)]
    options = {"noise": library.to(noise), "indices": library.to(indices)}
    out, pullback = dq.vjp(*arrays[:2], dq.Residual(estimator, 3), **options)
    _, tangent = dq.jvp(*arrays, dq.Residual(estimator, 3), **options)
    g_z, g_words = (library.back(x) for x in pullback(library.to(g)))
    want = np.zeros_like(words)
    for row, own in enumerate(indices):
        kept = np.flatnonzero(own >= 0)
        here = {"noise": noise[kept][:, row : row + 1], "indices": own[kept][None]}
        alone, back = dq.vjp(z[row : row + 1], words[kept], dq.Residual(estimator, len(kept)), **here)
        g_row, g_kept = back(g[row : row + 1])
        want[kept] += g_kept
        moved = dq.jvp(
            z[row : row + 1], words[kept], dz[row : row + 1], dwords[kept], dq.Residual(estimator, len(kept)), **here
        )[1]
        for ours, theirs in ((out.z_q, alone.z_q), (tangent, moved)):
            # float32 of order one through three stages.
            np.testing.assert_allclose(library.back(ours)[row], theirs[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(g_z[row], g_row[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(g_words, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(g_words[1, 1:], 0)


@pytest.mark.parametrize("name", ["torch", "jax"])
@pytest.mark.parametrize("estimator", [dq.DiVeQDetach(), dq.Radial(dq.Power(0.5)), dq.Radial(dq.Cosine())], ids=repr)
def test_automatic_differentiation_passes_by_it_too(name: str, estimator: Any) -> None:
    library = library_named(name)
    rng = np.random.default_rng(5)
    z, words = (library.to(rng.standard_normal(shape).astype("f4")) for shape in ((3, D), (3, K, D)))
    indices = library.to(np.array([[0, -1, 2], [1, -1, -1], [3, 0, -1]]))
    g = library.to(rng.standard_normal((3, D)).astype("f4"))
    residual = dq.Residual(estimator, 3)
    want = [library.back(x) for x in dq.vjp(z, words, residual, indices=indices)[1](g)]

    def loss(z: Any, words: Any) -> Any:
        return (dq.quantize(z, words, residual, indices=indices).z_q * g).sum()

    if name == "torch":
        import torch

        leaves = [x.clone().requires_grad_() for x in (z, words)]
        first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum((x * x).sum() for x in first), leaves[:1])
    else:
        import jax

        first = jax.grad(loss, (0, 1))(z, words)
        second = jax.grad(lambda z: sum((x * x).sum() for x in jax.grad(loss, (0, 1))(z, words)))(z)
        second = [second]
    for ours, theirs in zip(first, want, strict=True):
        # The same few operations in float32, perhaps in another order.
        np.testing.assert_allclose(library.back(ours), theirs, rtol=1e-5, atol=1e-5)
    assert np.isfinite(library.back(second[0])).all()


# Dtypes of indices

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


def of_integers(library: Library, values: Any, dtype: str) -> Any:
    with wide(library):
        return library.to(np.array(values, dtype))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_indices_of_any_integer_dtype(dtype: str, library: Library) -> None:
    """What an unsigned dtype holds is a number, never the mark."""
    count, last = 300, 127 if dtype == "int8" else 255
    rng = np.random.default_rng(6)
    z = rng.standard_normal((2, D)).astype("f4")
    words = rng.standard_normal((2, count, D)).astype("f4")
    with wide(library):
        single, staged = of_integers(library, [last, 3], dtype), of_integers(library, [[last, 3], [0, last]], dtype)
        z_, one, all_ = (library.to(x) for x in (z, words[0], words))
        residual = dq.Residual(dq.DiVeQDetach(), 2)
        sums = np.stack([words[0, last] + words[1, 3], words[0, 0] + words[1, last]])
        np.testing.assert_array_equal(library.back(dq.lookup(single, one)), words[0, [last, 3]])
        np.testing.assert_array_equal(library.back(dq.decode(single, one, dq.STE())), words[0, [last, 3]])
        np.testing.assert_array_equal(library.back(dq.decode(staged, all_, residual)), sums)
        for out in (
            dq.quantize(z_, all_, residual, indices=staged),
            dq.vjp(z_, all_, residual, indices=staged)[0],
            dq.jvp(z_, all_, z_, all_, residual, indices=staged)[0],
        ):
            np.testing.assert_array_equal(library.back(out.z_q), sums)
            np.testing.assert_array_equal(library.back(out.indices), [[last, 3], [0, last]])
        for verb in (dq.quantize, lambda *x, **o: dq.vjp(*x, **o)[0]):
            out = verb(z_, one, dq.STE(), indices=single)
            np.testing.assert_array_equal(library.back(out.indices), [last, 3])
        np.testing.assert_array_equal(np.flatnonzero(library.back(dq.usage(single, count))), [3, last])
        error = ((z - words[0, [last, 3]]) ** 2).mean()
        for loss in (dq.codebook_loss, dq.commitment_loss):
            # A sum of sixteen squares in float32.
            np.testing.assert_allclose(library.back(loss(z_, one, single)), error, rtol=1e-6)
        _, moved = dq.ema_update(dq.ema_init(one), z_, one, single)
        changed = np.flatnonzero(np.any(library.back(moved) != words[0], axis=1))
        np.testing.assert_array_equal(changed, [3, last])
        levels = [17, 17]
        want = dq.decode(np.array([last, 3]), None, dq.FSQ(levels))
        np.testing.assert_array_equal(library.back(dq.decode(single, None, dq.FSQ(levels))), want)
        positions = np.array([0.25, 0.5], "f4")
        want = dq.decode_curve(np.array([last, 3]), positions, words[0])
        np.testing.assert_array_equal(library.back(dq.decode_curve(single, library.to(positions), one)), want)


def test_truth_values_are_no_indices(library: Library) -> None:
    words = library.to(np.ones((2, K, D), "f4"))
    one, z = words[0, ...], library.to(np.ones((2, D), "f4"))
    single, staged = library.to(np.array([True, False])), library.to(np.ones((2, 2), bool))
    residual = dq.Residual(dq.STE(), 2)
    for call in (
        lambda: dq.lookup(single, one),
        lambda: dq.decode(staged, words, residual),
        lambda: dq.quantize(z, words, residual, indices=staged),
        lambda: dq.quantize(z, one, dq.STE(), indices=single),
        lambda: dq.usage(single, K),
        lambda: dq.codebook_loss(z, one, single),
        lambda: dq.ema_update(dq.ema_init(one), z, one, single),
        lambda: dq.decode(single, None, dq.FSQ([3])),
        lambda: dq.decode_curve(single, library.to(np.zeros(2, "f4")), one),
    ):
        with pytest.raises(TypeError, match=r"must have an integer dtype, got .*bool"):
            call()


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32", "uint64"])
@pytest.mark.parametrize("name", ["jax", "mlx"])
def test_what_is_out_of_range_is_nothing_where_it_is_not_refused(name: str, dtype: str) -> None:
    """Neither the mark nor another array's memory; for an unsigned dtype also what wraps to -1."""
    library = library_named(name)
    with wide(library):
        for index in (K, K + 1, 1000, np.iinfo(dtype).max):
            indices, words = of_integers(library, [1, index], dtype), library.to(np.ones((K, 2), "f4"))
            found = library.back(dq.lookup(indices, words))
            np.testing.assert_array_equal(found, [[1, 1], [np.nan, np.nan]])
            np.testing.assert_array_equal(library.back(dq.usage(indices, K)), np.eye(K)[1])
            _, moved = dq.ema_update(dq.ema_init(words), library.to(np.full((2, 2), 3.0, "f4")), words, indices)
            np.testing.assert_array_equal(library.back(moved), np.where(np.arange(K)[:, None] == 1, 3, 1) * np.ones(2))
            # In a later stage it is no dropped one.
            staged = of_integers(library, [[1, index]], dtype)
            assert np.all(np.isnan(library.back(dq.decode(staged, words, dq.Residual(dq.STE(), 2)))))


def test_a_later_stage_that_finds_nothing_marks_the_vector(library: Library) -> None:
    """Else its indices would decode to a sum of fewer stages, where training saw NaN."""
    words = np.random.default_rng(13).standard_normal((2, K, D)).astype("f4")
    words[1, 0, 0] = np.nan
    z, words_ = library.to(np.ones((3, D), "f4")), library.to(words)
    estimator = dq.Residual(dq.DiVeQDetach(), 2)
    for out in (
        dq.quantize(z, words_, estimator, check_finite=False),
        dq.vjp(z, words_, estimator, check_finite=False)[0],
        dq.jvp(z, words_, z, words_, estimator, check_finite=False)[0],
    ):
        assert np.all(np.isnan(library.back(out.z_q)))
        np.testing.assert_array_equal(library.back(out.indices), np.full((3, 2), -1))
        assert np.all(np.isnan(library.back(dq.decode(out.indices, words_, estimator))))


def test_numpy_refuses_what_wraps_to_the_mark() -> None:
    words = np.ones((2, K, D))
    with pytest.raises(ValueError, match=r"^decode: indices must lie in \[0, K\) with K = 6, .* 18446744073709551615"):
        dq.decode(np.array([[1, 2**64 - 1]], np.uint64), words, dq.Residual(dq.STE(), 2))


@pytest.mark.parametrize("name", COMPOSITES)
def test_decoding_and_given_indices_compile(name: str) -> None:
    torch = pytest.importorskip("torch")
    estimator, shape = COMPOSITES[name]
    generator = torch.Generator().manual_seed(0)
    z, words = (torch.randn(s, generator=generator) for s in ((N, D), shape))
    indices = dq.quantize(z, words, estimator).indices
    indices[: N // 2, 1] = -1
    options = {"fullgraph": True, "backend": "eager"}
    decoded = dq.decode(indices, words, estimator)
    again = torch.compile(lambda i: dq.decode(i, words, estimator), **options)(indices)
    torch.testing.assert_close(again, decoded, rtol=0, atol=0, equal_nan=True)
    given = torch.compile(lambda z, i: dq.quantize(z, words, estimator, indices=i).z_q, **options)(z, indices)
    torch.testing.assert_close(given, decoded, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_residual_codebook_in_sixteen_bits_decodes_to_what_wider_vectors_gave(dtype: str, library: Library) -> None:
    rng = np.random.default_rng(7)
    z, words = rng.standard_normal((N, D)).astype("f4"), rng.standard_normal((4, K, D)).astype("f4")
    kind = (
        library.bfloat16
        if dtype == "bfloat16"
        else library.to(words[:1].astype("f2")).dtype
        if library.float16
        else None
    )
    if kind is None:
        pytest.skip(f"{library.name} has no {dtype}")
    with standard_promotion():
        narrow = library.cast(library.to(words), kind)
        out = dq.quantize(library.to(z), narrow, dq.Residual(dq.STE(), 4))
        decoded = dq.decode(out.indices, narrow, dq.Residual(dq.STE(), 4))
    assert decoded.dtype == out.z_q.dtype
    np.testing.assert_array_equal(library.back(decoded), library.back(out.z_q))


@pytest.mark.parametrize("name", ["torch", "jax", "mlx", "array_api_strict"])
def test_only_the_mark_is_a_dropped_stage(name: str) -> None:
    library = library_named(name)
    words = library.to(np.arange(8, dtype=np.float32).reshape(2, 2, 2))
    decoded = library.back(dq.decode(library.to(np.array([[1, -2], [1, -1]])), words, dq.Residual(dq.STE(), 2)))
    np.testing.assert_array_equal(decoded, [[np.nan] * 2, [2, 3]])
