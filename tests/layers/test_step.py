"""One step of a layer: its value in every library, its hand-derived gradient, its losses, masks and evaluation."""

from __future__ import annotations

import numpy as np
import pytest

import diveq_core as dq
from layer_cases import BATCH, DIM, KINDS, LAYERS, Case, K, plain, settings_of
from libraries import Library, library_named

BY_KIND = pytest.mark.parametrize("kind", KINDS)


@BY_KIND
def test_the_pullback_is_automatic_differentiation(kind: str) -> None:
    torch_library = library_named("torch")
    import torch

    case = Case.of(kind)
    other = case.to(torch_library)
    options = {"mask": case.mask, "noise": case.noise, "kept_stages": case.kept_stages}
    out, pullback = LAYERS.forward_vjp(case.settings, case.state, case.z, **options)
    g_z, gradients = pullback(case.g, 2.0)

    leaves = [other.z.requires_grad_(), *(other.state[name].requires_grad_() for name in case.settings.parameters)]
    step = other.step()
    total = (step.z_q * other.g).sum() + 2.0 * step.losses.total
    expected = torch.autograd.grad(total, leaves, materialize_grads=True)

    np.testing.assert_allclose(out.z_q, step.z_q.detach().numpy(), rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(out.indices, step.indices.numpy())
    assert set(gradients) == set(case.settings.parameters)
    for ours, theirs in zip([g_z, *(gradients[name] for name in case.settings.parameters)], expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-9, atol=1e-11)


@BY_KIND
def test_every_library_gives_the_same(kind: str, library: Library) -> None:
    case = Case.of(kind, np.float32)
    expected, other = case.step(), case.to(library)
    out = other.step()
    np.testing.assert_array_equal(library.back(out.indices), expected.indices)
    np.testing.assert_allclose(library.back(out.z_q), expected.z_q, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(library.back(out.losses.total), expected.losses.total, rtol=2e-5, atol=2e-6)
    for ours, theirs in zip(out.statistics, expected.statistics, strict=True):
        if theirs is not None:
            np.testing.assert_allclose(library.back(ours), theirs, rtol=2e-5, atol=2e-5)
    if not case.settings.has_codebook:
        return
    ours, theirs = other.state, case.state
    for _ in range(2):
        ours = LAYERS.update(case.settings, ours, out.statistics, noise=other.update_noise)
        theirs = LAYERS.update(case.settings, theirs, expected.statistics, noise=case.update_noise)
    for name, x in theirs.items():
        np.testing.assert_allclose(library.back(ours[name]), x, rtol=2e-5, atol=2e-5, err_msg=name)


@BY_KIND
def test_evaluation_is_what_the_tokens_decode_to(kind: str, library: Library) -> None:
    case = Case.of(kind, np.float32).to(library)
    out = LAYERS.forward(case.settings, case.state, case.z, train=False)
    tokens = LAYERS.encode(case.settings, case.state, case.z)
    decoded = LAYERS.decode(case.settings, case.state, tokens, dtype=case.z.dtype)
    np.testing.assert_array_equal(library.back(out.z_q), library.back(decoded))
    assert out.z_q.dtype == case.z.dtype
    assert tuple(out.z_q.shape) == tuple(case.z.shape)
    assert out.statistics is None
    assert float(out.losses.total) == 0


@BY_KIND
def test_perplexity_is_that_of_each_codebook(kind: str, library: Library) -> None:
    case = Case.of(kind, np.float32)
    settings, axes = case.settings, tuple(x for x in (case.settings.heads, case.settings.stages) if x > 1)
    tokens = LAYERS.encode(settings, case.state, case.z, mask=case.mask)
    tokens = tokens.segments if settings.on_curve else tokens
    by_part = tokens.reshape(-1, *axes)
    # A codebook that heads share, or stages, has the tokens of all of them.
    rows = by_part.reshape(-1, *axes[1:]) if settings.shared else by_part
    columns = rows.reshape(len(rows), -1).T
    expected = []
    for column in columns:
        share = np.bincount(column[column >= 0]).astype(float)
        share = share[share > 0] / share.sum()
        expected.append(np.exp(-(share * np.log(share)).sum()))
    found = library.back(LAYERS.perplexity(settings, library.to(tokens)))
    assert found.shape == (axes[1:] if settings.shared else axes)
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-5)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("estimator", [dq.STE(), dq.DiVeQ(), dq.Radial(dq.Power(2.0)), dq.Rotation()])
def test_a_step_is_quantize_and_the_losses(estimator: dq.Estimator, stages: int) -> None:
    settings = LAYERS.Settings(DIM, K, estimator, stages=stages, codebook_weight=0.5, commitment_weight=0.25)
    state = LAYERS.init(settings, np.zeros(()), rng=np.random.default_rng(0))
    z, codebook = plain(dtype=np.float64), state["codewords"]
    noise = np.random.default_rng(1).standard_normal((stages, *z.shape) if stages > 1 else z.shape)
    out = LAYERS.forward(settings, state, z, train=True, noise=noise)
    quantizer = dq.Residual(estimator, stages) if stages > 1 else estimator
    expected = dq.quantize(z, codebook, quantizer, noise=noise)
    np.testing.assert_array_equal(out.z_q, expected.z_q)
    np.testing.assert_array_equal(out.indices, expected.indices)
    if stages == 1:
        error = np.mean((z - codebook[expected.indices]) ** 2)
    else:
        errors, left = [], z
        for stage in range(stages):
            own = expected.indices[:, stage]
            errors.append(np.mean((left - codebook[stage][own]) ** 2))
            left = left - dq.quantize(left, codebook[stage], estimator, noise=noise[stage], indices=own).z_q
        error = np.mean(errors)
    np.testing.assert_allclose(out.losses.codebook, error)
    np.testing.assert_allclose(out.losses.commitment, error)
    np.testing.assert_allclose(out.losses.total, 0.75 * error)


def test_each_head_has_its_own_direction() -> None:
    settings = LAYERS.Settings(DIM, K, dq.STE(), cosine=True, heads=2, init="normal")
    state = LAYERS.init(settings, np.zeros(()), rng=np.random.default_rng(0))
    z = plain(dtype=np.float64)
    out = LAYERS.forward(settings, state, z, train=True)
    errors = []
    for head in range(2):
        own, words = z[:, 3 * head : 3 * head + 3], state["codewords"][head]
        tokens = dq.nearest_cosine(own, words)
        np.testing.assert_array_equal(out.indices[:, head], tokens)
        errors.append(np.mean((dq.normalize(own) - dq.normalize(words)[tokens]) ** 2))
    np.testing.assert_allclose(out.losses.commitment, np.mean(errors))


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, (0.0, 0.0)),
        ({"estimator": dq.STE()}, (1.0, 0.25)),
        ({"estimator": dq.Rotation(), "codebook_update": "linear"}, (1.0, 0.25)),
        ({"estimator": dq.STE(), "codebook_update": "ema"}, (0.0, 0.25)),
        ({"estimator": dq.STE(), "codebook_update": "frozen"}, (0.0, 0.25)),
        ({"estimator": dq.STE(), "commitment_weight": 0.0}, (1.0, 0.0)),
        ({"codebook_weight": 2.0}, (2.0, 0.0)),
    ],
)
def test_default_weights(options: dict, weights: tuple[float, float]) -> None:
    assert LAYERS.Settings(DIM, K, **options).weights == weights


