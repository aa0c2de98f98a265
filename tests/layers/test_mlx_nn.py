"""The layer for MLX, as a module of its own kind and against NumPy's."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import diveq_core as dq
import diveq_numpy
from processes import run_python

if TYPE_CHECKING:
    from pathlib import Path

mx = pytest.importorskip("mlx.core", exc_type=ImportError)
nn = pytest.importorskip("mlx.nn", exc_type=ImportError)
optimizers = pytest.importorskip("mlx.optimizers", exc_type=ImportError)

from diveq_mlx.nn import VectorQuantizer  # noqa: E402 - skips without MLX

# The same operations on numbers of order one, in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
K, D = 8, 6
SETTINGS: dict[str, dict[str, Any]] = {
    "gradient": {"estimator": dq.Rotation()},
    "noise": {"estimator": dq.DiVeQ()},
    "averages": {"estimator": dq.STE(), "codebook_update": "ema", "ema_decay": 0.5},
    "linear": {"estimator": dq.Rotation(), "codebook_update": "linear", "linear_factors": "both"},
    "heads and stages": {"estimator": dq.STE(), "heads": 2, "stages": 2},
    "narrow, by direction": {"estimator": dq.STE(), "codebook_dim": 4, "cosine": True},
    "images": {"estimator": dq.STE(), "channel_axis": 1, "not_finite": "skip"},
    "levels": {"estimator": dq.FSQ([5, 5, 5])},
    "curve": {"estimator": dq.SFDiVeQDetach()},
}
by_settings = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    mx.random.seed(0)


def size(options: dict[str, Any]) -> int | None:
    return None if isinstance(options.get("estimator"), dq.FSQ) else K


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def batch(options: dict[str, Any], seed: int = 0) -> np.ndarray:
    z = numbers(4, 5, D, seed=seed)
    return np.moveaxis(z, -1, 1) if options.get("channel_axis") == 1 else z


def pair(options: dict[str, Any]) -> tuple[VectorQuantizer, diveq_numpy.VectorQuantizer]:
    """Two layers of the same arrays, begun."""
    layer = VectorQuantizer(D, size(options), **options)
    same = diveq_numpy.VectorQuantizer(D, size(options), rng=np.random.default_rng(0), **options)
    if layer.settings.from_data:
        layer.start(mx.array(batch(options)))
    same.load_arrays(layer.arrays())
    return layer, same


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encoder, self.vq, self.decoder = nn.Linear(12, D), VectorQuantizer(D, **options), nn.Linear(D, 12)

    def __call__(self, x: Any) -> tuple[Any, Any]:
        out = self.vq(self.encoder(x))
        return self.decoder(out.z_q), out.loss


def trained(options: dict[str, Any], compiled: bool, steps: int = 30) -> tuple[Model, list[float]]:
    model, optimizer = Model(codebook_size=size(options), **options), optimizers.Adam(1e-2)
    # Near a plane, so that a few codewords serve.
    x = mx.array(numbers(64, 2) @ numbers(2, 12) + 0.1 * numbers(64, 12))

    def loss(model: Model, x: Any) -> Any:
        y, loss = model(x)
        return mx.mean((y - x) ** 2) + loss

    gradient = nn.value_and_grad(model, loss)

    def step(x: Any) -> Any:
        value, gradients = gradient(model, x)
        optimizer.update(model, gradients)
        return value

    state = [model.state, optimizer.state, mx.random.state]
    if compiled:
        if options.get("init") == "kmeans":
            step(x)
        step = mx.compile(step, inputs=state, outputs=state)
    values = []
    for _ in range(steps):
        value = step(x)
        mx.eval(state)
        values.append(value.item())
    return model, values


AVERAGES = {"codebook_update": "ema", "ema_decay": 0.9, "estimator": dq.STE()}


@pytest.mark.parametrize(
    ("options", "compiled"),
    [
        pytest.param({}, False, id="gradient"),
        pytest.param({}, True, id="gradient, compiled"),
        pytest.param(AVERAGES, False, id="averages"),
        pytest.param({"codebook_update": "linear"}, False, id="linear"),
        pytest.param({"init": "kmeans", "replace_every": 0}, True, id="k-means, compiled"),
    ],
)
def test_training_lowers_the_loss(options: dict[str, Any], compiled: bool):
    model, values = trained({"replace_every": 3} | options, compiled)
    assert values[-1] < 0.7 * values[0]
    assert model.vq.started.item()
    assert model.vq.steps.item() == 30 + (compiled and options.get("init") == "kmeans")
    assert np.isfinite(np.asarray(model.vq.codebook)).all()


@by_settings
def test_a_step_is_that_of_numpy(options: dict[str, Any]):
    layer, same = pair(options)
    z, g = batch(options, seed=1), batch(options, seed=2)
    mask = np.random.default_rng(0).random((4, 5)) < 0.7
    noise = numbers(4, 5, D, seed=3) if options["estimator"] == dq.DiVeQ() else None
    if layer.settings.on_curve:
        noise = dq.CurveNoise(np.full(K - 1, 0.5, np.float32), None)
    given = noise
    if isinstance(noise, np.ndarray):
        given = mx.array(noise)
    elif noise is not None:
        given = dq.CurveNoise(mx.array(noise.dither), None)

    def loss(layer: VectorQuantizer, z: Any) -> Any:
        out = layer(z, mx.array(mask), noise=given)
        return mx.sum(out.z_q * mx.array(g)) + 2 * out.loss, out

    def of(parameters: dict[str, Any], z: Any) -> Any:
        layer.update(parameters)
        return loss(layer, z)

    (_, out), (gradients, g_z) = mx.value_and_grad(of, argnums=(0, 1))(layer.trainable_parameters(), mx.array(z))
    wanted = same.forward(z, mask, noise=noise)
    assert np.array_equal(np.asarray(out.indices), wanted.indices)
    np.testing.assert_allclose(np.asarray(out.z_q), wanted.z_q, **CLOSE)
    np.testing.assert_allclose(np.asarray(out.loss), wanted.loss, **CLOSE)
    np.testing.assert_allclose(np.asarray(g_z), same.backward(g, 2.0), **CLOSE)
    assert gradients.keys() == same.gradients.keys()
    for name, x in same.gradients.items():
        np.testing.assert_allclose(np.asarray(gradients[name]), x, **CLOSE, err_msg=name)
    same.update()
    for name, x in layer.arrays().items():
        np.testing.assert_allclose(x, same.arrays()[name], **CLOSE, err_msg=name)


@by_settings
def test_evaluation_is_the_decoded_token_and_changes_nothing(options: dict[str, Any]):
    layer, _ = pair(options)
    layer.eval()
    before, z = layer.arrays(), mx.array(batch(options, seed=1))
    out = layer(z)
    assert out.z_q.shape == z.shape
    assert mx.array_equal(out.z_q, layer.decode(layer.encode(z)))
    assert out.loss.item() == 0
    assert all(np.array_equal(before[name], x) for name, x in layer.arrays().items())


@by_settings
def test_a_file_goes_to_numpy_and_back(options: dict[str, Any], tmp_path: Path):
    layer, _ = pair(options)
    z = batch(options, seed=1)
    layer.save(tmp_path / "mlx.safetensors")
    other = diveq_numpy.VectorQuantizer.load(tmp_path / "mlx.safetensors")
    other.save(tmp_path / "numpy.safetensors")
    back = VectorQuantizer.load(tmp_path / "numpy.safetensors")
    assert back.settings == layer.settings
    tokens = [layer.encode(mx.array(z)), other.encode(z), back.encode(mx.array(z))]
    parts = [x if isinstance(x, tuple) else (x,) for x in tokens]
    for first, second, third in zip(*parts, strict=True):
        assert mx.array_equal(first, third)
        np.testing.assert_allclose(np.asarray(first), second, rtol=0, atol=1e-6 if second.dtype.kind == "f" else 0)


def test_the_gradient_reaches_a_codebook_that_the_step_begins():
    layer, z = VectorQuantizer(D, K, dq.STE()), mx.array(numbers(32, D))
    first = layer.codewords
    _, gradients = nn.value_and_grad(layer, lambda layer, z: layer(z * 2).loss)(layer, z)
    assert not mx.array_equal(first, layer.codewords)
    # The codebook loss of vectors that are not codewords themselves.
    assert mx.abs(gradients["codewords"]).max().item() > 0


def test_replacement_survives_the_optimizer():
    layer, optimizer = VectorQuantizer(D, K, dq.STE(), replace_every=1, init="normal"), optimizers.SGD(1e-3)
    layer.codebook = mx.concatenate([mx.zeros((1, D)), mx.full((K - 1, D), 50.0)])
    gradient = nn.value_and_grad(layer, lambda layer, z: layer(z).loss)
    _, gradients = gradient(layer, mx.array(0.1 * numbers(128, D)))
    optimizer.update(layer, gradients)
    # A codeword that nobody chose has moved next to the one in use.
    assert mx.abs(layer.codebook).max().item() < 1


def test_what_gradients_do_not_train_stays_frozen():
    model = Model(codebook_size=K, estimator=dq.STE(), codebook_update="ema", codebook_dim=4)
    trains = {"in_weight", "in_bias", "out_weight", "out_bias"}
    assert set(model.trainable_parameters()["vq"]) == trains
    assert set(model.parameters()["vq"]) == set(model.vq.settings.shapes)
    model.freeze()
    assert not model.trainable_parameters()["vq"]
    model.unfreeze()
    assert set(model.trainable_parameters()["vq"]) == trains
    model.vq.unfreeze(keys=["codewords"])
    assert set(model.trainable_parameters()["vq"]) == trains


def test_weights_travel_by_mlx_files_and_copies(tmp_path: Path):
    model, _ = trained({}, False, steps=3)
    x = mx.array(numbers(16, 12, seed=1))
    model.save_weights(str(tmp_path / "model.safetensors"))
    other = Model(codebook_size=K)
    other.load_weights(str(tmp_path / "model.safetensors"))
    wanted = model.eval()(x)[0]
    assert mx.array_equal(other.eval()(x)[0], wanted)
    assert mx.array_equal(copy.deepcopy(model)(x)[0], wanted)
    before = other.vq.codebook
    other.train()(x)
    # What the file began is not begun again.
    assert mx.array_equal(other.vq.codebook, before)


def test_the_codebook_can_be_set():
    layer, codebook = VectorQuantizer(D, K), mx.array(numbers(K, D))
    layer.codebook = codebook
    assert mx.array_equal(layer.codebook, codebook)
    assert "codebook" not in layer.parameters()
    layer(mx.array(numbers(32, D, seed=1)))
    assert mx.array_equal(layer.codebook, codebook)
    with pytest.raises(ValueError, match=r"codebook: expected shape \(8, 6\), got \(4, 6\)"):
        layer.codebook = codebook[:4]


def test_quantizer_dropout_marks_what_it_drops():
    layer = VectorQuantizer(D, K, stages=3, quantizer_dropout=True)
    indices = np.asarray(layer(mx.array(numbers(64, D))).indices)
    assert (indices[:, 0] >= 0).all()
    assert 0 < (indices[:, 2] < 0).mean() < 1


def test_a_compiled_step_may_not_begin_by_k_means():
    layer = VectorQuantizer(D, K, init="kmeans")
    with pytest.raises(RuntimeError, match=r"needs one step in training outside mx\.compile"):
        mx.compile(lambda z: layer(z).z_q)(mx.array(numbers(32, D)))


@pytest.mark.parametrize("way", ["start", "codebook", "file"])
def test_a_compiled_step_knows_a_codebook_that_has_begun(way: str, tmp_path: Path):
    layer, z = VectorQuantizer(D, K, init="kmeans"), mx.array(numbers(32, D))
    if way == "start":
        layer.start(z)
    if way == "codebook":
        layer.codebook = z[:K]
    if way == "file":
        layer(z)
        layer.save(tmp_path / "layer.safetensors")
        layer = VectorQuantizer.load(tmp_path / "layer.safetensors")
    before, state = layer.codebook, [layer.state, mx.random.state]
    mx.compile(lambda z: layer(z).z_q, inputs=state, outputs=state)(z + 1)
    assert mx.array_equal(layer.codebook, before)


def test_the_representation_says_what_it_is():
    assert repr(VectorQuantizer(D, K, stages=2)) == "VectorQuantizer(dim=6, codebook_size=8, stages=2)"


def test_the_backend_alone_does_not_import_mlx_nn():
    assert run_python("import diveq_mlx, sys; print('mlx.nn' in sys.modules)").strip() == "False"
