"""``diveq-core`` and ``python -m diveq_core``: the commands."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_ALWAYS = {"typer": "typer", "rich": "rich"}
_EXPERIMENTS = {
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "threadpoolctl": "threadpoolctl",
}


def main(prog_name: str | None = None) -> None:
    """Run the command line, or say in one line how to install what it needs."""
    # The others say what a file of theirs needs, when they are given one.
    experiment = any(name in sys.argv[1:2] for name in ("compare", "bench"))
    needed = _ALWAYS | _EXPERIMENTS if experiment else _ALWAYS
    missing = [package for module, package in needed.items() if find_spec(module) is None]
    if missing:
        sys.stderr.write(
            f'diveq_core: the commands need {", ".join(missing)}, not installed here: pip install "diveq-core[cli]"\n'
        )
        sys.exit(2)
    from diveq_core.commands.cli import app

    app(prog_name=prog_name)


if __name__ == "__main__":
    main("python -m diveq_core")
