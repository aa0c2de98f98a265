"""JAX under its settings: every public call gives NumPy's numbers, forward and gradients, and raises nothing.

The table of capabilities is tried under the settings that raise and change no number, so those are not tried again.
"""

from __future__ import annotations

import numpy as np
import pytest

import diveq_core as dq
from capabilities import cell
from capability_rows import ESTIMATORS, ROWS
from layer_cases import LAYERS, Case
from libraries import jax_checked, library_named

jax = pytest.importorskip("jax")
jnp = jax.numpy


SETTINGS = {
    "checked": jax_checked,
    "disable_jit": jax.disable_jit,
    "enable_x64": lambda: jax.enable_x64(True),
    "checking_leaks": jax.checking_leaks,
}
# Every call compiles everything anew.
LEAKS = ["DiVeQ()", "Rotation()", "Residual(DiVeQ(), 2)", "FSQ", "ema_update", "project, decode_curve"]


@pytest.fixture(autouse=True)
def _strict_promotion():
    library_named("jax")


@pytest.mark.parametrize(
    "setting",
    # The table of transformations has the first of them for each estimator.
    [pytest.param(name, marks=pytest.mark.slow) for name in ("disable_jit", "enable_x64", "checking_leaks")],
)
def test_every_call(setting: str):
    library = library_named("jax")
    wrong = {}
    with SETTINGS[setting]():
        for name in LEAKS if setting == "checking_leaks" else ROWS:
            try:
                cell(name, library)
            except Exception as error:  # all of them in one report
                wrong[name] = f"{type(error).__name__}: {error}"
    assert not wrong


@pytest.mark.parametrize("setting", ["checked", "disable_jit"])
def test_forward_mode(setting: str):
    dz, dcodebook = (np.random.default_rng(3).standard_normal(shape, dtype=np.float32) for shape in ((5, 4), (6, 4)))
    library = library_named("jax")
    for name in ("DiVeQ()", "Radial(PseudoHuber())", "Rotation()", "SFDiVeQ()"):
        row = ESTIMATORS[name]
        inputs = row.draw(np.random.default_rng(7))
        here = [jnp.asarray(x) for x in inputs]
        with SETTINGS[setting]():
            tangent = jax.jvp(
                lambda z, c, row=row, here=here: row.forward(z, c, *here[2:])[0],
                tuple(here[:2]),
                (jnp.asarray(dz), jnp.asarray(dcodebook)),
            )[1]
        expected = row.jvp(*inputs, dz, dcodebook)[-1]
        np.testing.assert_allclose(library.back(tangent), expected, rtol=row.rtol, atol=row.atol)


@pytest.mark.parametrize("kind", ["averages", "linear", "dropout in heads", "curve", "Gumbel", "FSQ in stages", "skip"])
def test_a_layer_under_settings_that_raise(kind: str):
    case = Case.of(kind, np.float32)
    ours, settings = case.to(library_named("jax")), case.settings

    def trained(case: Case):
        options = {"mask": case.mask, "noise": case.noise, "kept_stages": case.kept_stages}
        out, pullback = LAYERS.forward_vjp(settings, case.state, case.z, **options)
        state = LAYERS.update(settings, case.state, out.statistics, noise=case.update_noise)
        return out.z_q, pullback(case.g)[0], state

    with jax_checked():
        # A sample of the vectors marks those that are left out by NaN, at which JAX stops outside of jit.
        made = jax.jit(lambda: trained(ours))()
        if settings.from_data:
            LAYERS.start(settings, ours.state, ours.z, mask=ours.mask, rng=jax.random.key(0))
        LAYERS.decode(settings, ours.state, LAYERS.encode(settings, ours.state, ours.z))
    expected = trained(case)
    assert set(made[2]) == set(expected[2])
    for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_masked_losses_make_no_nan():
    z, codebook = jnp.ones((3, 2)), jnp.arange(8.0).reshape(4, 2)
    tokens, mask = jnp.array([-1, 2, -1]), jnp.array([False, True, False])
    with jax_checked():
        for loss in (dq.codebook_loss, dq.commitment_loss):
            assert float(loss(z, codebook, tokens, mask=mask)) == 12.5
            g_z, g_codebook = jax.grad(loss, (0, 1))(z, codebook, tokens, mask=mask)
            assert (g_z[0] == 0).all()
            assert (g_codebook[:2] == 0).all()
        for loss in (dq.codebook_loss_vjp, dq.commitment_loss_vjp):
            value, pullback = loss(z, codebook, tokens, mask=mask)
            assert (pullback(value)[0] == 0).all()


@pytest.mark.parametrize("rows", [0, 1, 2047, 2049])
def test_disable_jit_with_few_and_many_vectors(rows: int):
    z, codebook = (np.random.default_rng(0).standard_normal((n, 3)).astype(np.float32) for n in (rows, 7))
    with jax.disable_jit():
        np.testing.assert_array_equal(dq.nearest(jnp.asarray(z), jnp.asarray(codebook)), dq.nearest(z, codebook))


def test_nan_of_the_data_is_still_told():
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        dq.perplexity(jnp.zeros(3))
    assert jnp.isnan(dq.perplexity(jnp.zeros(3)))
    assert jnp.isnan(dq.decode(jnp.array([-1]), None, dq.FSQ([3, 3]))).all()
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        dq.decode(jnp.array([-1]), None, dq.FSQ([3, 3]))
