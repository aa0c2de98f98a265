"""Python in a process of its own, and what is installed for it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

# Another process is writing just this program to the folder that JAX compiles to, so it is compiled again.
_UNREAD = "Error reading persistent compilation cache entry"


def run_python(code: str, *arguments: str) -> str:
    """Output of Python code in a fresh process, whose warnings are errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", f"ignore:{_UNREAD}", "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
