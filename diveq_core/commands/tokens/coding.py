"""``encode`` and ``decode``: from a file of vectors to one of tokens and back, a chunk at a time."""

from __future__ import annotations

import hashlib
import importlib.util
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from diveq_core.commands.terminal import check_output
from diveq_core.commands.tokens.errors import DataError, NotFiniteError
from diveq_core.commands.tokens.progress import Display
from diveq_core.commands.tokens.sinks import Sink, open_sink
from diveq_core.commands.tokens.sources.opening import open_data, open_tokens
from diveq_core.layers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diveq_core.commands.tokens.sources import Source

CHUNK_BYTES = 1 << 24
"""Of vectors that are read at a time."""


def chunk_rows(dim: int) -> int:
    """How many vectors are read at a time: their number depends on nothing else, so that a later run has the same."""
    return max(CHUNK_BYTES // (4 * dim), 1)


def load(path: Path) -> Tokenizer:
    """The tokenizer of a file, as one that takes rows and marks those that are not finite."""
    if not path.is_file():
        raise DataError(f"TOKENIZER must be a file that fit wrote, got {path}, which does not exist")
    try:
        tokenizer = Tokenizer.load(path)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise DataError(f"TOKENIZER must be a file that fit or a tokenizer's save wrote: {error}") from None
    if tokenizer.settings.on_curve and tokenizer.position_bits is None:
        raise DataError(
            f"TOKENIZER must give integers, got a curve without position_bits in {path}, whose tokens have a real "
            "position; Tokenizer(..., position_bits=8) rounds it"
        )
    return tokenizer.of_rows()


def token_dtype(tokenizer: Tokenizer, *, marks: bool) -> np.dtype:
    """The smallest unsigned integers that hold all tokens, and, if there may be ``marks``, one number more."""
    return np.min_scalar_type(tokenizer.token_count - (0 if marks else 1))


def not_finite(path: Path, row: int, lead: tuple[int, ...]) -> NotFiniteError:
    """A vector that is not finite, by its number and, where there are more axes, its place."""
    place = "" if len(lead) < 2 else f", at {tuple(int(i) for i in np.unravel_index(row, lead))}"
    return NotFiniteError(
        f"DATA must be finite, got NaN or infinity in row {row}{place} of {path}; --skip-bad marks it"
    )


def encode(
    tokenizer: Path,
    data: Path,
    out: Path,
    *,
    column: str | None = None,
    patch: int | None = None,
    skip_bad: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Write the tokens of all vectors; what was done, by name.

    Raises
    ------
    DataError
        If an option or a file cannot be used.
    """
    quantizer = load(tokenizer)
    source = open_data(data, column, patch)
    check_width(quantizer, source, tokenizer)
    dtype = token_dtype(quantizer, marks=skip_bad)
    mark = np.iinfo(dtype).max

    def tokens(z: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        found = quantizer.encode(z)
        marked = found.reshape(len(z), -1)[:, 0] < 0
        if marked.any():
            if not skip_bad:
                raise not_finite(data, first + int(marked.argmax()), source.lead)
            found = np.where(found < 0, mark, found)
        return found.astype(dtype), marked

    made_of = {"tokenizer": digest(tokenizer), "data": source.identity(), "--skip-bad": skip_bad}
    sink = open_sink(out, source.lead, quantizer.settings.axes, dtype, made_of)
    return {
        "command": "encode",
        "tokenizer": str(tokenizer),
        "data": str(data),
        "out": str(out),
        **_written(source, sink, tokens, source.dim, resume=resume),
        "bits_per_vector": quantizer.bits,
    }


def decode(tokenizer: Path, tokens: Path, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Write the vectors of all tokens; a mark gives NaN.

    Raises
    ------
    DataError
        If an option or a file cannot be used.
    """
    quantizer = load(tokenizer)
    source = open_tokens(tokens, len(quantizer.settings.axes))
    if source.item != quantizer.settings.axes:
        raise DataError(
            f"TOKENS must end in the axes {quantizer.settings.axes} of groups and stages, got shape "
            f"{(*source.lead, *source.item)} in {tokens}"
        )
    count, kind = quantizer.token_count, np.dtype(source.dtype)
    largest = np.iinfo(kind).max

    def vectors(found: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        marks = found == largest if kind.kind == "u" and largest >= count else found == -1
        wrong = ~marks & ((found < 0) | (found >= count))
        if wrong.any():
            row = int(np.flatnonzero(wrong.reshape(len(found), -1).any(axis=1))[0])
            value = found.reshape(len(found), -1)[row][wrong.reshape(len(found), -1)[row]][0]
            raise DataError(
                f"TOKENS must be below {count}, or the mark, got {value} in row {first + row} of {tokens}; are they of "
                "another tokenizer?"
            )
        z_q = quantizer.decode(np.where(marks, -1, found.astype(np.int64)))
        return z_q, marks.reshape(len(found), -1)[:, 0]

    made_of = {"tokenizer": digest(tokenizer), "tokens": source.identity()}
    dtype = np.dtype(np.float32 if quantizer.codebook is None else quantizer.codebook.dtype)
    sink = open_sink(out, source.lead, (quantizer.settings.dim,), dtype, made_of)
    return {
        "command": "decode",
        "tokenizer": str(tokenizer),
        "tokens": str(tokens),
        "out": str(out),
        **_written(source, sink, vectors, quantizer.settings.dim, resume=resume),
    }


def check_width(tokenizer: Tokenizer, source: Source, path: Path) -> None:
    """Refuse vectors of another length."""
    if source.dim != tokenizer.settings.dim:
        raise DataError(
            f"DATA must hold vectors of {tokenizer.settings.dim} entries as {path} takes, got {source.dim} in "
            f"{source.path}"
        )


def check_report(path: Path) -> None:
    """Refuse a picture that cannot be drawn or written, before anything is computed."""
    check_output(DataError, "--report", path, ".png")
    if importlib.util.find_spec("matplotlib") is None:
        raise DataError('--report needs matplotlib, not installed here: pip install "diveq-core[cli]"')


def digest(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _written(
    source: Source,
    sink: Sink,
    function: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
    dim: int,
    *,
    resume: bool,
) -> dict[str, Any]:
    """Write what a function makes of each chunk of rows, and of the number of the first."""
    began = time.perf_counter()
    rows = chunk_rows(dim)
    with sink, Display() as display:
        first = row = sink.begin(rows, resume=resume)
        display.stage(str(sink.path), source.rows, row)
        if row < source.rows:
            for chunk in source.chunks(rows, row):
                sink.write(*function(chunk, row))
                row += len(chunk)
                display.advance(len(chunk))
        if row != source.rows:
            raise DataError(f"{source.path} must hold {source.rows} vectors as its header says, got {row}")
        sink.finish()
    seconds = time.perf_counter() - began
    return {
        "vectors": source.rows,
        "shape": [*sink.lead, *sink.item],
        "dtype": sink.dtype.name,
        "skipped": sink.skipped,
        "resumed_at": first,
        "seconds": seconds,
        "vectors_per_second": (source.rows - first) / seconds,
    }
