"""The options of one benchmark, checked before anything is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diveq_core.commands.bench.problem import BACKENDS, DEVICES, DTYPES
from diveq_core.commands.terminal import UsageError, check_integer


class BenchError(UsageError):
    """A benchmark that cannot be run as asked for."""


@dataclass(frozen=True)
class Settings:
    """What to time.

    Parameters
    ----------
    quick : bool
        Small sizes, in about a minute; no bar is judged by them.
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
                check_integer(BenchError, name, value, 1)
            object.__setattr__(self, name, tuple(dict.fromkeys(values)) or default[name])
        for name, known, otherwise in (
            ("dtype", DTYPES, ("float32",)),
            ("backend", BACKENDS, ()),
            ("device", DEVICES, ("cpu",)),
        ):
            values = tuple(part.strip().lower() for value in self._given(name) for part in value.split(","))
            for value in values:
                if value not in known:
                    raise BenchError(f"--{name} must be among {', '.join(known)}, got {value!r}")
            object.__setattr__(self, name, tuple(dict.fromkeys(values)) or otherwise)
        if self.repeats is None:
            object.__setattr__(self, "repeats", 3 if self.quick else 7)
        check_integer(BenchError, "repeats", self.repeats, 1)

    def _given(self, name: str) -> tuple[Any, ...]:
        values = tuple(getattr(self, name))
        if values and not self.grid:
            got = " ".join(f"--{name} {value}" for value in values)
            raise BenchError(f"--{name} needs --grid, since the default run has its own sizes; got {got} without it")
        return values
