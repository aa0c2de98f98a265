"""``encode``, ``decode`` and ``inspect``: the tokenizer's own tokens in files, and a line for what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import diveq_core as dq
from diveq_core.commands.cli import app
from diveq_core.commands.tokens import coding
from diveq_core.commands.tokens.inspect import spacing
from processes import importable, run_python

needs_zarr = pytest.mark.skipif(not importable("zarr"), reason="needs zarr")


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def run(*arguments):
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def refused(code, message, *arguments):
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"{arguments[0]}: ")
    assert message in result.stderr


def vectors(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def saved(path, *shape, estimator=None, **options):
    """A tokenizer of random codewords in a file."""
    tokenizer = dq.Tokenizer(vectors(*shape, seed=1), dq.STE() if estimator is None else estimator, **options)
    tokenizer.save(path)
    return tokenizer


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(coding, "CHUNK_BYTES", 1 << 10)


TOKENIZERS = {
    "plain": ((9, 6), {}),
    "stages": ((3, 9, 6), {"estimator": dq.Residual(dq.STE(), 3)}),
    "groups": ((2, 9, 3), {"estimator": dq.Product(dq.STE(), 2)}),
    "groups of stages": ((2, 3, 9, 3), {"estimator": dq.Product(dq.Residual(dq.STE(), 3), 2)}),
    "cosine": ((9, 6), {"cosine": True}),
    "channels first": ((9, 6), {"channel_axis": 1}),
    "refuses": ((9, 6), {"not_finite": "refuse"}),
    "curve": ((9, 6), {"estimator": dq.SFDiVeQ(), "position_bits": 6}),
}


@pytest.mark.parametrize("suffix", [".npy", pytest.param(".zarr", marks=needs_zarr)])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_files_hold_what_the_tokenizer_gives(tmp_path, kind, suffix):
    shape, options = TOKENIZERS[kind]
    tokenizer = saved(tmp_path / "tok.safetensors", *shape, **options)
    z = vectors(11, 13, 6)
    np.save(tmp_path / "z.npy", z)
    tokens, back = tmp_path / f"tokens{suffix}", tmp_path / f"back{suffix}"
    found = run("encode", tmp_path / "tok.safetensors", tmp_path / "z.npy", "-o", tokens)
    rows = tokenizer.encode(z.reshape(-1, 6))
    expected = rows.reshape(11, 13, *rows.shape[1:])
    assert found["shape"] == list(expected.shape)
    assert (found["vectors"], found["skipped"], found["bits_per_vector"]) == (143, 0, tokenizer.bits)
    written = opened(tokens)
    assert written.dtype == (np.uint16 if kind == "curve" else np.uint8)
    np.testing.assert_array_equal(written, expected)
    found = run("decode", tmp_path / "tok.safetensors", tokens, "-o", back)
    assert found["shape"] == [11, 13, 6]
    decoded = tokenizer.decode(rows)
    np.testing.assert_array_equal(opened(back), decoded.reshape(11, 13, 6))
    assert not list(tmp_path.glob("*.partial"))


def opened(path):
    if path.suffix == ".npy":
        return np.load(path)
    import zarr

    return zarr.open_array(path, mode="r")[...]


def test_one_vector(tmp_path):
    tokenizer = saved(tmp_path / "tok.safetensors", 9, 6)
    np.save(tmp_path / "z.npy", vectors(6))
    run("encode", tmp_path / "tok.safetensors", tmp_path / "z.npy", "-o", tmp_path / "t.npy")
    tokens = np.load(tmp_path / "t.npy")
    assert tokens.shape == ()
    assert tokens == tokenizer.encode(vectors(6))
    run("decode", tmp_path / "tok.safetensors", tmp_path / "t.npy", "-o", tmp_path / "v.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), tokenizer.decode(tokens.astype(int)))


@pytest.mark.parametrize(
    ("codewords", "plain", "marked"),
    [(1, "uint8", "uint8"), (255, "uint8", "uint8"), (256, "uint8", "uint16"), (257, "uint16", "uint16")],
)
def test_the_smallest_integers_that_hold_the_tokens_and_the_mark(tmp_path, codewords, plain, marked):
    """With a mark there is one number more; 255 is a token of 256 codewords, and the mark of fewer."""
    tokenizer, z, t, v = (tmp_path / name for name in ("tok.safetensors", "z.npy", "t.npy", "v.npy"))
    codebook = np.arange(codewords, dtype=np.float32)[:, None]
    dq.Tokenizer(codebook).save(tokenizer)
    np.save(z, codebook)
    run("encode", tokenizer, z, "-o", t)
    assert np.load(t).dtype == plain
    run("decode", tokenizer, t, "-o", v)
    np.testing.assert_array_equal(np.load(v), codebook)
    bad = codebook.copy()
    bad[0] = np.nan
    np.save(z, bad)
    assert run("encode", tokenizer, z, "-o", t, "--skip-bad")["skipped"] == 1
    tokens = np.load(t)
    assert tokens.dtype == marked
    np.testing.assert_array_equal(tokens, [np.iinfo(marked).max, *range(1, codewords)])
    assert run("decode", tokenizer, t, "-o", v)["skipped"] == 1
    np.testing.assert_array_equal(np.load(v), bad)


@pytest.mark.parametrize("estimator", [dq.STE(), dq.Residual(dq.STE(), 2)])
def test_a_vector_that_is_not_finite_is_refused_by_its_number(tmp_path, estimator):
    tokenizer, z, t = (tmp_path / name for name in ("tok.safetensors", "z.npy", "t.npy"))
    saved(tokenizer, *(() if estimator == dq.STE() else (2,)), 9, 6, estimator=estimator)
    data = vectors(20, 30, 6)
    data[17, 3, 2] = np.inf
    data[19] = np.nan
    np.save(z, data)
    message = f"DATA must be finite, got NaN or infinity in row 513, at (17, 3) of {z}; --skip-bad marks"
    refused(3, message, "encode", tokenizer, z, "-o", t)
    refused(3, message, "fit", z, "-o", tmp_path / "other.safetensors", "--codewords", 3)
    refused(3, message, "inspect", tokenizer, "--data", z)
    assert not t.exists()
    # What was written before it is there to go on with, but with another option it is another run.
    refused(2, "holds 504 of 600 rows of an earlier run: --resume", "encode", tokenizer, z, "-o", t, "--skip-bad")
    refused(2, "got another --skip-bad", "encode", tokenizer, z, "-o", t, "--skip-bad", "--resume")
    refused(3, message, "encode", tokenizer, z, "-o", t, "--resume")
    found = run("encode", tokenizer, z, "-o", tmp_path / "u.npy", "--skip-bad")
    assert found["skipped"] == 31
    marked = (np.load(tmp_path / "u.npy") == 255).reshape(20, 30, -1)
    np.testing.assert_array_equal(marked.all(axis=2), ~np.isfinite(data).all(axis=2))
    np.testing.assert_array_equal(marked.any(axis=2), ~np.isfinite(data).all(axis=2))
    assert run("inspect", tokenizer, "--data", z, "--skip-bad")["skipped"] == 31


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    tokenizer, t, v = (tmp_path / name for name in ("tok.safetensors", "t.npy", "v.npy"))
    saved(tokenizer, 9, 6)
    np.save(t, np.array([[1, 8], [2, 9]]))
    message = "TOKENS must be below 9, or the mark, got 9 in row 3 of"
    refused(2, message, "decode", tokenizer, t, "-o", v)
    np.save(t, np.array([0.5]))
    refused(2, "TOKENS must hold integers, got float64", "decode", tokenizer, t, "-o", v)
    (tmp_path / "t.txt").write_text("1 2")
    refused(2, "TOKENS must be a .npy, .npz or Zarr file, got", "decode", tokenizer, tmp_path / "t.txt", "-o", v)
    # Of the library itself, whose mark is -1.
    np.save(t, np.array([1, -1]))
    run("decode", tokenizer, t, "-o", tmp_path / "w.npy")
    assert np.isnan(np.load(tmp_path / "w.npy")).tolist() == [[False] * 6, [True] * 6]
    saved(tokenizer, 2, 9, 6, estimator=dq.Residual(dq.STE(), 2))
    np.save(t, np.zeros((5, 3), int))
    refused(
        2, "TOKENS must end in the axes (2,) of groups and stages, got shape (5, 3)", "decode", tokenizer, t, "-o", v
    )


def test_what_is_wrong_is_said_in_one_line(tmp_path):
    tokenizer, z, t = (tmp_path / name for name in ("tok.safetensors", "z.npy", "t.npy"))
    saved(tokenizer, 9, 6)
    np.save(z, vectors(5, 4))
    refused(2, "DATA must hold vectors of 6 entries as", "encode", tokenizer, z, "-o", t)
    refused(2, "DATA must hold vectors of 6 entries as", "inspect", tokenizer, "--data", z)
    refused(2, "which does not exist", "encode", tokenizer, tmp_path / "y.npy", "-o", t)
    refused(2, "TOKENIZER must be a file that fit wrote, got", "encode", tmp_path / "no.safetensors", z, "-o", t)
    refused(2, "load: ", "inspect", z)
    np.save(z, vectors(5, 6))
    refused(2, "-o must be a name ending in .npy or .zarr", "encode", tokenizer, z, "-o", tmp_path / "t.txt")
    refused(2, "-o must be in a folder that exists", "encode", tokenizer, z, "-o", tmp_path / "no" / "t.npy")
    refused(2, "--report must be a file name ending in .png", "inspect", tokenizer, "--report", tmp_path / "a.pdf")
    saved(tokenizer, 9, 6, estimator=dq.SFDiVeQ())
    refused(2, "TOKENIZER must give integers, got a curve without position_bits", "encode", tokenizer, z, "-o", t)


def test_inspect_says_what_the_codewords_are(tmp_path):
    tokenizer, z = tmp_path / "tok.safetensors", tmp_path / "z.npy"
    codebook = np.float32([[0, 0], [3, 4], [3, 4], [100, 100]])
    dq.Tokenizer(codebook).save(tokenizer)
    np.save(z, np.float32([[0, 1], [0, -1], [3, 4], [3, 4]]))
    found = run("inspect", tokenizer, "--data", z, "--report", tmp_path / "a.png")
    (book,) = found["codebooks"]
    assert (book["codewords"], book["dimension"], book["copies"]) == (4, 2, 1)
    np.testing.assert_allclose(
        [book["nearest"][key] for key in ("least", "median", "most")], [0, 2.5, np.hypot(97, 96)]
    )
    assert found["distortion"] == 0.5
    np.testing.assert_allclose(found["variance"], np.load(z).var(axis=0).sum(), rtol=1e-6)
    (part,) = found["parts"]
    assert (part["used"], part["of"]) == (2, 4)
    np.testing.assert_allclose(part["perplexity"], 2, rtol=1e-6)
    assert found["dead"] == [[2, 3]]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 800
    lines = invoke("inspect", tokenizer).stdout
    assert "Codebook: 4 codewords of 2 entries, 1 of them copies; nearest neighbour at 0 to" in lines


def test_distances_far_from_the_origin(tmp_path):
    book = vectors(50, 8) + 1e4
    d = np.linalg.norm(book.astype(float)[:, None] - book.astype(float), axis=-1) + np.diag(np.full(50, np.inf))
    found = spacing(book)["nearest"]
    expected = dict(zip(("least", "median", "most"), np.quantile(d.min(axis=1), (0, 0.5, 1)), strict=True))
    assert {key: pytest.approx(value, rel=1e-9) for key, value in expected.items()} == found


def test_a_scalar_quantizer_has_no_codebook(tmp_path):
    dq.Tokenizer(estimator=dq.FSQ([8, 5])).save(tmp_path / "tok.safetensors")
    np.save(tmp_path / "z.npy", vectors(50, 2))
    found = run("inspect", tmp_path / "tok.safetensors", "--data", tmp_path / "z.npy", "--report", tmp_path / "a.png")
    assert (found["codebooks"], found["values_per_token"]) == ([], 40)
    run("encode", tmp_path / "tok.safetensors", tmp_path / "z.npy", "-o", tmp_path / "t.npy")
    run("decode", tmp_path / "tok.safetensors", tmp_path / "t.npy", "-o", tmp_path / "v.npy")
    expected = dq.quantize(vectors(50, 2), None, dq.FSQ([8, 5])).z_q
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), expected)


def test_the_version_and_completion():
    from importlib.metadata import version

    assert invoke("--version").stdout == f"{version('diveq-core')}\n"
    shown = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'diveq-core'; from diveq_core.__main__ import main; main()"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "_DIVEQ_CORE_COMPLETE": "source_bash"},
    )
    assert "complete -o default -F _diveq_core_completion diveq-core" in shown.stdout


def test_the_command_line_begins_with_nothing_heavy():
    heavy = ["torch", "jax", "matplotlib", "sklearn", "scipy", "PIL", "zarr", "pyarrow", "safetensors", "faiss"]
    code = f"import sys, diveq_core.commands.cli; print([name for name in {heavy} if name in sys.modules])"
    assert run_python(code) == "[]\n"


def test_in_a_pipe_it_says_what_it_did_and_no_more(tmp_path):
    saved(tmp_path / "tok.safetensors", 9, 6)
    np.save(tmp_path / "z.npy", vectors(50, 6))
    result = invoke("encode", tmp_path / "tok.safetensors", tmp_path / "z.npy", "-o", tmp_path / "t.npy")
    assert result.stderr == ""
    first, second, third = result.stdout.splitlines()
    assert first == f"{tmp_path / 't.npy'}: 50, uint8, of 50 vectors"
    assert second.endswith(" vectors/s")
    assert third.endswith(" s in all")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a terminal of its own")
def test_on_a_terminal_it_says_how_far_it_is(tmp_path):
    saved(tmp_path / "tok.safetensors", 9, 6)
    np.save(tmp_path / "z.npy", vectors(50, 6))
    ours, theirs = os.openpty()
    command = ["encode", "tok.safetensors", "z.npy", "-o", "t.npy"]
    small = (
        "from diveq_core.commands.tokens import coding; coding.CHUNK_BYTES = 24; from diveq_core.__main__ import main"
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    subprocess.run(
        [sys.executable, "-c", f"{small}; main()", *command], stderr=theirs, cwd=tmp_path, env=environment, check=True
    )
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours), os.close(theirs)
    assert "t.npy" in shown
    assert "100%" in shown
    assert "vectors/s" in shown
