"""Plan files: what is saved comes back, and what is damaged is refused."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from canvas_engineering.canvas import CanvasLayout
from canvas_engineering.connectivity import CanvasTopology
from canvas_engineering.errors import PlanError
from canvas_engineering.plan import BlockSparsePlan


@pytest.fixture(scope="module")
def plan() -> BlockSparsePlan:
    layout = CanvasLayout(T=3, H=5, W=5, d_model=8, regions={"a": (0, 3, 0, 4, 0, 5), "b": (0, 3, 3, 5, 0, 2)})
    return BlockSparsePlan.from_topology(CanvasTopology.causal_temporal(["a", "b"]), layout, block_q=16, block_kv=16)


@pytest.fixture
def saved(plan: BlockSparsePlan, tmp_path: Path) -> Path:
    path = tmp_path / "canvas.plan"
    plan.save(path)
    return path


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the arrays of a plan file and write it back without touching the recorded digest."""
    with np.load(path) as archive:
        arrays = dict(archive)
    change(arrays)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.write_bytes(buffer.getvalue())


def edit_header(**values: Any) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        header = {**json.loads(arrays["header"].tobytes()), **values}
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)

    return change


def test_a_saved_plan_comes_back_whole(plan: BlockSparsePlan, saved: Path) -> None:
    loaded = BlockSparsePlan.load(saved)
    assert loaded == plan
    assert loaded.digest == plan.digest
    assert (loaded.source, loaded.grid, loaded.regions) == (plan.source, plan.grid, plan.regions)
    assert str(loaded) == str(plan)


def test_an_empty_plan_comes_back(tmp_path: Path) -> None:
    plan = BlockSparsePlan.from_mask(np.zeros((0, 3), bool))
    plan.save(tmp_path / "empty.plan")
    assert BlockSparsePlan.load(tmp_path / "empty.plan") == plan


def test_no_pickle_is_read(saved: Path) -> None:
    rewrite(saved, lambda arrays: arrays.update(entry_kv=np.array([{"a": 1}], dtype=object)))
    with pytest.raises(PlanError, match="damaged or not a plan"):
        BlockSparsePlan.load(saved)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved: Path, keep: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(PlanError, match=r"cannot load plan file.*canvas\.plan"):
        BlockSparsePlan.load(saved)


def test_a_flipped_byte_is_noticed(saved: Path, plan: BlockSparsePlan) -> None:
    content = bytearray(saved.read_bytes())
    for position in range(0, len(content), max(1, len(content) // 50)):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        saved.write_bytes(bytes(damaged))
        try:
            loaded = BlockSparsePlan.load(saved)
        except PlanError:
            continue
        assert loaded == plan, "only bytes that carry no content may go unnoticed"


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.plan"
    text.write_text("not a plan")
    with pytest.raises(PlanError, match="damaged or not a plan"):
        BlockSparsePlan.load(text)
    other = tmp_path / "other.npz"
    np.savez(other, weights=np.ones(3))
    with pytest.raises(PlanError, match="not a plan, it lacks header, q_tokens"):
        BlockSparsePlan.load(other)
    array = tmp_path / "array.npy"
    np.save(array, np.ones(3))
    with pytest.raises(PlanError, match="damaged or not a plan"):
        BlockSparsePlan.load(array)
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme", "hello")
    with pytest.raises(PlanError, match="not a plan"):
        BlockSparsePlan.load(archive)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot load plan file '.*nowhere.plan': No such file or directory"):
        BlockSparsePlan.load(tmp_path / "nowhere.plan")
    with pytest.raises(PlanError, match=r"cannot load plan file.*directory"):
        BlockSparsePlan.load(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"magic": "something else"}, "not a plan of canvas-engineering"),
        ({"version": 99}, "format version must be 1, got 99"),
        ({"digest": "0" * 64}, "its content was changed"),
        ({"num_q": -1}, "num_q must be a non-negative int, got -1"),
        ({"num_q": 1.5}, "num_q must be a non-negative int, got 1.5"),
        ({"block_kv": 12}, "block_kv must be a positive multiple of 8, got 12"),
        ({"softmax": "none"}, 'softmax must be "connection" or "joint"'),
        ({"grid": None}, "header is incomplete"),
    ],
)
def test_edited_headers_are_refused(saved: Path, header: dict[str, Any], message: str) -> None:
    rewrite(saved, edit_header(**header))
    with pytest.raises(PlanError, match=message):
        BlockSparsePlan.load(saved)


def put(name: str, index: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("entry_kv", 0, 9999), r"entry_kv must lie in \[0, \d+\), got 9999"),
        (put("entry_kv", 0, -1), r"entry_kv must lie in \[0, \d+\), got -1"),
        (put("entry_mask", 0, 9999), "entry_mask must lie in"),
        (put("entry_ptr", -1, 9999), "entry_ptr must end with"),
        (put("entry_ptr", 1, 9999), "entry_ptr must not decrease"),
        (put("set_ptr", 0, 1), "set_ptr must start with 0"),
        (put("q_tokens", (0, 0), 9999), "q_tokens must lie in"),
        (put("q_tokens", (0, 0), 1), "q_tokens must hold every token once, got token"),
        (put("kv_tokens", (0, 0), -1), r"kv_tokens must hold padding \(-1\) at a tile's end only"),
        (put("row_weight", (0, 0), np.nan), "row_weight must be finite"),
        (put("row_connection", (0, 0), -2), "row_connection must lie in"),
        (lambda a: a.update(masks=a["masks"][:, :8]), "masks must have shape"),
        (lambda a: a.update(row_weight=a["row_weight"].astype(np.float64)), "row_weight must be float32, got float64"),
        (lambda a: a.update(entry_mask=a["entry_mask"][:-1]), "entry_mask must have shape"),
        (put("row_weight", (0, 0), 0.123), "its content was changed"),
    ],
)
def test_corrupted_arrays_are_refused(saved: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    rewrite(saved, change)
    with pytest.raises(PlanError, match=message):
        BlockSparsePlan.load(saved)


def test_mask_bits_at_padding_are_refused() -> None:
    mask = np.tri(20, 20, dtype=bool)
    plan = BlockSparsePlan.from_mask(mask, block_q=16, block_kv=16)
    masks = plan.masks.copy()
    masks[plan.entry_mask[plan.entry_kv == 1].max(), :, -1] = 0xFF
    with pytest.raises(PlanError, match="must be 0 at padding rows and keys"):
        replace(plan, masks=masks).validate()


def test_writing_where_nothing_can_be_written(plan: BlockSparsePlan, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot write '.*missing.*canvas\.plan': No such file or directory"):
        plan.save(tmp_path / "missing" / "canvas.plan")


def test_a_failed_write_keeps_the_old_file(plan: BlockSparsePlan, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full_disk(file: Any, **arrays: Any) -> None:
        file.write(b"half a plan")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(PlanError, match="No space left on device"):
        plan.save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name], "no temporary file is left behind"
