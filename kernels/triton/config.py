"""Block sizes, warps and stages of the kernels: a table shipped as data, a user's own measurements on top.

Plain Python: neither torch nor triton is needed to read the table. A table is a JSON file::

    {"format": 1, "architecture": "sm_90", "source": "...", "kernels": [
        {"kernel": "forward", "head_dim": 128, "dtype": "float16", "sets": "many",
         "block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3}, ...]}

``dtype`` is ``float16`` (also used for bfloat16, which compiles to the same code) or ``float32``; ``head_dim`` the
padded one (a power of two from 16 to 256); ``sets`` whether a query row may stand in several softmax sets, which
takes a second accumulator.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from canvas_engineering.errors import BackendError

FORMAT = 1
KERNELS = ("forward", "backward_q", "backward_kv")
HEAD_DIMS = (16, 32, 64, 128, 256)
SHIPPED = Path(__file__).parent / "configs"
#: Architectures with a table of their own, and the one that stands in for others of the same kind.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

Key = tuple[str, int, str, str]  # kernel, head_dim, dtype, sets


@dataclass(frozen=True)
class KernelConfig:
    """How one kernel is compiled.

    Attributes:
        block_m, block_n: Rows and keys of one step.
        num_warps: Per program.
        num_stages: Depth of the software pipeline.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def table_dtype(dtype: str) -> str:
    """The dtype under which the table lists ``dtype``."""
    return "float16" if dtype == "bfloat16" else dtype


def nearest_architecture(architecture: str) -> str:
    """The listed architecture whose table serves ``architecture``."""
    if architecture in ARCHITECTURES:
        return architecture
    if architecture.startswith("gfx"):
        return "gfx942"
    if architecture.startswith("sm_"):
        capability = int(architecture.removeprefix("sm_").rstrip("af"))
        # Consumer Blackwell (sm_12x) has the shared memory and the tensor cores of sm_8x, not those of sm_100.
        if 90 <= capability < 100:
            return "sm_90"
        if 100 <= capability < 120:
            return "sm_100"
    return "sm_80"


def read_table(path: Path) -> dict[Key, KernelConfig]:
    """The entries of a table file.

    Raises:
        BackendError: The file is no table of this format, with the place and the value.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BackendError(f"kernel table {path} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("kernels"), list):
        raise BackendError(f"kernel table {path} must be a JSON object with format {FORMAT} and a list 'kernels'")
    table: dict[Key, KernelConfig] = {}
    for i, row in enumerate(data["kernels"]):
        table[_key(path, i, row)] = _config(path, i, row)
    return table


def _key(path: Path, i: int, row: Any) -> Key:
    allowed: dict[str, tuple[Any, ...]] = {
        "kernel": KERNELS,
        "head_dim": HEAD_DIMS,
        "dtype": ("float16", "float32"),
        "sets": ("one", "many"),
    }
    if not isinstance(row, dict):
        raise BackendError(f"kernel table {path}: kernels[{i}] must be an object, got {row!r}")
    for name, values in allowed.items():
        if row.get(name) not in values:
            raise BackendError(f"kernel table {path}: kernels[{i}].{name} must be one of {values}, got {row.get(name)!r}")
    return row["kernel"], row["head_dim"], row["dtype"], row["sets"]


def _config(path: Path, i: int, row: dict[str, Any]) -> KernelConfig:
    limits = {"block_m": (16, 256), "block_n": (16, 256), "num_warps": (1, 16), "num_stages": (1, 8)}
    for name, (low, high) in limits.items():
        value = row.get(name)
        power = name == "num_stages" or (isinstance(value, int) and value & (value - 1) == 0)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high or not power:
            kind = "an integer" if name == "num_stages" else "a power of two"
            raise BackendError(
                f"kernel table {path}: kernels[{i}].{name} must be {kind} from {low} to {high}, got {value!r}"
            )
    return KernelConfig(**{name: row[name] for name in limits})


def write_table(path: Path, architecture: str, source: str, table: dict[Key, KernelConfig]) -> None:
    """Write a table file, whole or not at all (a temporary file, then a rename).

    Raises:
        OSError: The path cannot be written.
    """
    rows = [
        {"kernel": kernel, "head_dim": head_dim, "dtype": dtype, "sets": sets, **asdict(config)}
        for (kernel, head_dim, dtype, sets), config in sorted(table.items())
    ]
    head = {"format": FORMAT, "architecture": architecture, "source": source}
    body = ",\n".join("    " + json.dumps(row) for row in rows)
    text = json.dumps(head, indent=2)[:-2] + ',\n  "kernels": [\n' + body + "\n  ]\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def cache_folder() -> Path:
    """The user's cache folder of this package."""
    if override := os.environ.get("CANVAS_ENGINEERING_CACHE"):
        return Path(override)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "canvas-engineering"


