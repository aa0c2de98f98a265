"""The layer for Equinox: numbers, state and files, under Equinox's and JAX's transformations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import diveq_core as dq
from layer_steps import CASES, COUNT, DIM, Step, assert_same_arrays, assert_same_step, inputs, numpy_step
from libraries import standard_promotion
from processes import importable, run_python

pytest.importorskip("equinox")
optax = pytest.importorskip("optax")

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from diveq_jax.equinox import VectorQuantizer  # noqa: E402

RATE = 0.01
ADAM = optax.adam(RATE)
KEY = jax.random.key(0)


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Any:
    """Nothing here runs long enough to be worth an optimized program; optax mixes dtypes."""
    jax.config.update("jax_disable_most_optimizations", True)
    with standard_promotion():
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def made(*arguments: Any, **options: Any) -> tuple[VectorQuantizer, eqx.nn.State]:
    return eqx.nn.make_with_state(VectorQuantizer)(*arguments, **{"key": KEY} | options)


class Model(eqx.Module):
    encoder: eqx.nn.Linear
    vq: VectorQuantizer
    decoder: eqx.nn.Linear

    def __init__(self, key: Any) -> None:
        keys = jax.random.split(key, 3)
        self.encoder = eqx.nn.Linear(DIM, 4, key=keys[0])
        self.vq = VectorQuantizer(4, COUNT, key=keys[1], replace_every=5)
        self.decoder = eqx.nn.Linear(4, DIM, key=keys[2])

    def __call__(self, x: jax.Array, state: eqx.nn.State, key: Any) -> Any:
        out, state = self.vq(jax.vmap(self.encoder)(x), state, key=key)
        return jax.vmap(self.decoder)(out.z_q), out, state


def loss_of(model: Model, state: eqx.nn.State, x: jax.Array, key: Any) -> Any:
    y, out, state = model(x, state, key)
    return ((y - x) ** 2).mean() + out.loss, state


def stepped(loss: Any, model: Model, state: Any, moments: Any, x: jax.Array, key: Any) -> Any:
    to_loss, to_update = jax.random.split(key)
    (value, state), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(model, state, x, to_loss)
    updates, moments = ADAM.update(gradients, moments)
    model = eqx.apply_updates(model, updates)
    vq, state = model.vq.update(state, key=to_update)
    return eqx.tree_at(lambda model: model.vq, model, vq), state, moments, value


@eqx.filter_jit
def train(model: Model, state: Any, moments: Any, x: jax.Array, key: Any) -> Any:
    return stepped(loss_of, model, state, moments, x, key)


def begin() -> tuple[Model, eqx.nn.State, Any]:
    model, state = eqx.nn.make_with_state(Model)(KEY)
    return model, state, ADAM.init(eqx.filter(model, eqx.is_inexact_array))


def batch(number: int = 0) -> jax.Array:
    rng = np.random.default_rng(number)
    centres = np.random.default_rng(7).standard_normal((COUNT, DIM)) * 2
    return jnp.asarray(centres[rng.integers(0, COUNT, 64)] + 0.1 * rng.standard_normal((64, DIM)), jnp.float32)


@pytest.fixture(scope="module")
def trained() -> tuple[Model, eqx.nn.State, list[float]]:
    model, state, moments = begin()
    losses = []
    for i, key in enumerate(jax.random.split(KEY, 60)):
        model, state, moments, value = train(model, state, moments, batch(i), key)
        losses.append(float(value))
    return model, state, losses


def test_a_model_trains(trained: tuple[Model, eqx.nn.State, list[float]]):
    model, state, losses = trained
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:10])
    assert int(model.vq.arrays(state)["steps"]) == 60
    # What the optimizer trains is the codebook itself.
    np.testing.assert_array_equal(model.vq.parameters["codewords"], model.vq.codebook(state))


def test_the_first_batch_begins_the_codebook_and_the_gradient_reaches_it():
    model, state, moments = begin()
    x = batch()
    vectors = np.asarray(jax.vmap(model.encoder)(x))
    model, state, *_ = train(model, state, moments, x, KEY)
    moves = np.abs(np.asarray(model.vq.codebook(state))[:, None] - vectors).max(axis=2).min(axis=1)
    # Adam's first step moves each number that has a gradient by the rate.
    assert moves.max() <= 1.01 * RATE
    assert moves.max() >= 0.99 * RATE


def test_an_unused_parameter_is_replaced_by_the_step():
    model, state, moments = begin()
    model, state, moments, _ = train(model, state, moments, batch(), KEY)
    arrays = model.vq.arrays(state)
    arrays["codewords"][3] = 1000.0
    arrays["usage"][:] = 0
    vq, state = model.vq.load_arrays(arrays, state)
    model = eqx.tree_at(lambda model: model.vq, model, vq)
    for i in range(4):
        # The schedule asks for it after the fifth step.
        assert np.abs(model.vq.codebook(state)[3]).min() > 900
        model, state, moments, _ = train(model, state, moments, batch(i), KEY)
    assert np.abs(model.vq.codebook(state)).max() < 20
    assert model.vq.arrays(state)["usage"].sum() == 0


def test_inference_is_hard_and_changes_nothing(trained: tuple[Model, eqx.nn.State, list[float]]):
    model, state, _ = trained
    vq = eqx.nn.inference_mode(model).vq
    z = jax.vmap(model.encoder)(batch(1))
    out, after = vq(z, state)
    np.testing.assert_array_equal(out.z_q, vq.decode(vq.encode(z, state), state))
    np.testing.assert_array_equal(out.z_q, vq.codebook(state)[out.indices])
    assert float(out.loss) == 0
    assert eqx.tree_equal(after, state)


@pytest.mark.parametrize("case", ["linear", "images"])
def test_the_numbers_are_those_of_numpy(case: str):
    options = CASES[case]
    vq, state = made(DIM, COUNT, init="normal", replace_every=0, **options)
    arrays, given = vq.arrays(state), inputs(options)
    noisy = getattr(vq.settings.estimator, "noisy", False)
    z, mask, noise, g = map(jnp.asarray, given)

    @eqx.filter_jit
    def step(vq: VectorQuantizer, z: jax.Array, state: eqx.nn.State) -> Any:
        def loss(both: Any, state: eqx.nn.State) -> Any:
            vq, z = both
            out, state = vq(z, state, mask, noise=noise if noisy else None)
            return (out.z_q * g).sum() + out.loss, (out, state)

        return eqx.filter_grad(loss, has_aux=True)((vq, z), state)

    with jax.numpy_dtype_promotion("strict"):
        (gradients, g_z), (out, state) = step(vq, z, state)
    expected = numpy_step(vq.settings, arrays, given.z, given.mask, given.noise if noisy else None, given.g)
    actual = Step(out.z_q, out.indices, out.loss, g_z, gradients.parameters, vq.arrays(state))
    assert_same_step(actual, expected)


def test_steps_in_a_scan_with_a_checkpoint_are_the_same_steps():
    model, state, moments = begin()
    xs, keys = jnp.stack([batch(i) for i in range(7)]), jax.random.split(KEY, 7)
    carried, static = eqx.partition((model, state, moments), eqx.is_array)

    @jax.jit
    def run(carried: Any, xs: jax.Array, keys: Any) -> Any:
        def step(carried: Any, given: Any) -> Any:
            *new, value = stepped(eqx.filter_checkpoint(loss_of), *eqx.combine(carried, static), *given)
            return eqx.filter(tuple(new), eqx.is_array), value

        return jax.lax.scan(step, carried, (xs, keys))

    new, values = run(carried, xs, keys)
    expected = []
    for x, key in zip(xs, keys, strict=True):
        model, state, moments, value = train(model, state, moments, x, key)
        expected.append(float(value))
    np.testing.assert_allclose(values, expected, rtol=1e-3)
    scanned, scanned_state, _ = eqx.combine(new, static)
    found, plain = scanned.vq.arrays(scanned_state), model.vq.arrays(state)
    assert int(found["steps"]) == 7
    # Adam divides by the size of gradients, so that rounding moves a number by a part of the rate.
    np.testing.assert_allclose(found.pop("codewords"), plain.pop("codewords"), atol=RATE / 5)
    assert_same_arrays(found, plain)


def test_examples_under_vmap_are_one_batch():
    options = {"codebook_update": "ema", "init": "normal", "replace_every": 0, "axis_name": ["batch"]}
    vq, state = made(DIM, COUNT, dq.STE(), **options)
    arrays, z = vq.arrays(state), inputs({}).z[0]
    keys = jax.random.split(KEY, len(z))
    call = jax.vmap(lambda z, state, key: vq(z, state, key=key), (0, None, 0), (0, None), axis_name="batch")
    out, state = jax.jit(call)(jnp.asarray(z), state, keys)
    expected = numpy_step(vq.settings, arrays, z)
    np.testing.assert_array_equal(out.indices, expected.indices)
    assert_same_arrays(vq.arrays(state), expected.arrays)


def test_a_codebook_begins_eagerly_and_waits_for_the_update():
    vq, state = made(2, 4, dq.STE(), replace_every=0)
    z = jnp.asarray(np.random.default_rng(0).standard_normal((8, 2)), jnp.float32)
    _, begun = vq(z, state, key=KEY)
    found = np.asarray(vq.codebook(begun))
    assert all((np.asarray(z) == word).all(axis=1).any() for word in found)
    # Without an update the codebook stays in the state, and a later batch does not begin it again.
    _, later = vq(z + 5, begun, key=KEY)
    np.testing.assert_array_equal(vq.codebook(later), found)
    updated, after = vq.update(later)
    np.testing.assert_array_equal(updated.parameters["codewords"], found)
    np.testing.assert_array_equal(updated.codebook(after), found)


def test_devices_share_a_codebook(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    code = """
        import equinox as eqx
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import PartitionSpec as P
        import diveq_core as dq
        from diveq_jax.equinox import VectorQuantizer
        from layer_steps import assert_same_arrays, numpy_step

        jax.config.update("jax_disable_most_optimizations", True)
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        key = jax.random.key(0)
        options = dict(codebook_weight=0.0, commitment_weight=0.0, axis_name="data", key=key)
        vq, fresh = eqx.nn.make_with_state(VectorQuantizer)(3, 4, dq.Rotation(), **options)
        carried, static = eqx.partition(vq, eqx.is_array)

        @jax.jit
        def step(carried, state, z, mask, g):
            def local(carried, state, z, mask, g):
                def loss(carried, state):
                    out, state = eqx.combine(carried, static)(z, state, mask, key=key)
                    return (out.z_q * g).sum(), (out.indices, state)

                gradients, (indices, state) = jax.grad(loss, has_aux=True)(carried, state)
                vq, state = eqx.combine(carried, static).update(state, key=key)
                return indices, gradients, eqx.filter(vq, eqx.is_array), state

            specs = (P(), P(), P("data"), P("data"), P("data"))
            out_specs = (P("data"), P(), P(), P())
            return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs)(carried, state, z, mask, g)

        rng = np.random.default_rng(0)
        z, g = (rng.standard_normal((32, 3), dtype=np.float32) for _ in range(2))
        mask = rng.random(32) < 0.8
        mask[8:16] = False

        def arrays(carried, state):
            for x in jax.tree.leaves((carried, state)):
                copies = [np.asarray(shard.data) for shard in x.addressable_shards]
                assert len(copies) == 4 and all((copy == copies[0]).all() for copy in copies)
            return eqx.combine(carried, static).arrays(state)

        # A codebook that is given: as on one device with the joined batch.
        given, state = vq.with_codebook(jnp.asarray(z[:4]), jax.tree.map(jnp.copy, fresh))
        before = given.arrays(state)
        indices, gradients, new, state = step(eqx.filter(given, eqx.is_array), state, z, mask, g)
        expected = numpy_step(vq.settings, before, z, mask, None, g)
        np.testing.assert_array_equal(indices, expected.indices)
        assert_same_arrays(gradients.parameters, expected.gradients)
        assert_same_arrays(arrays(new, state), expected.arrays)

        # One from data: vectors that are there.
        _, _, new, state = step(carried, fresh, z, mask, g)
        begun = arrays(new, state)
        assert begun["started"]
        assert all((z[mask] == word).all(axis=1).any() for word in begun["codewords"])

        # No vector anywhere: nothing begins.
        _, _, new, state = step(carried, fresh, z, np.zeros(32, bool), g)
        assert not arrays(new, state)["started"]
        print("done")
    """
    assert run_python(code).split() == ["done"]


def test_leaves_are_serialised(trained: tuple[Model, eqx.nn.State, list[float]], tmp_path: Any):
    model, state, _ = trained
    eqx.tree_serialise_leaves(tmp_path / "model", (model, state))
    other, other_state = eqx.nn.make_with_state(Model)(jax.random.key(1))
    other, other_state = eqx.tree_deserialise_leaves(tmp_path / "model", (other, other_state))
    assert eqx.tree_equal((other, other_state), (model, state))


def test_a_file_goes_through_the_other_frameworks(trained: tuple[Model, eqx.nn.State, list[float]], tmp_path: Any):
    pytest.importorskip("safetensors")
    import diveq_numpy

    model, state, _ = trained
    z = np.asarray(jax.vmap(model.encoder)(batch(2)))
    tokens = np.asarray(model.vq.encode(jnp.asarray(z), state))
    assert len(set(tokens.tolist())) > 2
    model.vq.save(tmp_path / "first", state)
    there = diveq_numpy.VectorQuantizer.load(tmp_path / "first")
    np.testing.assert_array_equal(there.encode(z), tokens)
    there.save(tmp_path / "last")
    if importable("flax"):
        from diveq_jax import flax

        further = flax.VectorQuantizer.load(tmp_path / "last")
        np.testing.assert_array_equal(further.encode(jnp.asarray(z)), tokens)
        further.save(tmp_path / "last")
    vq, vq_state = VectorQuantizer.load(tmp_path / "last")
    assert vq.settings == model.vq.settings
    np.testing.assert_array_equal(vq.encode(jnp.asarray(z), vq_state), tokens)
    for name, x in model.vq.arrays(state).items():
        np.testing.assert_array_equal(vq.arrays(vq_state)[name], x)


def test_without_a_codebook():
    vq, state = made(2, None, dq.FSQ([5, 5]))
    z = jnp.asarray([[0.1, 0.2]])
    out, state = eqx.filter_jit(vq)(z, state)
    assert vq.codebook(state) is None
    assert vq.arrays(state) == {}
    np.testing.assert_array_equal(out.indices, vq.encode(z, state))


def test_a_key_is_asked_for_where_something_is_drawn():
    vq, state = made(2, 4, init="normal", replace_every=0)
    with pytest.raises(TypeError, match=r"VectorQuantizer: key must be a JAX key in training, .*, got None"):
        vq(jnp.zeros((3, 2)), state)


def test_a_missing_framework_is_named():
    code = """
        import sys
        sys.modules["equinox"] = None
        try:
            import diveq_jax.equinox
        except ImportError as error:
            print(error)
    """
    assert run_python(code).strip() == "diveq_jax.equinox needs equinox; pip install 'diveq-core[jax,equinox]'"
