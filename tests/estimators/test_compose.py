"""Residual and product quantization: the chain rule, exact decoding, and stages that go on helping."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import diveq_core as dq
from libraries import Library, assert_close, library_named

K, D, BATCH = 7, 6, (4, 5)

CASES = {
    "residual DiVeQ": (dq.Residual(dq.DiVeQ(), 3), (3, K, D), (3, *BATCH, D)),
    "residual detach, fewer stages than codebooks": (dq.Residual(dq.DiVeQDetach(), 2), (3, K, D), (2, *BATCH, D)),
    "residual STE, one codebook": (dq.Residual(dq.STE(), 3), (K, D), (3, *BATCH, D)),
    "residual cosine, one codebook": (dq.Residual(dq.Radial(dq.Cosine()), 2), (K, D), (2, *BATCH, D)),
    "product NSVQ": (dq.Product(dq.NSVQ(), 2), (2, K, 3), (*BATCH, D)),
    "product radial, one codebook": (dq.Product(dq.Radial(dq.PseudoHuber(0.5)), 3), (K, 2), (*BATCH, D)),
    "residual of products": (dq.Residual(dq.Product(dq.DiVeQ(), 2), 3), (3, 2, K, 3), (3, *BATCH, D)),
    "product of residuals": (dq.Product(dq.Residual(dq.DiVeQ(), 2), 3), (3, 2, K, 2), (2, *BATCH, D)),
}


def draw(name: str, seed: int = 0) -> tuple[Any, ...]:
    estimator, words, eps = CASES[name]
    rng = np.random.default_rng(seed)
    z, g, dz = (rng.standard_normal((*BATCH, D)) for _ in range(3))
    codebook, dcodebook = rng.standard_normal(words), rng.standard_normal(words)
    return estimator, z, codebook, rng.standard_normal(eps), g, dz, dcodebook


@pytest.mark.parametrize("name", CASES)
def test_pullback_is_torch_autograd_through_quantize(name: str) -> None:
    torch = pytest.importorskip("torch")
    estimator, z, codebook, noise, g, *_ = draw(name)
    out, pullback = dq.vjp(z, codebook, estimator, noise=noise)
    g_z, g_codebook = pullback(g)
    tz, twords = torch.tensor(z, requires_grad=True), torch.tensor(codebook, requires_grad=True)
    there = dq.quantize(tz, twords, estimator, noise=torch.tensor(noise))
    there.z_q.backward(torch.tensor(g))
    # float64 throughout; the cosine of almost parallel vectors loses about six digits of sixteen.
    np.testing.assert_allclose(there.z_q.detach().numpy(), out.z_q, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(there.indices.numpy(), out.indices)
    np.testing.assert_allclose(tz.grad.numpy(), g_z, rtol=1e-9, atol=1e-9)
    if twords.grad is None:  # what gets no gradient is no part of torch's graph
        np.testing.assert_array_equal(g_codebook, 0)
    else:
        np.testing.assert_allclose(twords.grad.numpy(), g_codebook, rtol=1e-9, atol=1e-9)


# Torch has tried all of them above, by the same rules; JAX compiles each for seconds.
BOUND = ("residual of products", "residual cosine, one codebook", "product NSVQ")


@pytest.mark.parametrize(
    "name", [name if name in BOUND else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_pullback_is_jax_autodiff_through_quantize(name: str) -> None:
    jax = pytest.importorskip("jax")
    estimator, z, codebook, noise, g, *_ = draw(name)
    g_z, g_codebook = dq.vjp(z, codebook, estimator, noise=noise)[1](g)
    with jax.enable_x64(True):
        jz, jwords, jnoise, jg = (jax.numpy.asarray(x) for x in (z, codebook, noise, g))
        there = jax.jit(
            jax.grad(lambda z, words: (dq.quantize(z, words, estimator, noise=jnoise).z_q * jg).sum(), (0, 1))
        )(jz, jwords)
        # float64 throughout; the cosine of almost parallel vectors loses about six digits of sixteen.
        np.testing.assert_allclose(np.asarray(there[0]), g_z, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(np.asarray(there[1]), g_codebook, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_pushforward_and_pullback_are_adjoint(name: str) -> None:
    estimator, z, codebook, noise, g, dz, dcodebook = draw(name, seed=1)
    g_z, g_codebook = dq.vjp(z, codebook, estimator, noise=noise)[1](g)
    out, tangent = dq.jvp(z, codebook, dz, dcodebook, estimator, noise=noise)
    np.testing.assert_array_equal(out.z_q, dq.quantize(z, codebook, estimator, noise=noise).z_q)
    # Both sides are sums of a few hundred float64 products of order one, up to the conditioning of the cosine.
    np.testing.assert_allclose(np.sum(tangent * g), np.sum(g_z * dz) + np.sum(g_codebook * dcodebook), rtol=1e-8)


@pytest.mark.parametrize(
    "name", ["residual DiVeQ", "residual STE, one codebook", "product NSVQ", "residual of products"]
)
def test_every_library_agrees(name: str, library: Library) -> None:
    estimator, *arrays = draw(name, seed=2)
    z, codebook, noise, g = (x.astype(np.float32) for x in arrays[:4])
    out, pullback = dq.vjp(z, codebook, estimator, noise=noise)
    there, there_pullback = dq.vjp(library.to(z), library.to(codebook), estimator, noise=library.to(noise))
    # float32 of order one through three stages.
    assert_close(there.z_q, out.z_q, library, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(library.back(there.indices), out.indices)
    for ours, theirs in zip(pullback(g), there_pullback(library.to(g)), strict=True):
        assert_close(theirs, ours, library, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("estimator", "words"),
    [
        (dq.Residual(dq.DiVeQDetach(), 3), (3, K, D)),
        (dq.Product(dq.STE(), 3), (3, K, 2)),
        (dq.Residual(dq.Product(dq.Radial(dq.Power(2.0)), 2), 2), (2, 2, K, 3)),
        (dq.DiVeQDetach(), (K, D)),
    ],
)
def test_indices_decode_to_the_output_bit_for_bit(estimator: Any, words: tuple[int, ...], library: Library) -> None:
    rng = np.random.default_rng(3)
    z, codebook = (library.to(rng.standard_normal(s).astype(np.float32)) for s in ((*BATCH, D), words))
    out = dq.quantize(z, codebook, estimator)
    decoded = dq.decode(out.indices, codebook, estimator)
    np.testing.assert_array_equal(library.back(decoded), library.back(out.z_q))


def test_given_indices_are_used_instead_of_the_nearest() -> None:
    estimator, z, codebook, noise, *_ = draw("residual of products")
    out = dq.quantize(z, codebook, estimator, noise=noise)
    others = (out.indices + 1) % K
    np.testing.assert_array_equal(dq.quantize(z, codebook, estimator, noise=noise, indices=others).indices, others)


def test_straight_through_in_every_stage_passes_the_gradient_once() -> None:
    estimator, z, codebook, _, g, *_ = draw("residual STE, one codebook")
    g_z, g_codebook = dq.vjp(z, codebook, estimator)[1](g)
    np.testing.assert_array_equal(g_z, g)
    np.testing.assert_array_equal(g_codebook, np.zeros_like(codebook))


def test_codebooks_of_dropped_stages_get_no_gradient() -> None:
    estimator, z, codebook, noise, g, *_ = draw("residual detach, fewer stages than codebooks")
    _, g_codebook = dq.vjp(z, codebook, estimator, noise=noise)[1](g)
    assert np.any(g_codebook[:2] != 0)
    np.testing.assert_array_equal(g_codebook[2], np.zeros((K, D)))


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_fewer_stages_are_those_of_a_shorter_codebook(stages: int, library: Library) -> None:
    """Quantizer dropout: the first stages do what they would do alone, and their indices decode exactly."""
    rng = np.random.default_rng(5)
    z, codebook = (library.to(rng.standard_normal(s).astype(np.float32)) for s in ((*BATCH, D), (3, K, D)))
    estimator = dq.Residual(dq.DiVeQDetach(), stages)
    whole = dq.quantize(z, codebook, dq.Residual(dq.DiVeQDetach(), 3))
    for words in (codebook, codebook[:stages, ...]):
        out = dq.quantize(z, words, estimator)
        np.testing.assert_array_equal(library.back(out.indices), library.back(whole.indices)[..., :stages])
        truncated = dq.decode(whole.indices[..., :stages], words, estimator)
        np.testing.assert_array_equal(library.back(truncated), library.back(out.z_q))


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_automatic_differentiation_gives_dropped_stages_no_gradient(name: str) -> None:
    library = library_named(name)
    rng = np.random.default_rng(6)
    z, codebook = (library.to(rng.standard_normal(s).astype(np.float32)) for s in ((*BATCH, D), (3, K, D)))
    estimator = dq.Residual(dq.DiVeQDetach(), 2)
    if name == "torch":
        codebook.requires_grad_()
        dq.quantize(z, codebook, estimator).z_q.sum().backward()
        gradient = codebook.grad
    else:
        import jax

        gradient = jax.grad(lambda words: dq.quantize(z, words, estimator).z_q.sum())(codebook)
    assert np.any(library.back(gradient)[:2] != 0)
    np.testing.assert_array_equal(library.back(gradient)[2], np.zeros((K, D)))


def test_eight_stages_go_on_reducing_the_error_of_tiny_data(library: Library) -> None:
    """At scale 1e-5 residuals fall to 1e-8, where squared distances that are clamped or not scaled say nothing."""
    rng = np.random.default_rng(4)
    z = (1e-5 * rng.standard_normal((400, 4))).astype(np.float32)
    codebooks, residual = [], z
    for _ in range(8):
        words = np.concatenate([np.zeros((1, 4), np.float32), residual[rng.choice(400, 31, replace=False)]])
        codebooks.append(words)
        residual = residual - words[dq.nearest(residual, words)]
    codebook = library.to(np.stack(codebooks))
    errors = []
    for stages in range(1, 9):
        out = dq.quantize(library.to(z), codebook, dq.Residual(dq.DiVeQDetach(), stages))
        errors.append(float(np.linalg.norm(library.back(out.z_q) - z)))
    assert all(later < 0.97 * earlier for earlier, later in itertools.pairwise(errors)), errors


def test_a_key_gives_every_stage_its_own_noise() -> None:
    jax = pytest.importorskip("jax")
    z, codebook = jax.numpy.ones((3, 2)), jax.numpy.zeros((1, 2))
    one = dq.quantize(z, codebook, dq.Residual(dq.NSVQ(), 1), rng=jax.random.key(0)).z_q
    two = dq.quantize(z, codebook, dq.Residual(dq.NSVQ(), 2), rng=jax.random.key(0)).z_q
    assert not np.allclose(two, 2 * one)


@pytest.mark.parametrize(
    ("make", "error", "parts"),
    [
        (lambda: dq.Residual(dq.DiVeQ(), 0), ValueError, ["Residual", "stages", ">= 1", "0"]),
        (lambda: dq.Product(dq.DiVeQ(), 1.5), ValueError, ["Product", "groups", ">= 1", "1.5"]),
        (lambda: dq.Residual(dq.DiVeQ, 2), TypeError, ["Residual", "DiVeQ()", "type"]),
        (
            lambda: dq.quantize(np.ones((3, 5)), np.ones((2, K, 2)), dq.Product(dq.STE(), 2)),
            ValueError,
            ["quantize", "multiple of 2", "(3, 5)"],
        ),
        (
            lambda: dq.vjp(np.ones((3, 4)), np.ones((2, K, 4)), dq.Residual(dq.STE(), 3)),
            ValueError,
            ["vjp", "Residual", "length at least 3", "(2, 7, 4)"],
        ),
        (
            lambda: dq.quantize(np.ones((3, 4)), np.ones((K, 4)), dq.Residual(dq.NSVQ(), 2), noise=np.ones((3, 4))),
            ValueError,
            ["quantize", "noise", "(2, ..., D)", "(3, 4)"],
        ),
        (
            lambda: dq.decode(np.zeros((3, 4), int), np.ones((2, K, 4)), dq.Residual(dq.STE(), 2)),
            ValueError,
            ["decode", "indices", "2", "(3, 4)"],
        ),
        (
            lambda: dq.quantize(
                np.ones((3, 4)), np.ones((K, 4)), dq.Residual(dq.STE(), 2), indices=np.zeros((3, 3), int)
            ),
            ValueError,
            ["quantize", "indices", "(..., 2, ...)", "(3, 3)"],
        ),
        (
            lambda: dq.vjp(np.ones((3, 4)), np.ones((3, K, 2)), dq.Product(dq.STE(), 2)),
            ValueError,
            ["vjp", "Product", "of length 2,", "(3, 7, 2)"],
        ),
        (
            lambda: dq.decode(np.zeros((3, 2), int), np.ones((3, K, 2)), dq.Product(dq.STE(), 2)),
            ValueError,
            ["decode", "Product", "of length 2,", "(3, 7, 2)"],
        ),
        (
            lambda: dq.quantize(np.ones((3, 4), int), np.ones((K, 4)), dq.Residual(dq.STE(), 2)),
            TypeError,
            ["quantize", "z must have a real floating dtype", "int64"],
        ),
        (lambda: dq.quantize(np.float64(1), np.ones((K, 4)), dq.Residual(dq.STE(), 2)), ValueError, ["quantize", "()"]),
        (
            lambda: dq.quantize(np.ones((3, 4)), np.ones((K, 4)), dq.Residual(dq.STE(), 2), indices=[[0, 0]] * 3),
            TypeError,
            ["quantize", "indices must be an array", "builtins.list"],
        ),
        (
            lambda: dq.decode([[0, 0]], np.ones((K, 4)), dq.Residual(dq.STE(), 2)),
            TypeError,
            ["decode", "indices must be an array", "builtins.list"],
        ),
        (
            lambda: dq.vjp(np.ones((3, 4)), np.ones((K, 4)), dq.Residual(dq.NSVQ(), 2), noise=1.0),
            TypeError,
            ["vjp", "noise must be an array", "builtins.float"],
        ),
        (
            lambda: dq.vjp(np.ones((3, 4)), np.ones((K, 2)), dq.Product(dq.NSVQ(), 2), noise=np.float64(1)),
            ValueError,
            ["vjp", "noise of Product", "D = 4", "()"],
        ),
        (
            lambda: dq.quantize(
                np.ones((3, 4)),
                np.ones((K, 4)),
                dq.Residual(dq.SFDiVeQDetach(), 2),
                noise=dq.CurveNoise(np.ones(K - 1)),
            ),
            TypeError,
            ["quantize", "noise of Residual", "a sequence of 2", "CurveNoise"],
        ),
        (
            lambda: dq.quantize(
                np.ones((3, 4)),
                np.ones((K, 4)),
                dq.Residual(dq.SFDiVeQDetach(), 2),
                noise=[dq.CurveNoise(np.ones(K - 1))],
            ),
            ValueError,
            ["quantize", "noise of Residual", "a sequence of 2", "1"],
        ),
    ],
)
def test_errors_say_what_was_expected_and_what_was_got(make: Any, error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("wrong", [[[0.0]], None, 1.0], ids=repr)
@pytest.mark.parametrize("estimator", [dq.Residual(dq.STE(), 2), dq.Product(dq.STE(), 2)], ids=repr)
def test_what_is_no_array_is_named(estimator: Any, wrong: Any) -> None:
    z, codebook = np.ones((3, 4)), np.ones((K, 4))
    verbs = {
        "quantize": dq.quantize,
        "vjp": dq.vjp,
        "jvp": lambda z, words, estimator: dq.jvp(z, words, z, words, estimator),
    }
    for name, verb in verbs.items():
        for what, arguments in (("z", (wrong, codebook)), ("codebook", (z, wrong))):
            with pytest.raises(
                TypeError, match=rf"^{name}: {what} must be an array .* got builtins\.{type(wrong).__name__}$"
            ):
                verb(*arguments, estimator)
    with pytest.raises(TypeError, match=r"^decode: codebook must be an array"):
        dq.decode(np.zeros((3, 2), int), wrong, estimator)


COMPOSITES = {
    "residual": (dq.Residual(dq.DiVeQDetach(), 2), (2, K, 4)),
    "product": (dq.Product(dq.DiVeQDetach(), 2), (2, K, 2)),
    "nested": (dq.Product(dq.Residual(dq.DiVeQDetach(), 2), 2), (2, 2, K, 2)),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_cotangents_and_tangents_of_another_shape_are_refused(name: str, library: Library) -> None:
    estimator, words = COMPOSITES[name]
    z, codebook = library.to(np.ones((3, 4), np.float32)), library.to(np.ones(words, np.float32))
    _, pullback = dq.vjp(z, codebook, estimator)
    for shape in ((3, 6), (3, 3), (1, 4), (4,)):
        wrong = library.to(np.ones(shape, np.float32))
        with pytest.raises(ValueError, match=r"^pullback: g must have the shape of z_q, \(3, 4\), got"):
            pullback(wrong)
        with pytest.raises(ValueError, match=r"^jvp: dz must have the shape of z, \(3, 4\), got"):
            dq.jvp(z, codebook, wrong, codebook, estimator)
    more = library.to(np.ones((words[0] + 1, *words[1:]), np.float32))
    with pytest.raises(ValueError, match=r"^jvp: dcodebook must have the shape of codebook, .*, got \(3,"):
        dq.jvp(z, codebook, z, more, estimator)
    with pytest.raises(TypeError, match=r"^pullback: g must be an array"):
        pullback(1.0)


@pytest.mark.parametrize("estimator", [dq.SFDiVeQDetach(), dq.SFDiVeQ(0.3)], ids=repr)
def test_a_sequence_gives_each_part_its_own_noise(estimator: Any, library: Library) -> None:
    rng = np.random.default_rng(5)
    z, codebook = (rng.standard_normal(s).astype(np.float32) for s in ((5, 4), (2, K, 2)))

    def drawn() -> tuple[np.ndarray, np.ndarray]:
        return rng.random(K - 1).astype(np.float32), rng.standard_normal((2, 5, 2)).astype(np.float32)

    parts = [drawn(), drawn()]
    noise = [dq.CurveNoise(library.to(dither), library.to(ends)) for dither, ends in parts]
    z_, codebook_ = library.to(z), library.to(codebook)
    out = dq.quantize(z_, codebook_, dq.Product(estimator, 2), noise=noise)
    for part in range(2):
        alone = dq.quantize(z_[:, 2 * part : 2 * part + 2], codebook_[part, ...], estimator, noise=noise[part])
        np.testing.assert_array_equal(library.back(out.z_q)[:, 2 * part : 2 * part + 2], library.back(alone.z_q))
        np.testing.assert_array_equal(library.back(out.indices)[:, part], library.back(alone.indices))
    wide = library.to(np.concatenate([z[:, :2], z[:, 2:]]))
    pair = [
        dq.CurveNoise(x.dither, None if x.ends is None else library.to(np.tile(e, (1, 2, 1))))
        for x, (_, e) in zip(noise, parts, strict=True)
    ]
    staged = dq.quantize(wide, codebook_, dq.Residual(estimator, 2), noise=pair)
    first = dq.quantize(wide, codebook_[0, ...], estimator, noise=pair[0])
    second = dq.quantize(wide - first.z_q, codebook_[1, ...], estimator, noise=pair[1])
    np.testing.assert_array_equal(library.back(staged.z_q), library.back(first.z_q + second.z_q))


def test_each_group_of_a_product_is_quantized_by_itself(library: Library) -> None:
    rng = np.random.default_rng(0)
    z, codebooks, noise = rng.standard_normal((7, 6)), rng.standard_normal((2, K, 3)), rng.standard_normal((7, 6))
    z, codebooks, noise = (x.astype(np.float32) for x in (z, codebooks, noise))
    out = dq.quantize(library.to(z), library.to(codebooks), dq.Product(dq.DiVeQ(0.3), 2), noise=library.to(noise))
    for group, here in enumerate((slice(0, 3), slice(3, 6))):
        alone = dq.quantize(
            library.to(z[:, here]), library.to(codebooks[group]), dq.DiVeQ(0.3), noise=library.to(noise[:, here])
        )
        np.testing.assert_array_equal(library.back(out.z_q)[:, here], library.back(alone.z_q))
        np.testing.assert_array_equal(library.back(out.indices)[:, group], library.back(alone.indices))
