"""A layer's file: the same in every framework, whole or not there, and refused if it is another."""

from __future__ import annotations

import numpy as np
import pytest

import diveq_core as dq
from diveq_core.layers.file import from_text, to_text
from diveq_numpy import VectorQuantizer
from layer_cases import DIM, KINDS, K, plain, settings_of
from libraries import library_named

pytest.importorskip("safetensors")

ESTIMATORS = [
    dq.STE(),
    dq.NSVQ(),
    dq.DiVeQ(0.1),
    dq.DiVeQDetach(),
    dq.Rotation(),
    dq.SFDiVeQ(0.1),
    dq.SFDiVeQDetach(),
    dq.GumbelST(0.3),
    *(dq.Radial(r) for r in (dq.Power(1.5), dq.PseudoHuber(0.2), dq.PNorm(3.0), dq.Cosine())),
    dq.Radial(dq.Mahalanobis(np.diag([1.0, 1 / 3, 2.0, 3.0, 4.0, 5.0]))),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_estimators_are_read_as_they_were_written(estimator: dq.Estimator) -> None:
    settings = dq.layers.Settings(DIM, K, estimator)
    assert from_text(to_text(settings)) == settings


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_read_as_they_were_written(kind: str) -> None:
    assert from_text(to_text(settings_of(kind))) == settings_of(kind)


def trained(settings: dq.layers.Settings) -> VectorQuantizer:
    given = settings.given()
    vq = VectorQuantizer(given.pop("dim"), given.pop("codebook_size"), **given, rng=np.random.default_rng(0))
    for seed in range(3):
        z = np.random.default_rng(seed).standard_normal((4, DIM, DIM)).astype(np.float32)
        vq.backward(vq.forward(z).z_q)
        vq.step(0.1)
        vq.update()
    return vq


def test_a_file_of_channels_last_is_loaded_for_channels_first(tmp_path) -> None:
    vq, path = trained(settings_of("plain")), tmp_path / "layer.safetensors"
    vq.save(path)
    first = VectorQuantizer.load(path, channel_axis=1)
    assert first.settings.channel_axis == 1
    z = np.random.default_rng(9).standard_normal((3, 4, 5, DIM)).astype(np.float32)
    np.testing.assert_array_equal(first.encode(np.moveaxis(z, -1, 1)), vq.encode(z))
    np.testing.assert_array_equal(first.decode(vq.encode(z)), np.moveaxis(vq.decode(vq.encode(z)), -1, 1))
    with pytest.raises(ValueError, match="codewords must have shape"):
        VectorQuantizer.load(path, codebook_size=K + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_the_layer(kind: str, tmp_path) -> None:
    pytest.importorskip("torch")
    import diveq_torch

    vq, path = trained(settings_of(kind)), tmp_path / "layer.safetensors"
    vq.save(path)
    z = np.random.default_rng(9).standard_normal((30, DIM, DIM)).astype(np.float32)
    torch_library = library_named("torch")
    other = diveq_torch.VectorQuantizer.load(path).eval()
    for ours, theirs in ((vq, VectorQuantizer.load(path)), (vq, other)):
        assert theirs.settings == vq.settings
        for name, x in ours.arrays().items():
            np.testing.assert_array_equal(theirs.arrays()[name], x)
            assert theirs.arrays()[name].dtype == x.dtype
    tokens, found = vq.encode(z), other.encode(torch_library.to(z))
    tokens, found = (tokens[0], found[0]) if isinstance(tokens, tuple) else (tokens, found)
    np.testing.assert_array_equal(torch_library.back(found), tokens)
    back = tmp_path / "back.safetensors"
    other.save(back)
    assert back.read_bytes() == path.read_bytes()


def test_a_file_is_whole_or_as_it_was(tmp_path) -> None:
    path = tmp_path / "layer.safetensors"
    trained(settings_of("plain")).save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"save: a file holds numbers, not functions"):
        VectorQuantizer(DIM, K, dq.Radial(dq.CustomRadius(lambda q, z: q))).save(path)
    assert path.read_bytes() == before
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


def test_a_file_of_something_else_is_refused(tmp_path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "other"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"load: .*other must be a whole safetensors file of a layer"):
        VectorQuantizer.load(path)
    save_file({"codewords": plain()}, path)
    with pytest.raises(ValueError, match=r"load: .*other must be a file that a layer's save wrote"):
        VectorQuantizer.load(path)
    save_file(
        {"codewords": plain()},
        path,
        {"diveq_core.layer.1": to_text(settings_of("plain"))},
    )
    with pytest.raises(ValueError, match=r"load: .*other must hold the arrays"):
        VectorQuantizer.load(path)
    with pytest.raises(FileNotFoundError):
        VectorQuantizer.load(tmp_path / "missing")


def test_a_file_of_float64_stays_so(tmp_path) -> None:
    pytest.importorskip("torch")
    import diveq_torch

    vq, path = VectorQuantizer(DIM, K, dtype=np.float64), tmp_path / "layer"
    vq.save(path)
    for kind in (VectorQuantizer, diveq_torch.VectorQuantizer):
        found = kind.load(path).arrays()["codewords"]
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, vq.arrays()["codewords"])


def test_a_damaged_file_is_refused(tmp_path) -> None:
    from safetensors.numpy import save_file

    vq, path = VectorQuantizer(DIM, K), tmp_path / "layer"
    text = to_text(vq.settings)
    for wrong in ("{", "[]", "3", text.replace("dim", "dun"), text.replace("6", "-6")):
        save_file(vq.arrays(), path, {"diveq_core.layer.1": wrong})
        with pytest.raises(ValueError, match=r"load: .* must hold the settings that save wrote"):
            VectorQuantizer.load(path)
    words = vq.arrays()["codewords"]
    for wrong in (words * np.nan, words * np.inf, words.astype(np.int64)):
        save_file(vq.arrays() | {"codewords": wrong}, path, {"diveq_core.layer.1": text})
        with pytest.raises(ValueError, match=r"load: codewords of .* must be finite numbers of kind 'f', got"):
            VectorQuantizer.load(path)


def test_arrays_of_other_settings_are_refused() -> None:
    vq = VectorQuantizer(DIM, K)
    before = vq.arrays()
    with pytest.raises(ValueError, match="load_arrays: expected codewords, started, steps, usage"):
        vq.load_arrays({"codewords": plain()})
    with pytest.raises(ValueError, match=r"load_arrays: codewords must have shape \(8, 6\), got \(9, 6\)"):
        vq.load_arrays(before | {"codewords": np.zeros((9, 6), np.float32)})
    for name, x in vq.arrays().items():
        np.testing.assert_array_equal(x, before[name])
