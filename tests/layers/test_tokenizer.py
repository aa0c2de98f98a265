"""The tokenizer: the tokens of the verbs and of layers, in every library, and its file."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import diveq_core as dq
from layer_cases import KINDS, Case
from libraries import Library, library_named
from processes import importable
from vectors import normal

if TYPE_CHECKING:
    from pathlib import Path

K, D = 8, 4
STE, STAGED, GROUPED = dq.STE(), dq.Residual(dq.DiVeQ(), 3), dq.Product(dq.STE(), 2)
BOTH = dq.Product(dq.Residual(dq.STE(), 2), 2)
QUANTIZERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "plain": (STE, (K, D), {}),
    "stages": (STAGED, (3, K, D), {}),
    "stages, one codebook": (STAGED, (K, D), {}),
    "spare stages": (STAGED, (5, K, D), {}),
    "groups": (GROUPED, (2, K, D), {}),
    "groups, one codebook": (GROUPED, (K, D), {}),
    "groups of stages": (BOTH, (2, 2, K, D), {}),
    "groups of spare stages": (BOTH, (2, 3, K, D), {}),
    "groups of stages, one codebook": (BOTH, (2, K, D), {}),
    "FSQ": (dq.FSQ([5, 4, 3]), None, {}),
    "FSQ in stages": (dq.Residual(dq.FSQ([5, 4, 3]), 2), None, {}),
    "FSQ in groups": (dq.Product(dq.FSQ([5, 4, 3]), 2), None, {}),
}


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return normal(*shape, seed=seed).astype(np.float32)


def codebook_of(shape: Any) -> Any:
    return None if shape is None else numbers(*shape)


def vectors(tokenizer: dq.Tokenizer) -> np.ndarray:
    return numbers(3, 5, tokenizer.settings.dim, seed=1)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_tokens_are_those_of_the_verbs(name: str, library: Library) -> None:
    estimator, shape, options = QUANTIZERS[name]
    codebook = codebook_of(shape)
    tokenizer = dq.Tokenizer(None if codebook is None else library.to(codebook), estimator, **options)
    z = vectors(tokenizer)
    tokens = tokenizer.encode(library.to(z))
    quantized = dq.quantize(
        z,
        codebook,
        estimator,
        noise=np.zeros((3, *z.shape), z.dtype)
        if ("stages" in name and estimator is STAGED) or name == "spare stages"
        else None,
    )
    np.testing.assert_array_equal(library.back(tokens), quantized.indices)
    decoded = library.back(tokenizer.decode(tokens))
    expected = dq.decode(quantized.indices, codebook, estimator, dtype=np.float32)
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_allclose(
        library.back(tokenizer.distortion(library.to(z))), ((z - expected) ** 2).sum(axis=-1).mean(), rtol=1e-5
    )
    # The same value reads vectors of every library.
    np.testing.assert_array_equal(tokenizer.encode(z), quantized.indices)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_gives_its_tokenizer(kind: str) -> None:
    case = Case.of(kind, np.float32)
    tokenizer = dq.Tokenizer.of_state(case.settings, case.state)
    tokens = tokenizer.encode(case.z, case.mask)
    expected = dq.layers.encode(case.settings, case.state, case.z, mask=case.mask)
    if isinstance(expected, dq.layers.Point):
        np.testing.assert_array_equal(tokens.positions, expected.positions)
        np.testing.assert_array_equal(tokens.segments, expected.segments)
    else:
        np.testing.assert_array_equal(tokens, expected)
    decoded = dq.layers.decode(case.settings, case.state, expected)
    np.testing.assert_array_equal(tokenizer.decode(tokens), decoded)


def test_a_linear_codebook_is_multiplied_out_and_directions_are_searched() -> None:
    factors = dq.LinearCodebook(numbers(K, D), numbers(D, D, seed=2))
    z = numbers(50, D, seed=1)
    tokenizer = dq.Tokenizer(factors)
    np.testing.assert_array_equal(tokenizer.encode(z), dq.nearest(z, dq.linear_codebook(factors)))
    by_direction = dq.Tokenizer(numbers(K, D), cosine=True)
    tokens = by_direction.encode(z)
    np.testing.assert_array_equal(tokens, dq.nearest_cosine(z, numbers(K, D)))
    np.testing.assert_allclose(np.linalg.norm(by_direction.decode(tokens), axis=-1), 1, rtol=1e-6)


def test_an_image_has_its_channels_first(library: Library) -> None:
    tokenizer = dq.Tokenizer(numbers(K, D), channel_axis=1)
    image = numbers(2, D, 3, 5, seed=1)
    tokens = tokenizer.encode(library.to(image))
    np.testing.assert_array_equal(library.back(tokens), dq.nearest(np.moveaxis(image, 1, -1), numbers(K, D)))
    decoded = library.back(tokenizer.decode(tokens))
    assert decoded.shape == image.shape
    np.testing.assert_allclose(
        library.back(tokenizer.distortion(library.to(image))), ((image - decoded) ** 2).sum(axis=1).mean(), rtol=1e-5
    )


@pytest.mark.parametrize("bits", [1, 4, 12])
def test_a_curve_gives_integers_at_a_stated_rate(bits: int, library: Library) -> None:
    codebook, z = numbers(K, D), numbers(40, D, seed=1)
    z[3] = np.nan
    whole = dq.Tokenizer(codebook, dq.SFDiVeQ())
    tokenizer = dq.Tokenizer(codebook, dq.SFDiVeQ(), position_bits=bits)
    assert tokenizer.bits == pytest.approx(np.log2(K - 1) + bits)
    steps = (1 << bits) - 1
    point = whole.encode(z)
    tokens = library.back(tokenizer.encode(library.to(z)))
    assert tokens.dtype.kind == "i"
    assert tokens[3] == -1
    there = np.arange(len(z)) != 3
    segments, positions = np.divmod(tokens[there], steps + 1)
    np.testing.assert_array_equal(segments, point.segments[there])
    assert np.abs(positions / steps - point.positions[there]).max() <= 0.5 / steps + 1e-6
    decoded = library.back(tokenizer.decode(library.to(tokens)))
    longest = np.linalg.norm(np.diff(codebook, axis=0), axis=1).max()
    assert np.linalg.norm(decoded - whole.decode(point), axis=1)[there].max() <= longest * (0.5 / steps + 1e-5)
    assert np.isnan(decoded[3]).all()
    np.testing.assert_array_equal(
        library.back(tokenizer.usage(library.to(tokens))), np.bincount(segments, minlength=K - 1)
    )


def test_counts_and_bits() -> None:
    tokenizer = dq.Tokenizer(numbers(2, K, D), dq.Residual(dq.STE(), 2))
    tokens = np.array([[0, 1], [0, -1], [3, 1], [-1, -1]])
    usage = tokenizer.usage(tokens)
    np.testing.assert_array_equal(usage[0], [2, 0, 0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(usage[1], [0, 2, 0, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(tokenizer.perplexity(tokens), [np.exp(-(2 / 3) * np.log(2 / 3) + np.log(3) / 3), 1])
    assert tokenizer.bits == 2 * np.log2(K)
    assert repr(tokenizer) == "Tokenizer(dim=4, codebook_size=8, stages=2, bits=6)"
    assert repr(dq.Tokenizer(None, dq.FSQ([5, 5]))) == "Tokenizer(dim=2, estimator=FSQ(levels=(5, 5)), bits=4.644)"


def test_what_is_not_finite_costs_no_distortion(library: Library) -> None:
    tokenizer, z = dq.Tokenizer(numbers(K, D)), numbers(20, D, seed=1)
    mask = np.arange(20) % 2 == 0
    expected = tokenizer.distortion(z[mask])
    z[~mask] = np.inf
    np.testing.assert_allclose(library.back(tokenizer.distortion(library.to(z))), expected, rtol=1e-6)
    z[~mask] = 0
    masked = tokenizer.distortion(library.to(z), library.to(mask))
    np.testing.assert_allclose(library.back(masked), expected, rtol=1e-6)


def test_it_is_a_value() -> None:
    codebook = numbers(K, D)
    tokenizer, z = dq.Tokenizer(codebook), numbers(20, D, seed=1)
    same, tokens = dq.Tokenizer(codebook.copy()), tokenizer.encode(z)
    codebook[:] = 0
    np.testing.assert_array_equal(tokenizer.encode(z), tokens)
    tokenizer.codebook[:] = 0
    np.testing.assert_array_equal(tokenizer.encode(z), tokens)
    assert tokenizer == same
    assert hash(tokenizer) == hash(same)
    assert tokenizer != dq.Tokenizer(codebook)
    assert tokenizer != dq.Tokenizer(same.codebook, cosine=True)
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other == tokenizer
        np.testing.assert_array_equal(other.encode(z), tokens)


def test_float64_stays_where_a_library_has_it() -> None:
    codebook = 1 + 1e-12 * np.arange(K)[:, None] * np.ones((K, D))
    tokenizer = dq.Tokenizer(codebook)
    np.testing.assert_array_equal(tokenizer.encode(codebook[::-1].copy()), np.arange(K)[::-1])
    if importable("jax"):
        import jax.numpy as jnp

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tokenizer.encode(jnp.ones((3, D))).shape == (3,)


def test_it_goes_into_compiled_functions() -> None:
    tokenizer, z = dq.Tokenizer(numbers(2, K, D), dq.Residual(dq.STE(), 2)), numbers(20, D, seed=1)
    tokens = tokenizer.encode(z)
    if importable("jax"):
        import jax

        fresh = copy.copy(tokenizer)
        np.testing.assert_array_equal(jax.jit(fresh.encode)(z), tokens)
        np.testing.assert_array_equal(fresh.encode(jax.numpy.asarray(z)), tokens)
    if importable("torch"):
        import torch

        compiled = torch.compile(copy.copy(tokenizer).encode, backend="eager", fullgraph=True)
        np.testing.assert_array_equal(compiled(torch.tensor(z)), tokens)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    pytest.importorskip("safetensors")
    path = tmp_path / "tokenizer.safetensors"
    dq.Tokenizer(numbers(K, D), dq.SFDiVeQ(), position_bits=3).save(path)
    return path


@pytest.mark.parametrize("name", [*QUANTIZERS, "curve", "directions"])
def test_a_file_holds_it_all(name: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    if name == "curve":
        tokenizer = dq.Tokenizer(numbers(K, D), dq.SFDiVeQ(), position_bits=3)
    elif name == "directions":
        tokenizer = dq.Tokenizer(numbers(K, D).astype(float), cosine=True, not_finite="skip")
    else:
        estimator, shape, options = QUANTIZERS[name]
        tokenizer = dq.Tokenizer(codebook_of(shape), estimator, **options)
    for number in range(2):
        tokenizer.save(tmp_path / str(number))
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    there = dq.Tokenizer.load(tmp_path / "0")
    assert there == tokenizer
    np.testing.assert_array_equal(there.encode(vectors(there)), tokenizer.encode(vectors(tokenizer)))
    assert list(tmp_path.iterdir()) == sorted(tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 2


def test_a_layers_file_is_read_too(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from diveq_numpy import VectorQuantizer

    layer, z = VectorQuantizer(6, K, heads=2, codebook_dim=D, rng=np.random.default_rng(0)), numbers(9, 6)
    layer.forward(z)
    layer.save(tmp_path / "layer")
    tokenizer = dq.Tokenizer.load(tmp_path / "layer")
    assert tokenizer == layer.tokenizer()
    np.testing.assert_array_equal(tokenizer.encode(z), layer.encode(z))
    tokenizer.save(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"load: .* must be a file that a layer's save wrote.*tokenizer\.1"):
        VectorQuantizer.load(tmp_path / "tokenizer")


def test_a_file_that_was_changed_is_refused(written: Path) -> None:
    whole = written.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        written.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"load: .* must be a whole safetensors file of a tokenizer or layer, got"):
            dq.Tokenizer.load(written)
    written.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"load: .* must be as save wrote it, got other settings or numbers"):
        dq.Tokenizer.load(written)

    def with_header(**changes: Any) -> None:
        from safetensors.numpy import load, save

        size = int.from_bytes(whole[:8], "little")
        ((kind, text),) = json.loads(whole[8 : 8 + size])["__metadata__"].items()
        header = json.loads(text) | {key: x for key, x in changes.items() if key != "kind"}
        written.write_bytes(save(load(whole), {changes.get("kind", kind): json.dumps(header)}))

    with_header(kind="diveq_core.tokenizer.2")
    with pytest.raises(ValueError, match=r"got diveq_core\.tokenizer\.2; another version of diveq_core may read it"):
        dq.Tokenizer.load(written)
    with_header(kind="else")
    with pytest.raises(ValueError, match=r"got else$"):
        dq.Tokenizer.load(written)
    with_header(settings={"dim": "wide"})
    with pytest.raises(ValueError, match="must hold the settings that save wrote"):
        dq.Tokenizer.load(written)
    with_header(settings={"dim": D, "codebook_size": K + 1})
    with pytest.raises(ValueError, match="must hold the arrays"):
        dq.Tokenizer.load(written)


WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda: dq.Tokenizer(), TypeError, "Tokenizer: codebook must be an array"),
    (lambda: dq.Tokenizer(numbers(K, D), dq.STE), TypeError, "Tokenizer: estimator must be an Estimator such as DiVeQ"),
    (lambda: dq.Tokenizer(numbers(K, D), dq.FSQ([3, 3])), TypeError, "Tokenizer: codebook must be None"),
    (lambda: dq.Tokenizer(numbers(K, D), dq.GumbelST()), TypeError, "Tokenizer: estimator must be a single one"),
    (lambda: dq.Tokenizer(numbers(D)), ValueError, r"Tokenizer: codebook must have shape \(K, D\)"),
    (lambda: dq.Tokenizer(np.ones((K, D), int)), TypeError, "Tokenizer: codebook must have a real floating dtype"),
    (lambda: dq.Tokenizer(np.full((K, D), np.nan)), ValueError, "Tokenizer: codewords must be finite"),
    (lambda: dq.Tokenizer(numbers(K, D), position_bits=3), ValueError, "Tokenizer: position_bits must be None but on"),
    (lambda: dq.Tokenizer(numbers(K, D), dq.SFDiVeQ(), position_bits=30), ValueError, "position_bits must keep tokens"),
    (lambda: dq.Tokenizer(numbers(K, D), not_finite="drop"), ValueError, "not_finite must be one of"),
    (lambda: dq.Tokenizer(numbers(K, D)).encode(numbers(3, 5)), ValueError, "encode: z must have 4 entries along axis"),
    (lambda: dq.Tokenizer(numbers(K, D)).encode([[1.0]]), TypeError, "encode: z"),
    (lambda: dq.Tokenizer(numbers(K, D)).decode(np.array([K])), ValueError, "decode: indices must"),
    (lambda: dq.Tokenizer(numbers(K, D)).decode(np.array([0.5])), TypeError, "decode: indices must"),
    (lambda: dq.Tokenizer(numbers(K, D), dq.SFDiVeQ()).decode(np.array([0])), TypeError, "decode: tokens of a curve"),
]


@pytest.mark.parametrize(("make", "kind", "text"), WRONG, ids=range(len(WRONG)))
def test_errors_say_what_is_wrong(make: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make()


def test_a_refusing_tokenizer_refuses() -> None:
    z = numbers(3, D)
    z[1, 2] = np.inf
    with pytest.raises(ValueError, match=r"encode: .*finite"):
        dq.Tokenizer(numbers(K, D), not_finite="refuse").encode(z)
    marked = dq.Tokenizer(numbers(K, D)).encode(z)
    assert marked[1] == -1
    skipped = dq.Tokenizer(numbers(K, D), not_finite="skip")
    assert not skipped.decode(skipped.encode(z))[1].any()


def test_torch_keeps_gradients_out() -> None:
    pytest.importorskip("torch")
    torch = library_named("torch")
    z = torch.to(numbers(3, D)).requires_grad_()
    tokenizer = dq.Tokenizer(torch.to(numbers(K, D)).requires_grad_())
    tokens = tokenizer.encode(z)
    assert not tokenizer.decode(tokens).requires_grad
    assert not tokens.requires_grad


def test_what_it_kept_in_inference_mode_serves_outside() -> None:
    """A map is kept for the backward pass, which tensors that were made in that mode cannot be."""
    torch = pytest.importorskip("torch")
    from diveq_numpy import VectorQuantizer

    vq = VectorQuantizer(4, 6, codebook_dim=2, init="normal", rng=np.random.default_rng(0))
    gradients = []
    for first in (torch.no_grad, torch.inference_mode):
        tokenizer, z = vq.tokenizer(), torch.from_numpy(normal(5, 4)).float().requires_grad_()
        with first():
            tokenizer.encode(z)
        gradients += torch.autograd.grad(tokenizer.distortion(z), z)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_it_is_made_of_values() -> None:
    torch = pytest.importorskip("torch")
    text = r"^Tokenizer: codebook must have values, got an array without: it is traced, or of shapes alone$"
    with pytest.raises(ValueError, match=text):
        torch.func.vmap(lambda codebook: dq.Tokenizer(codebook).encode(codebook))(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=text):
        dq.Tokenizer(torch.ones(3, 4, device="meta"))
    from diveq_torch import VectorQuantizer

    with pytest.raises(ValueError, match=text.replace("codebook", "codewords")):
        VectorQuantizer(4, 6, device="meta").tokenizer()
