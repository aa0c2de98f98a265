"""``python -m diveq_core``: the commands."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_EXTRA = {
    "typer": "typer",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "threadpoolctl": "threadpoolctl",
}


def main() -> None:
    """Run the command line, or say in one line how to install what it needs."""
    missing = [package for module, package in _EXTRA.items() if find_spec(module) is None]
    if missing:
        sys.stderr.write(
            f'diveq_core: the commands need {", ".join(missing)}, not installed here: pip install "diveq-core[cli]"\n'
        )
        sys.exit(2)
    from diveq_core.commands.cli import app

    app(prog_name="python -m diveq_core")


if __name__ == "__main__":
    main()
