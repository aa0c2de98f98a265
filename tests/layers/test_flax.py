"""The layer for Flax NNX: numbers, state and files, under Flax's and JAX's transformations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import diveq_core as dq
from layer_steps import CASES, COUNT, DIM, Step, assert_same_arrays, assert_same_step, inputs, numpy_step
from libraries import standard_promotion
from processes import importable, run_python

pytest.importorskip("flax")
optax = pytest.importorskip("optax")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from diveq_jax.flax import CodebookState, VectorQuantizer  # noqa: E402

RATE = 0.01

# One value, so that all models share a compiled step.
ADAM = optax.adam(RATE)


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Any:
    """Nothing here runs long enough to be worth an optimized program; Flax and optax mix dtypes."""
    jax.config.update("jax_disable_most_optimizations", True)
    with standard_promotion():
        yield
    jax.config.update("jax_disable_most_optimizations", False)


class Model(nnx.Module):
    def __init__(self, seed: int = 0, **options: Any) -> None:
        rngs = nnx.Rngs(seed)
        self.encoder = nnx.Linear(DIM, 4, rngs=rngs)
        self.vq = VectorQuantizer(4, COUNT, rngs=rngs, replace_every=5, **options)
        self.decoder = nnx.Linear(4, DIM, rngs=rngs)

    def __call__(self, x: jax.Array) -> Any:
        out = self.vq(self.encoder(x))
        return self.decoder(out.z_q), out


def loss_of(model: Model, x: jax.Array) -> jax.Array:
    y, out = model(x)
    return ((y - x) ** 2).mean() + out.loss


@nnx.jit
def train(model: Model, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
    value, gradients = nnx.value_and_grad(loss_of)(model, x)
    optimizer.update(model, gradients)
    return value


def optimizer_of(model: Model) -> nnx.Optimizer:
    return nnx.Optimizer(model, ADAM, wrt=nnx.Param)


def batch(number: int = 0) -> jax.Array:
    rng = np.random.default_rng(number)
    centres = np.random.default_rng(7).standard_normal((COUNT, DIM)) * 2
    return jnp.asarray(centres[rng.integers(0, COUNT, 64)] + 0.1 * rng.standard_normal((64, DIM)), jnp.float32)


@pytest.fixture(scope="module")
def trained() -> tuple[Model, list[float]]:
    model = Model()
    optimizer = optimizer_of(model)
    return model, [float(train(model, optimizer, batch(i))) for i in range(60)]


def test_a_model_trains(trained: tuple[Model, list[float]]):
    model, losses = trained
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:10])
    assert int(model.vq.steps[...]) == 60
    assert isinstance(model.vq.codewords, nnx.Param)
    assert isinstance(model.vq.usage, CodebookState)


def test_the_first_batch_begins_the_codebook_and_the_gradient_reaches_it():
    model = Model()
    x = batch()
    vectors = np.asarray(model.encoder(x))
    train(model, optimizer_of(model), x)
    moves = np.abs(model.vq.arrays()["codewords"][:, None] - vectors).max(axis=2).min(axis=1)
    # Adam's first step moves each number that has a gradient by the rate.
    assert moves.max() <= 1.01 * RATE
    assert moves.max() >= 0.99 * RATE
    assert bool(model.vq.started[...])


def test_an_unused_parameter_is_replaced_in_the_model():
    model = Model()
    optimizer = optimizer_of(model)
    train(model, optimizer, batch())
    model.vq.codewords[...] = model.vq.codewords[...].at[3].set(1000.0)
    model.vq.usage[...] = jnp.zeros(COUNT)
    for i in range(4):
        train(model, optimizer, batch(i))
        # The schedule asks for it in the fifth step.
        assert (np.abs(model.vq.codebook[3]).min() > 900) == (i < 3)
    assert np.abs(model.vq.codebook).max() < 20
    assert float(model.vq.usage[...].sum()) == 0


def test_evaluation_is_hard_and_changes_nothing(trained: tuple[Model, list[float]]):
    model, _ = trained
    z = model.encoder(batch(1))
    model.eval()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState))))
    count = int(model.vq.rngs.count[...])
    out = model.vq(z)
    np.testing.assert_array_equal(out.z_q, model.vq.decode(model.vq.encode(z)))
    np.testing.assert_array_equal(out.z_q, model.vq.codebook[out.indices])
    assert float(out.loss) == 0
    after = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert int(model.vq.rngs.count[...]) == count
    model.train()
    assert model.vq.deterministic is False
    assert nnx.view(model, deterministic=True).vq.deterministic is True


@pytest.mark.parametrize("case", ["gradient", "heads", "stages"])
def test_the_numbers_are_those_of_numpy(case: str):
    options = CASES[case]
    vq = VectorQuantizer(DIM, COUNT, rngs=nnx.Rngs(0), init="normal", replace_every=0, **options)
    arrays, given = vq.arrays(), inputs(options)
    z, mask, noise, g = map(jnp.asarray, given)

    @nnx.jit
    def step(vq: VectorQuantizer, z: jax.Array) -> Any:
        def loss(vq: VectorQuantizer, z: jax.Array) -> Any:
            out = vq(z, mask, noise=noise if getattr(vq.settings.estimator, "noisy", False) else None)
            return (out.z_q * g).sum() + out.loss, out

        return nnx.grad(loss, argnums=(0, 1), has_aux=True)(vq, z)

    with jax.numpy_dtype_promotion("strict"):
        (gradients, g_z), out = step(vq, z)
    noise = given.noise if getattr(vq.settings.estimator, "noisy", False) else None
    expected = numpy_step(vq.settings, arrays, given.z, given.mask, noise, given.g)
    found = nnx.to_pure_dict(gradients)
    assert_same_step(Step(out.z_q, out.indices, out.loss, g_z, found, vq.arrays()), expected)


def test_a_layer_that_is_called_twice_gets_both_gradients():
    options = {"estimator": dq.Rotation(), "replace_every": 0}
    vq = VectorQuantizer(DIM, COUNT, rngs=nnx.Rngs(0), **options)
    given = inputs({})
    vq.codebook = vq.codebook
    expected = numpy_step(vq.settings, vq.arrays(), given.z, g=given.g)
    z, g = jnp.asarray(given.z), jnp.asarray(given.g)

    @nnx.jit
    def step(vq: VectorQuantizer) -> Any:
        def loss(vq: VectorQuantizer) -> jax.Array:
            first, second = vq(z), vq(z)
            return ((first.z_q + second.z_q) * g).sum() + first.loss + second.loss

        return nnx.grad(loss)(vq)

    gradients = nnx.to_pure_dict(step(vq))
    assert_same_arrays(gradients, {name: 2 * x for name, x in expected.gradients.items()})
    assert int(vq.steps[...]) == 2


def test_steps_in_a_scan_with_rematerialization_are_the_same_steps():
    plain, scanned = Model(), Model()
    optimizers = optimizer_of(plain), optimizer_of(scanned)
    xs = jnp.stack([batch(i) for i in range(7)])
    expected = [float(train(plain, optimizers[0], x)) for x in xs]

    @nnx.jit
    def run(model: Model, optimizer: nnx.Optimizer, xs: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def step(carry: Any, x: jax.Array) -> Any:
            model, optimizer = carry
            value, gradients = nnx.value_and_grad(nnx.remat(loss_of))(model, x)
            optimizer.update(model, gradients)
            return carry, value

        return step((model, optimizer), xs)[1]

    np.testing.assert_allclose(run(scanned, optimizers[1], xs), expected, rtol=1e-3)
    assert int(scanned.vq.steps[...]) == 7
    assert_same_arrays(scanned.vq.arrays() | {"codewords": 0}, plain.vq.arrays() | {"codewords": 0})
    # Adam divides by the size of gradients, so that rounding moves a number by a part of the rate.
    np.testing.assert_allclose(scanned.vq.codebook, plain.vq.codebook, atol=RATE / 5)


def test_examples_under_vmap_are_one_batch():
    vq = VectorQuantizer(
        DIM, COUNT, dq.STE(), rngs=nnx.Rngs(0), codebook_update="ema", init="normal", replace_every=0, axis_name="batch"
    )
    arrays, z = vq.arrays(), inputs({}).z[0]

    @nnx.jit
    @nnx.vmap(in_axes=(None, 0), axis_name="batch")
    def step(vq: VectorQuantizer, z: jax.Array) -> Any:
        return vq(z).indices

    indices = step(vq, jnp.asarray(z))
    expected = numpy_step(vq.settings, arrays, z)
    np.testing.assert_array_equal(indices, expected.indices)
    assert_same_arrays(vq.arrays(), expected.arrays)


def test_devices_share_a_codebook(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    code = """
        import jax
        import jax.numpy as jnp
        import numpy as np
        from flax import nnx
        from jax.sharding import PartitionSpec as P
        import diveq_core as dq
        from diveq_jax.flax import VectorQuantizer
        from layer_steps import assert_same_arrays, numpy_step

        jax.config.update("jax_disable_most_optimizations", True)
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        options = dict(codebook_update="ema", replace_every=1, axis_name="data")
        vq = VectorQuantizer(3, 4, dq.STE(), rngs=nnx.Rngs(0), **options)
        graph, fresh = nnx.split(vq)
        # Of its own: the module's variables are written below.
        fresh = jax.tree.map(jnp.copy, fresh)

        @jax.jit
        def step(state, z, mask):
            def local(state, z, mask):
                vq = nnx.merge(graph, state)
                out = vq(z, mask)
                return out.indices, nnx.state(vq)

            specs = (P(), P("data"), P("data"))
            return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P("data"), P()))(state, z, mask)

        rng = np.random.default_rng(0)
        z = rng.standard_normal((32, 3), dtype=np.float32)
        mask = rng.random(32) < 0.8
        mask[8:16] = False

        def arrays(state):
            values = {name: x for name, x in nnx.to_pure_dict(state).items() if name != "rngs"}
            for x in values.values():
                copies = [np.asarray(shard.data) for shard in x.addressable_shards]
                assert len(copies) == 4 and all((copy == copies[0]).all() for copy in copies)
            return {name: np.asarray(x) for name, x in values.items()}

        # A codebook that is given: as on one device with the joined batch.
        vq.codebook = jnp.asarray(z[:4])
        indices, state = step(nnx.state(vq), z, mask)
        expected = numpy_step(vq.settings, vq.arrays(), z, mask)
        np.testing.assert_array_equal(indices, expected.indices)
        assert_same_arrays(arrays(state), expected.arrays)

        # One from data, then some steps until each codeword was chosen ten times on average: some are replaced.
        _, state = step(fresh, z, mask)
        begun = arrays(state)
        assert begun["started"] and np.isfinite(begun["codewords"]).all()
        assert len(np.unique(begun["codewords"], axis=0)) > 1
        nnx.update(vq, state)
        vq.codebook = vq.codebook.at[2].set(1000.0)
        vq.usage[...] = jnp.zeros(4)
        state = nnx.state(vq)
        for _ in range(3):
            _, state = step(state, z, mask)
        assert np.abs(arrays(state)["codewords"]).max() < 10

        # No vector anywhere: nothing begins.
        _, state = step(fresh, z, np.zeros(32, bool))
        assert not arrays(state)["started"]
        print("done")
    """
    assert run_python(code).split() == ["done"]


def test_orbax_saves_and_restores_a_model(trained: tuple[Model, list[float]], tmp_path: Any):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    model, _ = trained
    other = Model(seed=1)
    state = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", state)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(other, nnx.Not(nnx.RngState))))
        restored = checkpointer.restore(tmp_path / "model", abstract)
    nnx.update(other, restored)
    for name, x in model.vq.arrays().items():
        np.testing.assert_array_equal(other.vq.arrays()[name], x)
    x = batch(3)
    np.testing.assert_array_equal(other.vq.encode(other.encoder(x)), model.vq.encode(model.encoder(x)))


def test_a_file_goes_through_the_other_frameworks(trained: tuple[Model, list[float]], tmp_path: Any):
    pytest.importorskip("safetensors")
    import diveq_numpy

    model, _ = trained
    z = np.asarray(model.encoder(batch(2)))
    tokens = np.asarray(model.vq.encode(jnp.asarray(z)))
    assert len(set(tokens.tolist())) > 2
    model.vq.save(tmp_path / "flax")
    there = diveq_numpy.VectorQuantizer.load(tmp_path / "flax")
    np.testing.assert_array_equal(there.encode(z), tokens)
    there.save(tmp_path / "numpy")
    if importable("torch"):
        import torch

        import diveq_torch

        there = diveq_torch.VectorQuantizer.load(tmp_path / "numpy")
        np.testing.assert_array_equal(there.encode(torch.tensor(z)).numpy(), tokens)
        there.save(tmp_path / "last")
    back = VectorQuantizer.load(tmp_path / ("last" if importable("torch") else "numpy"))
    assert back.settings == model.vq.settings
    np.testing.assert_array_equal(back.encode(jnp.asarray(z)), tokens)
    for name, x in model.vq.arrays().items():
        np.testing.assert_array_equal(back.arrays()[name], x)


def test_k_means_begins_the_codebook():
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.standard_normal((12, 2)) + centre for centre in (-9.0, 9.0)]).astype(np.float32)
    vq = VectorQuantizer(2, 2, rngs=nnx.Rngs(0), init="kmeans")
    nnx.jit(VectorQuantizer.start)(vq, jnp.asarray(z))
    np.testing.assert_allclose(vq.codebook, [z[:12].mean(axis=0), z[12:].mean(axis=0)], rtol=1e-5)
    assert bool(vq.started[...])


def test_without_a_codebook():
    vq = VectorQuantizer(2, None, dq.FSQ([5, 5]), rngs=nnx.Rngs(0))
    out = nnx.jit(lambda vq, z: vq(z))(vq, jnp.asarray([[0.1, 0.2]]))
    assert vq.codebook is None
    np.testing.assert_array_equal(out.indices, vq.encode(jnp.asarray([[0.1, 0.2]])))


def test_errors():
    with pytest.raises(TypeError, match=r"VectorQuantizer: rngs must be an nnx.Rngs, got builtins.int"):
        VectorQuantizer(2, 4, rngs=0)


def test_the_backend_imports_no_framework_and_a_missing_one_is_named():
    code = """
        import sys
        import diveq_jax
        assert not {"flax", "equinox"} & set(sys.modules)
        sys.modules["flax"] = None
        try:
            import diveq_jax.flax
        except ImportError as error:
            print(error)
    """
    assert run_python(code).strip() == "diveq_jax.flax needs flax; pip install 'diveq-core[jax,flax]'"
