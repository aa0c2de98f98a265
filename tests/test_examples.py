"""The examples of docs/examples as a reader runs them, with few steps: that they learn, and that frameworks agree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diveq_numpy
from processes import importable

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
ALL = ("matplotlib", "safetensors")


def needs(*packages: str) -> Any:
    missing = [name for name in (*ALL, *packages) if not importable(name)]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def example(name: str, *arguments: Any, **environment: str) -> str:
    """What a script prints."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def figures(printed: str, name: str) -> list[float]:
    """The numbers beside a name in the table."""
    (row,) = (row for row in printed.splitlines() if row.startswith(name))
    return [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", row.removeprefix(name).split("  ", 1)[1])]


def assert_picture(path: Path) -> None:
    from matplotlib.image import imread

    picture = imread(path)
    assert min(picture.shape[:2]) > 300
    assert picture[..., :3].std() > 0.05


@needs("torch", "flax", "optax", "mlxtend")
def test_torch_and_flax_learn_alike_and_share_files(tmp_path: Path):
    # One test, for workers of xdist would each train the models of a fixture.
    arguments = ("--steps", 40, "--float64", "--out", tmp_path)
    of_torch, of_flax = example("vqvae_torch.py", *arguments), example("vqvae_flax.py", *arguments)

    curves = [np.load(tmp_path / f"vqvae_{name}.npz")["curve"] for name in ("torch", "flax")]
    assert [(x.dtype, x.shape) for x in curves] == [(np.float64, (40,))] * 2
    # Sums of a step are rounded in another order; steps of Adam make little more of that.
    np.testing.assert_allclose(*curves, rtol=1e-11)
    first, last = figures(of_torch, "loss, first and last")
    assert last < 0.5 * first
    assert figures(of_flax, "loss, first and last") == [first, last]
    assert figures(of_flax, "curves apart")[0] < 1e-11
    assert_picture(tmp_path / "vqvae.png")
    for name in ("torch", "flax"):
        assert_decodes_alike(tmp_path / f"vqvae_{name}.safetensors")

    printed = example(
        "prior_torch.py", "--steps", 20, "--samples", 1, "--model", tmp_path / "vqvae_flax", "--out", tmp_path
    )
    first, last = figures(printed, "loss, first and last")
    unseen, at_random = figures(printed, "loss, held out")
    assert last < 0.7 * first
    assert unseen < 0.7 * at_random
    assert_picture(tmp_path / "prior.png")


def assert_decodes_alike(path: Path) -> None:
    """The quantizer of a file has the same tokens and vectors in PyTorch and in NumPy."""
    import torch

    import diveq_torch

    there, here = diveq_torch.VectorQuantizer.load(path), diveq_numpy.VectorQuantizer.load(path)
    assert here.codebook.dtype == np.float64
    z = here.codebook.mean(axis=0)[:, None, None] + np.random.default_rng(0).standard_normal((4, 16, 7, 7))
    z = z if here.settings.channel_axis == 1 else np.moveaxis(z, 1, -1)
    tokens = here.encode(z)
    assert len(np.unique(tokens)) > 10
    assert (there.encode(torch.from_numpy(z)).numpy() == tokens).all()
    assert (there.decode(torch.from_numpy(tokens)).detach().numpy() == here.decode(tokens)).all()


@needs("torch", "skimage", "sklearn")
def test_a_vqgan_learns(tmp_path: Path):
    printed = example("vqgan_torch.py", "--steps", 30, "--out", tmp_path)
    first, last = figures(printed, "loss, first and last")
    assert last < 0.7 * first
    without, beside = figures(printed, "PSNR")
    assert min(without, beside) > 8
    assert_picture(tmp_path / "vqgan.png")


@pytest.fixture
def voices(tmp_path: Path) -> Path:
    """Wav files of harmonic sounds with gliding pitch, where the speech is not installed."""
    folder = tmp_path / "voices"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        pitch = np.cumsum(rng.uniform(90, 250) * (1 + 0.2 * np.sin(np.arange(8192) / 1500 + i))) / 8000
        sound = sum(np.sin(2 * np.pi * k * pitch) / k for k in range(1, 9)) * np.sin(np.arange(8192) / 900) ** 2
        with wave.open(str(folder / f"{i:02}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 8192, "NONE", None))
            file.writeframes((6000 * sound).astype("<i2").tobytes())
    return folder


@needs("jax", "equinox", "optax")
def test_more_stages_of_a_codec_are_nearer(voices: Path, tmp_path: Path):
    arguments = ("--steps", 30, "--stages", 2, "--data", voices, "--out", tmp_path)
    # Its few steps are not worth an optimized program.
    printed = example("audio_codec.py", *arguments, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    first, last = figures(printed, "loss, first and last")
    assert last < 0.8 * first
    ratios = [figures(printed, f"{i} kbit/s")[0] for i in (1, 2)]
    assert ratios[-1] > ratios[0]
    assert_picture(tmp_path / "audio_codec.png")
    lengths = set()
    for name in ("original", "1_stage", "2_stages"):
        with wave.open(str(tmp_path / f"{name}.wav")) as file:
            lengths.add((file.getnframes(), file.getframerate()))
    assert lengths == {(8192, 8000)}


@needs("jax", "equinox", "optax")
def test_a_codec_without_speech_says_where_it_comes_from(tmp_path: Path):
    assert "apt-get install asterisk-core-sounds-en-wav" in example(
        "audio_codec.py", "--data", tmp_path, "--out", tmp_path
    )


def test_a_missing_package_is_named_with_its_extra():
    code = "import importlib.util as u; u.find_spec = lambda name: None; import digits; digits.load()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=EXAMPLES)
    assert done.returncode == 1
    assert "needs mlxtend; pip install 'diveq-core[examples]'" in done.stderr


@needs("torch", "flax", "optax", "mlxtend")
@pytest.mark.slow
def test_full_size(tmp_path: Path):
    """The figures of docs/examples.md, within the spread of machines."""
    printed = [example(f"vqvae_{name}.py", "--out", tmp_path) for name in ("torch", "flax")]
    for each in printed:
        assert figures(each, "PSNR")[0] > 23.5
        assert figures(each, "codewords used")[0] > 110
    drawn = example("prior_torch.py", "--model", tmp_path / "vqvae_torch", "--out", tmp_path)
    assert figures(drawn, "read as what was asked for")[0] > 80
