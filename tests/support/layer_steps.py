"""Settings of layers to be tried in every framework, and the step that NumPy makes of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import diveq_core as dq
from diveq_numpy import VectorQuantizer

DIM, COUNT = 6, 8
_STE = dq.STE()

CASES: dict[str, dict[str, Any]] = {
    "gradient": {},
    "moving averages": {"estimator": _STE, "codebook_update": "ema"},
    "linear": {"codebook_update": "linear", "linear_factors": "both"},
    "heads": {"estimator": _STE, "heads": 2, "codebook_dim": 4, "cosine": True},
    "stages": {"stages": 3, "codebook_weight": 0.5, "commitment_weight": 0.3},
    "images": {"estimator": dq.Rotation(), "channel_axis": 1},
}


class Step(NamedTuple):
    """What a step in training gives."""

    z_q: Any
    indices: Any
    loss: Any
    g_z: Any
    gradients: dict[str, Any]
    arrays: dict[str, Any]
    """The state after it."""


class Inputs(NamedTuple):
    z: np.ndarray
    mask: np.ndarray
    noise: np.ndarray
    g: np.ndarray


def inputs(options: dict[str, Any]) -> Inputs:
    rng = np.random.default_rng(0)
    shape = (4, DIM, 5) if options.get("channel_axis") == 1 else (4, 5, DIM)
    stages = (options["stages"],) if "stages" in options else ()
    z, g = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    noise = rng.standard_normal((*stages, 4, 5, DIM), dtype=np.float32)
    return Inputs(z, rng.random((4, 5)) < 0.7, noise, g)


def numpy_step(
    settings: dq.layers.Settings, arrays: dict[str, Any], z: Any, mask: Any = None, noise: Any = None, g: Any = None
) -> Step:
    """Forward, backward of ``sum(g z_q) + loss``, and update, without an optimizer."""
    given = settings.given()
    vq = VectorQuantizer(given.pop("dim"), given.pop("codebook_size"), **given)
    vq.load_arrays(arrays)
    out = vq.forward(z, mask, noise=noise)
    g_z = vq.backward(np.zeros_like(z) if g is None else g)
    vq.update()
    return Step(out.z_q, out.indices, out.loss, g_z, vq.gradients, vq.arrays())


def assert_same_step(actual: Step, expected: Step) -> None:
    """Equal tokens, and numbers equal to the rounding of float32 in sums of some hundred terms of order one."""
    np.testing.assert_array_equal(actual.indices, expected.indices)
    for name in ("z_q", "loss", "g_z"):
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=1e-4, atol=1e-5, err_msg=name)
    for name in ("gradients", "arrays"):
        assert_same_arrays(getattr(actual, name), getattr(expected, name))


def assert_same_arrays(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(actual) == set(expected)
    for name, x in expected.items():
        np.testing.assert_allclose(actual[name], x, rtol=1e-4, atol=2e-5, err_msg=name)
