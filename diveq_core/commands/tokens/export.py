"""``export``: a tokenizer as graphs of ONNX, made by this library's own search on arrays that record it.

The encoder takes vectors (N, D) and gives tokens, the decoder takes tokens and gives vectors; N is open.
"""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np

import diveq_numpy
from diveq_core.arrays import search
from diveq_core.commands.terminal import check_output
from diveq_core.commands.tokens.errors import DataError, RunError
from diveq_core.layers import file, hard
from diveq_core.layers.run import Step, decoded
from diveq_core.layers.words import words

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from diveq_core.layers.tokenizer import Tokenizer

# Vectors that both ways must give the same tokens of, and the share of them that may be near ties.
_CHECKED, _TIES = 1 << 12, 1e-3


def decoder_path(path: Path) -> Path:
    """Where the decoder lies whose encoder is at a path."""
    return path.with_name(f"{path.stem}.decoder{path.suffix}")


def export(tokenizer: Tokenizer, path: Path) -> dict[str, Any]:
    """Write the encoder to a path and the decoder beside it, checked by onnxruntime; their paths and numbers of nodes.

    Raises
    ------
    DataError
        If a package is missing, or the tokenizer is one of a curve, whose search is no graph.
    RunError
        If onnxruntime gives other tokens than NumPy; nothing is written then.
    """
    begun = time.perf_counter()
    check_output(DataError, "--out", path, ".onnx")
    encoder, decoder = graphs(tokenizer)
    check(tokenizer, encoder, decoder)
    # The encoder last: where it is, its decoder is too.
    file.write_whole(decoder_path(path), decoder.SerializeToString())
    file.write_whole(path, encoder.SerializeToString())
    models = {"encoder": (path, encoder), "decoder": (decoder_path(path), decoder)}
    written = {name: {"path": str(own), "nodes": len(model.graph.node)} for name, (own, model) in models.items()}
    return {"command": "export", **written, "seconds": time.perf_counter() - begun}


def graphs(tokenizer: Tokenizer) -> tuple[Any, Any]:
    """Encoder and decoder as models of ONNX, in the dtype that the tokenizer holds."""
    onnx, settings, arrays = _package("ndonnx"), tokenizer.settings, tokenizer.arrays
    if settings.on_curve:
        raise DataError(f"TOKENIZER must not be one of a curve, whose search is no graph, got {settings.estimator}")
    dtype = next(iter(arrays.values())).dtype if arrays else np.dtype(np.float32)
    state = {name: onnx.asarray(x) for name, x in arrays.items()}
    z = onnx.argument(shape=("N", settings.dim), dtype=getattr(onnx, dtype.name))
    rows = tokenizer.of_rows().settings
    books = None
    if settings.searches:
        lib = diveq_numpy.backend
        pieces = hard.as_they_are(settings, words(lib, settings, arrays)[0])
        books = {own: (onnx.asarray(x), _constants(onnx, search.prepared(lib, x))) for own, (x, _) in pieces.items()}
    tokens = onnx.argument(shape=("N", *settings.axes), dtype=onnx.int64)
    given = Step("export", rows, state, z, None, whole=False).tokens(books)
    encoder = onnx.build({"z": z}, {"tokens": given})
    decoder = onnx.build({"tokens": tokens}, {"z_q": decoded(rows, state, tokens, None)})
    for model in (encoder, decoder):
        entry = model.metadata_props.add()
        entry.key, entry.value = file.TOKENIZER, file.to_text(settings)
    return encoder, decoder


def check(tokenizer: Tokenizer, encoder: Any, decoder: Any) -> None:
    """Refuse graphs that do not give NumPy's tokens and vectors."""
    runtime, settings, rng = _package("onnxruntime"), tokenizer.settings, np.random.default_rng(0)
    code, vectors = (runtime.InferenceSession(model.SerializeToString()) for model in (encoder, decoder))
    rows = tokenizer.of_rows()
    tokens = rng.integers(0, settings.token_count, (_CHECKED, *settings.axes))
    words = rows.decode(tokens)
    # Unlike a spread, it leaves no range.
    largest = float(np.abs(words).max())
    given = vectors.run(None, {"tokens": tokens})[0]
    if not np.allclose(given, words, rtol=1e-5, atol=1e-6 * largest):
        raise RunError("onnxruntime must decode as NumPy does, got other vectors")
    # About codewords, some very near, some far; and what is not finite.
    reach = 10.0 ** rng.uniform(-3, 1, (_CHECKED, 1)) * largest
    with np.errstate(over="ignore"):
        z = (words + reach * rng.standard_normal(words.shape)).astype(words.dtype)
    z[0], z[1] = np.nan, np.inf
    for some in (z, z[:1], z[:0]):
        expected = rows.encode(some)
        apart = int(np.sum(code.run(None, {"z": some})[0] != expected))
        if apart > _TIES * expected.size:
            raise RunError(f"onnxruntime must give NumPy's tokens, got {apart} others of {expected.size}")


def _constants(onnx: ModuleType, words: search.Prepared) -> search.Prepared:
    return search.Prepared(*(onnx.asarray(np.asarray(x)) for x in words))


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise DataError(f"it needs {name}; pip install 'diveq-core[onnx]'") from None
