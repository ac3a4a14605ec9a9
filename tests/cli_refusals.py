"""How the tests of the commands check a refusal."""

from __future__ import annotations

import pytest

from canvas_engineering.cli.main import main


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run, check exit status 2, nothing on standard output, one ``error:`` line; return it."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line
