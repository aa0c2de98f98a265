"""``python -m diveq_core``: the commands."""

from __future__ import annotations

import sys

_EXTRA = ("typer", "click", "rich", "matplotlib", "sklearn", "PIL", "numpy", "threadpoolctl")


def main() -> None:
    """Run the command line, or say in one line how to install what it needs."""
    try:
        from diveq_core.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        print(f'diveq_core: the commands need {error.name}: pip install "diveq-core[cli]"', file=sys.stderr)
        sys.exit(2)
    app(prog_name="python -m diveq_core")


if __name__ == "__main__":
    main()
