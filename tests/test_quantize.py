"""The verbs: shapes, dtypes, memory layouts, noise and indices, in every library."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import diveq_core as dq
from libraries import Library, assert_close, float64_in, generators, library_named, standard_promotion

ESTIMATORS = [
    dq.STE(),
    dq.NSVQ(),
    dq.DiVeQ(),
    dq.DiVeQDetach(),
    dq.Radial(dq.Power(0.5)),
    dq.Radial(dq.PseudoHuber(0.3)),
    dq.Radial(dq.PNorm(3.0)),
    dq.Radial(dq.Mahalanobis(np.diag([1.0, 2.0, 3.0]))),
    dq.Radial(dq.Cosine()),
]
HARD = [estimator for estimator in ESTIMATORS if estimator.hard]
NOISY = [estimator for estimator in ESTIMATORS if estimator.noisy]
IDS = {"ids": repr}

K, D = 7, 3

# Two libraries add up D numbers and divide in their own order: a few units in the last place of numbers of order 10.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def arrays(*shape: int, count: int = K, width: int = D, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z, codebook and noise, float32."""
    rng = np.random.default_rng(seed)
    shapes = (*shape, width), (count, width), (*shape, width)
    return tuple(rng.standard_normal(s).astype(np.float32) for s in shapes)


def index_dtype(library: Library) -> np.dtype:
    x = library.to(np.zeros((1, 1), np.float32))
    return library.back(dq.nearest(x, x)).dtype


SHAPES = [(), (5,), (2, 3), (2, 1, 3), (0,), (2, 0), (0, 4)]


@pytest.mark.parametrize(
    ("estimator", "shape"),
    # Only the first few differ in form: without a codebook's gradient, soft, hard.
    [(e, s) for i, e in enumerate(ESTIMATORS) for s in (SHAPES if i < 4 else SHAPES[2:3] + SHAPES[4:5])],
    ids=str,
)
def test_every_shape(library: Library, estimator: dq.Estimator, shape: tuple[int, ...]):
    z, codebook, noise = arrays(*shape)
    z_, codebook_, noise_ = (library.to(x) for x in (z, codebook, noise))
    indices = np.asarray(dq.nearest(z, codebook), index_dtype(library)).reshape(shape)
    assert_close(dq.nearest(z_, codebook_), indices, library)

    out = dq.quantize(z_, codebook_, estimator, noise=noise_)
    expected, expected_pullback = dq.vjp(z, codebook, estimator, noise=noise)
    assert_close(out.indices, indices, library)
    assert_close(out.z_q, expected.z_q, library, **CLOSE)

    out, pullback = dq.vjp(z_, codebook_, estimator, noise=noise_)
    assert_close(out.z_q, expected.z_q, library, **CLOSE)
    for cotangent, same in zip(pullback(noise_), expected_pullback(noise), strict=True):
        assert_close(cotangent, same, library, **CLOSE)

    out, tangent = dq.jvp(z_, codebook_, noise_, codebook_, estimator, noise=noise_)
    assert_close(out.z_q, expected.z_q, library, **CLOSE)
    assert_close(tangent, dq.jvp(z, codebook, noise, codebook, estimator, noise=noise)[1], library, **CLOSE)

    rows = dq.lookup(out.indices, codebook_)
    assert_close(rows, codebook[indices], library)


@pytest.mark.parametrize(("count", "width"), [(1, 3), (5, 1), (1, 1)])
@pytest.mark.parametrize(
    "estimator", [e for e in ESTIMATORS if not isinstance(getattr(e, "radius", None), dq.Mahalanobis)], **IDS
)
def test_one_codeword_and_one_coordinate(library: Library, estimator: dq.Estimator, count: int, width: int):
    z, codebook, noise = arrays(4, count=count, width=width)
    out, pullback = dq.vjp(*(library.to(x) for x in (z, codebook)), estimator, noise=library.to(noise))
    expected, expected_pullback = dq.vjp(z, codebook, estimator, noise=noise)
    assert_close(out.z_q, expected.z_q, library, **CLOSE)
    for cotangent, same in zip(pullback(library.to(noise)), expected_pullback(noise), strict=True):
        assert np.isfinite(same).all()
        assert_close(cotangent, same, library, **CLOSE)


@pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
def test_the_verbs_agree_bit_for_bit(library: Library, estimator: dq.Estimator):
    z, codebook, noise = (library.to(x) for x in arrays(4, 5))
    first = dq.quantize(z, codebook, estimator, noise=noise)
    for out in (
        dq.vjp(z, codebook, estimator, noise=noise)[0],
        dq.jvp(z, codebook, z, codebook, estimator, noise=noise)[0],
        dq.quantize(z, codebook, estimator, noise=noise, indices=dq.nearest(z, codebook)),
    ):
        assert_close(out.z_q, library.back(first.z_q), library)
        assert_close(out.indices, library.back(first.indices), library)


@pytest.mark.parametrize("estimator", HARD, **IDS)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_hard_output_is_the_codeword_bit_for_bit(library: Library, estimator: dq.Estimator, offset: float):
    z, codebook, _ = (library.to(x + np.float32(offset)) for x in arrays(50))
    out = dq.quantize(z, codebook, estimator)
    assert_close(out.z_q, library.back(dq.lookup(out.indices, codebook)), library)


@pytest.mark.parametrize("verb", [dq.quantize, dq.vjp, dq.jvp])
def test_given_indices_are_used(library: Library, verb):
    z, codebook, _ = (library.to(x) for x in arrays(2, 3))
    indices = library.to(np.array([[0, 6, 6], [1, 0, 2]]))
    tangents = (z, codebook) if verb is dq.jvp else ()
    out = verb(z, codebook, *tangents, dq.DiVeQDetach(), indices=indices)
    out = out if verb is dq.quantize else out[0]
    assert_close(out.indices, library.back(indices), library)
    assert_close(out.z_q, library.back(codebook)[[[0, 6, 6], [1, 0, 2]]], library)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32"])
def test_tokens_stored_in_a_narrow_dtype_decode(library: Library, dtype: str):
    # More codewords than an int8 or uint8 can count.
    _, codebook, _ = arrays(count=300)
    z = codebook[[0, 100, 100, 5]]
    tokens = library.to(np.array([0, 100, 100, 5], dtype))
    assert_close(dq.lookup(tokens, library.to(codebook)), z, library)
    out, pullback = dq.vjp(library.to(z), library.to(codebook), dq.DiVeQDetach(), indices=tokens)
    assert_close(out.z_q, z, library)
    assert_close(pullback(library.to(z))[1], np.zeros_like(codebook), library)
    assert library.back(dq.usage(tokens, 300))[[0, 5, 100]].tolist() == [1, 1, 2]


def test_lookup_marks_minus_one(library: Library):
    _, codebook, _ = arrays()
    expected = codebook[[2, -1, 0]]
    expected[1] = np.nan
    marked = library.to(np.array([2, -1, 0]))
    assert_close(dq.lookup(marked, library.to(codebook)), expected, library)
    z, g = library.to(np.ones((3, D), np.float32)), library.to(np.ones((3, D), np.float32))
    out, pullback = dq.vjp(z, library.to(codebook), dq.DiVeQDetach(), indices=marked)
    assert_close(out.z_q, expected, library)
    g_codebook = library.back(pullback(g)[1])
    # A library by the standard alone adds up by a matrix product, in which NaN spreads.
    assert np.isfinite(g_codebook).all() or library.name == "array_api_strict"


def test_what_is_not_finite_decodes_to_what_quantize_gave(library: Library):
    z, codebook, _ = arrays(4)
    z[1, 2] = np.nan
    z_, codebook_ = library.to(z), library.to(codebook)
    with np.errstate(invalid="ignore"):
        for estimator in HARD:
            out = dq.quantize(z_, codebook_, estimator, check_finite=False)
            assert library.back(out.indices)[1] == -1
            assert_close(dq.decode(out.indices, codebook_, estimator), library.back(out.z_q), library)


@pytest.mark.parametrize("estimator", [dq.NSVQ(), dq.DiVeQ(), dq.DiVeQ(0.0), dq.Rotation()], **IDS)
def test_indices_of_estimators_with_noise_decode_to_the_codeword(library: Library, estimator: dq.Estimator):
    z, codebook, noise = (library.to(x) for x in arrays(5))
    out = dq.quantize(z, codebook, estimator, noise=noise)
    words = library.back(codebook)[library.back(out.indices)]
    assert_close(dq.decode(out.indices, codebook, estimator), words, library)


@pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
def test_sixteen_bits_are_computed_in_float32(library: Library, estimator: dq.Estimator):
    if not library.float16:
        pytest.skip(f"{library.name} has no float16")
    z, codebook, noise = (x.astype(np.float16) for x in arrays(20))
    out, pullback = dq.vjp(*(library.to(x) for x in (z, codebook)), estimator, noise=library.to(noise))
    wide, wide_pullback = dq.vjp(*(x.astype(np.float32) for x in (z, codebook)), estimator, noise=noise.astype("f4"))
    # Computed in float32 and rounded once; half a unit may go to the other side.
    once = {"rtol": 2 * float(np.finfo(np.float16).eps), "atol": 1e-6}
    assert_close(out.z_q, wide.z_q.astype(np.float16), library, **once)
    for cotangent, same in zip(pullback(library.to(noise)), wide_pullback(noise.astype("f4")), strict=True):
        assert_close(cotangent, same.astype(np.float16), library, **once)


@pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
def test_bfloat16(library: Library, estimator: dq.Estimator):
    if library.bfloat16 is None:
        pytest.skip(f"{library.name} has no bfloat16")
    z, codebook, noise = (library.cast(library.to(x), library.bfloat16) for x in arrays(20))
    wide = [library.back(x) for x in (z, codebook, noise)]
    out, pullback = dq.vjp(z, codebook, estimator, noise=noise)
    expected, expected_pullback = dq.vjp(*wide[:2], estimator, noise=wide[2])
    # One rounding to 8 bits, and half a unit to the other side.
    once = {"rtol": 2**-7, "atol": 1e-6}
    for x, same in zip((out.z_q, *pullback(noise)), (expected.z_q, *expected_pullback(wide[2])), strict=True):
        assert x.dtype == library.bfloat16
        assert_close(x, same, library, **once)


@pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32"), ("float16", "float32")], ids=str)
def test_mixed_dtypes(library: Library, estimator: dq.Estimator, dtypes: tuple[str, str]):
    if "float16" in dtypes and not library.float16:
        pytest.skip(f"{library.name} has no float16")
    z, codebook, noise = arrays(6)
    z, codebook, noise = z.astype(dtypes[0]), codebook.astype(dtypes[1]), noise.astype(dtypes[0])
    result = np.result_type(*dtypes)
    with float64_in(library), standard_promotion():
        out, pullback = dq.vjp(library.to(z), library.to(codebook), estimator, noise=library.to(noise))
        assert library.back(out.z_q).dtype == result
        g_z, g_codebook = pullback(library.to(noise.astype(result)))
        assert library.back(g_z).dtype == z.dtype
        assert library.back(g_codebook).dtype == codebook.dtype
        tangent = dq.jvp(*map(library.to, (z, codebook, z, codebook)), estimator, noise=library.to(noise))[1]
        assert library.back(tangent).dtype == result


@pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
def test_float64_keeps_its_digits(library: Library, estimator: dq.Estimator):
    z, codebook, noise = (x.astype(np.float64) / 3 for x in arrays(6))
    with float64_in(library):
        out, pullback = dq.vjp(library.to(z), library.to(codebook), estimator, noise=library.to(noise))
        expected, expected_pullback = dq.vjp(z, codebook, estimator, noise=noise)
        # As CLOSE, in float64.
        assert_close(out.z_q, expected.z_q, library, rtol=1e-13, atol=1e-13)
        for cotangent, same in zip(pullback(library.to(noise)), expected_pullback(noise), strict=True):
            assert_close(cotangent, same, library, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("estimator", [dq.DiVeQ(), dq.DiVeQDetach(), dq.Radial(dq.PseudoHuber(0.3))], **IDS)
@np.errstate(invalid="ignore")  # NumPy says so besides
def test_many_rows(library: Library, estimator: dq.Estimator):
    # More than a backend may take at a time, with a remainder, and one that is not finite.
    z, codebook, noise = arrays(40_009, width=8)
    z[30_000, 3] = np.nan
    arguments = {"noise": library.to(noise), "check_finite": False}
    out, pullback = dq.vjp(library.to(z), library.to(codebook), estimator, **arguments)
    expected, g_z, g_codebook = by_definition(z, codebook, estimator, noise, library.back(out.indices))
    assert_close(out.z_q, expected, library, **CLOSE)
    cotangents = pullback(library.to(noise))
    assert_close(cotangents[0], g_z, library, **CLOSE)
    # A sum of 40009 / K numbers of order one, added in float32 in any order; the one that is not finite is in none.
    assert_close(cotangents[1], g_codebook, library, rtol=1e-4, atol=0.02)


def by_definition(z, codebook, estimator, noise, indices):
    """z_q and both cotangents of ``noise``, row by row in float64."""
    z, codebook, g = (x.astype(np.float64) for x in (z, codebook, noise))
    d = codebook[indices] - z
    rho = np.linalg.norm(d, axis=1, keepdims=True)
    w = d + getattr(estimator, "sigma", 0.0) * g
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    if isinstance(estimator, dq.Radial):
        g_q = (g * d).sum(axis=1, keepdims=True) * d / (rho**2 + estimator.radius.delta**2)
    else:
        g_q = (g * w).sum(axis=1, keepdims=True) * d / rho
    z_q = codebook[indices] if estimator.hard else z + rho * w
    z_q[indices < 0] = np.nan
    g_codebook = np.zeros_like(codebook)
    np.add.at(g_codebook, indices[indices >= 0], g_q[indices >= 0])
    g_z = g - g_q
    g_z[indices < 0] = np.nan
    return tuple(x.astype(np.float32) for x in (z_q, g_z, g_codebook))


def strided(x):
    """The same values, every other element of a larger array."""
    wide = np.repeat(np.repeat(x, 2, axis=0), 2, axis=-1)
    return wide[::2, ..., ::2]


LAYOUTS = {
    "strided": strided,
    "reversed": lambda x: np.ascontiguousarray(x[::-1, ..., ::-1])[::-1, ..., ::-1],
    "fortran": np.asfortranarray,
    "read-only": lambda x: np.broadcast_to(x, x.shape),
    "foreign byte order": lambda x: x.astype(x.dtype.newbyteorder()),
    "unaligned": lambda x: np.frombuffer(b"." + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
def test_numpy_layouts(estimator: dq.Estimator, layout: str):
    contiguous = arrays(4, 5)
    z, codebook, noise = (LAYOUTS[layout](x) for x in contiguous)
    expected, expected_pullback = dq.vjp(*contiguous[:2], estimator, noise=contiguous[2])
    out, pullback = dq.vjp(z, codebook, estimator, noise=noise)
    np.testing.assert_array_equal(out.indices, expected.indices)
    np.testing.assert_allclose(out.z_q, expected.z_q, **CLOSE)
    for cotangent, same in zip(pullback(noise), expected_pullback(contiguous[2]), strict=True):
        np.testing.assert_allclose(cotangent, same, **CLOSE)


@pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
def test_views(library: Library, estimator: dq.Estimator):
    contiguous = arrays(4, 6)
    z, codebook, noise = (library.to(np.repeat(x, 2, axis=-1))[..., ::2] for x in contiguous)
    expected, expected_pullback = dq.vjp(*contiguous[:2], estimator, noise=contiguous[2])
    out, pullback = dq.vjp(z, codebook, estimator, noise=noise)
    assert_close(out.z_q, expected.z_q, library, **CLOSE)
    for cotangent, same in zip(pullback(noise), expected_pullback(contiguous[2]), strict=True):
        assert_close(cotangent, same, library, **CLOSE)


@pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
def test_inputs_are_left_alone(library: Library, estimator: dq.Estimator):
    originals = arrays(5)
    z, codebook, noise = (library.to(x) for x in originals)
    _, pullback = dq.vjp(z, codebook, estimator, noise=noise)
    first = [library.back(x).copy() for x in pullback(z)]
    for x, expected in zip(pullback(z), first, strict=True):
        assert_close(x, expected, library)
    for x, original in zip((z, codebook, noise), originals, strict=True):
        assert_close(x, original, library)


@pytest.mark.parametrize("verb", [dq.quantize, dq.vjp])
@pytest.mark.parametrize("estimator", NOISY, **IDS)
def test_the_same_seed_draws_the_same_noise(library: Library, estimator: dq.Estimator, verb):
    z, codebook, _ = (library.to(x) for x in arrays(5))

    def draw(seed: int):
        out = verb(z, codebook, estimator, rng=generators(library.name, seed))
        return library.back((out if verb is dq.quantize else out[0]).z_q)

    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).all(axis=-1).any()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_drawn_noise_is_standard_normal(library: Library, dtype: str):
    if dtype == "float16" and not library.float16:
        pytest.skip(f"{library.name} has no float16")
    with float64_in(library):
        # With z = 0 and one codeword at distance 1, NSVQ's output is the direction of the noise; in one
        # dimension its sign, and for DiVeQ with sigma = 1 the chance of the far side is Phi(-1) = 0.1587.
        z, codebook = library.to(np.zeros((4000, 1), dtype)), library.to(np.ones((1, 1), dtype))
        nsvq = library.back(dq.quantize(z, codebook, dq.NSVQ(), rng=generators(library.name, 0)).z_q)
        diveq = library.back(dq.quantize(z, codebook, dq.DiVeQ(1.0), rng=generators(library.name, 1)).z_q)
    # A length times its inverse: one rounding from 1.
    np.testing.assert_allclose(np.abs(nsvq), 1.0, rtol=np.finfo(dtype).eps)
    # Five standard deviations of a share of 4000.
    assert abs((nsvq < 0).mean() - 0.5) < 5 * (0.25 / 4000) ** 0.5
    assert abs((diveq < 0).mean() - 0.1587) < 5 * (0.1587 * 0.8413 / 4000) ** 0.5


@pytest.mark.parametrize("name", ["numpy", "torch", "cupy"])
def test_the_default_stream_is_the_librarys(name: str):
    library = library_named(name)
    z, codebook, _ = (library.to(x) for x in arrays(5))
    seed = {"numpy": lambda: np.random.seed, "torch": lambda: __import__("torch").manual_seed}.get(
        name, lambda: __import__("cupy").random.seed
    )()

    def draw(number: int):
        seed(number)
        return library.back(dq.quantize(z, codebook, dq.NSVQ()).z_q)

    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).all(axis=-1).any()


@pytest.mark.parametrize("estimator", HARD, **IDS)
def test_estimators_without_noise_ignore_it(library: Library, estimator: dq.Estimator):
    z, codebook, noise = (library.to(x) for x in arrays(5))
    plain = dq.quantize(z, codebook, estimator)
    assert_close(dq.quantize(z, codebook, estimator, noise=noise).z_q, library.back(plain.z_q), library)


@pytest.mark.parametrize("estimator", [dq.DiVeQ(), dq.NSVQ(), dq.DiVeQDetach(), dq.Radial(dq.Power(1.0))], **IDS)
@np.errstate(invalid="ignore")  # NumPy says so besides
def test_a_row_that_is_not_finite_stays_so_alone(library: Library, estimator: dq.Estimator):
    z, codebook, noise = arrays(4)
    z[1, 2] = np.nan
    args = {"noise": library.to(noise), "check_finite": False}
    out, pullback = dq.vjp(library.to(z), library.to(codebook), estimator, **args)
    assert library.back(out.indices)[1] == -1
    finite = np.isfinite(library.back(out.z_q))
    np.testing.assert_array_equal(finite, np.array([True, False, True, True])[:, None] & np.ones(D, bool))
    g_z, g_codebook = pullback(library.to(np.ones_like(z)))
    assert np.isnan(library.back(g_z)[1]).any()
    assert np.isfinite(library.back(g_z)[[0, 2, 3]]).all()
    # It belongs to no codeword, so its gradient is nobody's, or visibly everybody's.
    chosen = library.back(out.indices)[[0, 2, 3]]
    there = library.back(g_codebook)[chosen]
    assert np.isfinite(there).all() or np.isnan(library.back(g_codebook)).all()


@pytest.mark.parametrize("estimator", [*ESTIMATORS, dq.DiVeQ(0.0), dq.DiVeQ(np.float32(0.5))], **IDS)
def test_estimators_pickle_and_copy(estimator: dq.Estimator):
    z, codebook, noise = arrays(5)
    expected = dq.quantize(z, codebook, estimator, noise=noise).z_q
    for other in (copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator))):
        assert type(other) is type(estimator)
        assert repr(other) == repr(estimator)
        np.testing.assert_array_equal(dq.quantize(z, codebook, other, noise=noise).z_q, expected)


