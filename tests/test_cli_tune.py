"""``canvas-engineering tune``, with invented measurements in place of a GPU's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_refusals import refused

from canvas_engineering.cli import main as cli, tune as command
from canvas_engineering.cli.main import main
from canvas_engineering.kernels.triton import config
from canvas_engineering.kernels.triton.config import KernelConfig, Key, Tile, read_table, tuned_table_path
from canvas_engineering.kernels.triton.tune import CandidateError

pytest.importorskip("triton")

DEVICE = "NVIDIA Example 100"


class Invented:
    """One millisecond and a bit per kernel; pipelines of three stages do not fit."""

    measured: int = 0

    def kernel(self, key: Key, config: KernelConfig) -> float:
        if config.num_stages == 3:
            raise CandidateError("OutOfResources")
        type(self).measured += 1
        return 1e-3 + 1e-6 * config.other_block(key.kernel)

    def tile(self, tile: Tile) -> float:
        return 1.0 if (tile.block_q, tile.block_kv) == (128, 64) else 2.0


@pytest.fixture(autouse=True)
def gpu(kernel_table_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU by name only, and a cache folder of the test's own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: DEVICE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(command, "make_measure", lambda gpu: Invented())
    Invented.measured = 0


ARGUMENTS = ["tune", "--head-dim", "64", "--dtype", "bfloat16"]


def test_it_measures_keeps_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ARGUMENTS) == 0
    text = capsys.readouterr().out
    table = read_table(tuned_table_path(DEVICE))
    assert (table.architecture, len(table.tiles)) == ("sm_90", 16)
    assert table.source.startswith(f"measured on {DEVICE}, canvas-engineering 0.6.0, triton ")
    for key, entry in table.kernels.items():
        assert entry.num_stages != 3
        (line,) = [line for line in text.splitlines() if line.startswith(" ".join(map(str, key)) + " ")]
        assert f"{entry.block_m} x {entry.block_n}" in line
    assert "fastest tile of plans, 64 float16: 128 x 64" in text
    assert f"{Invented.measured + 16} candidates measured" in text
    assert "x OutOfResources" in text
    assert f"written   {tuned_table_path(DEVICE)}" in text


def test_the_second_call_measures_nothing_and_again_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ARGUMENTS) == 0
    once = Invented.measured
    capsys.readouterr()
    assert main(ARGUMENTS) == 0
    assert Invented.measured == once
    assert "25 entries were measured before and kept; --again measures them anew" in capsys.readouterr().out
    assert main([*ARGUMENTS, "--again"]) == 0
    assert Invented.measured == 2 * once


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = tmp_path / "sm_90.json"
    assert main([*ARGUMENTS, "--json", "--export", str(exported)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["architecture"]) == (DEVICE, "sm_90")
    assert (found["kept"], found["left"], found["hopeless"]) == (0, 0, [])
    assert found["exported"] == str(exported)
    table = read_table(exported)
    assert set(table.kernels) >= set(config.shipped_table("sm_90").kernels)
    for entry in found["entries"]:
        key = Key(*(entry[name] for name in Key._fields))
        assert table.kernels[key] == KernelConfig(
            *(entry[name] for name in ("block_m", "block_n", "num_warps", "num_stages"))
        )
        assert entry["seconds"] > 1e-3


def test_a_spent_budget_says_what_is_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*ARGUMENTS, "--budget", "1e-9"]) == 0
    assert "25 entries are left: the budget is spent, the next call goes on" in capsys.readouterr().out


def test_entries_without_a_usable_candidate_end_with_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Invented):
        def kernel(self, key: Key, config: KernelConfig) -> float:
            raise CandidateError("wrong results")

    monkeypatch.setattr(command, "make_measure", lambda gpu: Broken())
    assert main(ARGUMENTS) == 1
    text = capsys.readouterr().out
    assert "no candidate could be used for forward 64 float16 many 128" in text
    assert "x wrong results" in text


def test_an_interrupt_keeps_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Invented):
        def kernel(self, key: Key, config: KernelConfig) -> float:
            if key.kernel == "backward_kv":
                raise KeyboardInterrupt
            return super().kernel(key, config)

    monkeypatch.setattr(command, "make_measure", lambda gpu: Interrupted())
    assert main(ARGUMENTS) == 130
    assert {key.kernel for key in read_table(tuned_table_path(DEVICE)).kernels} == {"forward", "backward_q"}
    monkeypatch.setattr(command, "make_measure", lambda gpu: Invented())
    capsys.readouterr()
    assert main(ARGUMENTS) == 0
    assert "16 entries were measured before and kept" in capsys.readouterr().out


# -- dry run ------------------------------------------------------------------------------------------------


def test_a_dry_run_lists_and_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "forward 64 float16 many 128" in text
    assert "candidates would be measured for sm_90." in text
    assert Invented.measured == 0
    assert not tuned_table_path(DEVICE).exists()


def test_a_dry_run_knows_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ARGUMENTS) == 0
    capsys.readouterr()
    assert main([*ARGUMENTS, "--head-dim", "64", "128", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {entry["name"].split()[1] for entry in found["entries"] if entry["measured"]} == {"64"}
    assert found["candidates"] == sum(entry["candidates"] for entry in found["entries"] if not entry["measured"])


def test_a_dry_run_needs_no_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["architecture"], found["device"]) == ("sm_90", None)
    assert main(["tune", "--dry-run", "--target", "gfx942"]) == 0
    assert "for gfx942." in capsys.readouterr().out


# -- refused ------------------------------------------------------------------------------------------------


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(ARGUMENTS, capsys) == (
        "error: tune measures on an NVIDIA or AMD GPU, and torch.cuda.is_available() is False"
    )


def test_an_old_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "needs compute capability at least 8.0, got 7.5" in refused(ARGUMENTS, capsys)


@pytest.mark.parametrize("module", ["triton", "tqdm", "torch"])
def test_without_a_package(module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("canvas_engineering._optional.installed", lambda name: name != module)
    assert refused(ARGUMENTS, capsys) == (
        f"error: tune needs the package {module!r}, which is not installed: pip install 'canvas-engineering[triton]'"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device must be a GPU, cuda:0 to cuda:0, got 'cpu'"),
        (["--device", "cuda:3"], "--device must be a GPU, cuda:0 to cuda:0, got 'cuda:3'"),
        (["--device", "nonsense"], "--device must name a torch device, got 'nonsense'"),
        (["--target", "sm_80"], "--target needs --dry-run: tune measures the GPU that is there, got --target sm_80"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused([*ARGUMENTS, *arguments], capsys) == f"error: {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head-dim", "4"], "must be a number from 8 to 256, got '4'"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
        (["--budget", "0"], "must be a positive number of seconds, got '0'"),
        (["--budget", "soon"], "must be a positive number of seconds, got 'soon'"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(["tune", *arguments])
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err


def test_an_export_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused([*ARGUMENTS, "--export", str(tmp_path)], capsys) == (
        f"error: --export must name a file, got the folder {tmp_path}"
    )
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused([*ARGUMENTS, "--export", str(tmp_path / "file" / "sm_90.json")], capsys)
    assert Invented.measured == 0


def test_the_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command in cli.COMMANDS
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    assert "Nothing is ever tuned without this command." in capsys.readouterr().out
