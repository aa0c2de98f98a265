"""The command itself at a small size: table, picture, data, messages, and the same numbers in every library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from diveq_core.commands.cli import app
from diveq_core.commands.compare.images import load_images
from diveq_core.commands.compare.libraries import load_library
from diveq_core.commands.compare.patches import Patches
from diveq_core.commands.compare.recipes import DEFAULT, RECIPES
from diveq_core.commands.compare.replacement import noise_shape, replace
from diveq_core.commands.compare.report import mean_and_spread
from diveq_core.commands.compare.scalar import chosen_levels
from diveq_core.commands.compare.settings import CompareError, Settings
from diveq_core.commands.compare.training import Experiment, training_step
from diveq_core.commands.terminal import check_output
from diveq_core.layers.adam import Moments, no_moments
from libraries import library_named

SMALL = ["--steps", "6", "--warmup", "3", "--batch", "16", "--codewords", "8", "--dim", "3", "--seeds", "2"]


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """Smooth colours with some noise, 48 x 40."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:48, 0:40] / 48
    image = np.stack([rows, columns, rows * columns], axis=2) + 0.1 * rng.random((48, 40, 3))
    path = tmp_path_factory.mktemp("data") / "photograph.npy"
    np.save(path, np.clip(image, 0, 1))
    return str(path)