@pytest.mark.parametrize("estimator", ESTIMATORS, **IDS)
def test_estimators_are_hashable_and_frozen(estimator: dq.Estimator):
    assert hash(estimator) == hash(copy.copy(estimator))
    assert estimator == copy.copy(estimator)
    with pytest.raises((AttributeError, TypeError)):
        estimator.sigma = 1.0


@pytest.mark.parametrize(
    "estimator", [dq.STE(), dq.Rotation(), dq.DiVeQDetach(), dq.Radial(dq.PseudoHuber())], ids=repr
)
@pytest.mark.parametrize("name", ["numpy", "array_api_strict", "mlx", "torch"])
# Of few vectors the rule keeps its derivatives, of many what it reads.
@pytest.mark.parametrize("n", [6, 6000])
def test_the_pullback_is_that_of_the_codebook_that_was_used(n: int, name: str, estimator) -> None:
    library, rng = library_named(name), np.random.default_rng(0)
    z, g, words = (rng.standard_normal(s).astype(np.float32) for s in ((n, 3), (n, 3), (5, 3)))
    expected = dq.vjp(z, words, estimator)[1](g)
    codebook = library.to(words.copy())
    if name == "numpy":
        codebook = words.copy()
    _, pullback = dq.vjp(library.to(z), codebook, estimator)
    codebook[...] = library.to(3 * words[::-1].copy())
    g_z, g_codebook = pullback(library.to(g))
    assert_close(g_z, expected[0], library, rtol=1e-5, atol=1e-5)
    # A sum over vectors, in any order.
    assert_close(g_codebook, expected[1], library, rtol=1e-5, atol=max(1e-5, n * float(np.finfo(np.float32).eps)))


