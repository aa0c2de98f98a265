"""The published packages as oracles where their definition is ours, and their faults where it is not.

Both sides get the same noise: torch's generator is seeded, the peer draws from it, and what it drew is
replayed. A test of a fault asserts that the pinned version has it and that ours has not.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import diveq_core as dq
from strategies import EPS, ROUNDINGS, brute_force, example_count

torch = pytest.importorskip("torch", reason="the peers are torch packages")

SHAPES = [(6, 3, 4), (1, 1, 1), (16, 8, 2), (40, 2, 5)]
"""N, D, K."""


@pytest.fixture
def authors() -> Any:
    module = pytest.importorskip("diveq", reason="diveq is not installed")
    if version("diveq") != "0.1.3":
        pytest.skip("the faults are those of diveq 0.1.3")
    return module


@pytest.fixture
def lucidrains() -> Any:
    module = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    if not version("vector-quantize-pytorch").startswith("1.32."):
        pytest.skip("the faults are those of vector-quantize-pytorch 1.32")
    return module


@pytest.fixture
def substitution() -> Any:
    module = pytest.importorskip("nsvq", reason="nsvq is not installed")
    if version("nsvq") != "0.1.0":
        pytest.skip("the faults are those of nsvq 0.1.0")
    return module


def problem(shape: tuple[int, int, int], seed: int) -> tuple[Any, Any, Any]:
    """z, codebook and a cotangent, float32."""
    n, d, k = shape
    rng = np.random.default_rng(seed)
    return tuple(torch.tensor(rng.standard_normal(s).astype(np.float32)) for s in ((n, d), (k, d), (n, d)))


def ours(z: Any, codebook: Any, g: Any, estimator: dq.Estimator, **options: Any) -> list[np.ndarray]:
    """Output and gradients by torch's backward pass through ``quantize``."""
    z, codebook = z.clone().requires_grad_(), codebook.clone().requires_grad_()
    z_q = dq.quantize(z, codebook, estimator, **options).z_q
    z_q.backward(g)
    # None where the estimator gives the codebook no gradient.
    g_codebook = torch.zeros_like(codebook) if codebook.grad is None else codebook.grad
    return [x.detach().numpy() for x in (z_q, z.grad, g_codebook)]


def theirs(z: Any, module: Any, parameter: Any, g: Any) -> tuple[list[np.ndarray], Any]:
    """The same of a peer's module in training, and the indices it chose."""
    z = z.clone().requires_grad_()
    z_q, indices, *_ = module(z)
    z_q.backward(g)
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return [x.detach().numpy() for x in (z_q, z.grad, grad.reshape(-1, z.shape[-1]))], indices


def assert_agree(a: list[np.ndarray], b: list[np.ndarray], z: Any, codebook: Any, g: Any) -> None:
    """To float32's roundings of sums over rows and columns; the peer rounds as often as we do."""
    far = float(z.abs().max() + codebook.abs().max())
    sizes = (far, float(g.abs().sum(-1).max()), float(g.abs().sum()))
    for x, y, size in zip(a, b, sizes, strict=True):
        assert np.max(np.abs(x - y)) <= 2 * ROUNDINGS * EPS["float32"] * size


def diveq_module(module: Any, codebook: Any, **options: Any) -> Any:
    peer = module(*codebook.shape, codebook_reset=False, allow_warning=False, **options)
    with torch.no_grad():
        peer.codebook.copy_(codebook)
    return peer


def lucid_module(module: Any, codebook: Any, **options: Any) -> tuple[Any, Any]:
    count, width = codebook.shape
    peer = module.VectorQuantize(dim=width, codebook_size=count, **options)
    with torch.no_grad():
        peer._codebook.embed.copy_(codebook[None])
    return peer, peer._codebook.embed


problems = {"shape": st.sampled_from(SHAPES), "seed": st.integers(0, 2**32 - 1)}

# Oracles


@settings(max_examples=example_count(0.5))
@given(**problems, variance=st.sampled_from([1e-3, 0.1, 2.0]))
def test_diveq(authors: Any, shape: tuple[int, int, int], seed: int, variance: float) -> None:
    """DiVeQ with the standard deviation that the authors' code in fact uses."""
    z, codebook, g = problem(shape, seed)
    peer = diveq_module(authors.DIVEQ, codebook, noise_var=variance)
    torch.manual_seed(seed % 2**31)
    want, indices = theirs(z, peer, peer.codebook, g)
    torch.manual_seed(seed % 2**31)
    noise = torch.randn(z.shape)
    assert_agree(ours(z, codebook, g, dq.DiVeQ(variance), noise=noise, indices=indices), want, z, codebook, g)


