"""What the commands share: the error for a person at the terminal, the checks that raise it, the console."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console


class UsageError(ValueError):
    """A message for the person at the terminal: what was wrong, what was expected and what was got."""


def check_integer(error: type[UsageError], name: str, value: Any, at_least: int, below: int | None = 1 << 31) -> None:
    """Check an option's integer; ``name`` is that of the field, ``error`` the command's own. No array is 2^31 long."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise error(f"{option} must be an integer >= {at_least}, got {value}")
    if below is not None and value >= below:
        raise error(f"{option} must be an integer below 2^{below.bit_length() - 1}, got {value}")


def check_output(error: type[UsageError], option: str, path: Path, suffix: str) -> None:
    """Check that a file can be written, so that no run is lost."""
    if path.suffix.lower() != suffix:
        raise error(f"{option} must be a file name ending in {suffix}, got {path}")
    if path.is_dir():
        raise error(f"{option} must be a file, got the folder {path}")
    if not path.parent.is_dir():
        raise error(f"{option} must be in a folder that exists, got {path}")
    there = path.exists()
    try:
        if not os.access(path if there else path.parent, os.W_OK):
            raise PermissionError
        # Tried, as rights alone do not tell: no file system for processes takes one, say.
        with path.open("ab"):
            pass
    except OSError:
        raise error(f"{option} must be a file that can be written, got {path}, which may not") from None
    if not there:
        path.unlink()


def wide_console(narrowest: int) -> Console:
    """The console of standard output, at least so many columns wide where it is not a terminal."""
    from rich.console import Console

    console = Console()
    # A file or a pipe has no width of its own; a table squeezed into 80 columns would lose its figures.
    return console if console.is_terminal else Console(width=max(console.width, narrowest))
