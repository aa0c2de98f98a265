"""JAX on several devices: arrays over an explicit mesh, and `jax.shard_map` with its checks, as gradients take it."""

from __future__ import annotations

import os

import pytest

from capabilities import PAGE, known_cells
from processes import run_python
from transformations import ON_DEVICES

pytest.importorskip("jax")


@pytest.fixture
def _five_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    # What makes compiled code faster takes longer than it saves here.
    flags = "--xla_force_host_platform_device_count=5 --xla_backend_optimization_level=0"
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {flags}")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


@pytest.mark.usefixtures("_five_devices")
@pytest.mark.parametrize("transformation", ON_DEVICES)
def test_gradients_on_five_devices(transformation: str):
    code = """
        import sys
        import jax
        from transformations import ESTIMATORS, transformed

        assert len(jax.devices()) == 5
        for name in ESTIMATORS:
            print(name, transformed(name, sys.argv[1]), sep="|")
    """
    written = {name: cells[transformation] for name, cells in known_cells(PAGE.read_text(encoding="utf-8"), 1).items()}
    assert dict(line.split("|") for line in run_python(code, transformation).splitlines()) == written


@pytest.mark.usefixtures("_five_devices")
def test_the_other_calls_on_an_explicit_mesh():
    code = """
        import dataclasses
        import jax
        import numpy as np
        import diveq_core as dq
        from capabilities import cell
        from capability_rows import ESTIMATORS, ROWS, listed
        from libraries import library_named
        from jax.sharding import PartitionSpec

        library = library_named("jax")

        def placed(x):
            rows = np.ndim(x) > 0 and len(x) == 5
            return jax.device_put(jax.numpy.asarray(x), PartitionSpec("rows") if rows else PartitionSpec())

        # What draws from all vectors, or cuts them in pieces, is given a mesh that JAX divides by itself.
        drawn = {"project, decode_curve", "curve_init", "kmeans", "kmeans_plus_plus", "replace_unused"}
        # The estimators have a test of their own.
        others = [name for name in ROWS if name not in drawn and name not in ESTIMATORS]
        with jax.set_mesh(jax.make_mesh((5,), ("rows",))):
            for name in others:
                cell(name, dataclasses.replace(library, to=placed))
            for name in sorted(drawn):
                row = ROWS[name]
                inputs = row.draw(np.random.default_rng(7))
                here = [placed(x) if i else jax.device_put(x, PartitionSpec()) for i, x in enumerate(inputs)]
                if len(inputs[0]) % 5 == 0:
                    here[0] = jax.device_put(inputs[0], PartitionSpec("rows"))
                f = jax.sharding.auto_axes(row.forward, out_sharding=PartitionSpec())
                for actual, expected in zip(listed(f(*here)), listed(row.forward(*inputs)), strict=True):
                    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
            many = np.random.default_rng(0).standard_normal((5, 3000, 3), dtype=np.float32)
            words = many[0, :7]
            np.testing.assert_array_equal(dq.nearest(placed(many), placed(words)), dq.nearest(many, words))
            by_vmap = jax.jit(jax.vmap(lambda z: dq.nearest(z, placed(words))))(placed(many))
            np.testing.assert_array_equal(by_vmap, dq.nearest(many, words))
            # Noise is drawn where the vectors lie.
            for estimator in (dq.DiVeQ(), dq.SFDiVeQ()):
                draw = jax.jit(lambda z, c, e=estimator: dq.quantize(z, c, e, rng=jax.random.key(0)).z_q)
                found = draw(placed(many[:, 0]), placed(words))
                assert found.sharding.spec[0] == "rows"
                whole = jax.device_put(many[:, 0], PartitionSpec())
                np.testing.assert_allclose(found, draw(whole, placed(words)), rtol=1e-5, atol=1e-5)
            tokens = np.arange(5 * 220_000).reshape(5, -1) % 7
            np.testing.assert_array_equal(dq.usage(placed(tokens), 7), dq.usage(tokens, 7))
            # So is the number of stages of each example.
            settings = dq.layers.Settings(3, 7, stages=3, quantizer_dropout=True, init="normal", replace_every=0)
            state = dq.layers.init(settings, placed(words), rng=jax.random.key(0))
            step = jax.jit(lambda z: dq.layers.forward(settings, state, z, train=True, rng=jax.random.key(1)))
            for z in (many, many[:, 0]):
                found, whole = (step(x).indices for x in (placed(z), jax.device_put(z, PartitionSpec())))
                assert found.sharding.spec[0] == "rows"
                np.testing.assert_array_equal(found == -1, whole == -1)
                assert len(np.unique((np.asarray(found) >= 0).sum(axis=-1))) > 1
        print(len(others))
    """
    assert int(run_python(code)) > 12


@pytest.mark.usefixtures("_five_devices")
def test_a_layer_on_an_explicit_mesh():
    code = """
        import jax
        import numpy as np
        import diveq_core as dq
        from diveq_jax import layers
        from jax.sharding import PartitionSpec

        settings = dq.layers.Settings(3, 4, dq.STE(), codebook_update="ema", init="kmeans", replace_every=1)
        z = np.random.default_rng(0).standard_normal((55, 3), dtype=np.float32)
        first = dq.layers.init(settings, z, rng=np.random.default_rng(0))

        @jax.jit
        def step(state, z, key):
            def loss(z):
                out, after = layers.trained(settings, state, z, None, None, key, None)
                return (out.z_q**2).sum() + out.losses.total, (out.indices, after)

            return jax.grad(loss, has_aux=True)(z)

        def steps(z, place):
            state, found = jax.tree.map(place, first), []
            for number in range(2):
                # That none will choose.
                state |= {"codewords": state["codewords"].at[3].add(1000.0 * number)}
                g_z, (indices, state) = step(state, z, place(jax.random.key(number)))
                found += [g_z, indices, *state.values()]
            return found

        expected = steps(z, jax.numpy.asarray)
        with jax.set_mesh(jax.make_mesh((5,), ("rows",))):
            actual = steps(jax.device_put(z, PartitionSpec("rows")), lambda x: jax.device_put(x, PartitionSpec()))
        assert actual[0].sharding.spec[0] == "rows"
        for ours, theirs in zip(actual, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        print(expected[-1].sum(), abs(expected[-5][3]).max() < 10)
    """
    assert run_python(code).split() == ["0.0", "True"]
