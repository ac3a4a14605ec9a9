"""Runs the tests marked ``interpreted``: Triton kernels on the CPU, in processes that interpret them.

Whether Triton interprets is settled when a kernel is first imported, so that one process cannot do both. Here every
part of these tests is one test; to run a part by hand, ``TRITON_INTERPRET=1 pytest -m interpreted tests/...``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PARTS = ("equivalence/test_equivalence.py", "equivalence/test_random_canvases.py", "triton_backend")


@pytest.mark.parametrize("part", PARTS)
def test_interpreted(part: str) -> None:
    # Without what the surrounding pytest was told.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-m", "interpreted", "-q", "-p", "no:xdist"]
    # Its logging plugin would add every trace message of torch.compile to a failure.
    command += ["-p", "no:cacheprovider", "-p", "no:logging"]
    done = subprocess.run(
        [*command, str(TESTS / part)],
        cwd=TESTS.parent,
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    report = f"{' '.join(done.args)}\n{done.stdout}\n{done.stderr}"
    if done.returncode != 0:
        pytest.fail(report, pytrace=False)
    # Nothing of it may be skipped: an interpreter needs no hardware.
    assert " passed" in done.stdout.splitlines()[-1], report
    assert "skipped" not in done.stdout.splitlines()[-1], report


def test_no_part_is_forgotten(modules_left_out: set[Path]) -> None:
    """Every module with such tests, of those that this run collected, belongs to a part."""
    forgotten = {
        module for module in modules_left_out if not any(module.is_relative_to(TESTS / part) for part in PARTS)
    }
    assert not forgotten
