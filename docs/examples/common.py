"""What all examples share: their options, the message where a package is missing, and the table at the end."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

START = time.perf_counter()


def options(about: str, steps: int, out: str) -> argparse.ArgumentParser:
    """The options of every example, to which one may add its own."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for the picture and the trained model")
    return parser


def parsed(parser: argparse.ArgumentParser) -> Any:
    given = parser.parse_args()
    for package in ("matplotlib", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise missing(package)
    if given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out must be a folder, got the file {given.out}")
    given.out.mkdir(parents=True, exist_ok=True)
    return given


def missing(package: str) -> SystemExit:
    """What to raise where a package is not installed."""
    return SystemExit(f"{Path(sys.argv[0]).name}: needs {package}; pip install 'diveq-core[examples]'")


def progress(step: int, steps: int, loss: Any) -> None:
    """Say ten times how far the training is."""
    if (step + 1) % max(1, steps // 10) == 0:
        print(f"step {step + 1} of {steps}: loss {float(loss):.4f}", flush=True)


def table(rows: Sequence[tuple[str, str]], *saved: Path) -> None:
    """Print figures beside their names, how long the script took, and what it wrote."""
    rows = [*rows, ("seconds", f"{time.perf_counter() - START:.0f}")]
    width = max(len(name) for name, _ in rows)
    for name, figure in rows:
        print(f"{name:{width}}  {figure}")
    for path in saved:
        print(f"saved {path}")


def ends(curve: Sequence[float]) -> tuple[str, str]:
    """The row of a table for a loss along training."""
    tenth = max(1, len(curve) // 10)
    first, last = np.mean(curve[:tenth]), np.mean(curve[-tenth:])
    return "loss, first and last tenth of steps", f"{first:.4f}, {last:.4f}"


def psnr(x: np.ndarray, y: np.ndarray) -> float:
    """The peak signal-to-noise ratio in decibels, of numbers from 0 to 1."""
    return float(-10 * np.log10(np.mean((np.asarray(x) - np.asarray(y)) ** 2)))
