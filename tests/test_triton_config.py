"""The tables of block sizes: what is shipped, how an entry is chosen, and what is refused."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from canvas_engineering import AttentionDispatcher, CanvasLayout, CanvasTopology
from canvas_engineering.cli.main import main
from canvas_engineering.errors import BackendError
from canvas_engineering.kernels.triton import config
from canvas_engineering.kernels.triton.candidates import candidates, table_keys
from canvas_engineering.kernels.triton.config import (
    ARCHITECTURES,
    DTYPES,
    HEAD_DIMS,
    KERNELS,
    OWN_BLOCKS,
    SETS,
    KernelConfig,
    Key,
    Table,
    Tile,
    kernel_config,
    read_table,
    recommended_tiles,
    write_table,
)
from canvas_engineering.plan.auto import AUTO_TILES
from canvas_engineering.routing.torch_tiles import tiles_of

TILE_SIZES = (8, 16, 24, 32, 40, 64, 96, 120, 128, 192, 256)
DEVICE = "NVIDIA Example 100"


pytestmark = pytest.mark.usefixtures("kernel_table_cache")


def tuned(kernels: dict[Key, KernelConfig], tiles: dict[Tile, float] | None = None) -> None:
    """Store measurements for ``DEVICE``."""
    write_table(config.tuned_table_path(DEVICE), Table("sm_90", "a test", kernels, tiles or {}))
    config.forget_tables()


# -- shipped ------------------------------------------------------------------------------------------------


def test_a_table_is_shipped_for_every_architecture_and_no_other() -> None:
    assert {path.stem for path in config.SHIPPED.glob("*.json")} == set(ARCHITECTURES)
    for architecture in ARCHITECTURES:
        table = read_table(config.SHIPPED / f"{architecture}.json")
        assert table.architecture == architecture
        assert table.source


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shipped_tables_are_complete(architecture: str) -> None:
    present = {key[:4] for key in config.shipped_table(architecture).kernels}
    wanted = {
        (kernel, head_dim, dtype, sets)
        for kernel in KERNELS
        for head_dim in HEAD_DIMS
        for dtype in DTYPES
        for sets in SETS
    }
    assert present == wanted


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shipped_entries_are_candidates(architecture: str) -> None:
    for key, entry in config.shipped_table(architecture).kernels.items():
        assert entry in set(candidates(key, architecture)), key
        assert key in table_keys()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "sm_86", "sm_103", "sm_120", "gfx90a", "interpreter"])
def test_every_call_has_blocks_that_suit_its_tile(architecture: str) -> None:
    for kernel in KERNELS:
        for head_dim in (8, 40, 64, 80, 96, 128, 200, 256):
            for dtype in ("float16", "bfloat16", "float32"):
                for block_q in TILE_SIZES:
                    for block_kv in TILE_SIZES:
                        found = kernel_config(
                            architecture, kernel, head_dim, dtype, many_sets=True, block_q=block_q, block_kv=block_kv
                        )
                        assert found.block_m in OWN_BLOCKS
                        assert found.block_n in OWN_BLOCKS
                        # Masks are read in words of 32 keys; half a word is for what fits no other way.
                        assert found.block_n != 16 or block_kv <= 16 or head_dim > 128
                        assert found.block_m < 2 * max(block_q, 32)


def test_bfloat16_is_served_by_float16_and_small_head_dims_by_64() -> None:
    def found(head_dim: int, dtype: str) -> KernelConfig:
        return kernel_config("sm_90", "forward", head_dim, dtype, many_sets=True, block_q=128, block_kv=128)

    assert found(64, "bfloat16") == found(64, "float16") == found(16, "float16")


@pytest.mark.parametrize("kernel", KERNELS)
def test_heavy_variants_get_half_of_the_other_block(kernel: str) -> None:
    def other(**keywords: Any) -> int:
        found = kernel_config(
            "sm_90", kernel, **{"head_dim": 64, **keywords}, dtype="float16", many_sets=True, block_q=128, block_kv=128
        )
        return found.other_block(kernel)

    plain = other()
    assert plain >= 64
    assert other(dropout=True) == other(head_dim=56) == plain // 2
    assert other(sigmoid=True) == (plain if kernel == "forward" else plain // 2)
    assert other(contiguous=False) == (plain // 2 if kernel == "backward_kv" else plain)


@pytest.mark.parametrize(
    ("architecture", "relative"),
    [
        ("sm_80", "sm_80"),
        ("sm_86", "sm_80"),
        ("sm_89", "sm_80"),
        ("sm_90", "sm_90"),
        ("sm_100", "sm_100"),
        ("sm_103", "sm_100"),
        ("sm_120", "sm_80"),
        ("gfx942", "gfx942"),
        ("gfx90a", "gfx942"),
    ],
)
def test_nearest_architecture(architecture: str, relative: str) -> None:
    assert config.nearest_architecture(architecture) == relative


# -- refused ------------------------------------------------------------------------------------------------


def test_a_head_dim_above_256_is_refused() -> None:
    with pytest.raises(BackendError, match="head_dim must be from 1 to 256, got 264"):
        kernel_config("sm_90", "forward", 264, "float16", many_sets=True, block_q=64, block_kv=64)


def test_a_missing_entry_is_a_backend_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(config, "shipped_table", lambda architecture: Table(architecture, "empty", {}))
        with pytest.raises(
            BackendError,
            match="the kernel table of sm_90 must hold an entry for the call, got none for kernel 'backward_q', "
            "head_dim 96, dtype bfloat16, several softmax sets",
        ):
            kernel_config("sm_90", "backward_q", 96, "bfloat16", many_sets=True, block_q=64, block_kv=64)


ENTRY = {
    "kernel": "forward",
    "head_dim": 64,
    "dtype": "float16",
    "sets": "one",
    "block_m": 64,
    "block_n": 64,
    "num_warps": 4,
    "num_stages": 2,
}
TILE = {"head_dim": 64, "dtype": "float16", "block_q": 64, "block_kv": 64, "speed": 1.0}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "must be a JSON object with format 1"),
        ({"format": 2}, "must be a JSON object with format 1"),
        ({"format": 1, "kernels": {}}, "kernels must be a list, got dict"),
        ({"format": 1, "kernels": [3]}, r"kernels\[0\] must be an object, got 3"),
        (
            {"format": 1, "kernels": [{**ENTRY, "block_m": 48}]},
            r"block_m must be a power of two from 16 to 256, got 48",
        ),
        ({"format": 1, "kernels": [{**ENTRY, "num_warps": True}]}, "num_warps must be a power of two from 1 to 16"),
        ({"format": 1, "kernels": [{**ENTRY, "num_stages": 9}]}, "num_stages must be an integer from 1 to 8, got 9"),
        ({"format": 1, "kernels": [{**ENTRY, "kernel": "delta"}]}, "kernel must be one of forward, backward_q, "),
        ({"format": 1, "kernels": [{**ENTRY, "head_dim": 32}]}, "head_dim must be one of 64, 128, 256, got 32"),
        ({"format": 1, "tiles": [{**TILE, "speed": 1.5}]}, r"tiles\[0\].speed must be a number in \(0, 1\], got 1.5"),
        ({"format": 1, "tiles": [{**TILE, "block_q": 4}]}, "block_q must be an integer from 8 to 256, got 4"),
    ],
)
def test_ill_formed_tables_are_refused_with_place_and_value(table: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(BackendError, match=message):
        read_table(path)


def test_a_broken_tuned_table_is_named_with_the_way_out(kernel_table_cache: Path) -> None:
    path = config.tuned_table_path(DEVICE)
    path.parent.mkdir(parents=True)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(BackendError, match=r"nvidia-example-100.json cannot be read: .*; delete it or tune again"):
        kernel_config("sm_90", "forward", 64, "float16", many_sets=True, block_q=64, block_kv=64, device_name=DEVICE)


# -- blocks and files ---------------------------------------------------------------------------------------


@given(st.integers(1, 256), st.sets(st.sampled_from(OWN_BLOCKS), min_size=1))
def test_fit_block_pads_least(tile: int, blocks: set[int]) -> None:
    found = config.fit_block(tuple(blocks), tile)
    allowed = [block for block in blocks if (block == 16) == (tile <= 16)] or blocks
    covered = {block: -(-tile // block) * block for block in allowed}
    assert covered[found] == min(covered.values())
    assert found == max(block for block in allowed if covered[block] == covered[found])


def test_a_written_table_reads_back(tmp_path: Path) -> None:
    table = Table(
        "sm_90",
        "a test",
        {Key("backward_kv", 64, "float16", "one", 64): KernelConfig(32, 64, 8, 2)},
        {Tile(64, "float16", 128, 32): 0.5},
    )
    path = tmp_path / "new" / "table.json"
    write_table(path, table)
    assert read_table(path) == table
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR
    assert [entry.name for entry in path.parent.iterdir()] == ["table.json"]


def test_a_failed_write_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    write_table(path, Table("sm_90", "old", {}))

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        write_table(path, Table("sm_90", "new", {}))
    assert read_table(path).source == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.json"]


# -- tuned --------------------------------------------------------------------------------------------------

KEY = Key("forward", 64, "float16", "many", 64)
FASTER = KernelConfig(64, 32, 4, 5)


def test_a_tuned_entry_goes_before_the_shipped_one() -> None:
    tuned({KEY: FASTER})

    def found(block_q: int, device_name: str | None) -> KernelConfig:
        return kernel_config(
            "sm_90",
            "forward",
            64,
            "bfloat16",
            many_sets=True,
            block_q=block_q,
            block_kv=128,
            device_name=device_name,
        )

    assert found(64, DEVICE) == FASTER
    assert found(64, "another GPU") == found(64, None) != FASTER
    assert found(128, DEVICE) == found(128, None)  # not tuned


def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch find one GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: DEVICE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def test_a_launch_takes_the_tuned_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from canvas_engineering.kernels.triton import launch
    from canvas_engineering.kernels.triton.constants import Variant

    hopper(monkeypatch)
    launch.forget_configs()
    variant = Variant(head_dim=64, block_q=64, block_kv=128)
    device = torch.device("cuda", 0)
    before = launch._config(device, "forward", torch.bfloat16, variant)
    tuned({KEY: FASTER})
    assert launch._config(device, "forward", torch.bfloat16, variant) == before  # remembered: nothing is read twice
    launch.forget_configs()
    assert launch._config(device, "forward", torch.bfloat16, variant) == FASTER
    launch.forget_configs()


# -- tile sizes of plans ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [8, 96, 256])
def test_the_model_of_tile_sizes(architecture: str, dtype: str, head_dim: int) -> None:
    speeds = recommended_tiles(architecture, head_dim, dtype)
    assert max(speeds.values()) == 1
    assert min(speeds.values()) > 0
    assert speeds[128, 128] >= speeds[64, 64] >= speeds[16, 16]


def test_measured_tile_sizes_replace_the_model() -> None:
    tuned({}, {Tile(64, "float16", 64, 32): 1.0, Tile(64, "float16", 32, 32): 0.5})
    assert recommended_tiles("sm_90", 64, "bfloat16", DEVICE) == {(64, 32): 1.0, (32, 32): 0.5}
    assert recommended_tiles("sm_90", 64, "bfloat16") == recommended_tiles("sm_90", 64, "bfloat16", "another GPU")
    assert len(recommended_tiles("sm_90", 128, "bfloat16", DEVICE)) > 2


def test_without_a_gpu_a_dispatcher_takes_the_default_tile_sizes() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tiles_of("auto", 64) is tiles_of("triton", 64) is AUTO_TILES


def test_with_a_gpu_a_dispatcher_takes_its_tile_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    hopper(monkeypatch)
    tuned({}, {Tile(64, "float16", 64, 32): 1.0})
    assert tiles_of("auto", 64) == tiles_of("triton", 48) == {(64, 32): 1.0}
    assert tiles_of("portable", 64) is tiles_of("reference", 64) is AUTO_TILES
    assert tiles_of("auto", 4) is tiles_of("auto", 512) is AUTO_TILES  # the kernels take neither

    layout = CanvasLayout(T=4, H=8, W=8, d_model=64, regions={"a": (0, 4, 0, 8, 0, 8)})
    topology = CanvasTopology.isolated(["a"])

    def tile(**keywords: Any) -> set[tuple[int, int]]:
        dispatcher = AttentionDispatcher(topology, layout, d_model=64, n_heads=1, **keywords)
        return {(call.plan.block_q, call.plan.block_kv) for call in dispatcher.schedule.plan_calls}

    assert tile() == tile(backend="triton") == {(64, 32)}
    assert tile(backend="portable") != {(64, 32)}
    assert tile(block_q=128) == {(128, 32)}


def test_doctor_names_the_table_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    hopper(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["doctor"]) == 0
    assert "kernel table of cuda:0: shipped for sm_90; `canvas-engineering tune` measures" in capsys.readouterr().out
    tuned({KEY: FASTER})
    assert main(["doctor", "--json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)["kernel_tables"]
    assert line.startswith("cuda:0: 1 entries a test (")
    assert line.endswith("nvidia-example-100.json), the rest shipped for sm_90")
