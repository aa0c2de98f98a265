"""JAX as training loops use it: parameters of layers, schedules as traced numbers, export, saved residuals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import diveq_core as dq
from capabilities import cell
from capability_rows import ROWS
from libraries import library_named

jax = pytest.importorskip("jax")
pytest.importorskip("jax.export")
jnp = jax.numpy


@pytest.fixture(autouse=True)
def _strict_promotion():
    library_named("jax")


class Parameter:
    """What stands for an array by the protocol alone, with nothing of an array besides."""

    def __init__(self, value):
        self.value = value

    def __jax_array__(self):
        return self.value


# Their automatic differentiation takes arrays alone; what is given inside of it may be a parameter.
EXPLICIT = [name for name in ROWS if name not in ("curve_init", "kmeans", "kmeans_plus_plus")]


def test_parameters_are_arrays_in_every_verb():
    library = library_named("jax")
    wrong = {}
    for name in EXPLICIT:
        try:
            cell(name, dataclasses.replace(library, to=lambda x: Parameter(jnp.asarray(x)), differentiates=False))
        except Exception as error:  # all of them in one report
            wrong[name] = f"{type(error).__name__}: {error}"
    assert not wrong


def test_a_parameter_gets_gradients():
    z, codebook = (jnp.asarray(np.random.default_rng(0).standard_normal((n, 3)), "float32") for n in (6, 4))
    f = lambda z, c: (dq.quantize(z, c, dq.DiVeQDetach()).z_q ** 2).sum()  # noqa: E731
    expected = jax.jit(jax.grad(f, (0, 1)))(z, codebook)
    actual = jax.jit(jax.grad(lambda z, c: f(Parameter(z), Parameter(c)), (0, 1)))(z, codebook)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_flax_parameters():
    nnx = pytest.importorskip("flax.nnx")
    z, words = (jnp.asarray(np.random.default_rng(0).standard_normal((n, 3)), "float32") for n in (6, 4))
    codebook = nnx.Param(words)
    np.testing.assert_array_equal(dq.nearest(z, codebook), dq.nearest(z, words))
    state, moved = dq.ema_update(dq.ema_init(codebook), z, codebook, dq.nearest(z, codebook))
    assert isinstance(moved, jax.Array)
    assert isinstance(state.means, jax.Array)
    gradient = nnx.grad(lambda c: (dq.quantize(z, c, dq.DiVeQDetach()).z_q ** 2).sum())(codebook)
    expected = jax.grad(lambda c: (dq.quantize(z, c, dq.DiVeQDetach()).z_q ** 2).sum())(words)
    np.testing.assert_allclose(jnp.asarray(gradient), expected, rtol=1e-6)


def upkeep(z, codebook, noise, weight, decay, threshold, jitter):
    indices = dq.nearest(z, codebook)
    state, moved = dq.ema_update(dq.ema_init(codebook, weight=weight), z, codebook, indices, decay=decay)
    return moved, dq.replace_unused(
        moved, state.counts, z=z, noise=noise, threshold=threshold, jitter=jitter, state=state
    )


@pytest.mark.parametrize("jitter", [0.0, 0.02])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_schedule_may_be_traced(jitter: float, dtype: str):
    rng = np.random.default_rng(0)
    z, codebook = (jnp.asarray(rng.standard_normal((n, 3)), dtype) for n in (20, 6))
    noise = jnp.asarray(rng.standard_normal((6, 5)), "float32")
    numbers = (2.0, 0.75, 0.5, jitter)
    expected = upkeep(z, codebook, noise, *numbers)
    arrays = [jnp.asarray(x, dtype) for x in numbers]
    for found in (upkeep(z, codebook, noise, *arrays), jax.jit(upkeep)(z, codebook, noise, *arrays)):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a.astype("float32"), b.astype("float32"), rtol=1e-2 if jitter else 1e-6)


def test_the_range_of_an_array_is_checked_where_it_can_be_read():
    codebook = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"^ema_init: weight must lie in \[0, inf\), got -1"):
        dq.ema_init(codebook, weight=jnp.asarray(-1.0))
    with pytest.raises(ValueError, match=r"^ema_init: weight must have the shape of a number, \(\), got \(2,\)"):
        dq.ema_init(codebook, weight=jnp.ones(2))
    with pytest.raises(TypeError, match=r"^ema_init: weight must have a real floating dtype"):
        dq.ema_init(codebook, weight=jnp.asarray(1))
    with pytest.raises(TypeError, match=r"^ema_init: expected all arrays of one library"):
        dq.ema_init(codebook, weight=np.ones(()))


def test_a_schedule_of_sigma_scales_the_noise():
    rng = np.random.default_rng(0)
    z, codebook, noise = (jnp.asarray(rng.standard_normal((n, 3)), "float32") for n in (6, 4, 6))

    @jax.jit
    def gradients(z, codebook, sigma):
        f = lambda z, c: (dq.quantize(z, c, dq.DiVeQ(sigma=1.0), noise=sigma * noise).z_q ** 2).sum()  # noqa: E731
        return jax.grad(f, (0, 1))(z, codebook)

    for sigma in (0.03, 0.3):
        f = lambda z, c, s=sigma: (dq.quantize(z, c, dq.DiVeQ(s), noise=noise).z_q ** 2).sum()  # noqa: E731
        for a, b in zip(gradients(z, codebook, sigma), jax.grad(f, (0, 1))(z, codebook), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "verb",
    [
        lambda z, c: dq.nearest(z, c),
        lambda z, c: dq.quantize(z, c, dq.Residual(dq.Rotation(), 2)),
        lambda z, c: jax.grad(lambda z, c: (dq.quantize(z, c, dq.DiVeQDetach()).z_q ** 2).sum(), (0, 1))(z, c),
        lambda z, c: dq.usage(dq.nearest(z, c), 7),
        lambda z, c: dq.quantize(z, None, dq.FSQ([5, 4, 3])),
    ],
    ids=["nearest", "Residual", "gradients", "usage", "fsq"],
)
def test_export_with_any_number_of_vectors(verb):
    rng = np.random.default_rng(0)
    codebook = jnp.asarray(rng.standard_normal((7, 3)), "float32")
    (batch,) = jax.export.symbolic_shape("batch")
    exported = jax.export.export(jax.jit(verb))(
        jax.ShapeDtypeStruct((batch, 2, 3), "float32"), jax.ShapeDtypeStruct((7, 3), "float32")
    )
    for count in (1, 32, 70):
        z = jnp.asarray(rng.standard_normal((count, 2, 3)), "float32")
        found, expected = exported.call(z, codebook), verb(z, codebook)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", [dq.STE(), dq.DiVeQDetach(), dq.Residual(dq.DiVeQDetach(), 2)], ids=str)
def test_second_order_inside_a_scan(estimator):
    """Where JAX forgets the rule of a `jax.custom_jvp`."""
    rng = np.random.default_rng(0)
    z, codebook = (jnp.asarray(rng.standard_normal(s), "float32") for s in ((6, 4), (2, 5, 4)))
    codebook = codebook if isinstance(estimator, dq.Residual) else codebook[0]

    def loss(z, codebook):
        return jnp.sin(dq.quantize(z, codebook, estimator).z_q).sum()

    def scanned(z, codebook):
        return jax.lax.scan(lambda total, z: (total + loss(z, codebook), None), 0.0, z[None])[0]

    expected, found = (jax.jit(jax.hessian(f, (0, 1)))(z, codebook) for f in (loss, scanned))
    assert np.abs(expected[0][0]).max() > 0.1
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)