@pytest.mark.parametrize("kind", ["STE", "projected", "stages", "heads", "channels first", "FSQ", "cosine"])
def test_what_is_masked_is_never_read(kind: str, library: Library) -> None:
    case = Case.of(kind, np.float32)
    hidden = np.moveaxis(case.z.copy(), case.settings.channel_axis, -1)
    hidden[~case.mask] = np.nan
    hidden = np.moveaxis(hidden, -1, case.settings.channel_axis)
    state = {name: library.to(x) for name, x in case.state.items()}
    outs = [
        LAYERS.forward(case.settings, state, library.to(z), train=train, mask=library.to(case.mask))
        for z in (case.z, hidden)
        for train in (True, False)
    ]
    for out, like in zip(outs[2:], outs[:2], strict=True):
        np.testing.assert_array_equal(library.back(out.z_q), library.back(like.z_q))
        np.testing.assert_array_equal(library.back(out.indices), library.back(like.indices))
        assert float(out.losses.total) == float(like.losses.total)
        rows = np.moveaxis(library.back(out.z_q), case.settings.channel_axis, -1)
        assert (rows[~case.mask] == 0).all()
        assert (library.back(out.indices)[~case.mask] == -1).all()
    counted = outs[2].statistics.counts
    if counted is not None:
        parts = case.settings.heads * case.settings.stages
        assert float(library.back(counted).sum()) == case.mask.sum() * parts


