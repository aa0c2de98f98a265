"""The layer whose gradients are called by hand: it trains, keeps its promises of order, and speaks of what is wrong."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import diveq_core as dq
from diveq_numpy import VectorQuantizer
from layer_cases import DIM, K, plain


def train(vq: VectorQuantizer, steps: int = 60) -> list[float]:
    """Errors of a layer that is trained to give back what it gets, vectors around eight centres."""
    errors, centres = [], 2 * plain()[:K]
    for seed in range(steps):
        z = np.repeat(centres, 8, axis=0) + 0.1 * plain(seed)
        out = vq.forward(z)
        errors.append(float(np.mean((out.z_q - z) ** 2)))
        vq.backward(2 * (out.z_q - z) / z.size)
        vq.step(0.02)
        vq.update()
    return errors


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimator": dq.STE()},
        {"estimator": dq.STE(), "codebook_update": "ema", "ema_decay": 0.9},
        {"codebook_update": "linear"},
        {"estimator": dq.STE(), "stages": 2, "codebook_update": "ema", "ema_decay": 0.9},
    ],
    ids=str,
)
def test_it_trains(options: dict) -> None:
    vq = VectorQuantizer(DIM, K, **{"init": "normal"} | options, rng=np.random.default_rng(0))
    errors = train(vq)
    assert np.mean(errors[-10:]) < 0.7 * np.mean(errors[:3])


def test_a_projection_trains() -> None:
    vq = VectorQuantizer(DIM, None, dq.FSQ([7, 7, 7, 7]), rng=np.random.default_rng(0))
    errors = train(vq, 150)
    assert np.mean(errors[-10:]) < 0.7 * np.mean(errors[:3])


def test_the_codebook_can_be_read_and_set() -> None:
    vq = VectorQuantizer(DIM, K, dq.STE(), codebook_update="ema", rng=np.random.default_rng(0))
    words = np.random.default_rng(1).standard_normal((K, DIM)).astype(np.float32)
    vq.codebook = words
    np.testing.assert_array_equal(vq.codebook, words)
    words[...] = 0
    assert (vq.codebook != 0).all(), "its memory is its own"
    vq.forward(plain())
    assert (vq.codebook != plain()[:1]).any(), "a codebook that was set is not begun anew"
    for wrong, text in (
        (np.ones((K, 5), np.float32), r"expected shape \(8, 6\), got \(8, 5\)"),
        (np.full((K, DIM), np.nan, np.float32), "must be finite"),
    ):
        before = vq.codebook.copy()
        with pytest.raises(ValueError, match=text):
            vq.codebook = wrong
        np.testing.assert_array_equal(vq.codebook, before)
    with pytest.raises(ValueError, match="FSQ has no codebook"):
        VectorQuantizer(3, None, dq.FSQ([5, 5, 5])).codebook = words


@pytest.mark.parametrize(
    "options", [{"codebook_update": "linear"}, {"cosine": True}, {"estimator": dq.FSQ([5, 5]), "codebook_size": None}]
)
def test_the_codebook_is_the_one_that_is_searched(options: dict) -> None:
    given = {"codebook_size": K} | options
    vq = VectorQuantizer(DIM, given.pop("codebook_size"), **given, rng=np.random.default_rng(0))
    train(vq, 3)
    if not vq.settings.has_codebook:
        assert vq.codebook is None
        return
    x = dq.normalize(plain()) if vq.settings.cosine else plain()
    np.testing.assert_array_equal(vq.encode(plain()), dq.nearest(x, vq.codebook))
    np.testing.assert_array_equal(vq.decode(vq.encode(plain())), dq.lookup(vq.encode(plain()), vq.codebook))


def test_gradients_that_are_not_finite_change_nothing() -> None:
    vq = VectorQuantizer(DIM, K, rng=np.random.default_rng(0))
    train(vq, 2)
    before = vq.arrays()
    vq.forward(plain())
    vq.backward(np.full((64, DIM), np.inf, np.float32))
    vq.step(0.1)
    np.testing.assert_array_equal(vq.codebook, before["codewords"])
    errors = train(vq, 5)
    assert np.isfinite(errors).all()


def test_the_pullback_is_that_of_the_codebook_that_was_used() -> None:
    gradients = []
    for between in (False, True):
        vq = VectorQuantizer(DIM, K, init="normal", rng=np.random.default_rng(0))
        vq.forward(plain(), noise=plain(1))
        if between:
            vq.state["codewords"][...] = 7.0
        gradients.append((vq.backward(plain(2)), vq.gradients["codewords"]))
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_copies() -> None:
    vq = VectorQuantizer(DIM, K, rng=np.random.default_rng(0))
    train(vq, 2)
    for other in (copy.deepcopy(vq), pickle.loads(pickle.dumps(vq))):
        assert train(other, 3) == train(copy.deepcopy(vq), 3)


def test_statistics_are_those_of_the_state_that_is_held() -> None:
    vq = VectorQuantizer(DIM, K, dq.STE(), codebook_update="ema", rng=np.random.default_rng(0))
    train(vq, 2)
    before = vq.arrays()
    vq.forward(plain() + 100)
    vq.load_arrays(before)
    vq.update()
    for name, x in vq.arrays().items():
        np.testing.assert_array_equal(x, before[name])


def test_a_sum_that_overflows_is_no_vector() -> None:
    vq = VectorQuantizer(2, 1, dq.STE(), codebook_update="ema", init="normal", replace_every=0)
    before = vq.arrays()
    vq.forward(np.full((8, 2), 2e38, np.float32))
    vq.update()
    for name in ("codewords", "averages", "counts"):
        np.testing.assert_array_equal(vq.arrays()[name], before[name])


def test_wrong_order_says_what_is_wrong() -> None:
    vq = VectorQuantizer(DIM, K)
    with pytest.raises(RuntimeError, match="backward: expected a forward in training before"):
        vq.backward(plain())
    with pytest.raises(RuntimeError, match="step: expected a backward before"):
        vq.step(0.1)
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'codebok_dim'"):
        VectorQuantizer(DIM, K, codebok_dim=3)
    assert repr(VectorQuantizer(DIM, K, heads=2)) == "VectorQuantizer(dim=6, codebook_size=8, heads=2)"


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8"])
def test_arrays_that_were_loaded_may_be_written_to(dtype: str) -> None:
    vq = VectorQuantizer(DIM, K, dq.STE(), codebook_update="ema", init="normal", rng=np.random.default_rng(0))
    before = vq.arrays()
    given = {name: x.astype(dtype) if x.dtype.kind == "f" else x.copy() for name, x in before.items()}
    vq.load_arrays(given)
    for x in given.values():
        x[...] = 1
    for name, x in vq.arrays().items():
        np.testing.assert_array_equal(x, before[name])
