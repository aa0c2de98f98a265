"""The command line: options and messages. What a command does is in its own package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diveq_core.commands.bench.settings import BenchError
from diveq_core.commands.bench.settings import Settings as BenchSettings
from diveq_core.commands.compare.recipes import DEFAULT, RECIPES
from diveq_core.commands.compare.settings import CompareError, Settings
from diveq_core.commands.tokens.cli import COMMANDS

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("diveq-core"))
        raise typer.Exit


@app.callback()
def commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Vector quantization from the command line: tokens of files of vectors, and experiments."""


for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


@app.command("compare")
def compare_command(
    data: Annotated[
        Path | None,
        typer.Option(help="Image, folder of images, or .npy of one or a stack; two photographs by default."),
    ] = None,
    backend: Annotated[str, typer.Option(help="Array library: numpy, torch, jax or cupy.")] = "numpy",
    estimators: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Repeated or separated by commas, or all: {', '.join(RECIPES)}. The first {len(DEFAULT)} by default."
        ),
    ] = None,
    codewords: Annotated[int, typer.Option(help="Codewords in the codebook, K.")] = Settings.codewords,
    dim: Annotated[int, typer.Option(help="Dimension of a codeword, D.")] = Settings.dim,
    patch: Annotated[int, typer.Option(help="Side of a patch in pixels.")] = Settings.patch,
    warmup: Annotated[int, typer.Option(help="Steps before the codebook is made.")] = Settings.warmup,
    steps: Annotated[int, typer.Option(help="Steps with the quantizer.")] = Settings.steps,
    batch: Annotated[int, typer.Option(help="Patches per step.")] = Settings.batch,
    seeds: Annotated[int, typer.Option(help="Repetitions.")] = Settings.seeds,
    seed: Annotated[int, typer.Option(help="First seed.")] = Settings.seed,
    learning_rate: Annotated[float, typer.Option(help="Adam's learning rate.")] = Settings.learning_rate,
    replace: Annotated[bool, typer.Option(help="Replace unused codewords.")] = Settings.replace,
    replace_every: Annotated[int, typer.Option(help="Steps between replacements.")] = Settings.replace_every,
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("compare.png"),
    json: Annotated[Path | None, typer.Option(help="Also write the table and the loss curves as data.")] = None,
) -> None:
    """Train a patch autoencoder per estimator and seed on photographs; print a table and save a picture."""
    from diveq_core.commands.compare.command import compare

    try:
        settings = Settings(
            estimators=Settings.estimators if estimators is None else tuple(estimators),
            codewords=codewords,
            dim=dim,
            patch=patch,
            warmup=warmup,
            steps=steps,
            batch=batch,
            seeds=seeds,
            seed=seed,
            learning_rate=learning_rate,
            replace=replace,
            replace_every=replace_every,
        )
        compare(settings, backend, data, out, json)
    except CompareError as error:
        typer.echo(f"compare: {error}", err=True)
        raise typer.Exit(2) from None
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        typer.echo(f"compare: these sizes do not fit in memory: {_first_line(error)}", err=True)
        raise typer.Exit(2) from None


@app.command("bench")
def bench_command(
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, in about a minute; judges no bar.")] = False,
    grid: Annotated[bool, typer.Option("--grid", help="Time the sizes given below instead of the bars.")] = False,
    n: Annotated[list[int] | None, typer.Option(help="Vectors, N; may be repeated, as all of these.")] = None,
    k: Annotated[list[int] | None, typer.Option(help="Codewords, K.")] = None,
    d: Annotated[list[int] | None, typer.Option(help="Dimension, D.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, float64, float16 or bfloat16.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="numpy, torch, jax or cupy; those of the device by default.")
    ] = None,
    device: Annotated[list[str] | None, typer.Option(help="cpu or cuda.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Rounds; 7 by default, 3 if quick.")] = None,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory, each in its own process.")] = True,
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("bench.png"),
    json: Annotated[Path | None, typer.Option(help="Also write all figures as data.")] = None,
) -> None:
    """Time search and training step beside other packages; print ratios, save a picture of how cost grows."""
    from diveq_core.commands.bench.command import bench

    try:
        settings = BenchSettings(
            quick=quick,
            grid=grid,
            n=tuple(n or ()),
            k=tuple(k or ()),
            d=tuple(d or ()),
            dtype=tuple(dtype or ()),
            backend=tuple(backend or ()),
            device=tuple(device or ()),
            repeats=repeats,
            memory=memory,
        )
        bench(settings, out, json)
    except BenchError as error:
        typer.echo(f"bench: {error}", err=True)
        raise typer.Exit(2) from None
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        typer.echo(f"bench: these sizes do not fit in memory: {_first_line(error)}", err=True)
        raise typer.Exit(2) from None


def _is_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether there was no memory left: PyTorch and JAX have no common class for that, and say it in words."""
    words = ("can't allocate memory", "out of memory", "resource_exhausted")
    return isinstance(error, MemoryError) or any(x in str(error).lower() for x in words)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
