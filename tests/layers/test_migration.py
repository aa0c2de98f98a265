"""What docs/migration.md says of diveq, dm-haiku and code by hand: both sides on the same vectors.

vector-quantize-pytorch has its own file.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diveq_core as dq
from diveq_numpy import VectorQuantizer as NumPyQuantizer
from vectors import normal32

torch = pytest.importorskip("torch", reason="the layer and the peers are of torch")
from torch.nn import functional  # noqa: E402

from diveq_torch import VectorQuantizer  # noqa: E402
from layer_pairs import CLOSE, PLAIN, D, K, assert_same_step, step, vectors  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def authors() -> Any:
    module = pytest.importorskip("diveq", reason="diveq is not installed")
    if version("diveq") != "0.1.3":
        pytest.skip("the page speaks of diveq 0.1.3")
    return module


# diveq


def diveq_module(module: Any, *sizes: int, **options: Any) -> Any:
    return module(*sizes, allow_warning=False, **options)


def test_diveq_step(authors: Any) -> None:
    """Sizes in the other order, and what is called a variance is a standard deviation."""
    old = diveq_module(authors.DIVEQ, K, D, noise_var=1e-3, codebook_reset=False)
    new = VectorQuantizer(D, K, dq.DiVeQ(1e-3), **PLAIN)
    new.codebook = old.codebook.detach()
    z, g = vectors(40, D), vectors(40, D, seed=99)
    torch.manual_seed(1)
    a = z.clone().requires_grad_()
    z_q, indices, perplexity = old(a)
    (z_q * g).sum().backward()
    torch.manual_seed(1)
    b = z.clone().requires_grad_()
    out = new(b, noise=torch.randn(z.shape))
    (out.z_q * g).sum().backward()
    assert_same_step((out.z_q, out.indices, b.grad, new.codewords.grad), (z_q, indices, a.grad, old.codebook.grad))
    torch.testing.assert_close(dq.perplexity(dq.usage(out.indices, K)).item(), perplexity, rtol=1e-5, atol=0)
    assert dq.DiVeQ().sigma == pytest.approx(1e-3**0.5)
    hard, indices, _ = old.inference(z)
    assert_same_step(new.eval()(z)[:2], (hard, indices))
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        old(z[None])
    assert new(z[None]).indices.shape == (1, 40)


def test_diveq_detach_step(authors: Any) -> None:
    old = diveq_module(authors.DIVEQDetach, K, D, codebook_reset=False)
    new = VectorQuantizer(D, K, dq.DiVeQDetach(), **PLAIN)
    new.codebook = old.codebook.detach()
    assert_same_step(new(vectors(40, D))[:2], old(vectors(40, D))[:2])


def test_diveq_has_no_evaluation(authors: Any) -> None:
    """Its forward draws noise, counts and replaces whatever the mode."""
    old = diveq_module(authors.DIVEQ, K, D, noise_var=0.1, replacement_iters=3, verbose=False).eval()
    with torch.no_grad():
        old.codebook[-1] = 100.0
    new = VectorQuantizer(D, K, dq.DiVeQ(0.1), replace_every=1, init="normal").eval()
    new.codebook = old.codebook.detach()
    z = vectors(40, D)
    assert not torch.equal(old(z)[0], old(z)[0])
    old(z)
    assert old.codebook[-1].abs().max() < 10
    for _ in range(3):
        assert torch.equal(new(z).z_q, new(z).z_q)
    assert (new.codebook[-1] == 100).all()


def test_diveq_counts_steps_and_copies_without_moving(authors: Any) -> None:
    """A codeword is unused there if few steps chose it; here if few vectors did. Copies are moved enough to differ."""
    z = torch.cat([torch.full((99, 1), 1.0), torch.full((1, 1), -1.0)])
    words = torch.tensor([[1.0], [-1.0], [100.0]])
    old = diveq_module(authors.DIVEQ, 3, 1, replacement_iters=4, discard_threshold=0.5, verbose=False)
    new = VectorQuantizer(1, 3, replace_every=4, replace_threshold=0.5, replace_by="codewords", init="normal")
    with torch.no_grad():
        old.codebook.copy_(words)
    new.codebook = words
    for number in range(4):
        old(z)
        new(z)
        if number == 2:
            assert old.codebook_usage.tolist() == [3, 3, 0]
    assert new._pending.counts.tolist() == [99, 1, 0]
    new.update()
    # One vector in a hundred, in every step.
    assert old.codebook[1] == -1
    assert new.codebook[1] != -1
    assert old.codebook[2] in (1, -1)
    assert len(new.codebook.unique()) == 3


@pytest.mark.parametrize(("name", "option"), [("ResidualDIVEQ", "stages"), ("ProductDIVEQ", "heads")])
def test_diveq_of_several_codebooks(authors: Any, name: str, option: str) -> None:
    """The same codewords in evaluation. In training one direction of the whole error there, one for each part here."""
    old = diveq_module(getattr(authors, name), K, D, num_codebooks=3, noise_var=0.1, codebook_reset=False)
    new = VectorQuantizer(D, K, dq.DiVeQ(0.1), **{option: 3}, **PLAIN)
    with torch.no_grad():
        old.codebook.copy_(vectors(*old.codebook.shape, seed=5))
    new.codebook = old.codebook.detach()
    z = vectors(40, D)
    hard, indices, _ = old.inference(z)
    assert_same_step(new.eval()(z)[:2], (hard, torch.stack(indices, dim=-1)))
    theirs, ours = old(z)[0], new.train()(z).z_q
    torch.testing.assert_close((theirs - z).norm(dim=1), (hard - z).norm(dim=1), **CLOSE)
    # The first part alone: two entries of a product, all of a residual.
    width = D if option == "stages" else D // 3
    first = new.codebook[0][indices[0]]
    own = torch.linalg.norm(first - z[:, :width], dim=1)
    if option == "heads":
        torch.testing.assert_close((ours - z)[:, :width].norm(dim=1), own, **CLOSE)
        assert not torch.allclose((theirs - z)[:, :width].norm(dim=1), own, **CLOSE)
    else:
        assert not torch.allclose((ours - z).norm(dim=1), (hard - z).norm(dim=1), **CLOSE)


def test_space_filling_diveq_begins_without_quantizing(authors: Any) -> None:
    old = diveq_module(authors.SFDIVEQ, K, D, skip_iters=3, avg_iters=1)
    new = VectorQuantizer(D, K, dq.SFDiVeQ(1e-3))
    z = vectors(40, D)
    assert torch.equal(old(z)[0], z)
    assert not torch.equal(new(z).z_q, z)
    point = new.eval().encode(z)
    assert point._fields == ("segments", "positions")
    torch.testing.assert_close(new.decode(point), new(z).z_q, rtol=0, atol=0)


# dm-haiku


@dataclass
class Haiku:
    """`haiku.nets.VectorQuantizer` and, with a decay, `VectorQuantizerEMA`, transcribed to NumPy from their formulas.

    Source: google-deepmind/dm-haiku, haiku/_src/nets/vqvae.py, and haiku/_src/moving_averages.py for the averages,
    which begin at zero and are corrected as Adam's are.
    """

    embeddings: np.ndarray
    """(D, K)"""
    commitment_cost: float
    decay: float | None = None
    epsilon: float = 1e-5
    counter: int = 0
    size: Any = 0.0
    dw: Any = 0.0

    def __call__(self, inputs: np.ndarray, is_training: bool) -> dict[str, Any]:
        flat = inputs.reshape(-1, self.embeddings.shape[0])
        e = self.embeddings
        distances = (flat**2).sum(1, keepdims=True) - 2 * flat @ e + (e**2).sum(0, keepdims=True)
        indices = distances.argmin(1)
        one_hot = np.eye(e.shape[1])[indices]
        quantized = e.T[indices].reshape(inputs.shape)
        latent = ((quantized - inputs) ** 2).mean()
        loss = self.commitment_cost * latent + (latent if self.decay is None else 0.0)
        if self.decay is not None and is_training:
            self.counter += 1
            self.size = self.decay * self.size + (1 - self.decay) * one_hot.sum(0)
            self.dw = self.decay * self.dw + (1 - self.decay) * flat.T @ one_hot
            debias = 1 - self.decay**self.counter
            size, dw = self.size / debias, self.dw / debias
            n = size.sum()
            self.embeddings = dw / ((size + self.epsilon) / (n + e.shape[1] * self.epsilon) * n)
        share = one_hot.mean(0)
        perplexity = np.exp(-(share * np.log(share + 1e-10)).sum())
        return {
            "quantize": quantized,
            "loss": loss,
            "perplexity": perplexity,
            "encoding_indices": indices.reshape(inputs.shape[:-1]),
        }


def haiku_pair(decay: float | None, **options: Any) -> tuple[Haiku, NumPyQuantizer]:
    words = normal32(K, D, seed=3)
    new = NumPyQuantizer(D, K, dq.STE(), rng=np.random.default_rng(0), **PLAIN | options)
    new.codebook = words
    return Haiku(words.T.astype(np.float64), 0.25, decay), new


def test_haiku_vector_quantizer() -> None:
    """Our default weights are its loss with a cost of 0.25; in evaluation it has a loss too."""
    old, new = haiku_pair(None)
    z = normal32(4, 10, D)
    theirs, out = old(z, is_training=True), new.forward(z)
    np.testing.assert_allclose(out.z_q, theirs["quantize"], **CLOSE)
    np.testing.assert_array_equal(out.indices, theirs["encoding_indices"])
    np.testing.assert_allclose(out.loss, theirs["loss"], rtol=1e-6)
    np.testing.assert_allclose(out.losses.codebook, 4 * theirs["loss"] / 5, rtol=1e-6)
    np.testing.assert_allclose(dq.perplexity(dq.usage(out.indices, K)), theirs["perplexity"], rtol=1e-6)
    # Straight-through, and the two means over all entries.
    g = normal32(4, 10, D, seed=99)
    q = theirs["quantize"]
    np.testing.assert_allclose(new.backward(g), g + 0.25 * 2 * (z - q) / z.size, **CLOSE)
    pulled = np.zeros((K, D))
    np.add.at(pulled, theirs["encoding_indices"], 2 * (q - z) / z.size)
    np.testing.assert_allclose(new.gradients["codewords"], pulled, **CLOSE)
    assert old(z, is_training=False)["loss"] == theirs["loss"]
    assert new.forward(z, train=False).loss == 0


def test_haiku_averages() -> None:
    """Both begin at zero, so both lose the bias: ours in the quotient, there by a correction. Then the smoothing."""
    old, new = haiku_pair(0.9, codebook_update="ema", ema_decay=0.9)
    for seed in range(6):
        z = normal32(40, 10, D, seed=seed)
        theirs, out = old(z, is_training=True), new.forward(z)
        assert len(np.unique(out.indices)) == K
        np.testing.assert_array_equal(out.indices, theirs["encoding_indices"])
        np.testing.assert_allclose(out.loss, theirs["loss"], rtol=1e-5)
        new.update()
        np.testing.assert_allclose(new.codebook, old.embeddings.T, **CLOSE)
    before = old.embeddings.copy()
    assert old(z, is_training=False)["loss"] > 0
    np.testing.assert_array_equal(old.embeddings, before)


def test_haiku_sets_unchosen_codewords_to_zero() -> None:
    """In its first step, whatever they were."""
    old, new = haiku_pair(0.9, codebook_update="ema", ema_decay=0.9)
    old.embeddings[:, -1] = 100.0
    new.codebook = old.embeddings.T.astype(np.float32)
    z = normal32(40, 10, D)
    old(z, is_training=True)
    new.forward(z)
    new.update()
    assert (old.embeddings[:, -1] == 0).all()
    assert (new.codebook[-1] == 100).all()


def test_haiku_first_codebook_is_as_wide_as_ours() -> None:
    """There uniform within (3 / D)^(1/2), whose standard deviation is that of our normal numbers."""
    limit = (3 / D) ** 0.5
    drawn = np.random.default_rng(0).uniform(-limit, limit, 100_000)
    new = NumPyQuantizer(D, 4096, init="normal", rng=np.random.default_rng(0))
    # Standard errors of 0.2 and 0.4 per cent.
    np.testing.assert_allclose(new.codebook.std(), drawn.std(), rtol=0.02)


# By hand


def by_hand(z: Any, words: Any) -> tuple[Any, Any, Any]:
    indices = torch.cdist(z, words).argmin(dim=-1)
    q = words[indices]
    loss = functional.mse_loss(q, z.detach()) + 0.25 * functional.mse_loss(z, q.detach())
    return z + (q - z).detach(), indices, loss


def test_by_hand_in_torch() -> None:
    new = VectorQuantizer(D, K, dq.STE(), **PLAIN)
    words = new.codebook.clone().requires_grad_()
    z = vectors(4, 10, D)
    ours, theirs = step(new, z), step(lambda z: by_hand(z, words), z)
    assert_same_step(ours, theirs)
    torch.testing.assert_close(new.codewords.grad, words.grad, **CLOSE)
    # Its output is the codeword but for the rounding of z + (q - z).
    assert torch.equal(ours[0], new.codebook[ours[1]])
    assert not torch.equal(theirs[0], new.codebook[theirs[1]])


def test_sums_over_entries_are_so_many_means() -> None:
    new = VectorQuantizer(D, K, dq.STE(), codebook_weight=1.0 * D, commitment_weight=0.25 * D, **PLAIN)
    z = vectors(4, 10, D)
    out = new(z)
    errors = (out.z_q - z).square().sum(dim=-1).mean()
    torch.testing.assert_close(out.loss, 1.25 * errors, **CLOSE)


def test_by_hand_in_jax() -> None:
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    z, words, g = (
        jnp.asarray(normal32(*shape, seed=seed)) for shape, seed in (((40, D), 0), ((K, D), 1), ((40, D), 2))
    )
    settings = dq.layers.Settings(D, K, dq.STE(), **PLAIN)
    first = dq.layers.init(settings, np.zeros(1, np.float32), rng=np.random.default_rng(0))
    state = {name: jnp.asarray(x) for name, x in first.items()}

    def theirs(z: Any, words: Any) -> Any:
        indices = ((z[:, None] - words) ** 2).sum(-1).argmin(-1)
        q = words[indices]
        stop = jax.lax.stop_gradient
        loss = ((q - stop(z)) ** 2).mean() + 0.25 * ((z - stop(q)) ** 2).mean()
        return ((z + stop(q - z)) * g).sum() + loss

    def ours(z: Any, words: Any) -> Any:
        out = dq.layers.forward(settings, state | {"codewords": words}, z, train=True, rng=jax.random.key(1))
        return (out.z_q * g).sum() + out.losses.total

    values = [jax.jit(jax.value_and_grad(f, (0, 1)))(z, words) for f in (ours, theirs)]
    for a, b in zip(*(jax.tree.leaves(x) for x in values), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


# The page

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"


def section(title: str) -> str:
    """A chapter of the page."""
    chapters = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return next(chapter for chapter in chapters if chapter.startswith(title))


def options_of(kind: Any) -> set[str]:
    return {name for name in inspect.signature(kind).parameters if not name.endswith("kwargs")}


@pytest.mark.parametrize("name", ["VectorQuantize", "ResidualVQ", "FSQ", "SimVQ"])
def test_every_option_of_vector_quantize_pytorch_is_on_the_page(name: str) -> None:
    package = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    kind, text = getattr(package, name), section("From vector-quantize-pytorch")
    options = options_of(kind) | (options_of(kind.forward) - {"self", "x", "z"})
    assert not {option for option in options if not re.search(rf"\b{option}\b", text)}


@pytest.mark.parametrize("name", ["DIVEQ", "DIVEQDetach", "SFDIVEQ", "SFDIVEQDetach", "ResidualDIVEQ", "ProductDIVEQ"])
def test_every_option_of_diveq_is_on_the_page(authors: Any, name: str) -> None:
    text = section("From diveq")
    assert f"`{name}`" in text
    assert not {option for option in options_of(getattr(authors, name)) if not re.search(rf"\b{option}\b", text)}
