"""What docs/migration.md says of vector-quantize-pytorch: both sides on the same vectors, where they agree and not."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest

import diveq_core as dq

torch = pytest.importorskip("torch", reason="the layer and the peer are of torch")
from torch.nn import functional  # noqa: E402

from diveq_torch import VectorQuantizer  # noqa: E402
from layer_pairs import CLOSE, PLAIN, D, K, assert_same_step, step, vectors  # noqa: E402

# What it does by default.
EMA = {"codebook_update": "ema", "ema_decay": 0.8, "commitment_weight": 1.0} | PLAIN


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def lucidrains() -> Any:
    module = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    if not version("vector-quantize-pytorch").startswith("1.32."):
        pytest.skip("the page speaks of vector-quantize-pytorch 1.32")
    return module


def begin_as(new: Any, old: Any) -> None:
    """The state of vector-quantize-pytorch's layer, as the page copies it."""
    with torch.no_grad():
        words = old.codebooks if hasattr(old, "codebooks") else old.codebook
        new.codebook = words[0] if words.ndim > new.codebook.ndim else words
        if "counts" in new.settings.shapes:
            layers = old.layers if hasattr(old, "layers") else [old]
            sizes = torch.stack([layer._codebook.cluster_size for layer in layers])
            new.counts.copy_(sizes.flatten()[: new.counts.numel()].reshape(new.counts.shape))
        if new.settings.projected:
            for ours, theirs in (("in", old.project_in), ("out", old.project_out)):
                getattr(new, f"{ours}_weight").copy_(theirs.weight.T)
                getattr(new, f"{ours}_bias").copy_(theirs.bias)


# VectorQuantize

