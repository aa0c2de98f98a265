"""``fit``: the codebook that k-means in memory finds, by passes over files; every method; the picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import diveq_core as dq
from diveq_core.commands.cli import app
from diveq_core.commands.tokens import coding, streams
from diveq_core.commands.tokens.errors import DataError
from diveq_core.commands.tokens.fit import Settings
from diveq_core.commands.tokens.training import METHODS


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(coding, "CHUNK_BYTES", 1 << 13)
    monkeypatch.setattr(streams, "_BLOCK", 32)


def run(*arguments):
    result = CliRunner().invoke(app, ["fit", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def clusters(count, width=6, seed=0):
    """Vectors around twelve points."""
    rng = np.random.default_rng(seed)
    points = 3 * rng.standard_normal((12, width))
    return (points[rng.integers(0, 12, count)] + 0.3 * rng.standard_normal((count, width))).astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_passes_over_a_file_are_iterations_in_memory(tmp_path, offset):
    """From the same beginning: the whole file is the sample, and both draw the same."""
    z = (clusters(3000) + np.float32(offset)).astype(np.float32)
    np.save(tmp_path / "z.npy", z.reshape(30, 100, 6))
    out = tmp_path / "tok.safetensors"
    found = run(tmp_path / "z.npy", "-o", out, "--codewords", 20, "--passes", 4, "--sample", 3000)
    rng = np.random.default_rng(0)
    rng.choice(3000, 3000, replace=False, shuffle=False)
    expected = dq.kmeans(z, dq.kmeans_plus_plus(z, 20, rng=rng), iterations=4)
    tokenizer = dq.Tokenizer.load(out)
    # The last digits of float32, of sums in another order.
    np.testing.assert_allclose(tokenizer.codebook, expected.codebook, atol=1e-6 * (10 + offset))
    np.testing.assert_allclose(found["distortion"], float(expected.inertia) / 3000, rtol=1e-4)
    np.testing.assert_allclose(found["distortion"], float(tokenizer.distortion(z)), rtol=1e-4)
    (course,) = found["passes"]
    assert len(course) == 4
    assert np.all(np.diff([*course, found["distortion"]]) <= 1e-5 * course[0])
    np.testing.assert_allclose(found["variance"], z.astype(float).var(axis=0).sum(), rtol=1e-4)
    counts = tokenizer.usage(tokenizer.encode(z))
    (part,) = found["parts"]
    assert part["used"] == np.count_nonzero(counts)
    np.testing.assert_allclose(part["perplexity"], float(dq.perplexity(counts)), rtol=1e-5)


def test_the_error_of_a_pass_is_that_of_its_codebook(tmp_path):
    z = clusters(500) + np.float32(100)
    book = z[:9].copy()
    indices = dq.nearest(z, book)
    sums = streams.Sums(book, z.mean(axis=0, dtype=np.float64))
    sums.add(z[:300], indices[:300])
    sums.add(z[300:], indices[300:])
    wide = z.astype(np.float64)
    np.testing.assert_allclose(sums.inertia, ((wide - book[indices]) ** 2).sum(), rtol=1e-12)
    np.testing.assert_array_equal(sums.counts, np.bincount(indices, minlength=9))
    means = [wide[indices == k].mean(axis=0) for k in range(9)]
    np.testing.assert_allclose(sums.means(), means, rtol=1e-6)


def test_a_codeword_without_vectors_goes_where_the_error_is(tmp_path):
    sample = np.float32([[0.0], [0.0], [0.0], [10.0], [10.2], [50.0]])
    part = streams.Part(slice(0, 1), sample)
    part.books.append(np.float32([[0.0], [100.0], [10.0]]))
    part.fill(np.array([3, 0, 3]))
    np.testing.assert_array_equal(part.books[0], np.float32([[0.0], [50.0], [10.0]]))
    part.fill(np.array([3, 1, 2]))
    np.testing.assert_array_equal(part.books[0], np.float32([[0.0], [50.0], [10.0]]))


@pytest.mark.parametrize(("stages", "groups"), [(3, 1), (1, 2), (2, 2)])
def test_stages_and_groups(tmp_path, stages, groups):
    z = clusters(2000)
    np.save(tmp_path / "z.npy", z)
    out, picture = tmp_path / "tok.safetensors", tmp_path / "a.png"
    sizes = ("--codewords", 8, "--stages", stages, "--groups", groups, "--passes", 5)
    found = run(tmp_path / "z.npy", "-o", out, *sizes, "--report", picture)
    tokenizer = dq.Tokenizer.load(out)
    assert tokenizer.settings.axes == tuple(n for n in (groups, stages) if n > 1)
    assert found["bits_per_vector"] == 3 * stages * groups
    np.testing.assert_allclose(found["distortion"], float(tokenizer.distortion(z)), rtol=1e-5)
    assert len(found["parts"]) == stages * groups
    assert [len(course) <= 5 for course in found["passes"]] == [True] * stages
    # A stage begins below the last error of the one before it, and what all leave is the distortion.
    ends = [course[-1] for course in found["passes"]]
    assert ends == sorted(ends, reverse=True)
    assert found["distortion"] <= ends[-1] * (1 + 1e-5)
    if groups == 1:
        # As good as k-means in memory, stage by stage.
        left = z
        for _ in range(stages):
            book = dq.kmeans(left, 8, rng=np.random.default_rng(1), iterations=5).codebook
            left = left - book[dq.nearest(left, book)]
        assert found["distortion"] < 1.15 * float((left**2).sum(axis=1).mean())
    with Image.open(picture) as image:
        assert image.width > 1500


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(tmp_path, method):
    z = clusters(6000)
    np.save(tmp_path / "z.npy", z)
    out, picture = tmp_path / "tok.safetensors", tmp_path / "a.png"
    options = ("--method", method, "--codewords", 16, "--passes", 3, "--report", picture)
    found = run(tmp_path / "z.npy", "-o", out, *options)
    tokenizer = dq.Tokenizer.load(out)
    assert (tokenizer.position_bits == 8) == method.startswith("sf-")
    np.testing.assert_allclose(found["distortion"], float(tokenizer.distortion(z)), rtol=1e-4)
    # Twelve clusters and sixteen codewords: nearly all that is left is the noise around them.
    assert found["distortion"] < 0.08 * found["variance"]
    assert len(found["passes"][0]) == 3
    assert picture.exists()


@pytest.mark.parametrize("method", ["ema", "diveq"])
def test_methods_in_stages(tmp_path, method):
    np.save(tmp_path / "z.npy", clusters(3000))
    options = ("--method", method, "--codewords", 8, "--passes", 2, "--stages", 2, "--groups", 2)
    found = run(tmp_path / "z.npy", "-o", tmp_path / "tok.safetensors", *options)
    assert found["distortion"] < 0.05 * found["variance"]


def test_the_same_seed_gives_the_same_file_and_another_another(tmp_path):
    np.save(tmp_path / "z.npy", clusters(1000))
    files = []
    for seed in (3, 3, 4):
        run(tmp_path / "z.npy", "-o", tmp_path / "tok.safetensors", "--codewords", 8, "--seed", seed)
        files.append((tmp_path / "tok.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_vectors_that_are_not_finite_count_for_nothing(tmp_path):
    z = clusters(1000)
    bad = np.concatenate([z[:500], np.full((7, 6), np.nan, np.float32), z[500:]])
    np.save(tmp_path / "z.npy", bad)
    for method in ("kmeans", "ema"):
        options = ("--codewords", 12, "--skip-bad", "--method", method)
        found = run(tmp_path / "z.npy", "-o", tmp_path / "tok.safetensors", *options)
        assert (found["vectors"], found["skipped"]) == (1000, 7)
        tokenizer = dq.Tokenizer.load(tmp_path / "tok.safetensors")
        np.testing.assert_allclose(found["distortion"], float(tokenizer.distortion(z)), rtol=1e-4)


def test_float64_and_float16(tmp_path):
    for dtype, kept in ((np.float64, np.float64), (np.float16, np.float32)):
        np.save(tmp_path / "z.npy", clusters(500).astype(dtype))
        run(tmp_path / "z.npy", "-o", tmp_path / "tok.safetensors", "--codewords", 8)
        assert dq.Tokenizer.load(tmp_path / "tok.safetensors").codebook.dtype == kept


def test_fewer_distinct_vectors_than_codewords(tmp_path):
    np.save(tmp_path / "z.npy", np.repeat(np.eye(3, dtype=np.float32), 20, axis=0))
    found = run(tmp_path / "z.npy", "-o", tmp_path / "tok.safetensors", "--codewords", 8)
    # Means about a centre: zeros are zeros but for the last bit of float64.
    assert found["distortion"] < 1e-30
    assert found["parts"][0]["used"] == 3


def test_patches_of_photographs(tmp_path, monkeypatch):
    monkeypatch.setattr(coding, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(streams, "_BLOCK", 1 << 10)
    from sklearn.datasets import load_sample_images

    for name, image in zip("ab", load_sample_images().images, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    out = tmp_path / "out"
    out.mkdir()
    options = ("--codewords", 32, "--passes", 3, "--patch", 8, "--sample", 500)
    found = run(tmp_path, "-o", out / "tok.safetensors", *options)
    assert found["vectors"] == 2 * (427 // 8) * (640 // 8)
    assert found["distortion"] < 0.3 * found["variance"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codewords": 0}, "--codewords must be an integer >= 1, got 0"),
        ({"stages": 0}, "--stages must be an integer >= 1, got 0"),
        ({"method": "magic"}, "--method must be among kmeans, ema, .*, got 'magic'"),
        ({"learning_rate": 0.0}, "--learning-rate must be a finite number > 0, got 0"),
        ({"method": "sf-diveq", "codewords": 1}, "--codewords must be at least 2 on a curve, got 1"),
        ({"sample": 0}, "--sample must be an integer >= 1, got 0"),
        ({"seed": -1}, "--seed must be an integer >= 0, got -1"),
    ],
)
def test_options(options, message):
    with pytest.raises(DataError, match=message):
        Settings(**options)


def test_messages(tmp_path):
    np.save(tmp_path / "z.npy", clusters(10))
    z, out = tmp_path / "z.npy", tmp_path / "tok.safetensors"
    for arguments, message in (
        ((z, "-o", tmp_path / "tok.bin"), "-o must be a file name ending in .safetensors"),
        ((z, "-o", out, "--groups", 4), "--groups must divide the 6 entries of a vector, got 4"),
        ((z, "-o", out, "--report", tmp_path / "a.pdf"), "--report must be a file name ending in .png"),
        ((tmp_path / "y.npy", "-o", out), "which does not exist"),
    ):
        result = CliRunner().invoke(app, ["fit", *map(str, arguments)])
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert f"fit: {message}" in result.stderr or message in result.stderr
    assert not out.exists()


def test_the_picture_draws_vectors_of_all_the_data():
    from diveq_core.commands.tokens.picture import drawn

    # A sample is in the order of the data, here of two parts that lie apart.
    sample = np.repeat([[0.0], [1.0]], 5000, axis=0)
    assert drawn(sample).mean() == 0.5
    np.testing.assert_array_equal(drawn(sample[:3]), sample[:3])