@settings(max_examples=example_count(0.5))
@given(**problems)
def test_diveq_detach(authors: Any, shape: tuple[int, int, int], seed: int) -> None:
    z, codebook, g = problem(shape, seed)
    peer = diveq_module(authors.DIVEQDetach, codebook)
    want, indices = theirs(z, peer, peer.codebook, g)
    assert_agree(ours(z, codebook, g, dq.DiVeQDetach(), indices=indices), want, z, codebook, g)


@settings(max_examples=example_count(0.5))
@given(**problems)
def test_nsvq(substitution: Any, shape: tuple[int, int, int], seed: int) -> None:
    z, codebook, g = problem(shape, seed)
    peer = diveq_module(substitution.NSVQ, codebook)
    torch.manual_seed(seed % 2**31)
    want, indices = theirs(z, peer, peer.codebook, g)
    torch.manual_seed(seed % 2**31)
    noise = torch.randn(z.shape)
    assert_agree(ours(z, codebook, g, dq.NSVQ(), noise=noise, indices=indices), want, z, codebook, g)


@settings(max_examples=example_count(0.5))
@given(**problems, variance=st.sampled_from([0.0, 1e-3, 0.1, 2.0]))
def test_directional_reparametrization(
    lucidrains: Any, shape: tuple[int, int, int], seed: int, variance: float
) -> None:
    """DiVeQ as vector-quantize-pytorch has it, where the variance is one."""
    z, codebook, g = problem(shape, seed)
    peer, parameter = lucid_module(
        lucidrains,
        codebook,
        directional_reparam=True,
        directional_reparam_variance=variance,
        threshold_ema_dead_code=1e-9,
    )
    torch.manual_seed(seed % 2**31)
    want, indices = theirs(z, peer, parameter, g)
    torch.manual_seed(seed % 2**31)
    noise = torch.randn(z.shape)
    estimator = dq.DiVeQ(variance**0.5)
    assert_agree(ours(z, codebook, g, estimator, noise=noise, indices=indices), want, z, codebook, g)


@settings(max_examples=example_count(0.5))
@given(**problems)
def test_straight_through(lucidrains: Any, shape: tuple[int, int, int], seed: int) -> None:
    z, codebook, g = problem(shape, seed)
    peer, parameter = lucid_module(
        lucidrains, codebook, rotation_trick=False, learnable_codebook=True, ema_update=False
    )
    want, indices = theirs(z, peer, parameter, g)
    assert_agree(ours(z, codebook, g, dq.STE(), indices=indices), want, z, codebook, g)


@settings(max_examples=example_count(0.5))
@given(**problems)
def test_they_choose_the_same_codewords(authors: Any, shape: tuple[int, int, int], seed: int) -> None:
    """Near the origin; `test_wrong_codeword_far_from_the_origin` is where they do not."""
    z, codebook, _ = problem(shape, seed)
    _, indices, _ = diveq_module(authors.DIVEQDetach, codebook)(z)
    found = dq.nearest(z, codebook)
    distance = (z[:, None] - codebook).double().norm(dim=-1)
    a, b = (distance.gather(1, i[:, None].long()) for i in (indices, found))
    # The peer's own rounding of |z|^2 + |e|^2 decides between codewords this near to each other.
    assert torch.all((a**2 - b**2).abs() <= ROUNDINGS * EPS["float32"] * (1 + b**2) * 16)


def curve_module(module: Any, codebook: Any, **options: Any) -> Any:
    """A space-filling module of diveq that quantizes from the first step on."""
    peer = module(*codebook.shape, skip_iters=0, avg_iters=0, allow_warning=False, **options)
    with torch.no_grad():
        peer.codebook.copy_(codebook)
    return peer


CURVES = {"shape": st.sampled_from([(6, 3, 4), (16, 8, 2), (40, 2, 5)]), "seed": st.integers(0, 2**32 - 1)}


@settings(max_examples=example_count(0.5))
@given(**CURVES, variance=st.sampled_from([1e-3, 0.1, 2.0]))
def test_space_filling(authors: Any, shape: tuple[int, int, int], seed: int, variance: float) -> None:
    """SF-DiVeQ in training, with the dither that the authors' code draws first and the noise of both ends after."""
    z, codebook, g = problem(shape, seed)
    peer = curve_module(authors.SFDIVEQ, codebook, noise_var=variance)
    torch.manual_seed(seed % 2**31)
    want, indices = theirs(z, peer, peer.codebook, g)
    torch.manual_seed(seed % 2**31)
    dither = torch.rand((shape[2] - 1, 1))[:, 0]
    noise = dq.CurveNoise(dither, torch.stack([torch.randn(z.shape), torch.randn(z.shape)]))
    assert_agree(ours(z, codebook, g, dq.SFDiVeQ(variance), noise=noise, indices=indices), want, z, codebook, g)


