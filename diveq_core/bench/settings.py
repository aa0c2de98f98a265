"""The options of one benchmark, checked before anything is timed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

_BACKENDS = ("numpy", "torch", "jax", "cupy")
_DTYPES = ("float32", "float64", "float16", "bfloat16")
_DEVICES = ("cpu", "cuda")


class BenchError(ValueError):
    """A message for the person at the terminal: what was wrong, what was expected and what was got."""


@dataclass(frozen=True)
class Settings:
    """What to time.

    Parameters
    ----------
    quick : bool
        Small sizes, seconds instead of minutes; nothing is judged by them.
    grid : bool
        Times over all combinations of the given sizes, dtypes and devices, instead of the bars.
    n, k, d : tuple of int
        Sizes of the grid; empty for the default.
    dtype, backend, device : tuple of str
        Of the grid; empty for the default, which is float32, the backends that compute on the device, and the CPU.
    repeats : int
        Rounds in each comparison.
    memory : bool
        Whether to measure peak memory, each contender in its own process.
    """

    quick: bool = False
    grid: bool = False
    n: tuple[int, ...] = ()
    k: tuple[int, ...] = ()
    d: tuple[int, ...] = ()
    dtype: tuple[str, ...] = ()
    backend: tuple[str, ...] = ()
    device: tuple[str, ...] = ()
    repeats: int | None = None
    memory: bool = True

    def __post_init__(self) -> None:
        default = (
            {"n": (256,), "k": (16, 64), "d": (8,)} if self.quick else {"n": (16384,), "k": (256, 4096), "d": (64,)}
        )
        for name in ("n", "k", "d"):
            values = self._given(name)
            for value in values:
                _check_integer(name, value, 1)
            object.__setattr__(self, name, tuple(dict.fromkeys(values)) or default[name])
        for name, known, otherwise in (
            ("dtype", _DTYPES, ("float32",)),
            ("backend", _BACKENDS, ()),
            ("device", _DEVICES, ("cpu",)),
        ):
            values = tuple(part.strip().lower() for value in self._given(name) for part in value.split(","))
            for value in values:
                if value not in known:
                    raise BenchError(f"--{name} must be among {', '.join(known)}, got {value!r}")
            object.__setattr__(self, name, tuple(dict.fromkeys(values)) or otherwise)
        if self.repeats is None:
            object.__setattr__(self, "repeats", 3 if self.quick else 7)
        _check_integer("repeats", self.repeats, 1)

    def _given(self, name: str) -> tuple[Any, ...]:
        values = tuple(getattr(self, name))
        if values and not self.grid:
            got = " ".join(f"--{name} {value}" for value in values)
            raise BenchError(f"--{name} needs --grid, since the default run has its own sizes; got {got} without it")
        return values


def check_output(option: str, path: Path, suffix: str) -> None:
    """Check that a file can be written, so that no measurement is lost."""
    if path.suffix.lower() != suffix:
        raise BenchError(f"{option} must be a file name ending in {suffix}, got {path}")
    if path.is_dir():
        raise BenchError(f"{option} must be a file, got the folder {path}")
    if not path.parent.is_dir():
        raise BenchError(f"{option} must be in a folder that exists, got {path}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BenchError(f"{option} must be a file that can be written, got {path}, which may not")


def _check_integer(name: str, value: Any, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise BenchError(f"--{name} must be an integer >= {at_least}, got {value}")