@pytest.mark.parametrize("kind", ["STE", "projected", "stages", "heads", "averages"])
def test_vectors_that_are_not_finite(kind: str) -> None:
    z = np.random.default_rng(0).standard_normal((*BATCH, DIM))
    z[0, 0], z[1, 2, 1] = np.nan, np.inf
    lost = ~np.isfinite(z).all(axis=-1)

    def step(not_finite: str):
        settings = settings_of(kind, not_finite=not_finite, init="normal")
        state = LAYERS.init(settings, np.zeros(()), rng=np.random.default_rng(0))
        return LAYERS.forward_vjp(settings, state, z)

    marked, _ = step("mark")
    assert (marked.indices[lost].reshape(lost.sum(), -1)[:, 0] == -1).all()
    # Of a head, where only that one is lost.
    assert np.isnan(marked.z_q[lost]).any(axis=-1).all()
    assert np.isfinite(marked.z_q[~lost]).all()
    skipped, pullback = step("skip")
    assert (skipped.z_q[lost] == 0).all()
    assert np.isfinite(skipped.losses.total)
    g_z, gradients = pullback(np.ones_like(z))
    assert (g_z[lost] == 0).all()
    assert all(np.isfinite(g).all() for g in [g_z, *gradients.values()])
    with pytest.raises(ValueError, match="must be finite"):
        step("refuse")


def test_what_was_skipped_decodes_to_what_evaluation_gave(library: Library) -> None:
    case = Case.of("skip", np.float32)
    z = case.z.copy()
    z[0, 0], z[1, 2, 1] = np.nan, np.inf
    state = {name: library.to(x) for name, x in case.state.items()}
    out = LAYERS.forward(case.settings, state, library.to(z), train=False)
    assert (library.back(out.indices)[[0, 1], [0, 2]] == -1).all()
    assert (library.back(out.z_q)[[0, 1], [0, 2]] == 0).all()
    decoded = LAYERS.decode(case.settings, state, out.indices)
    np.testing.assert_array_equal(library.back(decoded), library.back(out.z_q))


def test_a_drawn_number_of_stages_is_used_by_each_example() -> None:
    settings = settings_of("dropout")
    state = LAYERS.init(settings, np.zeros(()), rng=np.random.default_rng(0))
    z = np.random.default_rng(1).standard_normal((400, 3, DIM))
    indices = LAYERS.forward(settings, state, z, train=True, rng=np.random.default_rng(2)).indices
    kept = (indices >= 0).sum(axis=-1)
    assert (kept == kept[:, :1]).all(), "an example uses one number of stages"
    assert set(np.unique(kept)) == {1, 2, 3}
    # Of 400 draws each of three has 133, with a standard deviation of 9.4.
    assert np.abs(np.bincount(kept[:, 0])[1:] - 400 / 3).max() < 5 * 9.4
    whole = LAYERS.forward(settings, state, z, train=True, kept_stages=np.full(400, 3)).indices
    np.testing.assert_array_equal(indices, np.where(indices < 0, -1, whole))