# Faults


def test_space_filling_detach_interpolates_nothing(authors: Any) -> None:
    """diveq's SF-DiVeQ-detach uses the first codeword of a segment twice, so its output is that codeword."""
    z, codebook, g = problem((200, 4, 8), 0)
    peer = curve_module(authors.SFDIVEQDetach, codebook)
    torch.manual_seed(0)
    (z_q, *_), indices = theirs(z, peer, peer.codebook, g)
    torch.manual_seed(0)
    dither = torch.rand((7, 1))[:, 0]
    first, second = codebook[indices], codebook[indices + 1]
    t = dither[indices][:, None]
    # z + (c - z) and the like: a few roundings of numbers of order one.
    np.testing.assert_allclose(z_q, first, atol=1e-5)
    assert ((1 - t) * first + t * second - first).norm(dim=1).mean() > 0.5
    out = dq.quantize(z, codebook, dq.SFDiVeQDetach(), noise=dq.CurveNoise(dither), indices=indices)
    assert torch.equal(out.z_q, (1 - t) * first + t * second)


def test_inference_misses_the_nearest_segment(authors: Any) -> None:
    """diveq looks at the two segments next to the nearest codeword: on an unordered codebook half are missed."""
    z, codebook, _ = problem((1000, 4, 64), 0)
    found, *_ = curve_module(authors.SFDIVEQ, codebook).inference(z)
    theirs, ours = ((z - x).norm(dim=1) for x in (found, dq.project(z, codebook).z_q))
    # A thousandth of a distance is no rounding.
    missed = (theirs > 1.001 * ours).float().mean().item()
    assert 0.3 < missed < 0.8
    assert not (ours > 1.001 * theirs).any()


