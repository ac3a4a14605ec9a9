"""The command line: what it prints, writes and returns, and how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from cli_refusals import refused

from canvas_engineering import BlockSparsePlan, CanvasLayout, CanvasSchema, CanvasTopology, Connection
from canvas_engineering.attention import api
from canvas_engineering.cli import clip, compare, place, run
from canvas_engineering.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
CANVASES = sorted((ROOT / "examples" / "canvases").glob("*.json"))
ROBOT = ROOT / "examples" / "canvases" / "robot.json"

SMALL: dict[str, Any] = {
    "schema_version": "0.2.0",
    "metadata": {"title": "small"},
    "layout": {"T": 3, "spatial_shape": [4, 4], "d_model": 16, "t_current": 0},
    "regions": {"screen": {"bounds": [0, 3, 0, 3, 0, 4]}, "mouse": {"bounds": [0, 3, 3, 4, 0, 2]}},
    "topology": [
        {"src": "screen", "dst": "screen", "t_src": 0, "t_dst": 0},
        {"src": "screen", "dst": "mouse", "t_src": 0, "t_dst": -1},
        {"src": "mouse", "dst": "screen"},
    ],
}

Edit = Callable[[dict[str, Any]], object]


def write_schema(folder: Path, edit: Edit | None = None) -> str:
    """A small schema file, changed by ``edit``."""
    data = json.loads(json.dumps(SMALL))
    if edit is not None:
        edit(data)
    path = folder / "small.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


# -- doctor -------------------------------------------------------------------------------------------------


def test_doctor_names_every_backend_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name, availability in api.available_backends().items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ") and availability.reason in line]
        assert ("  yes" if availability.ok else "  no") in line


def test_doctor_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == "0.6.0"
    assert found["packages"]["numpy"] == np.__version__
    assert found["backends"]["reference"]["ok"] is True
    assert found["devices"]["torch"]


def test_doctor_fails_when_nothing_can_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(api, "_availability", lambda name: api.Availability(False, f"no {name} today"))
    assert main(["doctor"]) == 1
    assert "no reference today" in capsys.readouterr().out


# -- plan ---------------------------------------------------------------------------------------------------


def test_plan_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ROBOT)]) == 0
    schema = CanvasSchema.from_json(ROBOT)
    assert schema.topology is not None
    plan = BlockSparsePlan.from_topology(schema.topology, schema.layout)
    assert str(plan) in capsys.readouterr().out


def test_plan_json_has_the_statistics_of_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_schema(tmp_path)
    assert main(["plan", path, "--softmax", "joint", "--block-q", "16", "--block-kv", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    schema = CanvasSchema.from_json(path)
    assert schema.topology is not None
    plan = BlockSparsePlan.from_topology(schema.topology, schema.layout, softmax="joint", block_q=16, block_kv=8)
    assert found["digest"] == plan.digest
    assert found["stats"] == plan.stats().as_dict()
    assert (found["softmax"], found["compile_seconds"] > 0) == ("joint", True)


def test_plan_is_saved_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, drawn = tmp_path / "small.plan", tmp_path / "small.png"
    assert main(["plan", write_schema(tmp_path), "--save", str(saved), "--png", str(drawn)]) == 0
    text = capsys.readouterr().out
    assert f"written   {saved}" in text
    assert BlockSparsePlan.load(saved).digest[:12] in text
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.json", "small.plan", "small.png"]

    assert main(["plan", str(saved)]) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[:5] == text.splitlines()[:5]
    assert "loaded" in again


def test_a_plan_file_is_not_compiled_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "small.plan"
    assert main(["plan", write_schema(tmp_path), "--save", str(saved)]) == 0
    assert main(["plan", str(saved), "--block-q", "32"]) == 2
    assert "is taken for a plan, which is compiled already: leave them out" in capsys.readouterr().err


@pytest.mark.parametrize("path", CANVASES, ids=lambda path: path.stem)
def test_shipped_canvases_compile_within_the_target(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stats"]["computed_per_true"] <= 1.25


# -- run ----------------------------------------------------------------------------------------------------


def test_run_compares_every_backend_and_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["run", str(ROBOT), "--out", str(out), "--repeat", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["equal"] is True
    status = {(outcome["backend"], outcome["arrays"]): outcome["status"] for outcome in report["outcomes"]}
    assert status["reference", "numpy"] == "reference"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert status["portable", f"torch {device}"] == "equal"
    assert status["portable", f"jax {jax.default_backend()}"] == "equal"
    assert status["dispatcher", f"torch {device}"] == "equal"
    assert set(api.BACKENDS) <= {backend for backend, _ in status}
    assert report["placed"]["visual"].startswith("8 x 8 pixel patches of matplotlib sample data")
    assert report["placed"]["goal"] == "empty tokens"
    assert report["compared"] == "all 320 rows of all 4 heads"
    names = ["plan.png", "report.json", "report.md", "result.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert sorted(Path(path).name for path in report.pop("written")) == names
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == report
    assert "| portable" in (out / "report.md").read_text(encoding="utf-8")


def test_run_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", write_schema(tmp_path), "--heads", "2", "--repeat", "1"]) == 0
    text = capsys.readouterr().out
    assert "every backend that ran equals the reference" in text
    assert "position and motion of the panned window" in text
    assert [path.name for path in tmp_path.iterdir()] == ["small.json"]


@pytest.mark.parametrize("softmax", ["connection", "joint"])
def test_run_takes_arrays_by_region(tmp_path: Path, softmax: str, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    given = tmp_path / "in.npz"
    pixels = rng.integers(0, 256, (5, 30, 40, 3), dtype=np.uint8)
    np.savez(given, screen=pixels, mouse=rng.standard_normal((6, 3)))
    arguments = ["run", write_schema(tmp_path), "--input", str(given), "--softmax", softmax, "--repeat", "1", "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["placed"]["screen"] == f"2 x 2 pixel patches of {given}"
    assert report["placed"]["mouse"] == f"3 features: {given}, array 'mouse'"


def test_run_takes_a_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "clip.npy"
    np.save(given, np.random.default_rng(0).random((3, 9, 12, 3)))
    assert main(["run", write_schema(tmp_path), "--input", str(given), "--repeat", "1", "--json"]) == 0
    assert str(given) in json.loads(capsys.readouterr().out)["placed"]["screen"]


def test_run_fails_when_a_backend_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from canvas_engineering.kernels.portable import backend

    right = backend.attention

    def wrong(q: Any, k: Any, v: Any, *arguments: Any, **options: Any) -> Any:
        return right(q, k, v, *arguments, **options) + 1e-3

    monkeypatch.setattr(backend, "attention", wrong)
    assert main(["run", write_schema(tmp_path), "--repeat", "1"]) == 1
    text = capsys.readouterr().out
    assert "a result DIFFERS from the reference" in text
    assert "max error 1.00e-03 is above" in text


def test_simulators_run_only_on_request() -> None:
    for backend, arrays in (("triton", "torch cpu"), ("pallas", "jax cpu"), ("pallas", "jax gpu")):
        assert compare.simulated(backend, arrays)
    for backend, arrays in (("triton", "torch cuda"), ("pallas", "jax tpu"), ("portable", "torch cpu")):
        assert not compare.simulated(backend, arrays)


def test_a_nan_is_never_equal(tmp_path: Path) -> None:
    allowed = compare.Tolerance(1.0, 1.0, "")
    error = compare.max_and_rms(np.array([0.0, np.nan]))
    outcome = compare.judge("portable", "torch cpu", error, (0.1, 0.1), allowed)
    assert outcome.status == "differs"
    assert outcome.as_dict()["max_error"] is None


def test_large_plans_are_compared_on_some_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "REFERENCE_BUDGET", 1000)
    assert main(["run", str(ROBOT), "--repeat", "1", "--block-q", "16", "--block-kv", "16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "q tiles, evenly spread) of all 4 heads" in report["compared"]
    status = {outcome["backend"]: outcome["status"] for outcome in report["outcomes"]}
    assert status["portable"] == "equal"
    assert status["dispatcher"] == "not compared"


def test_yardstick_is_the_decode_loop(tmp_path: Path) -> None:
    """In float64 the plain loop equals the reference: the two were written apart."""
    schema = CanvasSchema.from_json(write_schema(tmp_path))
    assert schema.topology is not None
    plan = BlockSparsePlan.from_topology(schema.topology, schema.layout, block_q=8, block_kv=16)
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, plan.num_q, 4))
    reference = api.block_sparse_attention(q, k, v, plan, backend="reference")
    for tile in range(plan.num_q_tiles):
        rows = plan.q_tokens[tile][: plan.q_count[tile]]
        np.testing.assert_allclose(compare.plain_tile(plan, tile, q[0], k[0], v[0]), reference[0][:, rows], atol=1e-13)


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda d: d.pop("layout"), ["layout"]),
        (lambda d: d["layout"].pop("T"), ["layout", "T"]),
        (lambda d: d["layout"].update(d_model="wide"), ["d_model", "wide"]),
        (lambda d: d["regions"]["screen"].pop("bounds"), ["screen", "bounds"]),
        (lambda d: d["regions"]["screen"].update(bounds=[0, 3, 0, 9, 0, 4]), ["screen", "9", "4"]),
        (lambda d: d["regions"]["screen"].update(bounds=[0, 3, 2, 1, 0, 4]), ["screen", "2", "1"]),
        (lambda d: d["topology"][1].pop("dst"), ["topology", "1", "dst"]),
        (lambda d: d["topology"][0].update(weight=-1.0), ["weight", "-1"]),
        (lambda d: d["topology"][0].update(temporal_fill="sometimes"), ["temporal_fill", "sometimes"]),
        (lambda d: d.pop("topology"), ["'topology' must hold at least one connection"]),
    ],
)
def test_bad_schema(
    command: str, edit: Edit, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused([command, write_schema(tmp_path, edit)], capsys)
    for word in words:
        assert word in line


def test_file_that_is_no_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.json"
    path.write_text("{'layout':", encoding="utf-8")
    assert str(path) in refused(["plan", str(path)], capsys)
    path.write_bytes(b"\xff\xfe\x00{")
    assert str(path) in refused(["plan", str(path)], capsys)
    path.write_text("[1, 2]", encoding="utf-8")
    refused(["plan", str(path)], capsys)


def test_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(["plan", "absent.json"], capsys) == "error: absent.json: No such file or directory"


def test_unknown_region_is_a_warning_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_schema(tmp_path, lambda d: d["topology"][1].update(dst="mous"))
    assert main(["plan", path]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "mous" in line
    assert "screen" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "3"], "d_model must be divisible by --heads, got d_model=16, heads=3"),
        (["--heads", "0"], "d_model must be divisible by --heads, got d_model=16, heads=0"),
        (["--repeat", "0"], "--repeat must be at least 1, got 0"),
        (["--block-q", "12"], "block_q"),
        (["--input", "absent.npy"], "absent.npy: No such file or directory"),
    ],
)
def test_bad_options(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(["run", write_schema(tmp_path), *options], capsys)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"screen": np.zeros((3, 8, 8))}, "must have shape (36, features), got (3, 8, 8)"),
        ({"screen": np.zeros((3, 8, 8, 4))}, "must have shape (frames, height, width, 3), got (3, 8, 8, 4)"),
        ({"screen": np.zeros((2, 8, 8, 3))}, "needs at least 3 frames of 3 x 4 pixels, got 2 of 8 x 8"),
        ({"screen": np.full((3, 8, 8, 3), 2.0)}, "must lie in 0..1"),
        ({"screen": np.full((3, 8, 8, 3), np.nan)}, "must lie in 0..1"),
        ({"screen": np.zeros((3, 8, 8, 3), dtype=int)}, "must be uint8 or floating point, got int64"),
        ({"scren": np.zeros((36, 2))}, "array 'scren' names no region; known regions: screen, mouse"),
        ({"mouse": np.full((6, 2), np.inf)}, "must be finite"),
        ({"mouse": np.zeros((6, 2), dtype=complex)}, "must hold real numbers, got complex128"),
    ],
)
def test_bad_input(arrays: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "in.npz"
    np.savez(given, **arrays)
    assert message in refused(["run", write_schema(tmp_path), "--input", str(given)], capsys)


def test_input_that_is_no_array_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "in.npz"
    for content in (b"", b"not an array", b"PK\x03\x04 cut short"):
        given.write_bytes(content)
        line = refused(["run", write_schema(tmp_path), "--input", str(given)], capsys)
        assert f"{given}: must be a .npy or .npz file of plain arrays" in line
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    line = refused(["run", write_schema(tmp_path), "--input", str(tmp_path / "objects.npy")], capsys)
    assert "must be a .npy or .npz file of plain arrays" in line


def test_pixels_need_two_spatial_dimensions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def one_dimensional(data: dict[str, Any]) -> None:
        data["layout"]["spatial_shape"] = [8]
        data["regions"] = {"screen": {"bounds": [0, 3, 0, 6]}, "mouse": {"bounds": [0, 3, 6, 8]}}

    path = write_schema(tmp_path, one_dimensional)
    assert "two spatial dimensions, got spatial_shape=(8,)" in refused(["run", path], capsys)
    given = tmp_path / "in.npz"
    np.savez(given, screen=np.random.default_rng(0).standard_normal((18, 5)))
    assert main(["run", path, "--input", str(given), "--repeat", "1"]) == 0


@pytest.mark.parametrize("option", ["--save", "--png"])
def test_output_path_that_cannot_be_written(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "missing" / "file.png"
    line = refused(["plan", write_schema(tmp_path), option, str(target)], capsys)
    assert f"cannot write '{target}': No such file or directory" in line


def test_out_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    target.write_text("precious", encoding="utf-8")
    assert str(target) in refused(["run", write_schema(tmp_path), "--out", str(target)], capsys)
    assert target.read_text(encoding="utf-8") == "precious"


def test_missing_extra_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from canvas_engineering import _optional

    monkeypatch.setattr(_optional, "installed", lambda module: False)
    line = refused(["run", write_schema(tmp_path)], capsys)
    assert "pip install 'canvas-engineering[viz]'" in line


@pytest.mark.parametrize(
    "arguments",
    [[], ["compute"], ["plan"], ["plan", "x.json", "--softmax", "global"], ["plan", "x", "--block-q", "-8"]],
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: canvas-engineering" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--help"], ["plan", "--help"], ["run", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    assert "exit status" in capsys.readouterr().out or arguments[0] == "plan"


# -- the real thing -----------------------------------------------------------------------------------------


def test_console_script_is_main() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        scripts = tomllib.load(file)["project"]["scripts"]
    assert scripts == {"canvas-engineering": "canvas_engineering.cli.main:entry_point"}


def test_subprocess_refuses_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "canvas_engineering.cli.main", "plan", "absent.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: absent.json: No such file or directory\n"


def test_closed_pipe_is_no_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "canvas_engineering.cli.main", "plan", write_schema(tmp_path)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


# -- canvases and pixels ------------------------------------------------------------------------------------


def test_shipped_canvases_are_what_they_say() -> None:
    schemas = {path.stem: CanvasSchema.from_json(path) for path in CANVASES}
    sizes = {name: schema.layout.num_positions for name, schema in schemas.items()}
    assert sizes == {
        "computer_use": 16384,
        "computer_use_small": 2048,
        "multi_frequency": 4096,
        "multi_robot": 2048,
        "robot": 320,
    }
    for schema in schemas.values():
        assert set(schema.metadata) == {"title", "description", "provenance"}
    for name in ("computer_use", "computer_use_small"):
        regions = ["screen", "mouse", "keyboard", "llm"]
        assert list(schemas[name].layout.regions) == regions
        assert schemas[name].topology == CanvasTopology.causal_temporal(regions)
    robots = ["arm_left", "arm_right", "base", "drone"]
    assert schemas["multi_robot"].topology == CanvasTopology.hub_spoke("world", robots)
    frequency = schemas["multi_frequency"]
    assert [frequency.layout.region_spec(name).period for name in frequency.layout.regions] == [1, 4, 16, 576]
    assert frequency.topology is not None
    fills = {(c.temporal_fill.value, c.interpolation_order) for c in frequency.topology.connections}
    assert fills == {("hold", 1), ("interpolate", 1), ("interpolate", 2), ("drop", 1)}


@pytest.mark.parametrize("path", CANVASES, ids=lambda path: path.stem)
def test_shipped_canvases_survive_a_round_trip(path: Path) -> None:
    schema = CanvasSchema.from_json(path)
    assert CanvasSchema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema


@pytest.mark.parametrize(("frames", "rows", "columns", "patch"), [(2, 24, 24, 8), (3, 5, 7, 4), (1, 96, 96, 4)])
def test_patches_are_in_canvas_order_and_reversible(frames: int, rows: int, columns: int, patch: int) -> None:
    pixels = np.random.default_rng(0).random((frames, rows * patch, columns * patch, 3)).astype(np.float32)
    patches = clip.to_patches(pixels, patch)
    assert patches.shape == (frames * rows * columns, 3 * patch * patch)
    t, r, c = frames - 1, rows // 2, columns - 1
    expected = pixels[t, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
    np.testing.assert_array_equal(patches[(t * rows + r) * columns + c], expected.ravel())
    np.testing.assert_array_equal(clip.from_patches(patches, frames, rows, columns, patch), pixels)


def test_picture_shows_what_is_read_of_the_pixels() -> None:
    """Weights given to other regions are divided out; a row that reads no pixels is zero."""
    layout = CanvasLayout(
        T=2, H=4, W=4, d_model=16, regions={"screen": (0, 2, 0, 3, 0, 4), "mouse": (0, 2, 3, 4, 0, 4)}
    )
    placed = place.place(layout, place.gather_input(layout, None))
    q = np.random.default_rng(0).standard_normal((1, 2, layout.num_positions, 8)).astype(np.float32)
    both = CanvasTopology([Connection("screen", "mouse", weight=3.0), Connection("screen", "screen")])

    def read(topology: CanvasTopology) -> Any:
        return run.pixels_read(BlockSparsePlan.from_topology(topology, layout), layout, placed, q, q)

    isolated = read(CanvasTopology.isolated(["screen"]))
    assert np.abs(isolated).max() > 0.1
    np.testing.assert_allclose(read(both), isolated, atol=1e-5)
    assert not read(CanvasTopology.isolated(["mouse"])).any()


def test_box_average_keeps_the_mean() -> None:
    picture = np.random.default_rng(0).random((12, 20, 3)).astype(np.float32)
    small = clip.box_average(picture, 4, 5)
    np.testing.assert_allclose(small, picture.reshape(4, 3, 5, 4, 3).mean(axis=(1, 3)), rtol=1e-6)
    np.testing.assert_allclose(clip.box_average(picture, 24, 40), picture.repeat(2, 0).repeat(2, 1), rtol=1e-6)


def test_photograph_is_panned() -> None:
    made = clip.pan_photograph(4, 6, 6, 256)
    assert made.frames.shape == (4, 48, 48, 3)
    assert made.path is not None
    assert len(np.unique(made.path, axis=0)) == 4
    assert made.frames.std() > 0.1
