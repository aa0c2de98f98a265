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


def started(folder: Path, code: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """Python code in a process of its own, which may import what lies in a folder of tests."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            **environment,
        },
    )


def finish(*processes: subprocess.Popen) -> None:
    """Wait for processes, each of which must succeed."""
    try:
        for process in processes:
            output, _ = process.communicate(timeout=180)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