def tuned_table_path(device_name: str) -> Path:
    """Where ``canvas-engineering tune`` keeps the measurements of one kind of device."""
    safe = "".join(c if c.isalnum() else "-" for c in device_name).strip("-").lower()
    return cache_folder() / "triton" / f"{safe}.json"


@cache
def shipped_table(architecture: str) -> dict[Key, KernelConfig]:
    """The table that the package ships for an architecture."""
    return read_table(SHIPPED / f"{nearest_architecture(architecture)}.json")


@cache
def _tuned_table(path: Path) -> dict[Key, KernelConfig]:
    return read_table(path) if path.exists() else {}


def forget_tables() -> None:
    """Read the tables anew at the next call, after ``tune`` has written one."""
    shipped_table.cache_clear()
    _tuned_table.cache_clear()


def kernel_config(
    architecture: str, kernel: str, head_dim: int, dtype: str, many_sets: bool, device_name: str | None = None
) -> KernelConfig:
    """The configuration of a kernel: measured on this kind of device if it was tuned, else the shipped one.

    Args:
        architecture: ``"sm_90"``, ``"gfx942"``, ...
        kernel: One of ``KERNELS``.
        head_dim: Any head_dim up to 256; the next listed one serves it.
        dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
        many_sets: Whether a row may stand in several softmax sets.
        device_name: The device's name, to look for its own measurements.
    """
    if architecture == "interpreter":
        # One block per tile; whatever the tile is. Warps and stages mean nothing.
        return KernelConfig(64, 64, 4, 1)
    listed = next(d for d in HEAD_DIMS if d >= head_dim)
    key = (kernel, listed, table_dtype(dtype), "many" if many_sets else "one")
    if device_name is not None:
        tuned = _tuned_table(tuned_table_path(device_name))
        if key in tuned:
            return tuned[key]
    return shipped_table(architecture)[key]


def fit_config(config: KernelConfig, block_q: int, block_kv: int) -> KernelConfig:
    """The configuration for a plan with tiles of ``block_q`` x ``block_kv``: blocks divide a tile, or pad it.

    Warps shrink with the block, so that a warp keeps enough of it to fill a tensor-core instruction.
    """
    block_m = fit_block(config.block_m, block_q)
    block_n = fit_block(config.block_n, block_kv)
    share = config.block_m * config.block_n // (block_m * block_n)
    warps = max(min(config.num_warps, 4), config.num_warps // max(share, 1))
    return replace(config, block_m=block_m, block_n=block_n, num_warps=warps)


def fit_block(block: int, tile: int) -> int:
    """The block size, at most ``block``, that covers a tile with the least padding; the largest of equal ones.

    At least 32, because masks are read in words of 32 keys, but 16 for tiles that fit into one such block.
    """
    if tile <= 16:
        return 16
    choices = [b for b in (256, 128, 64, 32) if b <= max(block, 32)]
    return min(choices, key=lambda b: (-(-tile // b) * b, -b))


def recommended_tiles(
    architecture: str, head_dim: int, dtype: str
) -> list[tuple[int, int, float]]:
    """Tile sizes for plans that will run on an architecture: ``(block_q, block_kv, efficiency)``, best first.

    ``efficiency`` is the share of the best tile's throughput that a tile reaches, for the compiler of plans to
    weigh against the pairs that it saves.
    """
    config = kernel_config(architecture, "forward", head_dim, dtype, many_sets=True)
    best = (config.block_m, config.block_n)
    tiles = []
    for block_q in (128, 64, 32, 16):
        for block_kv in (128, 64, 32, 16):
            tiles.append((block_q, block_kv, _efficiency(block_q, block_kv, best)))
    return sorted(tiles, key=lambda tile: -tile[2])


def _efficiency(block_q: int, block_kv: int, best: tuple[int, int]) -> float:
    return 1.0
