"""What docs/tokens.md shows is what happens: its commands and its Python in their order, in one folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from diveq_core.commands.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "tokens.md"


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    commands = []
    for kind, block in re.findall(
        r"^```(sh|python)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    ):
        if kind == "python":
            exec(block, names)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            if program == "python":
                assert arguments[0] == "-c"
                exec(arguments[1], {})
                continue
            assert program == "diveq-core"
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, result.output
            commands.append(arguments[0])
    assert set(commands) == {"fit", "encode", "decode", "inspect", "export"}
    assert (tmp_path / "report.png").exists()


def test_every_option_that_the_page_names_is_one():
    given = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE.read_text(encoding="utf-8")))
    known = {"--install-completion", "--help"}
    for command in ("fit", "encode", "decode", "inspect", "export"):
        known |= set(re.findall(r"--[a-z-]+", CliRunner().invoke(app, [command, "--help"]).stdout))
    assert given <= known
