"""The layer for Keras. Keras has one backend in a process, so that the other one is tested in another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diveq_core as dq
import diveq_numpy
from processes import importable, run_python

BACKENDS = [name for name in ("torch", "jax") if importable(name)]
if not BACKENDS or not importable("keras"):
    pytest.skip("needs keras, and torch or jax", allow_module_level=True)
os.environ.setdefault("KERAS_BACKEND", BACKENDS[0])

import keras  # noqa: E402 - reads the environment

from diveq_keras import VectorQuantizer  # noqa: E402

BACKEND = keras.backend.backend()
# Keras' own.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
# The same operations on numbers of order one, in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
K, D = 8, 6
SETTINGS: dict[str, dict[str, Any]] = {
    "noise": {"estimator": dq.DiVeQ()},
    "averages": {"estimator": dq.STE(), "codebook_update": "ema", "ema_decay": 0.5},
    "linear": {"estimator": dq.STE(), "codebook_update": "linear", "linear_factors": "both"},
    "one factor": {"estimator": dq.STE(), "codebook_update": "linear"},
    "heads and stages": {"estimator": dq.STE(), "heads": 2, "stages": 2},
    "images, narrow": {"estimator": dq.STE(), "channel_axis": 1, "codebook_dim": 4, "not_finite": "skip"},
    "levels": {"estimator": dq.FSQ([5, 5, 5])},
}
by_settings = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    keras.utils.set_random_seed(0)


def size(options: dict[str, Any]) -> int | None:
    return None if isinstance(options.get("estimator"), dq.FSQ) else K


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def batch(options: dict[str, Any], seed: int = 0) -> np.ndarray:
    z = numbers(4, 5, D, seed=seed)
    return np.moveaxis(z, -1, 1) if options.get("channel_axis") == 1 else z


def to_numpy(x: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(x)


def pair(options: dict[str, Any]) -> tuple[VectorQuantizer, diveq_numpy.VectorQuantizer]:
    """Two layers of the same arrays, begun."""
    layer = VectorQuantizer(D, size(options), seed=0, **options)
    same = diveq_numpy.VectorQuantizer(D, size(options), rng=np.random.default_rng(0), **options)
    if layer.settings.from_data:
        layer.start(batch(options))
    same.load_arrays(layer.arrays())
    return layer, same


def differentiated(
    layer: VectorQuantizer, z: np.ndarray, g: np.ndarray, **given: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """A step in training, and the gradients of sum(z_q g) + 2 loss."""
    given = {name: None if x is None else keras.ops.convert_to_tensor(x) for name, x in given.items()}
    z, g = keras.ops.convert_to_tensor(z), keras.ops.convert_to_tensor(g)
    names = [x.name.removesuffix("_moved") for x in layer.trainable_variables]
    if BACKEND == "torch":
        z = z.clone().requires_grad_()
        out = layer(z, training=True, return_all=True, **given)
        ((out.z_q * g).sum() + 2 * sum(layer.losses)).backward()
        return out, z.grad, {name: x.value.grad for name, x in zip(names, layer.trainable_variables, strict=True)}
    import jax

    layer.build(z.shape)

    def loss(trained: Any, z: Any) -> Any:
        others = [x.value for x in layer.non_trainable_variables]
        out, others, losses = layer.stateless_call(
            trained, others, z, training=True, return_all=True, return_losses=True, **given
        )
        return (out.z_q * g).sum() + 2 * sum(losses), (out, others)

    trained = [x.value for x in layer.trainable_variables]
    gradients, (out, others) = jax.grad(loss, (0, 1), has_aux=True)(trained, z)
    for variable, x in zip(layer.non_trainable_variables, others, strict=True):
        variable.assign(x)
    return out, gradients[1], dict(zip(names, gradients[0], strict=True))


@pytest.mark.parametrize(
    "options",
    [{"replace_every": 3}, {"codebook_update": "ema", "ema_decay": 0.9, "estimator": dq.STE(), "replace_every": 0}],
    ids=["gradient", "averages"],
)
def test_fit_lowers_the_loss_and_its_file_predicts_the_same(options: dict[str, Any], tmp_path: Path):
    layer = VectorQuantizer(D, K, **options)
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(D), layer, keras.layers.Dense(12)])
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    # Near a plane, so that a few codewords serve.
    x = numbers(64, 2) @ numbers(2, 12) + 0.1 * numbers(64, 12)
    losses = model.fit(x, x, batch_size=64, epochs=40, verbose=0).history["loss"]
    assert float(losses[-1]) < 0.7 * float(losses[0])
    arrays = layer.arrays()
    assert arrays["started"]
    assert arrays["steps"] == 40
    assert np.isfinite(arrays["codewords"]).all()

    model.save(tmp_path / "model.keras")
    wanted = model.predict(x, verbose=0)
    other = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(other.predict(x, verbose=0), wanted)
    assert other.layers[1].settings == layer.settings
    for name, a in other.layers[1].arrays().items():
        assert np.array_equal(a, arrays[name])


@by_settings
def test_a_step_is_that_of_numpy(options: dict[str, Any]):
    layer, same = pair(options)
    z, g = batch(options, seed=1), batch(options, seed=2)
    mask = np.random.default_rng(0).random((4, 5)) < 0.7
    noise = numbers(4, 5, D, seed=3) if options["estimator"] == dq.DiVeQ() else None
    out, g_z, gradients = differentiated(layer, z, g, mask=mask, noise=noise)
    wanted = same.forward(z, mask, noise=noise)
    assert np.array_equal(to_numpy(out.indices), wanted.indices)
    np.testing.assert_allclose(to_numpy(out.z_q), wanted.z_q, **CLOSE)
    np.testing.assert_allclose(to_numpy(out.loss), wanted.loss, **CLOSE)
    np.testing.assert_allclose(to_numpy(g_z), same.backward(g, 2.0), **CLOSE)
    assert gradients.keys() == same.gradients.keys()
    for name, x in same.gradients.items():
        np.testing.assert_allclose(to_numpy(gradients[name]), x, **CLOSE, err_msg=name)
    same.update()
    for name, x in layer.arrays().items():
        np.testing.assert_allclose(x, same.arrays()[name], **CLOSE, err_msg=name)


@by_settings
def test_evaluation_is_the_decoded_token_and_changes_nothing(options: dict[str, Any]):
    layer, _ = pair(options)
    before, z = layer.arrays(), batch(options, seed=1)
    z_q = layer(z)
    assert z_q.shape == z.shape
    assert np.array_equal(to_numpy(z_q), to_numpy(layer.decode(layer.encode(z))))
    assert not layer.losses
    assert all(np.array_equal(before[name], x) for name, x in layer.arrays().items())


@by_settings
def test_a_file_goes_to_others_and_back(options: dict[str, Any], tmp_path: Path):
    layer, _ = pair(options)
    z = batch(options, seed=1)
    layer.save(tmp_path / "keras.safetensors")
    other = diveq_numpy.VectorQuantizer.load(tmp_path / "keras.safetensors")
    other.save(tmp_path / "numpy.safetensors")
    back = VectorQuantizer.load(tmp_path / "numpy.safetensors")
    assert back.settings == layer.settings
    tokens = to_numpy(layer.encode(z))
    assert np.array_equal(tokens, other.encode(z))
    assert np.array_equal(tokens, to_numpy(back.encode(z)))
    if BACKEND == "torch":
        import torch

        from diveq_torch import VectorQuantizer as OfTorch

        tensor = torch.tensor(np.ascontiguousarray(z))
        assert np.array_equal(tokens, OfTorch.load(tmp_path / "numpy.safetensors").encode(tensor).numpy())


def test_the_codebook_can_be_set_and_moves_from_there():
    layer, codebook = VectorQuantizer(D, K), numbers(K, D)
    layer.codebook = keras.ops.convert_to_tensor(codebook)
    (moved,) = layer.trainable_variables
    moved.assign(keras.ops.ones_like(moved.value))
    np.testing.assert_allclose(to_numpy(layer.codebook), codebook + 1)
    layer.codebook = keras.ops.convert_to_tensor(codebook)
    layer(numbers(4, D), training=True)
    assert np.array_equal(to_numpy(layer.codebook), codebook)


def test_replacement_moves_what_nobody_chose_and_no_other():
    layer = VectorQuantizer(D, K, dq.STE(), replace_every=1)
    codebook = np.full((K, D), 50, np.float32)
    codebook[:2] = numbers(2, D)
    layer.codebook = keras.ops.convert_to_tensor(codebook)
    layer.trainable_variables[0].assign(0.1 * numbers(K, D, seed=1))
    before = to_numpy(layer.codebook)
    layer(numbers(128, D), training=True)
    after = to_numpy(layer.codebook)
    assert np.array_equal(after[:2], before[:2])
    assert np.abs(after[2:]).max() < 10
    assert layer.arrays()["usage"].sum() == 0


def test_k_means_begins_the_codebook():
    # One cluster for each codeword.
    centers = 10 * numbers(K, D)
    layer = VectorQuantizer(D, K, init="kmeans", seed=1)
    layer.start(np.repeat(centers, 8, axis=0))
    found = to_numpy(layer.codebook)
    assert np.abs(found[:, None] - centers[None]).max(axis=-1).min(axis=1).max() < 20
    assert layer.arrays()["started"]


def test_a_mask_of_keras_is_used_and_handed_on():
    z = numbers(2, 5, D)
    z[1, 3:] = 0
    layer = VectorQuantizer(D, K, init="normal")
    masked = keras.layers.Masking()(z)
    out = layer(masked, return_all=True)
    wanted = np.ones((2, 5), bool)
    wanted[1, 3:] = False
    assert np.array_equal(to_numpy(out.indices) >= 0, wanted)
    assert np.array_equal(to_numpy(keras.src.backend.get_keras_mask(layer(masked))), wanted)


def test_a_functional_model_may_give_all():
    i = keras.Input((None, D))
    out = VectorQuantizer(D, K, stages=2, init="normal", name="vq")(i, return_all=True)
    model = keras.Model(i, [out.z_q, out.indices])
    assert model.output_shape == [(None, None, D), (None, None, 2)]
    z = keras.ops.convert_to_tensor(numbers(2, 3, D))
    z_q, indices = model(z)
    assert np.array_equal(to_numpy(z_q), to_numpy(model.get_layer("vq").decode(indices)))


def test_a_wrong_width_is_refused():
    layer = VectorQuantizer(D, K)
    with pytest.raises(ValueError, match="6 entries along axis -1, which is channel_axis"):
        layer(numbers(4, D + 1))
    with pytest.raises(ValueError, match="6 entries along axis -1"):
        layer(keras.Input((D + 1,)))


def test_the_configuration_makes_the_layer():
    estimator = dq.Radial(dq.PseudoHuber(0.3))
    layer = VectorQuantizer(D, K, estimator, heads=2, seed=3, name="vq", dtype="mixed_bfloat16")
    same = VectorQuantizer.from_config(layer.get_config())
    assert same.get_config() == layer.get_config()
    assert same.settings == layer.settings
    for name, x in layer.arrays().items():
        # Of the same seed.
        assert np.array_equal(same.arrays()[name], x)
    with pytest.raises(TypeError, match="a file holds numbers, not functions"):
        VectorQuantizer(D, K, dq.Radial(lambda q, z: q[:, 0])).get_config()


def test_mixed_precision_keeps_the_state_wide():
    layer = VectorQuantizer(D, K, dtype="mixed_bfloat16")
    z_q = layer(numbers(32, D), training=True)
    assert keras.backend.standardize_dtype(z_q.dtype) == "bfloat16"
    assert {x.dtype for x in layer.weights} == {"float32", "bool", "int32"}
    assert layer.arrays()["started"]
    # Numbers that 16 bits round to other codewords' cells.
    codebook = numbers(1, D) + 1e-3 * numbers(K, D, seed=2)
    z = codebook[0] + 1e-3 * numbers(500, D, seed=1)
    layer.codebook = keras.ops.convert_to_tensor(codebook)
    wide = VectorQuantizer.from_config(layer.get_config() | {"dtype": "float32"})
    wide.load_arrays(layer.arrays())
    tokens = layer.encode(z)
    assert not np.array_equal(to_numpy(tokens), to_numpy(wide.encode(z)))
    decoded = layer.decode(tokens)
    assert decoded.dtype == z_q.dtype
    assert bool(keras.ops.all(decoded == layer(z)))


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
def test_fit_begins_by_k_means():
    # One cluster for each codeword, in the step that fit compiles on JAX.
    centers = 10 * numbers(K, D)
    layer = VectorQuantizer(D, K, dq.STE(), init="kmeans", seed=1, codebook_update="ema", replace_every=0)
    model = keras.Sequential([keras.Input((D,)), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    z = np.repeat(centers, 8, axis=0) + 1e-3 * numbers(8 * K, D)
    model.fit(z, z, batch_size=8 * K, epochs=1, verbose=0)
    arrays = layer.arrays()
    assert arrays["started"]
    found = np.sort(np.abs(arrays["codewords"][:, None] - centers[None]).max(axis=-1).min(axis=1))
    # K-means may leave one cluster between two, but a start by vectors alone is no mean of any.
    assert found[: K // 2].max() < 1e-3


def test_a_layer_that_is_not_trainable_stays_as_it_is():
    layer, _ = pair({"estimator": dq.STE(), "codebook_update": "ema"})
    layer.trainable = False
    before = layer.arrays()
    _, g_z, _ = differentiated(layer, numbers(8, D), np.ones((8, D), np.float32))
    # By the estimator still, whose gradient passes.
    assert np.abs(to_numpy(g_z)).max() > 0
    assert all(np.array_equal(before[name], x) for name, x in layer.arrays().items())


def test_draws_follow_the_seed():
    outs = []
    for seed in (0, 0, 1):
        layer = VectorQuantizer(D, K, init="normal", seed=seed)
        outs += [[to_numpy(layer(numbers(8, D), training=True)) for _ in range(2)]]
    assert np.array_equal(outs[0], outs[1])
    assert not np.array_equal(outs[0], outs[2])
    assert not np.array_equal(outs[0][0], outs[0][1])


# JAX compiles each program for seconds, so all of them run where that is asked for.
FEW = "(gradient or (averages and not fit) or mask or functional or trainable or k_means) and not process"


@pytest.mark.parametrize("tests", [FEW, pytest.param("not process", marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != BACKEND])
def test_the_other_backend_in_a_process_of_its_own(backend: str, tests: str):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", tests, __file__],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent.parent,
        env={**os.environ, "KERAS_BACKEND": backend, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout


def test_a_third_backend_is_refused_in_a_process_of_its_own():
    code = """
        import os
        os.environ["KERAS_BACKEND"] = "numpy"
        from diveq_keras import VectorQuantizer
        try:
            VectorQuantizer(2, 4)
        except RuntimeError as error:
            print(error)
    """
    assert run_python(code).startswith("VectorQuantizer: KERAS_BACKEND must be jax or torch, got numpy;")