@pytest.mark.parametrize("name", ["numpy", "array_api_strict", "mlx", "torch"])
@pytest.mark.parametrize("function", ["codebook_loss", "commitment_loss", "linear_codebook", "normalize", "gumbel"])
def test_what_makes_a_codebook_may_be_overwritten_before_other_pullbacks(name: str, function: str) -> None:
    library, rng = library_named(name), np.random.default_rng(0)
    z, words, weight, logits = (rng.standard_normal(s).astype(np.float32) for s in ((6, 3), (5, 3), (3, 3), (6, 5)))
    indices, one = rng.integers(0, 5, 6), np.asarray(1.0, dtype=np.float32)
    calls, overwritten, g = {
        "codebook_loss": (lambda c: dq.codebook_loss_vjp(to(z), c, to(indices)), [words], one),
        "commitment_loss": (lambda c: dq.commitment_loss_vjp(to(z), c, to(indices)), [words], one),
        "linear_codebook": (lambda *factors: dq.linear_codebook_vjp(factors), [words, weight], words),
        "normalize": (dq.normalize_vjp, [words], words),
        "gumbel": (lambda c: dq.vjp(to(logits), c, dq.GumbelST(), noise=to(logits)), [words], z),
    }[function]
    to = np.asarray
    expected = calls(*overwritten)[1](g)
    to = np.array if name == "numpy" else library.to
    # array_api_strict may share NumPy's memory.
    arrays = [to(x.copy()) for x in overwritten]
    out, pullback = calls(*arrays)
    for x in (*arrays, *([out] if function == "normalize" else [])):
        x[...] = to(np.full(x.shape, 7.0, dtype=np.float32))
    actual = pullback(to(g))
    for a, wanted in zip(*(x if isinstance(x, tuple) else (x,) for x in (actual, expected)), strict=True):
        assert_close(a, wanted, library, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("rows", [3, 9000])
@pytest.mark.parametrize("estimator", [dq.Radial(dq.Power(2.0)), dq.DiVeQDetach(), dq.Rotation()], ids=str)
def test_the_output_may_be_overwritten_before_the_pullback(name: str, rows: int, estimator: Any) -> None:
    library, rng = library_named(name), np.random.default_rng(0)
    z, codebook, g = (rng.standard_normal((n, 4)).astype(np.float32) for n in (rows, 5, rows))
    expected = dq.vjp(library.to(z), library.to(codebook), estimator)[1](library.to(g))
    out, pullback = dq.vjp(library.to(z), library.to(codebook), estimator)
    out.z_q[...] = 7.0
    for actual, wanted in zip(pullback(library.to(g)), expected, strict=True):
        np.testing.assert_array_equal(library.back(actual), library.back(wanted))
