"""The options of ``fit``, ``encode``, ``decode``, ``inspect`` and ``export``, and the codes that they end by."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diveq_core.commands.tokens.errors import INTERRUPTED, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_Data = Annotated[
    Path,
    typer.Argument(
        help="Vectors: .npy, .npz, .safetensors, Zarr, Parquet or Arrow, an image, or a folder of one kind of them.",
        show_default=False,
    ),
]
_Tokenizer = Annotated[Path, typer.Argument(help="What fit, or a tokenizer's save, wrote.", show_default=False)]
_Column = Annotated[str | None, typer.Option(help="Which column or array, where there are several.")]
_Patch = Annotated[
    int | None, typer.Option(min=1, help="Side of the patches that images are cut into, 4 for files of images.")
]
_SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Mark vectors that are not finite instead of refusing.")]
_Report = Annotated[Path | None, typer.Option(help="Picture to write, .png.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one object of JSON.")]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on with what a run left that did not end.")]


def fit_command(
    data: _Data,
    out: Annotated[Path, typer.Option("-o", "--out", help="Tokenizer to write, .safetensors.", show_default=False)],
    codewords: Annotated[int, typer.Option(help="Codewords, K.")] = 1024,
    stages: Annotated[int, typer.Option(help="Stages, each of what those before it left.")] = 1,
    groups: Annotated[int, typer.Option(help="Groups of entries, with a token each.")] = 1,
    method: Annotated[
        str, typer.Option(help="kmeans, ema, ste, nsvq, diveq, diveq-detach, rotation, sf-diveq or sf-diveq-detach.")
    ] = "kmeans",
    passes: Annotated[int, typer.Option(help="Passes over the data, in k-means at most and in each stage.")] = 10,
    sample: Annotated[int | None, typer.Option(help="Vectors that the codebook begins with.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Of Adam, in standard deviations of an entry.")] = 0.01,
    position_bits: Annotated[int, typer.Option(help="On a curve, bits of a position.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    column: _Column = None,
    patch: _Patch = None,
    skip_bad: _SkipBad = False,
    report: _Report = None,
    json: _Json = False,
) -> None:
    """Fit a tokenizer to vectors that need not fit in memory."""
    from diveq_core.commands.tokens.fit import Settings, fit

    with _messages("fit"):
        settings = Settings(
            *(codewords, stages, groups, method, passes, sample, learning_rate, position_bits), seed=seed
        )
        _say(fit(data, out, settings, column=column, patch=patch, skip_bad=skip_bad, report=report), json)


def encode_command(
    tokenizer: _Tokenizer,
    data: _Data,
    out: Annotated[Path, typer.Option("-o", "--out", help="Tokens to write, .npy or .zarr.", show_default=False)],
    column: _Column = None,
    patch: _Patch = None,
    skip_bad: _SkipBad = False,
    resume: _Resume = False,
    json: _Json = False,
) -> None:
    """Write the tokens of vectors, in the smallest unsigned integers that hold them."""
    from diveq_core.commands.tokens.coding import encode

    with _messages("encode"):
        _say(encode(tokenizer, data, out, column=column, patch=patch, skip_bad=skip_bad, resume=resume), json)


def decode_command(
    tokenizer: _Tokenizer,
    tokens: Annotated[Path, typer.Argument(help="Tokens: .npy, .npz or Zarr.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Vectors to write, .npy or .zarr.", show_default=False)],
    resume: _Resume = False,
    json: _Json = False,
) -> None:
    """Write the vectors that tokens stand for."""
    from diveq_core.commands.tokens.coding import decode

    with _messages("decode"):
        _say(decode(tokenizer, tokens, out, resume=resume), json)


def inspect_command(
    tokenizer: _Tokenizer,
    data: Annotated[Path | None, typer.Option(help="Vectors, as fit takes them.")] = None,
    column: _Column = None,
    patch: _Patch = None,
    skip_bad: _SkipBad = False,
    report: _Report = None,
    json: _Json = False,
) -> None:
    """Say what a tokenizer is, how far its codewords lie apart, and what it does to data."""
    from diveq_core.commands.tokens.inspect import inspect

    with _messages("inspect"):
        found = inspect(tokenizer, data=data, column=column, patch=patch, skip_bad=skip_bad, report=report)
        _say(found, json)


def export_command(
    tokenizer: _Tokenizer,
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="Encoder to write, .onnx; the decoder goes beside it.", show_default=False),
    ],
    json: _Json = False,
) -> None:
    """Write a tokenizer's encoder and decoder as graphs of ONNX, of any number of vectors."""
    from diveq_core.commands.tokens.coding import load
    from diveq_core.commands.tokens.export import export

    with _messages("export"):
        _say(export(load(tokenizer), out), json)


def _say(found: dict[str, Any], json: bool) -> None:
    from diveq_core.commands.tokens.report import as_json, as_lines

    typer.echo(as_json(found) if json else as_lines(found))


_KEPT = "what was written so far is kept, and --resume goes on with it"


@contextmanager
def _messages(command: str) -> Iterator[None]:
    """One line for what goes wrong, and the code of its kind."""
    kept = f"; {_KEPT}" if command in ("encode", "decode") else "; nothing was written"
    try:
        yield
    except DataError as error:
        typer.echo(f"{command}: {error}", err=True)
        raise typer.Exit(error.code) from None
    except KeyboardInterrupt:
        typer.echo(f"{command}: interrupted{kept}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        named = "" if error.filename is None else f": {error.filename}"
        typer.echo(f"{command}: {error.strerror or error}{named}{kept if full else ''}", err=True)
        raise typer.Exit(1) from None
    except MemoryError as error:
        typer.echo(f"{command}: these sizes do not fit in memory: {error}", err=True)
        raise typer.Exit(2) from None
    except ImportError as error:
        typer.echo(f"{command}: {error}", err=True)
        raise typer.Exit(2) from None


COMMANDS: dict[str, Callable[..., None]] = {
    "fit": fit_command,
    "encode": encode_command,
    "decode": decode_command,
    "inspect": inspect_command,
    "export": export_command,
}