WRONG = [
    ({"dim": 0}, "dim must be an integer >= 1, got 0"),
    ({"codebook_size": None}, "codebook_size must be an integer"),
    ({"codebook_size": 1, "estimator": dq.SFDiVeQ()}, "codebook_size must be an integer >= 2, got 1"),
    ({"codebook_update": "adam"}, "codebook_update must be one of gradient, ema, frozen, linear, got 'adam'"),
    ({"estimator": dq.Residual(dq.STE(), 2)}, "give heads= and stages= instead"),
    ({"estimator": dq.STE}, "call it: an instance is expected"),
    ({"heads": 4}, "heads must divide the 6 entries"),
    ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
    ({"cosine": 1}, "cosine must be True or False"),
    ({"channel_axis": 1.0}, "channel_axis must be an integer"),
    ({"codebook_update": "linear", "replace_by": "vectors"}, "replace_by must be codewords on a curve"),
    ({"quantizer_dropout": True}, "quantizer_dropout needs more than one stage"),
    ({"shared": True}, "shared needs more than one head or stage"),
    ({"estimator": dq.SFDiVeQ(), "codebook_update": "ema"}, "cannot be ema on a curve"),
    ({"estimator": dq.SFDiVeQ(), "stages": 2}, "heads and stages must be 1 on a curve"),
    ({"estimator": dq.GumbelST(), "codebook_weight": 1.0}, "weights of losses must be 0 for GumbelST"),
    ({"codebook_size": None, "estimator": dq.FSQ([5, 5]), "codebook_update": "ema"}, "must be gradient without"),
    ({"codebook_size": None, "estimator": dq.FSQ([5, 5]), "codebook_dim": 3}, "must have a level for each of 3"),
]


@pytest.mark.parametrize(("options", "text"), WRONG, ids=[text for _, text in WRONG])
def test_wrong_settings_say_what_is_wrong(options: dict, text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text) as caught:
        LAYERS.Settings(**{"dim": DIM, "codebook_size": K} | options)
    assert str(caught.value).startswith("VectorQuantizer: ")


def test_wrong_arguments_say_what_is_wrong() -> None:
    staged = settings_of("stages in heads")
    with pytest.raises(ValueError, match=r"perplexity: indices must end with the axes \(2, 2\) of heads and stages"):
        LAYERS.perplexity(staged, np.zeros((5, 2), int))
    with pytest.raises(TypeError, match=r"perplexity: settings must be a Settings, got builtins\.dict"):
        LAYERS.perplexity({}, np.zeros((5, 2), int))  # type: ignore[arg-type]
    case = Case.of("STE")
    settings, state, z = case.settings, case.state, case.z
    with pytest.raises(ValueError, match=r"forward: z must have 6 entries along axis -1.*got \(4, 5, 7\)"):
        LAYERS.forward(settings, state, np.ones((4, 5, 7)), train=True)
    with pytest.raises(ValueError, match="forward: state must hold codewords, started, steps, usage, got codewords"):
        LAYERS.forward(settings, {"codewords": state["codewords"]}, z, train=True)
    with pytest.raises(TypeError, match="forward: mask must have dtype bool"):
        LAYERS.forward(settings, state, z, train=True, mask=np.ones(BATCH))
    with pytest.raises(ValueError, match="forward: mask must have the shape of z without its channel axis"):
        LAYERS.forward(settings, state, z, train=True, mask=np.ones((4,), bool))
    with pytest.raises(TypeError, match="forward: train must be True or False"):
        LAYERS.forward(settings, state, z, train=1)
    with pytest.raises(TypeError, match="forward: settings must be a Settings"):
        LAYERS.forward({}, state, z, train=True)
    with pytest.raises(ValueError, match="pullback: g must have the shape of z"):
        LAYERS.forward_vjp(settings, state, z)[1](np.ones((4, 5, 5)))
    curve = Case.of("curve")
    with pytest.raises(TypeError, match="decode: tokens of a curve must be a Point"):
        LAYERS.decode(curve.settings, curve.state, np.zeros(3, int))
