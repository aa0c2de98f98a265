"""Graphs of ONNX: the same tokens and vectors as NumPy's, of any number of vectors, run by onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import diveq_core as dq
from diveq_core.commands.tokens import export as command
from diveq_core.commands.tokens.errors import DataError, RunError

if TYPE_CHECKING:
    from pathlib import Path


def _words(*shape: int, offset: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(shape) + offset).astype(np.float32)


_COPIES = np.concatenate([_words(20, 4), _words(20, 4)])
TOKENIZERS: dict[str, Any] = {
    "one codeword, whose sums overflow": lambda: dq.Tokenizer(_words(1, 3) * np.float32(5e37)),
    "copies and an offset": lambda: dq.Tokenizer(_COPIES + 100),
    "groups of stages": lambda: dq.Tokenizer(_words(2, 2, 16, 3), dq.Product(dq.Residual(dq.STE(), 2), 2)),
    "cosine, float64": lambda: dq.Tokenizer(_words(64, 5).astype(float), cosine=True),
    "FSQ in stages": lambda: dq.Tokenizer(None, dq.Residual(dq.FSQ([5, 5, 5]), 2)),
    "projected, channels first": lambda: _layer(codebook_dim=3, channel_axis=1).tokenizer(),
}
# ndonnx takes seconds for each graph.
MORE: dict[str, Any] = {
    "plain": lambda: dq.Tokenizer(_words(300, 6)),
    "stages": lambda: dq.Tokenizer(_words(3, 32, 6), dq.Residual(dq.STE(), 3)),
    "FSQ": lambda: dq.Tokenizer(None, dq.FSQ([8, 5, 5])),
    "linear": lambda: _layer(codebook_update="linear").tokenizer(),
}


def _layer(**options: Any) -> Any:
    from diveq_numpy import VectorQuantizer

    return VectorQuantizer(6, 16, dq.STE(), init="normal", rng=np.random.default_rng(0), **options)


def _run(path: Path, **given: np.ndarray) -> np.ndarray:
    import onnxruntime

    return onnxruntime.InferenceSession(path).run(None, given)[0]


@pytest.mark.parametrize("kind", [*TOKENIZERS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)])
def test_the_graphs_give_what_numpy_gives(kind: str, tmp_path: Path) -> None:
    tokenizer, path = (TOKENIZERS | MORE)[kind](), tmp_path / "tok.onnx"
    written = command.export(tokenizer, path)
    assert [written[name]["path"] for name in ("encoder", "decoder")] == [str(path), str(command.decoder_path(path))]
    rows = tokenizer.of_rows()
    dtype = next((x.dtype for x in tokenizer.arrays.values()), np.float32)
    for count in (0, 1, 700):
        z = (3 * np.random.default_rng(count).standard_normal((count, tokenizer.settings.dim))).astype(dtype)
        if kind == "copies and an offset":
            z += 100
        z[3:4] = np.nan
        tokens = _run(path, z=z)
        np.testing.assert_array_equal(tokens, rows.encode(z))
        vectors = _run(command.decoder_path(path), tokens=tokens)
        np.testing.assert_allclose(vectors, rows.decode(tokens), rtol=1e-6, atol=1e-6)


def test_a_graph_that_gives_other_tokens_is_not_written(tmp_path: Path) -> None:
    tokenizer, other = dq.Tokenizer(_words(30, 4)), dq.Tokenizer(_words(30, 4, offset=1.0))
    encoder, decoder = command.graphs(tokenizer)
    with pytest.raises(RunError, match="onnxruntime must give NumPy's tokens, got"):
        command.check(tokenizer, command.graphs(other)[0], decoder)
    with pytest.raises(RunError, match="onnxruntime must decode as NumPy does"):
        command.check(tokenizer, encoder, command.graphs(other)[1])


def test_a_curve_is_refused(tmp_path: Path) -> None:
    tokenizer = dq.Tokenizer(_words(8, 3), dq.SFDiVeQ(), position_bits=4)
    with pytest.raises(DataError, match="TOKENIZER must not be one of a curve"):
        command.export(tokenizer, tmp_path / "tok.onnx")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from diveq_core.commands.cli import app

    file, path = tmp_path / "tok.safetensors", tmp_path / "tok.onnx"
    tokenizer = dq.Tokenizer(_words(8, 3))
    tokenizer.save(file)
    done = CliRunner().invoke(app, ["export", str(file), "-o", str(path)])
    assert done.exit_code == 0, done.output
    assert str(path) in done.output
    assert str(command.decoder_path(path)) in done.output
    z = _words(5, 3)
    np.testing.assert_array_equal(_run(path, z=z), tokenizer.encode(z))
    missing = CliRunner().invoke(app, ["export", str(tmp_path / "none"), "-o", str(path)])
    assert missing.exit_code == 2
    assert missing.output.startswith("export: ")
    assert missing.output.count("\n") == 1