def test_equal_neighbours_give_nan(authors: Any) -> None:
    """0 / 0 on a segment of no length, in diveq's inference."""
    z, codebook = torch.tensor([[0.1, 0.2], [0.9, 0.1]]), torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    found, *_ = curve_module(authors.SFDIVEQ, codebook).inference(z)
    assert found.isnan().any()
    np.testing.assert_allclose(dq.project(z, codebook).z_q, [[0.1, 0.0], [0.9, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("name", ["ResidualSFDIVEQ", "ProductSFDIVEQ"])
def test_initialisation_of_composed_curves_does_nothing(authors: Any, name: str) -> None:
    """diveq assigns the means of the first vectors to a temporary; its plain module shows what was meant."""
    options = {"skip_iters": 3, "avg_iters": 1, "allow_warning": False}
    z, _, _ = problem((64, 4, 1), 0)
    plain = authors.SFDIVEQ(4, 4, **options)
    composed = getattr(authors, name)(4, 4, num_codebooks=2, replacement_iters=3, verbose=False, **options)
    before = [peer.codebook.detach().clone() for peer in (plain, composed)]
    for _ in range(2):
        plain(z)
        composed(z)
    assert not torch.equal(plain.codebook, before[0])
    np.testing.assert_allclose(plain.codebook.detach()[0], z[:16].mean(dim=0), atol=1e-6)
    assert torch.equal(composed.codebook, before[1])
    # Ours has no codebook of its own to begin: what begins one gives the vectors of each stage.
    first = dq.kmeans_plus_plus(z, 4, rng=torch.Generator().manual_seed(0))
    rest = z - dq.quantize(z, first, dq.STE()).z_q
    second = dq.kmeans_plus_plus(rest, 4, rng=torch.Generator().manual_seed(0))
    for words, source in ((first, z), (second, rest)):
        # There and back from the frame of the vectors.
        assert ((words[:, None] - source).abs().amax(dim=2).amin(dim=1) < 1e-5).all()
    errors = [
        (z - x).norm()
        for x in (first[dq.nearest(z, first)], first[dq.nearest(z, first)] + second[dq.nearest(rest, second)])
    ]
    assert errors[1] < errors[0]


def test_residual_diveq_is_noisy_in_evaluation(lucidrains: Any) -> None:
    """vector-quantize-pytorch adds the noise of the whole whether it trains or not; what it decodes has none."""
    z, codebook, _ = problem((20, 4, 8), 0)
    peer = lucidrains.ResidualVQ(dim=4, codebook_size=8, num_quantizers=2, diveq=True).eval()
    (first, indices, _), (again, same, _) = (peer(z[None]) for _ in range(2))
    assert torch.equal(indices, same)
    assert not torch.equal(first, again)
    assert not torch.allclose(first, peer.get_output_from_indices(indices), atol=1e-4)
    estimator, words = dq.Residual(dq.DiVeQDetach(), 2), torch.stack([codebook, codebook / 4])
    outs = [dq.quantize(z, words, estimator) for _ in range(2)]
    assert torch.equal(outs[0].z_q, outs[1].z_q)
    assert torch.equal(outs[0].z_q, dq.decode(outs[0].indices, words, estimator))


def test_masked_and_unmasked_commitment_losses_differ(lucidrains: Any) -> None:
    """With a mask vector-quantize-pytorch compares with the input as it was, without one with what was searched for."""
    z, codebook, _ = problem((20, 4, 8), 0)
    losses = []
    for mask in (None, torch.ones(1, 20, dtype=torch.bool)):
        peer, _ = lucid_module(lucidrains, torch.nn.functional.normalize(codebook), use_cosine_sim=True)
        losses.append(peer(z[None], mask=mask, freeze_codebook=True)[2].item())
    assert abs(losses[0] - losses[1]) > 0.1
    indices = dq.nearest(z, codebook)
    plain = dq.commitment_loss(z, codebook, indices)
    masked = dq.commitment_loss(z, codebook, indices, mask=torch.ones(20, dtype=torch.bool))
    assert torch.equal(plain, masked)


def test_a_variance_is_passed_as_a_standard_deviation(authors: Any) -> None:
    """diveq: ``Normal(0, noise_var)``; the effective variance is 1e-6 where the paper has 1e-3."""
    n = 20000
    z, codebook = torch.zeros(n, 2), torch.tensor([[1.0, 0.0]])
    torch.manual_seed(0)
    z_q, *_ = diveq_module(authors.DIVEQ, codebook, noise_var=1e-3)(z)
    # With d = (1, 0) the second coordinate of the output is sigma eps to first order in sigma.
    assert 0.9e-6 < z_q[:, 1].var().item() < 1.1e-6
    z_q = dq.quantize(z, codebook, dq.DiVeQ(), noise=torch.randn(n, 2)).z_q
    assert 0.9e-3 < z_q[:, 1].var().item() < 1.1e-3


def test_nsvq_does_likewise(substitution: Any) -> None:
    n = 20000
    z, codebook = torch.zeros(n, 2), torch.tensor([[1.0, 0.0]])
    torch.manual_seed(0)
    z_q, *_ = diveq_module(substitution.NSVQ, codebook, diveq=True, diveq_noise_var=1e-3)(z)
    assert 0.9e-6 < z_q[:, 1].var().item() < 1.1e-6
    assert dq.DiVeQ().sigma ** 2 == pytest.approx(1e-3, rel=1e-12)


@pytest.mark.parametrize(("offset", "spread", "least"), [(100.0, 1.0, 0.005), (1000.0, 1.0, 0.5), (10.0, 0.01, 0.5)])
def test_wrong_codeword_far_from_the_origin(
    authors: Any, lucidrains: Any, offset: float, spread: float, least: float
) -> None:
    """Both expand the square in float32 without centring; a share of the codewords is wrong."""
    rng = np.random.default_rng(0)
    z, codebook = ((offset + spread * rng.standard_normal(s)).astype(np.float32) for s in ((512, 64), (256, 64)))
    right = brute_force(z, codebook)
    z, codebook = torch.tensor(z), torch.tensor(codebook)
    _, first, _ = diveq_module(authors.DIVEQDetach, codebook).inference(z)
    peer, _ = lucid_module(lucidrains, codebook, rotation_trick=False)
    _, second, _ = peer.eval()(z)
    assert np.mean(first.numpy() != right) > least
    assert np.mean(second.numpy() != right) > least
    np.testing.assert_array_equal(dq.nearest(z, codebook).numpy(), right)


def test_small_vectors_all_get_codeword_zero(lucidrains: Any) -> None:
    """vector-quantize-pytorch clamps squared distances at 1e-8: at scale 1e-5 all are equal."""
    rng = np.random.default_rng(0)
    z, codebook = ((1e-5 * rng.standard_normal(s)).astype(np.float32) for s in ((64, 8), (16, 8)))
    right = brute_force(z, codebook)
    peer, _ = lucid_module(lucidrains, torch.tensor(codebook), rotation_trick=False)
    _, indices, _ = peer.eval()(torch.tensor(z))
    assert np.all(indices.numpy() == 0)
    assert len(np.unique(right)) > 8
    np.testing.assert_array_equal(dq.nearest(torch.tensor(z), torch.tensor(codebook)).numpy(), right)


def test_direction_of_small_errors_is_no_unit_vector(lucidrains: Any) -> None:
    """vector-quantize-pytorch clamps the length it divides by at 1e-6: small errors are not quantized away."""
    from vector_quantize_pytorch.vector_quantize_pytorch import directional_reparam

    z, q = torch.zeros(1, 2), torch.tensor([[3e-9, 4e-9]])
    assert directional_reparam(z, q, noise_variance=0.0).norm() < 0.01 * q.norm()
    out, pullback = dq.vjp(z, q, dq.DiVeQDetach())
    np.testing.assert_array_equal(out.z_q.numpy(), q.numpy())
    # u = (0.6, 0.8), to a rounding of each factor.
    np.testing.assert_allclose(pullback(torch.tensor([[1.0, 0.0]]))[1], [[0.36, 0.48]], rtol=4 * 2 * EPS["float32"])


def test_what_training_saw_is_not_the_codeword(authors: Any, lucidrains: Any) -> None:
    """z + (q - z) rounds: what the indices decode to is not what the decoder was trained on."""
    z, codebook, _ = problem((200, 8, 16), 0)
    hard, indices, _ = diveq_module(authors.DIVEQDetach, codebook)(z)
    assert not torch.equal(hard, codebook[indices])
    peer, _ = lucid_module(lucidrains, codebook, rotation_trick=False, learnable_codebook=True, ema_update=False)
    hard, indices, _ = peer(z.clone().requires_grad_())
    assert not torch.equal(hard, codebook[indices])
    for estimator in (dq.STE(), dq.DiVeQDetach()):
        out = dq.quantize(z, codebook, estimator)
        assert torch.equal(out.z_q, dq.lookup(out.indices, codebook))


def test_evaluation_is_noisy(authors: Any) -> None:
    """diveq's module draws noise in evaluation mode too; ours has no mode, only estimators without noise."""
    z, codebook, _ = problem((20, 4, 3), 0)
    peer = diveq_module(authors.DIVEQ, codebook, noise_var=0.1).eval()
    assert not torch.equal(peer(z)[0], peer(z)[0])
    once, again = (dq.quantize(z, codebook, dq.DiVeQDetach()).z_q for _ in range(2))
    assert torch.equal(once, again)


def test_one_weight_for_both_auxiliary_terms(lucidrains: Any) -> None:
    """A learned codebook's pull on the encoder and the encoder's on the codebook cannot be told apart there."""
    z, codebook, _ = problem((6, 3, 1), 0)
    gradients = []
    for weight in (1.0, 0.25):
        peer, parameter = lucid_module(
            lucidrains,
            codebook,
            rotation_trick=False,
            learnable_codebook=True,
            ema_update=False,
            commitment_weight=weight,
        )
        x = z.clone().requires_grad_()
        peer(x)[2].backward()
        gradients.append((x.grad, parameter.grad[0]))
    # A power of two: both scale with the one weight, exactly.
    for full, quarter in zip(*gradients, strict=True):
        assert full.abs().max() > 0
        assert torch.equal(full / 4, quarter)
    # Ours adds no term of its own: straight-through moves nothing but what its cotangent says.
    g_z, g_codebook = dq.vjp(z, codebook, dq.STE())[1](torch.zeros_like(z))
    assert not g_z.any()
    assert not g_codebook.any()


def test_usage_loses_repeated_indices(authors: Any) -> None:
    """diveq counts the batches in which a codeword was used, not the vectors that it served."""
    z, codebook = torch.zeros(10, 2), torch.zeros(1, 2)
    peer = authors.DIVEQDetach(1, 2, allow_warning=False, verbose=False)
    peer(z)
    assert peer.codebook_usage.tolist() == [1]
    assert dq.usage(dq.nearest(z, codebook), 1).tolist() == [10]


def test_gradient_penalty_at_zero_distance(authors: Any) -> None:
    """A vector on its codeword turns diveq's second derivatives to NaN; ours are finite."""
    codebook = torch.tensor([[1.0, 2.0], [5.0, 5.0]])

    def penalty(quantize: Any) -> Any:
        z = torch.tensor([[1.0, 2.0], [4.0, 5.5]], requires_grad=True)
        z_q = quantize(z)
        (g,) = torch.autograd.grad((z_q**2).sum(), z, create_graph=True)
        return torch.autograd.grad((g**2).sum(), z)[0]

    assert penalty(lambda z: diveq_module(authors.DIVEQDetach, codebook)(z)[0]).isnan().any()
    assert penalty(lambda z: dq.quantize(z, codebook, dq.DiVeQDetach()).z_q).isfinite().all()