LAYERS: dict[str, tuple[dict[str, Any], Any, dict[str, Any], tuple[int, ...]]] = {
    "default": ({}, dq.Rotation(), {}, (4, 10, D)),
    "decay": ({"decay": 0.95}, dq.Rotation(), {"ema_decay": 0.95}, (4, 10, D)),
    "commitment": ({"commitment_weight": 0.25}, dq.Rotation(), {"commitment_weight": 0.25}, (4, 10, D)),
    "no commitment": ({"commitment_weight": 0.0}, dq.Rotation(), {"commitment_weight": 0.0}, (4, 10, D)),
    "straight-through": ({"rotation_trick": False}, dq.STE(), {}, (4, 10, D)),
    "Gumbel's name": ({"rotation_trick": False, "straight_through": True}, dq.STE(), {}, (4, 10, D)),
    "cosine": ({"use_cosine_sim": True}, dq.Rotation(), {"cosine": True}, (4, 10, D)),
    "heads": ({"heads": 2, "codebook_dim": 3}, dq.Rotation(), {"heads": 2, "shared": True}, (4, 10, D)),
    "own codebooks": (
        {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True},
        dq.Rotation(),
        {"heads": 2},
        (4, 10, D),
    ),
    "projections": ({"codebook_dim": 3}, dq.Rotation(), {"codebook_dim": 3}, (4, 10, D)),
    "projections and heads": (
        {"codebook_dim": 2, "heads": 2},
        dq.Rotation(),
        {"codebook_dim": 4, "heads": 2, "shared": True},
        (4, 10, D),
    ),
    "channels first": ({"channel_last": False}, dq.Rotation(), {"channel_axis": 1}, (4, D, 10)),
    "images": ({"accept_image_fmap": True}, dq.Rotation(), {"channel_axis": 1}, (2, D, 4, 5)),
    "volumes": ({"accept_3d_fmap": True}, dq.Rotation(), {"channel_axis": 1}, (2, D, 2, 2, 5)),
    "no batch": ({}, dq.Rotation(), {}, (40, D)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_vector_quantize_step_by_step(lucidrains: Any, name: str) -> None:
    """The same outputs, tokens, losses, gradients and codebooks, once the counts begin with 1 as they do there."""
    given, estimator, options, shape = LAYERS[name]
    old = lucidrains.VectorQuantize(dim=D, codebook_size=K, **given)
    new = VectorQuantizer(D, K, estimator, **EMA | options)
    begin_as(new, old)
    for seed in range(4):
        z = vectors(*shape, seed=seed)
        assert_same_step(step(new, z), step(old, z))
        new.update()
        torch.testing.assert_close(new.codebook, old.codebook, **CLOSE)
    z = vectors(*shape, seed=9)
    z_q, indices, loss = old.eval()(z)
    out = new.eval()(z)
    assert_same_step(out[:3], (z_q, indices, loss))
    assert loss == out.loss == 0
    decoded = new.decode(indices)
    torch.testing.assert_close(decoded, z_q, **CLOSE)
    if not new.settings.shared:
        torch.testing.assert_close(decoded, old.get_output_from_indices(indices), **CLOSE)


def test_tokens_of_heads_that_share_a_codebook(lucidrains: Any) -> None:
    """There they decode to a vector for each head, which no projection takes."""
    tokens = torch.zeros(2, 5, 2, dtype=torch.int64)
    for width, decoded in ((3, (2, 5, 2, 3)), (2, None)):
        old = lucidrains.VectorQuantize(dim=D, codebook_size=K, heads=2, codebook_dim=width).eval()
        if decoded is None:
            with pytest.raises(RuntimeError, match="cannot be multiplied"):
                old.get_output_from_indices(tokens)
        else:
            assert old.get_output_from_indices(tokens).shape == decoded
        new = VectorQuantizer(D, K, dq.Rotation(), heads=2, shared=True, codebook_dim=2 * width)
        assert new.decode(tokens).shape == (2, 5, D)


def test_vector_quantize_with_a_mask(lucidrains: Any) -> None:
    lengths = torch.tensor([3, 10, 1, 7])
    mask = torch.arange(10) < lengths[:, None]
    outs = {}
    for key in ("mask", "lens"):
        torch.manual_seed(0)
        old = lucidrains.VectorQuantize(dim=D, codebook_size=K)
        new = VectorQuantizer(D, K, dq.Rotation(), **EMA)
        begin_as(new, old)
        z = vectors(4, 10, D)
        outs[key] = step(new, z, mask=mask), step(old, z, **{key: mask if key == "mask" else lengths})
        new.update()
        torch.testing.assert_close(new.codebook, old.codebook, **CLOSE)
    for new_out, old_out in outs.values():
        assert_same_step(new_out, old_out)
        assert (new_out[1][~mask] == -1).all()
        assert not new_out[0][~mask].any()


def test_a_learnable_codebook_has_two_losses_and_there_one_number(lucidrains: Any) -> None:
    old = lucidrains.VectorQuantize(
        dim=D, codebook_size=K, rotation_trick=False, learnable_codebook=True, ema_update=False
    )
    new = VectorQuantizer(D, K, dq.STE(), codebook_weight=1.0, commitment_weight=1.0, **PLAIN)
    begin_as(new, old)
    ours, theirs = (step(layer, vectors(4, 10, D)) for layer in (new, old))
    assert_same_step((ours[0], ours[1], ours[3]), (theirs[0], theirs[1], theirs[3]))
    torch.testing.assert_close(new.codewords.grad, old._codebook.embed.grad[0], **CLOSE)
    # The same gradients of twice the number.
    torch.testing.assert_close(ours[2], 2 * theirs[2])


def test_directional_reparam_is_diveq_with_a_variance(lucidrains: Any) -> None:
    old = lucidrains.VectorQuantize(dim=D, codebook_size=K, directional_reparam=True, threshold_ema_dead_code=1e-9)
    new = VectorQuantizer(D, K, dq.DiVeQ(5e-3**0.5), **PLAIN)
    begin_as(new, old)
    z = vectors(4, 10, D)
    torch.manual_seed(1)
    theirs = step(old, z)
    torch.manual_seed(1)
    assert_same_step(step(new, z, noise=torch.randn(z.shape)), theirs)
    assert old.directional_reparam_variance == pytest.approx(5 * dq.DiVeQ().sigma ** 2)
    # Without a gradient to give, it gives the codeword; ours, in training, its estimator's output.
    assert torch.equal(old(z)[0], old.codebook[old(z)[1]])
    out = new(z)
    assert not torch.equal(out.z_q, new.codebook[out.indices])


def test_averages_begin_with_the_first_codebook_there(lucidrains: Any) -> None:
    """With counts of 0 the first step moves a codeword to the mean of its vectors."""
    old = lucidrains.VectorQuantize(dim=D, codebook_size=K)
    new = VectorQuantizer(D, K, dq.Rotation(), **EMA)
    begin_as(new, old)
    new.counts.zero_()
    first, z = old.codebook.clone(), vectors(4, 10, D)
    indices = new(z).indices
    old(z)
    new.update()
    for k in indices.unique():
        rows = z[indices == k]
        torch.testing.assert_close(new.codebook[k], rows.mean(dim=0), **CLOSE)
        share = 0.8 / (0.8 + 0.2 * len(rows))
        torch.testing.assert_close(old.codebook[k], share * first[k] + (1 - share) * rows.mean(dim=0), **CLOSE)


def test_an_unused_codeword_shrinks_to_zero_there(lucidrains: Any) -> None:
    """Laplace smoothing divides by more than the count; ours leaves the codeword as it was, bit for bit."""
    old, new = lucidrains.VectorQuantize(dim=D, codebook_size=K), VectorQuantizer(D, K, dq.Rotation(), **EMA)
    with torch.no_grad():
        old._codebook.embed[0, -1] = -100.0
        old._codebook.embed_avg[0, -1] = -100.0
    begin_as(new, old)
    for seed in range(60):
        z = vectors(40, D, seed=seed) + 5
        new(z)
        old(z)
    new.update()
    assert (new.codebook[-1] == -100).all()
    # n / (n + 1e-5), but for the thousandth by which the smoothing keeps the sum.
    left = 0.8**60 / (0.8**60 + 1e-5)
    torch.testing.assert_close(old.codebook[-1], torch.full((D,), -100 * left), rtol=1e-3, atol=0)
    assert left == pytest.approx(1 / 8, abs=0.01)


def test_when_the_codebook_changes(lucidrains: Any) -> None:
    """There in the forward pass; here at the next step, or by update()."""
    old, new = lucidrains.VectorQuantize(dim=D, codebook_size=K), VectorQuantizer(D, K, dq.Rotation(), **EMA)
    begin_as(new, old)
    first = new.codebook.clone()
    for layer in (old, new):
        layer(vectors(4, 10, D))
    assert not torch.equal(old.codebook, first)
    assert torch.equal(new.codebook, first)
    new.update()
    torch.testing.assert_close(new.codebook, old.codebook, **CLOSE)


def test_several_calls_before_an_update(lucidrains: Any) -> None:
    """accum_ema_update, and manual_ema_update of each call, are one update() of several calls."""
    old = lucidrains.VectorQuantize(dim=D, codebook_size=K)
    new = VectorQuantizer(D, K, dq.Rotation(), auto_update=False, **EMA)
    begin_as(new, old)
    first, second = vectors(4, 10, D), vectors(4, 10, D, seed=1)
    old(first, accum_ema_update=True)
    old(second)
    new(first)
    new(second)
    new.update()
    torch.testing.assert_close(new.codebook, old.codebook, **CLOSE)


def test_a_trained_layer_is_carried_over(lucidrains: Any) -> None:
    """Codebook and cluster sizes are all that it has."""
    old, new = lucidrains.VectorQuantize(dim=D, codebook_size=K), VectorQuantizer(D, K, dq.Rotation(), **EMA)
    for seed in range(5):
        old(vectors(40, D, seed=seed))
    new.codebook = old.codebook
    new.counts.copy_(old._codebook.cluster_size[0])
    for seed in range(5, 8):
        assert_same_step(step(new, vectors(40, D, seed=seed)), step(old, vectors(40, D, seed=seed)))
    new.update()
    torch.testing.assert_close(new.codebook, old.codebook, **CLOSE)
    # Without the counts the next vectors weigh too much.
    new.codebook = old.codebook
    for layer in (new, old):
        layer(vectors(40, D, seed=9))
    new.update()
    assert not torch.allclose(new.codebook, old.codebook, atol=0.1)


def test_the_default_weights(lucidrains: Any) -> None:
    z = vectors(4, 10, D)
    old = lucidrains.VectorQuantize(dim=D, codebook_size=K)
    new = VectorQuantizer(D, K, dq.Rotation(), codebook_update="ema", **PLAIN)
    begin_as(new, old)
    torch.testing.assert_close(new(z).loss, 0.25 * old(z)[2])
    assert VectorQuantizer(D, K, dq.STE(), **PLAIN).settings.weights == (1.0, 0.25)
    assert VectorQuantizer(D, K, **PLAIN)(z).loss == 0
    assert old._codebook.decay == 0.8
    assert new.settings.ema_decay == 0.99


def test_names_of_what_is_returned(lucidrains: Any) -> None:
    z = vectors(4, 10, D)
    old, new = lucidrains.VectorQuantize(dim=D, codebook_size=K), VectorQuantizer(D, K, dq.Rotation(), **EMA)
    begin_as(new, old)
    parts = old(z, return_loss_breakdown=True)[3]
    out = new(z)
    assert out._fields == ("z_q", "indices", "loss", "losses")
    torch.testing.assert_close(out.losses.commitment, parts.commitment)
    assert out.indices.dtype == old(z)[1].dtype == torch.int64


def test_straight_through_gives_the_codeword_itself(lucidrains: Any) -> None:
    z = vectors(400, D)
    old = lucidrains.VectorQuantize(dim=D, codebook_size=K, rotation_trick=False)
    new = VectorQuantizer(D, K, dq.STE(), **EMA)
    begin_as(new, old)
    words = new.codebook.clone()
    ours, theirs = step(new, z), step(old, z)
    assert torch.equal(ours[0], words[ours[1]])
    assert not torch.equal(theirs[0], words[theirs[1]])


def test_a_frozen_codebook(lucidrains: Any) -> None:
    old = lucidrains.VectorQuantize(dim=D, codebook_size=K, freeze_codebook=True)
    new = VectorQuantizer(D, K, dq.Rotation(), codebook_update="frozen", commitment_weight=1.0, init="normal")
    begin_as(new, old)
    first = new.codebook.clone()
    for seed in range(3):
        assert_same_step(step(new, vectors(40, D, seed=seed)), step(old, vectors(40, D, seed=seed)))
    new.update()
    assert torch.equal(new.codebook, first)
    assert torch.equal(old.codebook, first)


def test_a_start_by_kmeans(lucidrains: Any) -> None:
    """There a call in evaluation starts it, and the vectors of the start weigh in the averages."""
    first, second = vectors(40, D) + 1, vectors(40, D, seed=1) - 1
    old = lucidrains.VectorQuantize(dim=D, codebook_size=1, kmeans_init=True)
    new = VectorQuantizer(D, 1, dq.Rotation(), **EMA | {"init": "kmeans"})
    drawn = new.codebook.clone()
    assert not old.codebook.any()
    old.eval()(first)
    new.eval()(first)
    torch.testing.assert_close(old.codebook[0], first.mean(dim=0), **CLOSE)
    assert torch.equal(new.codebook, drawn)
    for layer in (old.train(), new.train()):
        layer(first)
    new.update()
    torch.testing.assert_close(new.codebook, old.codebook, **CLOSE)
    for layer in (old, new):
        layer(second)
    new.update()
    means = first.mean(dim=0), second.mean(dim=0)
    torch.testing.assert_close(old.codebook[0], means[0].lerp(means[1], 1 - 0.8), **CLOSE)
    torch.testing.assert_close(new.codebook[0], means[0].lerp(means[1], 1 / (1 + 0.8)), **CLOSE)


def test_dead_codes(lucidrains: Any) -> None:
    """There a moving average of vectors a step, looked at in each step; here a share of the mean use, on a schedule."""
    z = vectors(8 * K, D)
    # Two vectors a step, of eight for each codeword on average.
    old = lucidrains.VectorQuantize(dim=D, codebook_size=K, threshold_ema_dead_code=2)
    new = VectorQuantizer(D, K, dq.Rotation(), **EMA | {"replace_every": 3, "replace_threshold": 2 / 8})
    with torch.no_grad():
        old._codebook.embed[0, -1] = 100.0
        old._codebook.embed_avg[0, -1] = 100.0
    begin_as(new, old)
    replaced = []
    for _ in range(6):
        for layer in (old, new):
            layer(z)
        new.update()
        replaced.append([bool(abs(x.codebook[-1]).max() < 10) for x in (old, new)])
    assert [x for x, _ in replaced] == [True] * 6
    # Ten uses for each codeword on average come after two steps, the schedule says three.
    assert [x for _, x in replaced] == [False, False, True, True, True, True]
    untouched = lucidrains.VectorQuantize(dim=D, codebook_size=K)._codebook
    assert not untouched.has_dead_code_replacement
    assert VectorQuantizer(D, K).settings.replace_every == 100


# ResidualVQ


def residual_pair(lucidrains: Any, estimator: Any, given: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    rotation = isinstance(estimator, dq.Rotation)
    old = lucidrains.ResidualVQ(dim=D, codebook_size=K, num_quantizers=3, rotation_trick=rotation, **given)
    new = VectorQuantizer(D, K, estimator, stages=3, **EMA | options)
    begin_as(new, old)
    return old, new


@pytest.mark.parametrize(
    ("given", "options"), [({}, {}), ({"codebook_dim": 3}, {"codebook_dim": 3})], ids=["default", "projections"]
)
def test_residual(lucidrains: Any, given: dict[str, Any], options: dict[str, Any]) -> None:
    """The same outputs, tokens and codebooks; one loss for each stage there, their mean here."""
    old, new = residual_pair(lucidrains, dq.STE(), given, options)
    for seed in range(3):
        z = vectors(4, 10, D, seed=seed)
        ours, theirs = step(new, z), step(old, z)
        assert_same_step(ours[:2], theirs[:2])
        torch.testing.assert_close(3 * ours[2], theirs[2].sum(), **CLOSE)
        new.update()
        torch.testing.assert_close(new.codebook, old.codebooks, **CLOSE)
    torch.testing.assert_close(new.decode(theirs[1]), old.get_output_from_indices(theirs[1]), **CLOSE)


def test_residual_by_direction(lucidrains: Any) -> None:
    """There the first codeword is taken from the vector as it was, here from its direction."""
    old, new = residual_pair(lucidrains, dq.STE(), {"use_cosine_sim": True}, {"cosine": True})
    z = 3 * vectors(4, 10, D)
    for layer in (old, new):
        layer.eval()
    units = functional.normalize(z, dim=-1)
    for x, y in zip(new(units)[:2], old(units)[:2], strict=True):
        torch.testing.assert_close(x, y, **CLOSE)
    assert torch.equal(new(z).indices, new(units).indices)
    theirs = old(z)[1]
    assert torch.equal(theirs[..., 0], new(z).indices[..., 0])
    assert not torch.equal(theirs, new(z).indices)


def test_groups_of_residuals(lucidrains: Any) -> None:
    old = lucidrains.GroupedResidualVQ(dim=D, groups=2, codebook_size=K, num_quantizers=3, rotation_trick=False).eval()
    new = VectorQuantizer(D, K, dq.STE(), heads=2, stages=3, **EMA).eval()
    new.codebook = old.codebooks
    z = vectors(4, 10, D)
    z_q, indices, _ = old(z)
    torch.testing.assert_close(new(z).z_q, z_q, **CLOSE)
    # The groups' axis is the first there.
    assert torch.equal(new(z).indices, indices.movedim(0, -2))


def test_residual_of_images(lucidrains: Any) -> None:
    """There it joins images along a wrong axis, and fails."""
    old = lucidrains.ResidualVQ(dim=D, codebook_size=K, num_quantizers=3, accept_image_fmap=True)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        old(vectors(2, D, 4, 5))
    out = VectorQuantizer(D, K, dq.STE(), stages=3, channel_axis=1)(vectors(2, D, 4, 5))
    assert out.indices.shape == (2, 4, 5, 3)


def test_the_gradient_of_a_residual_is_not_multiplied_by_its_stages(lucidrains: Any) -> None:
    pair = residual_pair(lucidrains, dq.STE(), {"commitment_weight": 0.0}, {"commitment_weight": 0.0})
    theirs, ours = (step(layer, vectors(4, 10, D))[3] for layer in pair)
    g = vectors(4, 10, D, seed=99)
    torch.testing.assert_close(theirs, 3 * g)
    torch.testing.assert_close(ours, g)


def test_the_gradient_of_rotations_in_stages(lucidrains: Any) -> None:
    """There those of all stages are added up; here what is left is differentiated too."""
    old, new = residual_pair(lucidrains, dq.Rotation(), {"commitment_weight": 0.0}, {"commitment_weight": 0.0})
    z, g, words = vectors(4, 10, D), vectors(4, 10, D, seed=99), new.codebook.clone()
    indices = new.eval().encode(z)
    new.train()
    turned, rest = [], z
    for s in range(3):
        out, pullback = dq.vjp(rest, words[s], dq.Rotation(), indices=indices[..., s])
        turned.append(pullback)
        rest = rest - out.z_q
    torch.testing.assert_close(step(old, z)[3], sum(pull(g)[0] for pull in turned), **CLOSE)
    expected = torch.zeros_like(g)
    for pull in reversed(turned):
        expected = pull(g - expected)[0] + expected
    torch.testing.assert_close(step(new, z)[3], expected, **CLOSE)


def test_a_commitment_loss_of_stages_reaches_z_as_there(lucidrains: Any) -> None:
    """Both hold the outputs of earlier stages constant; the mean of the stages' losses against their sum."""
    old, new = residual_pair(lucidrains, dq.STE(), {}, {"commitment_weight": 3.0})
    gradients = []
    for layer in (new, old):
        z = vectors(4, 10, D).requires_grad_()
        layer(z)[2].sum().backward()
        gradients.append(z.grad)
    torch.testing.assert_close(*gradients, **CLOSE)


def test_a_shared_codebook_decays_once_a_step(lucidrains: Any) -> None:
    """There once for each stage."""
    old, new = residual_pair(lucidrains, dq.STE(), {"shared_codebook": True}, {"shared": True})
    assert new.codebook.shape == (K, D)
    z = vectors(4, 10, D)
    indices = new(z).indices
    assert torch.equal(indices, old(z)[1])
    new.update()
    uses = [torch.bincount(indices[..., s].flatten(), minlength=K).float() for s in range(3)]
    torch.testing.assert_close(new.counts, 0.8 + 0.2 * sum(uses), **CLOSE)
    theirs = torch.ones(K)
    for count in uses:
        theirs = 0.8 * theirs + 0.2 * count
    torch.testing.assert_close(old.layers[0]._codebook.cluster_size[0], theirs, **CLOSE)


def test_dropout_of_stages(lucidrains: Any) -> None:
    """One number of stages for the whole batch there, one for each example here; -1 in both, and nothing added."""
    old, new = residual_pair(lucidrains, dq.STE(), {"quantize_dropout": True}, {"quantizer_dropout": True})
    z, kept = vectors(64, 5, D), {}
    for name, layer in (("old", old), ("new", new)):
        indices = layer(z)[1]
        kept[name] = (indices[:, 0] >= 0).sum(dim=-1)
        assert ((indices >= 0).sum(dim=-1) == kept[name][:, None]).all()
    assert len(kept["old"].unique()) == 1
    assert kept["new"].unique().tolist() == [1, 2, 3]
    tokens = new.eval().encode(z)
    short = torch.where(torch.arange(3) < 2, tokens, -1)
    new.codebook = old.codebooks
    torch.testing.assert_close(new.decode(short), old.get_output_from_indices(tokens[..., :2]), **CLOSE)
    with pytest.raises(ValueError, match="one for each part"):
        new.decode(tokens[..., :2])


def test_residual_diveq_has_one_noise_there(lucidrains: Any) -> None:
    """And draws it in evaluation too; here each stage has its own, and evaluation none."""
    old = lucidrains.ResidualVQ(dim=D, codebook_size=K, num_quantizers=3, diveq=True)
    new = VectorQuantizer(D, K, dq.DiVeQ(5e-3**0.5), stages=3, **PLAIN)
    begin_as(new, old)
    z = vectors(4, 10, D)
    z_q, indices, _ = old(z)
    hard = old.get_output_from_indices(indices)
    torch.testing.assert_close((z_q - z).norm(dim=-1), (hard - z).norm(dim=-1), **CLOSE)
    out = new(z)
    first = new.codebook[0][out.indices[..., 0]]
    assert not torch.allclose((out.z_q - z).norm(dim=-1), (hard - z).norm(dim=-1), **CLOSE)
    assert torch.equal(out.indices[..., 0], indices[..., 0])
    assert torch.equal(first, old.codebooks[0][indices[..., 0]])
    assert not torch.equal(old.eval()(z)[0], old(z)[0])
    torch.testing.assert_close(new.eval()(z).z_q, hard, **CLOSE)


# FSQ and SimVQ

LEVELS = [8, 5, 5]


def test_fsq_has_the_same_codes_and_nearly_the_same_bounds(lucidrains: Any) -> None:
    old, new = lucidrains.FSQ(LEVELS), VectorQuantizer(3, estimator=dq.FSQ(LEVELS))
    numbers = torch.arange(200)
    torch.testing.assert_close(new.decode(numbers), old.indices_to_codes(numbers[None])[0], rtol=0, atol=0)
    z = (1.5 * vectors(1, 20000, 3)).requires_grad_()
    theirs, ours = old(z), new(z)
    assert len(theirs) == 2
    assert ours.loss == 0
    assert theirs[1].dtype == torch.int32
    assert ours.indices.dtype == torch.int64
    differ = (theirs[1] != ours.indices).float().mean()
    assert 0 < differ < 0.01
    gradients = [torch.autograd.grad(z_q.sum(), z)[0][..., 1:] for z_q in (theirs[0], ours.z_q)]
    # The bound goes beyond the outermost level by a thousandth there, and stops short by as much here.
    torch.testing.assert_close(gradients[0], gradients[1] * (1.001 / 0.999), **CLOSE)


def test_fsq_options(lucidrains: Any) -> None:
    """dim, num_codebooks and images."""
    old = lucidrains.FSQ(LEVELS, dim=12)
    new = VectorQuantizer(12, estimator=dq.FSQ(LEVELS))
    with torch.no_grad():
        for ours, theirs in (("in", old.project_in), ("out", old.project_out)):
            getattr(new, f"{ours}_weight").copy_(theirs.weight.T)
            getattr(new, f"{ours}_bias").copy_(theirs.bias)
    z = vectors(2, 5, 12)
    for a, b in zip(new(z)[:2], old(z), strict=True):
        torch.testing.assert_close(a, b, check_dtype=False, **CLOSE)
    old, new = lucidrains.FSQ(LEVELS, num_codebooks=2), VectorQuantizer(6, estimator=dq.FSQ(LEVELS), heads=2)
    z = vectors(2, 5, 6)
    for a, b in zip(new(z)[:2], old(z), strict=True):
        torch.testing.assert_close(a, b, check_dtype=False, **CLOSE)
    # Four axes are an image there, whatever its last axis has; here the option says so.
    images = vectors(2, 3, 4, 3)
    new = VectorQuantizer(3, estimator=dq.FSQ(LEVELS), channel_axis=1)
    for a, b in zip(new(images)[:2], lucidrains.FSQ(LEVELS)(images), strict=True):
        torch.testing.assert_close(a, b, check_dtype=False, **CLOSE)
    assert lucidrains.FSQ([2, 3], preserve_symmetry=True)(vectors(1, 5, 2))[1].max() < 6
    with pytest.raises(ValueError, match=">= 3"):
        dq.FSQ([2, 3])


@pytest.mark.parametrize(("rotation", "estimator"), [(True, dq.Rotation()), (False, dq.STE())])
def test_simvq(lucidrains: Any, rotation: bool, estimator: Any) -> None:
    """The same in training, by the default weights; in evaluation it has a loss there."""
    old = lucidrains.SimVQ(D, K, rotation_trick=rotation)
    new = VectorQuantizer(D, K, estimator, codebook_update="linear", **PLAIN)
    torch.testing.assert_close(new.weight.detach(), torch.eye(D), rtol=0, atol=0)
    assert not torch.allclose(old.code_transform.weight, torch.eye(D), atol=0.5)
    with torch.no_grad():
        new.embedding.copy_(old.frozen_codebook)
        new.weight.copy_(old.code_transform.weight.T)
    z = vectors(4, 10, D)
    assert_same_step(step(new, z), step(old, z))
    torch.testing.assert_close(new.weight.grad, old.code_transform.weight.grad.T, **CLOSE)
    assert {name for name, _ in new.named_parameters()} == {"weight"}
    torch.testing.assert_close(new.codebook, old.codebook.detach(), **CLOSE)
    indices = old.eval()(z)[1]
    torch.testing.assert_close(new.eval().decode(indices), old.indices_to_codes(indices).detach(), **CLOSE)
    assert old(z)[2] > 0
    assert new(z).loss == 0


def test_simvq_begins_with_random_words_there() -> None:
    """By default ours begins with vectors of the first batch."""
    new = VectorQuantizer(D, K, dq.Rotation(), codebook_update="linear")
    z = vectors(40, D)
    new(z)
    assert (new.codebook[:, None] - z).abs().amax(dim=-1).amin(dim=-1).max() < 1e-5