def invoke(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def figures(path):
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


def test_a_stack_of_grey_images(tmp_path):
    from sklearn.datasets import load_digits

    np.save(tmp_path / "digits.npy", load_digits().images)
    out, data = tmp_path / "a.png", tmp_path / "a.json"
    result = invoke("--data", tmp_path / "digits.npy", *SMALL, "--estimators", "ste", "--out", out, "--json", data)
    assert result.exit_code == 0, result.output
    assert "patches of 4 x 4 x 1, 3594 held out" in result.stdout
    assert list(figures(data)) == ["ste"]
    refused = invoke("--data", tmp_path / "digits.npy", *SMALL, "--patch", 5, "--out", out)
    assert refused.exit_code != 0
    assert "two patches high" in refused.output


def test_default_recipes(photograph, tmp_path):
    out, data = tmp_path / "a.png", tmp_path / "a.json"
    result = invoke("--data", photograph, *SMALL, "--out", out, "--json", data)
    assert result.exit_code == 0, result.output
    for name in DEFAULT:
        assert RECIPES[name].label in result.stdout
    assert "±" in result.stdout
    assert "seeds 0, 1" in result.stdout
    assert f"Picture: {out}" in result.stdout
    assert result.stderr == ""
    assert "\x1b" not in result.stdout

    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width >= 1400
        assert 0.4 < picture.height / picture.width < 0.8

    rows = figures(data)
    assert list(rows) == list(DEFAULT)
    for name, row in rows.items():
        np.testing.assert_allclose(row["psnr"], -10 * np.log10(row["mse"]), rtol=1e-12)
        assert [point[0] for point in row["curves"][0]] == [0, 1, 2, 3, 4, 5, 6]
        for key, low, high in (("perplexity", 1, 8), ("used_share", 1 / 8, 1), ("positive_share", 0, 1)):
            if name == "unquantized":
                assert row[key] == [None, None]
            else:
                assert all(low - 1e-6 <= value <= high + 1e-6 for value in row[key])


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_same_table_in_every_library(photograph, tmp_path, name):
    """Everything is float64 and all random numbers come from the host.

    What differs is the order of sums: about 1e-16 per step, which a step may amplify somewhat. 1e-9 leaves that
    room and is a thousand times finer than any digit shown. Counts and shares are equal as long as no vector
    lies that close to the border between two codewords; perplexity and share of codewords used are float32, and
    XLA divides by a constant as it multiplies by its inverse, an ulp off.
    """
    library_named(name)
    agree(photograph, tmp_path, name, ["--steps", 25])


@pytest.mark.parametrize(
    ("name", "chosen"), [("torch", "ema,linear,sf-diveq,residual,product,fsq,gumbel"), ("jax", "ema,sf-diveq-detach")]
)
def test_same_table_in_every_library_of_other_quantizers(photograph, tmp_path, name, chosen):
    """With replacement; the tolerances are those above. JAX compiles each recipe for seconds, so there are fewer."""
    library_named(name)
    arguments = ["--steps", 8, "--seeds", 1, "--dim", 4, "--estimators", chosen, "--replace", "--replace-every", 3]
    agree(photograph, tmp_path, name, arguments)


def agree(photograph, tmp_path, name, arguments):
    """Compare the data of the same run in NumPy and in a library."""
    tables = {}
    for backend in ("numpy", name):
        data = tmp_path / f"{backend}.json"
        result = invoke(
            *("--data", photograph, "--backend", backend, *SMALL, *arguments, "--out", tmp_path / "a.png"),
            *("--json", data),
        )
        assert result.exit_code == 0, result.output
        tables[backend] = figures(data)
    for recipe, expected in tables["numpy"].items():
        actual = tables[name][recipe]
        for key in ("mse", "psnr"):
            np.testing.assert_allclose(actual[key], expected[key], rtol=1e-9, err_msg=f"{recipe} {key}")
        np.testing.assert_allclose(
            np.array(actual["curves"]), np.array(expected["curves"]), rtol=1e-9, err_msg=f"{recipe} curve"
        )
        assert actual["positive_share"] == expected["positive_share"]
        if recipe != "unquantized":
            np.testing.assert_allclose(actual["used_share"], expected["used_share"], rtol=2**-23, err_msg=recipe)
            np.testing.assert_allclose(actual["perplexity"], expected["perplexity"], rtol=1e-5, err_msg=recipe)


def test_same_seed_same_table_and_another_seed_another(photograph, tmp_path):
    data, runs = tmp_path / "a.json", []
    for seed in (3, 3, 4):
        arguments = ("--estimators", "diveq,nsvq", "--seeds", 1, "--seed", seed)
        result = invoke("--data", photograph, *SMALL, *arguments, "--out", tmp_path / "a.png", "--json", data)
        assert result.exit_code == 0, result.output
        assert "±" not in result.stdout
        runs.append({name: row["mse"] for name, row in figures(data).items()})
    assert runs[0] == runs[1]
    assert runs[0]["diveq"] != runs[2]["diveq"]


@pytest.mark.parametrize(("name", "trained"), [("ste", False), ("vq-vae", True), ("nsvq", True), ("diveq", True)])
def test_bare_straight_through_leaves_the_codebook_untrained(photograph, name, trained):
    settings = Settings(codewords=8, dim=3, batch=16, warmup=2, steps=4, seeds=1)
    experiment = Experiment(Patches(load_images(Path(photograph)), 4), load_library("numpy"), settings)
    parameters = before = experiment.start(0)
    moments, rng = no_moments(parameters), np.random.default_rng(0)
    for _ in range(3):
        x, noise = experiment.patches.sample(rng, 16), rng.standard_normal((16, 3))
        parameters, moments, *_ = training_step(parameters, moments, x, {"normal": noise}, 1e-2, RECIPES[name])
    assert np.array_equal(parameters["codebook"], before["codebook"]) != trained
    assert not np.array_equal(parameters["encoder.weight_1"], before["encoder.weight_1"])
    assert experiment.start(0) is before


def test_divergence_is_a_row_not_a_crash(photograph, tmp_path):
    data = tmp_path / "a.json"
    arguments = ("--estimators", "diveq", "--learning-rate", "1e200", "--out", tmp_path / "a.png", "--json", data)
    result = invoke("--data", photograph, *SMALL, *arguments)
    assert result.exit_code == 0, result.output
    assert "diverged (2 of 2)" in result.stdout
    assert figures(data)["diveq"]["mse"] == [None, None]


def test_grey_data_one_estimator_one_codeword(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((3, 16, 12, 1)))
    result = invoke(
        "--data", tmp_path / "a.npy", *SMALL, "--codewords", 1, "--estimators", "radial-2", "--out", tmp_path / "a.png"
    )
    assert result.exit_code == 0, result.output
    assert "100.0 ± 0.0 %" in result.stdout
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be an integer >= 1, got 0"),
        (["--seed", "-1"], "--seed must be an integer >= 0, got -1"),
        (["--learning-rate", "nan"], "--learning-rate must be a finite number > 0, got nan"),
        (["--learning-rate", "0"], "--learning-rate must be a finite number > 0, got 0.0"),
        (["--estimators", "diveq,vqvae"], "--estimators must be among all, unquantized, vq-vae, ste,"),
        (["--estimators", ","], "--estimators must name at least one of unquantized"),
        (["--estimators", "product"], "--dim must be even for product quantization, got 3 (--estimators product)"),
        (["--estimators", "sf-diveq", "--codewords", "1"], "--codewords must be at least 2 for a space-filling curve"),
        (["--replace-every", "0"], "--replace-every must be an integer >= 1, got 0"),
        (["--backend", "tensorflow"], "--backend must be one of numpy, torch, jax, cupy, got 'tensorflow'"),
        (["--codewords", "100000"], "--codewords must be at most the number of training patches, 1221, got 100000"),
        (["--patch", "40"], "80 x 40 pixels (--patch 40), got 48 x 40"),
        (["--data", "nowhere.png"], "got nowhere.png, which does not exist"),
        (["--out", "nowhere/a.png"], "--out must be in a folder that exists, got nowhere/a.png"),
        (["--out", "a.gif"], "--out must be a file name ending in .png, got a.gif"),
        (["--json", "nowhere/a.json"], "--json must be in a folder that exists"),
    ],
)
def test_messages(photograph, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = invoke("--data", photograph, *SMALL, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_output_is_checked_before_training(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(CompareError, match=r"--out must be a file, got the folder"):
        check_output(CompareError, "--out", tmp_path / "folder.png", ".png")


def test_output_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CompareError, match=r"--out must be a file that can be written, got .*, which may not"):
        check_output(CompareError, "--out", tmp_path / "a.png", ".png")


def test_a_library_that_is_not_installed(photograph, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = invoke("--data", photograph, *SMALL, "--backend", "torch", "--out", tmp_path / "a.png")
    assert result.exit_code == 2
    assert 'compare: --backend torch needs torch installed (pip install "diveq-core[torch]")' in result.stderr


@pytest.mark.parametrize("module", ["rich", "typer", "sklearn", "threadpoolctl"])
def test_an_extra_that_is_not_installed(module):
    program = (
        f"import runpy, sys; sys.modules[{module!r}] = None; sys.argv[1:] = ['compare']; "
        "runpy.run_module('diveq_core', run_name='__main__', alter_sys=True)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert 'pip install "diveq-core[cli]"' in result.stderr


def test_importing_the_library_imports_no_extra():
    program = (
        "import sys, diveq_core; "
        "print([m for m in ('typer', 'rich', 'matplotlib', 'sklearn', 'PIL', 'torch', 'jax') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_settings_choose_estimators_once_and_in_order():
    assert Settings(estimators=("nsvq, ste", "NSVQ")).estimators == ("nsvq", "ste")
    with pytest.raises(CompareError, match=r"--dim must be an integer >= 1, got 2\.5"):
        Settings(dim=2.5)


def test_all_recipes(photograph, tmp_path):
    out, data = tmp_path / "a.png", tmp_path / "a.json"
    arguments = ("--dim", 4, "--codewords", 16, "--seeds", 1, "--estimators", "all", "--out", out, "--json", data)
    result = invoke("--data", photograph, *SMALL, *arguments)
    assert result.exit_code == 0, result.output
    rows = figures(data)
    assert list(rows) == list(RECIPES)
    for name, row in rows.items():
        assert RECIPES[name].label in result.stdout
        assert row["mse"][0] < 1
        codes = 15 if name.startswith("sf-") else 16
        assert row["bits"] == [None if name == "unquantized" else np.log2(codes)]
        assert row["real_number_too"] == name.startswith("sf-")
    assert "3.9 + t" in result.stdout
    assert "t: and a position on the segment" in result.stdout


def test_replacement_of_a_codeword_that_is_far_away():
    """It comes near a used one, and neither Adam nor the moving averages remember it."""
    rng = np.random.default_rng(0)
    for name in ("vq-vae", "ema", "linear", "residual", "product", "sf-diveq", "gumbel"):
        quantizer = RECIPES[name].sized(4, 2).quantizer
        parameters = quantizer.start(rng.random((4, 2)))
        words = parameters[quantizer.words]
        last = (*(0,) * (words.ndim - 2), -1)
        words[last] = 100.0
        memory = {key: np.ones_like(x) for key, x in parameters.items()}
        counts = np.full(words.shape[:-1], 5)
        counts[last] = 0
        noise = rng.standard_normal(noise_shape(parameters, quantizer))
        moments = Moments(memory, dict(memory), (np.ones(()), np.ones(())))
        new, moments = replace(parameters, moments, counts, noise, quantizer)
        rows = counts > 0
        assert np.abs(new[quantizer.words][last]).max() < 2
        np.testing.assert_array_equal(new[quantizer.words][rows], words[rows])
        for kept in (moments.first, moments.second):
            np.testing.assert_array_equal(kept[quantizer.words], np.broadcast_to(rows[..., None], words.shape))
        if name == "ema":
            np.testing.assert_array_equal(new["ema.counts"], [1, 1, 1, 0])


def test_replacement_of_nothing_changes_nothing(photograph, tmp_path):
    """Codewords used by every batch stay, so the table is the same with replacement and without."""
    tables = []
    for option in ("--no-replace", "--replace"):
        data = tmp_path / "a.json"
        arguments = ("--codewords", 1, "--estimators", "vq-vae,diveq,fsq", "--replace-every", 2, "--json", data)
        result = invoke("--data", photograph, *SMALL, option, *arguments, "--out", tmp_path / "a.png")
        assert result.exit_code == 0, result.output
        tables.append({name: row["curves"] for name, row in figures(data).items()})
    assert tables[0] == tables[1]


@pytest.mark.parametrize(("codewords", "codes"), [(8, 8), (16, 16), (240, 240), (256, 256), (1024, 1024)])
def test_levels_make_as_many_codes(codewords, codes):
    levels = chosen_levels(codewords, 8)
    assert np.prod(levels) == codes
    assert min(levels) >= 3


def test_mean_and_spread():
    assert mean_and_spread([2.0]) == (2.0, None)
    assert mean_and_spread([1.0, 3.0]) == (2.0, 2**0.5)
