"""The module for PyTorch: state, modes, checkpoints, precision, functional calls, copies."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest

import diveq_core as dq
from diveq_numpy import VectorQuantizer as NumPyQuantizer
from layer_cases import DIM, KINDS, K, plain, settings_of

torch = pytest.importorskip("torch")
from torch.utils.checkpoint import checkpoint  # noqa: E402

from diveq_torch import VectorQuantizer  # noqa: E402

EMA = {"estimator": dq.STE(), "codebook_update": "ema", "ema_decay": 0.5, "replace_every": 2}


def layer(kind: str | dict = "plain", **options) -> VectorQuantizer:
    if isinstance(kind, dict):
        return VectorQuantizer(DIM, K, **kind | options)
    given = settings_of(kind, **options).given()
    return VectorQuantizer(given.pop("dim"), given.pop("codebook_size"), **given)


def vectors(seed: int = 0) -> torch.Tensor:
    return torch.tensor(plain(seed))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["plain", "STE", "averages", "linear", "stages in heads", "curve", "FSQ", "Gumbel"])
def test_it_trains_in_a_model(kind: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), layer(kind))
    decoder = torch.nn.Linear(DIM, DIM)
    parameters = [*model.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.02)
    centres, errors = 2 * vectors()[:K], []
    for seed in range(60):
        x = centres.repeat_interleave(8, dim=0) + 0.1 * vectors(seed)
        out = model(x)
        error = (decoder(out.z_q) - x).square().mean()
        optimizer.zero_grad()
        (error + out.loss).backward()
        optimizer.step()
        errors.append(error.item())
    assert np.mean(errors[-5:]) < 0.6 * np.mean(errors[:5])


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_what_gradients_train(kind: str) -> None:
    vq = layer(kind)
    assert {name for name, _ in vq.named_parameters()} == set(vq.settings.parameters)
    assert {name for name, _ in vq.named_buffers()} == set(vq.settings.buffers)
    assert set(vq.state_dict()) == set(vq.settings.shapes)
    if kind == "channels first":
        z = torch.randn(3, DIM, 4, requires_grad=True)
    else:
        z = torch.randn(3, 4, DIM, requires_grad=True)
    out = vq(z)
    (out.z_q.square().sum() + out.loss).backward()
    assert all(p.grad is not None for p in vq.parameters())


@pytest.mark.parametrize("options", [EMA, {"replace_every": 2}, {"codebook_update": "linear", "replace_every": 2}])
def test_evaluation_changes_no_state_and_is_hard(options: dict) -> None:
    vq = layer(options)
    for seed in range(3):
        vq(vectors(seed))
    vq.eval()
    before = {name: x.clone() for name, x in vq.state_dict().items()}
    outs = [vq(vectors(7)) for _ in range(2)]
    torch.testing.assert_close(outs[0].z_q, outs[1].z_q, rtol=0, atol=0)
    torch.testing.assert_close(outs[0].z_q, vq.decode(vq.encode(vectors(7))), rtol=0, atol=0)
    assert outs[0].loss == 0
    for name, x in vq.state_dict().items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("options", [EMA, {"estimator": dq.STE(), "stages": 2, "codebook_update": "ema"}])
def test_the_same_numbers_as_in_numpy(options: dict) -> None:
    options = options | {"init": "normal", "replace_every": 0}
    vq, other = layer(options), NumPyQuantizer(DIM, K, **options)
    other.load_arrays(vq.arrays())
    for seed in range(4):
        ours, theirs = vq(vectors(seed)), other.forward(plain(seed))
        np.testing.assert_array_equal(ours.indices.numpy(), theirs.indices)
        np.testing.assert_allclose(ours.loss.item(), theirs.loss, rtol=1e-5)
        other.update()
    vq.update()
    for name, x in other.arrays().items():
        np.testing.assert_allclose(vq.arrays()[name], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("options", [EMA, {"replace_every": 1}, {"codebook_weight": 1.0, "stages": 2}], ids=str)
def test_a_checkpoint_counts_once_and_gives_the_same_gradient(options: dict, reentrant: bool) -> None:
    def run(checkpointed: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        vq, encoder = layer(options, init="normal"), torch.nn.Linear(DIM, DIM)

        def loss(z: torch.Tensor) -> torch.Tensor:
            out = vq(encoder(z))
            return out.z_q.square().mean() + out.loss

        for seed in range(4):
            z = vectors(seed).requires_grad_()
            (checkpoint(loss, z, use_reentrant=reentrant) if checkpointed else loss(z)).backward()
        vq.update()
        return [z.grad, encoder.weight.grad, *(p.grad for p in vq.parameters()), *vq.buffers()]

    for ours, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_no_update_reaches_a_codebook_that_backward_reads() -> None:
    """Two steps before one backward, as in a model of two branches: the second begins with an update."""
    gradients = []
    for joined in (True, False):
        torch.manual_seed(0)
        vq = layer({"replace_every": 1, "replace_threshold": 0.9, "init": "normal"}, auto_update=True)
        with torch.no_grad():
            vq.codewords[4:] += 10.0
        first, second = torch.cat([vectors(0), vectors(4)]).requires_grad_(), vectors(1).requires_grad_()
        before = vq.codewords.clone()
        loss = vq(first, noise=torch.cat([vectors(2), vectors(5)])).z_q.square().sum()
        if not joined:
            loss.backward()
            vq.codewords.grad = None
        out = vq(second, noise=vectors(3)).z_q.square().sum()
        assert (vq.codewords != before).any(), "the second step replaces"
        if joined:
            try:
                (loss + out).backward()
            except RuntimeError as error:
                raise AssertionError("torch's own check of what was overwritten") from error
        gradients.append(first.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["plain", "averages", "curve", "FSQ", "dropout"])
def test_copies_and_state(kind: str) -> None:
    vq = layer(kind)
    for seed in range(2):
        vq(vectors(seed))
    file = io.BytesIO()
    torch.save(vq.state_dict(), file)
    file.seek(0)
    loaded = layer(kind)
    loaded.load_state_dict(torch.load(file))
    for other in (copy.deepcopy(vq), pickle.loads(pickle.dumps(vq)), loaded):
        outs = []
        for module in (vq, other):
            module = copy.deepcopy(module)
            module._pending = None
            torch.manual_seed(5)
            outs.append(module(vectors(9)))
        torch.testing.assert_close(outs[0].z_q, outs[1].z_q, rtol=0, atol=0)
    assert repr(vq) == f"VectorQuantizer({vq.settings.text()})"


def test_a_loaded_layer_does_not_begin_anew() -> None:
    vq = layer()
    vq(vectors())
    other = layer()
    other.load_state_dict(vq.state_dict())
    other(vectors(1))
    torch.testing.assert_close(other.codewords, vq.codewords, rtol=0, atol=0)


def test_statistics_are_those_of_the_state_that_is_held() -> None:
    """What a step left is gone when its state is: loaded over, set or begun anew."""
    vq = layer(EMA | {"replace_every": 0})
    for seed in range(2):
        vq(vectors(seed))
    vq.update()
    before = {name: x.clone() for name, x in vq.state_dict().items()}

    def load() -> None:
        vq.load_state_dict(before)

    def load_arrays() -> None:
        vq.load_arrays({name: x.numpy() for name, x in before.items()})

    def set_codebook() -> None:
        vq.codebook = before["codewords"]

    for back in (load, load_arrays, set_codebook, lambda: vq.start(vectors(5))):
        vq(vectors(3) + 100)
        back()
        after = {name: x.clone() for name, x in vq.state_dict().items()}
        vq.update()
        for name, x in vq.state_dict().items():
            torch.testing.assert_close(x, after[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_do_not_stop_averages(dtype: torch.dtype) -> None:
    vq = VectorQuantizer(2, 1, dq.STE(), codebook_update="ema", replace_every=0).to(dtype)
    assert vq.averages.dtype == vq.counts.dtype == vq.usage.dtype == torch.float32
    for mean in (3.0, 4.0):
        for _ in range(600):
            vq(mean + 0.1 * torch.randn(50, 2, dtype=dtype))
    vq.update()
    torch.testing.assert_close(vq.codewords.float(), torch.full((1, 2), 4.0), rtol=0, atol=0.03)
    assert vq.usage.item() == 1200 * 50


def test_a_frozen_codebook_is_not_replaced() -> None:
    vq = layer({"replace_every": 1, "replace_threshold": 0.9, "init": "normal"}).requires_grad_(False)
    before = vq.codewords.clone()
    for seed in range(4):
        vq(vectors(seed))
    vq.update()
    torch.testing.assert_close(vq.codewords, before, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"codebook_update": "linear", "linear_factors": "both"}, EMA], ids=str)
def test_several_calls_before_one_backward(options: dict) -> None:
    vq = layer(options | {"replace_every": 1, "replace_threshold": 0.9})
    for seed in range(4):
        z = [vectors(10 * seed + call).requires_grad_() for call in range(3)]
        outs = [vq(x) for x in z]
        sum(out.z_q.square().sum() + out.loss for out in outs).backward()
        assert all(x.grad.isfinite().all() for x in z)


def test_a_layer_is_made_without_a_device() -> None:
    with torch.device("meta"):
        vq = VectorQuantizer(DIM, K)
    vq = vq.to_empty(device="cpu")
    vq.load_state_dict(layer().state_dict())
    assert vq(vectors()).z_q.isfinite().all()


def test_a_layer_is_tried_for_its_shapes() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        vq = VectorQuantizer(DIM, K, init="kmeans", replace_every=1)
        for _ in range(2):
            out = vq(torch.randn(4, DIM))
        vq.update()
    assert (out.z_q.shape, out.indices.shape) == ((4, DIM), (4,))


def test_a_resumed_run_is_the_same_run() -> None:
    def run(vq: VectorQuantizer, seeds: range) -> None:
        for seed in seeds:
            vq(vectors(seed), noise=vectors(seed + 50))
        vq.update()

    options = {"replace_every": 2, "replace_threshold": 0.9, "codebook_update": "ema", "estimator": dq.STE()}
    whole = layer(options)
    run(whole, range(4))
    kept = {name: x.clone() for name, x in whole.state_dict().items()}
    run(whole, range(4, 10))
    resumed = layer(options)
    torch.randn(7)
    resumed.load_state_dict(kept)
    run(resumed, range(4, 10))
    for name, x in resumed.state_dict().items():
        torch.testing.assert_close(x, whole.state_dict()[name], rtol=0, atol=0)


def test_a_parameter_may_be_the_codebook_that_is_set() -> None:
    vq, words = layer(), torch.nn.Parameter(torch.randn(K, DIM))
    vq.codebook = words
    torch.testing.assert_close(vq.codebook, words.detach(), rtol=0, atol=0)
    assert {name for name, _ in vq.named_parameters()} == {"codewords"}
    vq.codebook.zero_()
    assert (vq.codebook != 0).all(), "what is read is a copy"


def test_what_is_no_tensor_is_refused() -> None:
    for wrong in (plain(), None, [1.0]):
        with pytest.raises(TypeError, match=r"VectorQuantizer: z must be a torch\.Tensor, got"):
            layer()(wrong)


def test_a_layer_that_loads_a_first_state_begins_anew() -> None:
    vq = layer()
    first = {name: x.clone() for name, x in vq.state_dict().items()}
    vq(vectors())
    vq.load_state_dict(first)
    vq(vectors(1))
    assert vq.started
    assert (vq.codewords != first["codewords"]).any()


@pytest.mark.parametrize("kind", ["plain", "averages", "linear", "FSQ"])
@pytest.mark.parametrize("average", ["swa", "ema"])
def test_an_averaged_model(kind: str, average: str) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    vq = layer(kind)
    options = {} if average == "swa" else {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}
    averaged, seen = AveragedModel(vq, use_buffers=True, **options), []
    for seed in range(3):
        vq(vectors(seed))
        vq.update()
        averaged.update_parameters(vq)
        seen.append({name: x.clone() for name, x in vq.state_dict().items()})
    weights = (1 / 3, 1 / 3, 1 / 3) if average == "swa" else (0.25, 0.25, 0.5)
    for name, x in averaged.module.state_dict().items():
        if name != "steps":
            expected = sum(w * state[name] for w, state in zip(weights, seen, strict=True))
            torch.testing.assert_close(x, expected)
    tokens = averaged.module.eval().encode(vectors())
    torch.testing.assert_close(averaged.module.decode(tokens), averaged(vectors()).z_q, rtol=0, atol=0)
    if kind != "FSQ":
        started = averaged.module.arrays()["started"]
        assert started.dtype == bool
        assert started


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "averages", "projected", "FSQ"])
def test_autocast_and_sixteen_bits(kind: str, dtype: torch.dtype) -> None:
    vq, encoder = layer(kind), torch.nn.Linear(DIM, DIM)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    parameters = [*vq.parameters(), *encoder.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.01)
    scales = []
    for seed in range(12):
        with torch.autocast("cpu", dtype):
            z = encoder(vectors(seed))
            out = vq(z)
            loss = out.z_q.float().square().mean() + out.loss
        assert z.dtype == out.z_q.dtype == dtype
        assert out.loss.dtype == torch.float32
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        assert all(x.isfinite().all() for x in vq.state_dict().values())
    assert scales[-1] > 1
    # All of the module in 16 bits.
    low = layer(kind).to(dtype)
    out = low(vectors().to(dtype))
    assert out.z_q.dtype == dtype
    low.update()
    assert all(x.isfinite().all() for x in low.state_dict().values())


def test_channels_last_stays() -> None:
    vq = VectorQuantizer(DIM, K, channel_axis=1)
    z = torch.randn(2, DIM, 5, 7).to(memory_format=torch.channels_last)
    for mode in (True, False):
        out = vq.train(mode)(z)
        assert out.z_q.is_contiguous(memory_format=torch.channels_last)
        assert out.indices.shape == (2, 5, 7)


def test_functional_calls_count_nothing() -> None:
    vq = layer({"init": "normal"})
    parameters, buffers = dict(vq.named_parameters()), dict(vq.named_buffers())

    def loss(parameters: dict, z: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        out = torch.func.functional_call(vq, (parameters, buffers), (z,), {"noise": noise})
        return out.z_q.square().sum()

    z, noise = torch.randn(3, 5, DIM), torch.randn(3, 5, DIM)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, z, noise)["codewords"]
    for row in range(3):
        expected = torch.func.grad(loss)(parameters, z[row], noise[row])["codewords"]
        torch.testing.assert_close(each[row], expected)
    vq.update()
    assert vq.steps == 0


def test_freezing() -> None:
    vq = layer({"init": "normal"}).requires_grad_(False)
    z = vectors().requires_grad_()
    vq(z).z_q.sum().backward()
    assert vq.codewords.grad is None
    assert z.grad is not None


def test_an_exported_layer_is_the_layer() -> None:
    vq = layer("projected").eval()
    file = io.BytesIO()
    program = torch.export.export(vq, (vectors(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, file)
    file.seek(0)
    out = torch.export.load(file).module()(vectors(1)[:10])
    torch.testing.assert_close(out.z_q, vq(vectors(1)[:10]).z_q, rtol=0, atol=0)


def test_the_worst_start_in_bfloat16() -> None:
    """All codewords equal, and one batch that is not finite; the slow suite has ten thousand steps of it."""
    assert used_after(400) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, EMA | {"ema_decay": 0.99, "replace_every": 100}], ids=["DiVeQ", "averages"])
def test_ten_thousand_steps_from_the_worst_start_in_bfloat16(options: dict) -> None:
    assert used_after(10_000, **options) >= 0.95


def used_after(steps: int, **options) -> float:
    """Share of the codewords that are used at the end."""
    torch.manual_seed(0)
    width, size = 8, 64
    vq = VectorQuantizer(width, size, **{"replace_every": 20, "not_finite": "skip"} | options)
    vq.codebook = torch.ones(size, width)
    encoder = torch.nn.Linear(width, width).to(torch.bfloat16)
    optimizer = torch.optim.Adam([*vq.parameters(), *encoder.parameters()], 1e-3)
    for step in range(steps):
        x = torch.randn(256, width, dtype=torch.bfloat16)
        if step == steps // 2:
            x = x * torch.nan
        out = vq(encoder(x))
        loss = (out.z_q - torch.where(x.isfinite(), x, 0)).square().float().mean() + out.loss
        optimizer.zero_grad()
        loss.backward()
        if all(p.grad.isfinite().all() for p in encoder.parameters()):
            optimizer.step()
        assert vq.codewords.isfinite().all(), step
    x = torch.randn(8192, width, dtype=torch.bfloat16)
    return dq.used_share(dq.usage(vq.eval().encode(encoder(x)), size)).item()
