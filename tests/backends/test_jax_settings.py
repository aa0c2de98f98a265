"""JAX under its settings: every public call gives NumPy's numbers, forward and gradients, and raises nothing.

The table of capabilities is tried under the settings that raise and change no number, so those are not tried again.
"""

from __future__ import annotations

import numpy as np
import pytest

import diveq_core as dq
from capabilities import cell
from capability_rows import ESTIMATORS, ROWS
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
    [
        "disable_jit",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("enable_x64", "checking_leaks")),
    ],
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
