"""The command: check everything, train with a progress display, then print the table and save the picture."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from diveq_core.commands.compare.images import load_images
from diveq_core.commands.compare.libraries import load_library
from diveq_core.commands.compare.patches import Patches
from diveq_core.commands.compare.picture import save_picture
from diveq_core.commands.compare.recipes import RECIPES
from diveq_core.commands.compare.report import as_data, table
from diveq_core.commands.compare.settings import CompareError, Settings
from diveq_core.commands.compare.training import Experiment, Run
from diveq_core.commands.terminal import check_output, wide_console

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import TaskID

    from diveq_core.commands.compare.libraries import Library

_NARROWEST = 132


def compare(settings: Settings, backend: str, data: Path | None, out: Path, data_out: Path | None) -> None:
    """Run the comparison that ``settings`` describe.

    Raises
    ------
    CompareError
        Before any training, if an option, the data, the library or an output file is not usable.
    """
    check_output(CompareError, "--out", out, ".png")
    if data_out is not None:
        check_output(CompareError, "--json", data_out, ".json")
    patches = Patches(load_images(data), settings.patch)
    if settings.codewords > patches.positions:
        raise CompareError(
            f"--codewords must be at most the number of training patches, {patches.positions}, got {settings.codewords}"
        )
    library = load_library(backend)
    console = wide_console(_NARROWEST)
    console.print(describe(patches, library, settings), highlight=False, soft_wrap=True)
    began = time.perf_counter()
    runs = train_all(Experiment(patches, library, settings), settings)
    console.print(table(runs))
    save_picture(out, runs, patches)
    console.print(f"Picture: {out}", highlight=False, soft_wrap=True)
    if data_out is not None:
        data_out.write_text(json.dumps(as_data(runs, patches, library, settings), indent=1) + "\n", encoding="utf-8")
        console.print(f"Table as data: {data_out}", highlight=False, soft_wrap=True)
    console.print(f"{time.perf_counter() - began:.0f} s in all", highlight=False)


def describe(patches: Patches, library: Library, settings: Settings) -> str:
    """What is going to be trained."""
    p, seeds = settings.patch, range(settings.seed, settings.seed + settings.seeds)
    return (
        f"Data: {patches.source}; patches of {p} x {p} x {patches.channels}, {len(patches.held_out)} held out "
        f"(the bottom quarter of each image), {patches.positions} positions to train on\n"
        f"Model: {patches.size} - {settings.width} - {settings.dim} - {settings.width} - {patches.size}, "
        f"K = {settings.codewords} codewords of dimension D = {settings.dim}\n"
        f"Training: {settings.warmup} steps without quantizer, {settings.steps} with, batches of {settings.batch}, "
        f"Adam from {settings.learning_rate:g}, seeds {', '.join(map(str, seeds))}\n"
        f"{_replacement(settings)}\n"
        f"Library: {library.name} {library.version}, float64, {library.device}"
    )


def _replacement(settings: Settings) -> str:
    if settings.replace:
        return f"Replacement: of unused codewords every {settings.replace_every} steps"
    return "Replacement: none"


def train_all(experiment: Experiment, settings: Settings) -> dict[str, list[Run]]:
    """All runs, by recipe, with a progress display on a terminal and silence elsewhere."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[reached]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    seeds = range(settings.seed, settings.seed + settings.seeds)
    runs: dict[str, list[Run]] = {name: [] for name in settings.estimators}
    with experiment.library.session(), progress:
        tasks = {
            name: progress.add_task(RECIPES[name].label, total=settings.steps * len(seeds), start=False, reached="")
            for name in runs
        }
        for name, task in tasks.items():
            progress.start_task(task)
            for seed in seeds:

                def advance(steps: int, error: float, task: TaskID = task, seed: int = seed) -> None:
                    progress.update(task, advance=steps, reached=f"seed {seed}  held-out MSE {error:.5f}")

                runs[name].append(experiment.run(name, seed, advance))
            progress.stop_task(task)
    return runs
