"""The command: ``python tests/mutants [--jobs 2] [--only SUBSTRING]``."""

from __future__ import annotations

import sys
from pathlib import Path

# Not this folder itself, where mutants of NumPy stand in numpy.py.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from mutants.run import main  # noqa: E402

raise SystemExit(main())
