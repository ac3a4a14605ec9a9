"""Block sizes, warps and stages of the kernels: a table shipped as data, a user's own measurements on top.

Plain Python: neither torch nor triton is needed to read a table. A table is a JSON file::

    {"format": 1, "architecture": "sm_90", "source": "...",
     "kernels": [{"kernel": "forward", "head_dim": 128, "dtype": "float16", "sets": "many",
                  "block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3}, ...],
     "tiles": [{"head_dim": 128, "dtype": "float16", "block_q": 128, "block_kv": 64, "speed": 1.0}, ...]}

``dtype`` is ``float16``, which stands for bfloat16 too (the code is the same), or ``float32``. ``head_dim`` is the
padded one, a power of two; 16 and 32 are served by the entries of 64. ``sets`` says whether a query row may stand in
several softmax sets, which takes a second accumulator. There is one entry for each size of the block that a program
owns: rows (``block_m``) for ``forward`` and ``backward_q``, keys (``block_n``) for ``backward_kv``. ``tiles`` is
optional: the relative speed of a pair in plans of a tile size, as measured by ``canvas-engineering tune``.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from canvas_engineering._files import atomic_write
from canvas_engineering.errors import BackendError

FORMAT = 1
KERNELS = ("forward", "backward_q", "backward_kv")
HEAD_DIMS = (64, 128, 256)
DTYPES = ("float16", "float32")
SETS = ("one", "many")
#: Sizes of the block that a program owns.
OWN_BLOCKS = (128, 64, 32, 16)
#: Architectures with a table of their own.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
SHIPPED = Path(__file__).parent / "configs"

# The model behind `recommended_tiles` where nothing was measured: the work of one step of a kernel that its fixed
# costs (index loads, barriers, rescaling) are worth, in pairs; the matrix products of each kernel; and how fast
# tensor cores are on blocks of fewer rows than their widest instruction takes.
STEP_OVERHEAD_PAIRS = 1024
PRODUCTS = {"forward": 2, "backward_q": 3, "backward_kv": 4}
FULL_RATE_ROWS = 64
NARROW_RATE = 0.6


class Key(NamedTuple):
    """What an entry of a table is for."""

    kernel: str
    head_dim: int
    dtype: str
    sets: str
    own_block: int


@dataclass(frozen=True)
class KernelConfig:
    """How one kernel is compiled: rows and keys of one step, warps, depth of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, kernel: str, own_block: int, other_block: int, num_warps: int, num_stages: int) -> KernelConfig:
        """The configuration in which one program of ``kernel`` owns a block and loops over the other one's."""
        block_m, block_n = (other_block, own_block) if kernel == "backward_kv" else (own_block, other_block)
        return cls(block_m, block_n, num_warps, num_stages)

    def own_block(self, kernel: str) -> int:
        """The block that one program owns; the other one is what it loops over."""
        return self.block_n if kernel == "backward_kv" else self.block_m

    def other_block(self, kernel: str) -> int:
        """The block that a program loops over."""
        return self.block_m if kernel == "backward_kv" else self.block_n


class Tile(NamedTuple):
    """A tile size of plans, for one head_dim and dtype."""

    head_dim: int
    dtype: str
    block_q: int
    block_kv: int


@dataclass(frozen=True)
class Table:
    """The contents of a table file."""

    architecture: str
    source: str
    kernels: dict[Key, KernelConfig]
    tiles: dict[Tile, float] = field(default_factory=dict)


# -- choosing -----------------------------------------------------------------------------------------------


def kernel_config(
    architecture: str,
    kernel: str,
    head_dim: int,
    dtype: str,
    *,
    many_sets: bool,
    block_q: int,
    block_kv: int,
    dropout: bool = False,
    contiguous: bool = True,
    sigmoid: bool = False,
    device_name: str | None = None,
) -> KernelConfig:
    """The configuration of a kernel for plans of one tile size: blocks divide the tile, or pad it.

    Args:
        architecture: ``"sm_90"``, ``"gfx942"``, ...; one without a table gets that of its nearest relative.
        kernel: One of ``KERNELS``.
        head_dim: Up to 256.
        dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
        many_sets: Whether a row may stand in several softmax sets.
        block_q, block_kv: The plan's tile.
        dropout: Whether there is dropout.
        contiguous: Whether every tile of the plan is a slice of the tokens.
        sigmoid: Sigmoid instead of softmax.
        device_name: Take what ``canvas-engineering tune`` measured on this kind of device, where it did.

    Raises:
        BackendError: ``head_dim`` is above 256, or no table holds an entry for the call.
    """
    tile_own, tile_other = (block_kv, block_q) if kernel == "backward_kv" else (block_q, block_kv)
    if architecture == "interpreter":
        own = fit_block(OWN_BLOCKS, tile_own)
        found = KernelConfig.of(kernel, own, max(own, 32), 4, 1)  # warps and stages mean nothing there
    else:
        if not 0 < head_dim <= HEAD_DIMS[-1]:
            raise BackendError(f"head_dim must be from 1 to {HEAD_DIMS[-1]}, got {head_dim}")
        configs = _own_blocks(shipped_table(architecture), kernel, head_dim, dtype, many_sets)
        if device_name is not None and (tuned := tuned_table(device_name)) is not None:
            configs |= _own_blocks(tuned, kernel, head_dim, dtype, many_sets)
        if not configs:
            raise BackendError(
                f"the kernel table of {nearest_architecture(architecture)} must hold an entry for the call, got none "
                f"for kernel {kernel!r}, head_dim {head_dim}, dtype {dtype}, {'several' if many_sets else 'one'} "
                f"softmax {'sets' if many_sets else 'set'}"
            )
        found = configs[fit_block(tuple(configs), tile_own)]
    heavy = is_heavy(kernel, head_dim, dropout=dropout, contiguous=contiguous, sigmoid=sigmoid)
    return fit_config(found, kernel, tile_other, heavy=heavy)


def is_heavy(kernel: str, head_dim: int, *, dropout: bool, contiguous: bool, sigmoid: bool) -> bool:
    """Whether a variant takes more registers than its entry leaves, so that the other block is halved.

    Dropout does, and a head_dim that is no power of two; sigmoid does in the backward pass; tokens that are gathered do
    so only beside the two accumulators of dK and dV.
    """
    by_kernel = {"forward": False, "backward_q": sigmoid, "backward_kv": sigmoid or not contiguous}
    return dropout or head_dim & (head_dim - 1) != 0 or by_kernel.get(kernel, False)


def fit_config(config: KernelConfig, kernel: str, tile_other: int, *, heavy: bool) -> KernelConfig:
    """The configuration with the other block fitted to a tile, and halved for a heavy variant."""
    largest = config.other_block(kernel)
    if heavy:
        # Masks are read in words of 32 keys; half a word is only for entries without registers for more.
        largest = max(largest // 2, 16 if kernel == "backward_kv" else min(largest, 32))
    other = fit_block(tuple(block for block in OWN_BLOCKS if block <= largest), tile_other)
    return KernelConfig.of(kernel, config.own_block(kernel), other, config.num_warps, config.num_stages)


def _own_blocks(table: Table, kernel: str, head_dim: int, dtype: str, many_sets: bool) -> dict[int, KernelConfig]:
    """The configurations of a kernel by the size of the block that a program owns."""
    wanted = (kernel, table_head_dim(head_dim), table_dtype(dtype), "many" if many_sets else "one")
    return {key.own_block: config for key, config in table.kernels.items() if key[:4] == wanted}


def fit_block(blocks: tuple[int, ...], tile: int) -> int:
    """The block that covers a tile with the least padding; the largest of equal ones.

    Blocks of 16 are for tiles that fit into one, or where there is no other: masks are read in words of 32 keys.
    """
    fitting = [block for block in blocks if (block == 16) == (tile <= 16)] or list(blocks)
    return min(fitting, key=lambda block: (-(-tile // block) * block, -block))


def recommended_tiles(
    architecture: str, head_dim: int, dtype: str, device_name: str | None = None
) -> dict[tuple[int, int], float]:
    """Tile sizes for plans that will run on an architecture, with the relative speed of one pair in such a tile.

    Measured where ``canvas-engineering tune`` ran on this kind of device, else a model: the fixed cost of a step
    is shared by the pairs of its block, and blocks of few rows do not fill the widest tensor-core instructions.
    """
    tuned = tuned_table(device_name) if device_name is not None else None
    for table in (tuned, shipped_table(architecture)):
        measured = {
            (tile.block_q, tile.block_kv): speed
            for tile, speed in (table.tiles if table is not None else {}).items()
            if tile[:2] == (table_head_dim(head_dim), table_dtype(dtype))
        }
        if measured:
            return measured
    seconds = {
        (block_q, block_kv): _modelled_time(architecture, head_dim, dtype, block_q, block_kv)
        for block_q in OWN_BLOCKS
        for block_kv in OWN_BLOCKS
    }
    best = min(seconds.values())
    return {tile: best / value for tile, value in seconds.items()}


def _modelled_time(architecture: str, head_dim: int, dtype: str, block_q: int, block_kv: int) -> float:
    """Relative time of one pair in forward and backward pass."""
    time = 0.0
    for kernel, products in PRODUCTS.items():
        config = kernel_config(
            architecture, kernel, head_dim, dtype, many_sets=True, block_q=block_q, block_kv=block_kv
        )
        pairs = config.block_m * config.block_n
        rate = 1.0 if config.own_block(kernel) >= FULL_RATE_ROWS else NARROW_RATE
        time += products / rate * (1 + STEP_OVERHEAD_PAIRS / pairs)
    return time


def describe_tables(architecture: str, device_name: str) -> str:
    """Which tables serve a GPU, in words.

    Raises:
        BackendError: A file is no table.
    """
    tuned = tuned_table(device_name)
    shipped = f"shipped for {nearest_architecture(architecture)}"
    if tuned is None:
        return f"{shipped}; `canvas-engineering tune` measures"
    return f"{len(tuned.kernels)} entries {tuned.source} ({tuned_table_path(device_name)}), the rest {shipped}"


def table_dtype(dtype: str) -> str:
    """The dtype under which a table lists ``dtype``."""
    return "float16" if dtype == "bfloat16" else dtype


def table_head_dim(head_dim: int) -> int:
    """The listed head_dim that serves ``head_dim``."""
    return next(listed for listed in HEAD_DIMS if listed >= head_dim)


def nearest_architecture(architecture: str) -> str:
    """The architecture whose table serves ``architecture``."""
    if architecture in ARCHITECTURES:
        return architecture
    if architecture.startswith("gfx"):
        return "gfx942"
    capability = int("".join(filter(str.isdigit, architecture)) or 0)
    if 90 <= capability < 100:
        return "sm_90"
    # Consumer Blackwell (sm_12x) has the shared memory and the tensor cores of sm_8x, not those of sm_100.
    return "sm_100" if 100 <= capability < 120 else "sm_80"


# -- files --------------------------------------------------------------------------------------------------


@cache
def shipped_table(architecture: str) -> Table:
    """The table that the package ships for an architecture or its nearest relative."""
    return read_table(SHIPPED / f"{nearest_architecture(architecture)}.json")


@cache
def tuned_table(device_name: str) -> Table | None:
    """What ``canvas-engineering tune`` measured on this kind of device, if it ran.

    Raises:
        BackendError: Its file is no table.
    """
    path = tuned_table_path(device_name)
    try:
        return read_table(path) if path.exists() else None
    except BackendError as error:
        raise BackendError(f"{error}; delete it or tune again") from error


def forget_tables() -> None:
    """Read the tables anew at the next call, after one was written."""
    shipped_table.cache_clear()
    tuned_table.cache_clear()


def tuned_table_path(device_name: str) -> Path:
    """Where ``canvas-engineering tune`` keeps the measurements of one kind of device."""
    safe = "".join(c if c.isalnum() else "-" for c in device_name.lower()).strip("-")
    return cache_folder() / "triton" / f"{safe}.json"


def cache_folder() -> Path:
    """The user's cache folder of this package; ``CANVAS_ENGINEERING_CACHE`` overrides it."""
    if override := os.environ.get("CANVAS_ENGINEERING_CACHE"):
        return Path(override)
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "canvas-engineering"


def read_table(path: Path) -> Table:
    """A table file, checked.

    Raises:
        BackendError: The file is no table of this format, with the place and the value.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BackendError(f"kernel table {path} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BackendError(f"kernel table {path} must be a JSON object with format {FORMAT}")
    kernels: dict[Key, KernelConfig] = {}
    for where, row in _rows(path, data, "kernels"):
        config = KernelConfig(
            **{name: _number(where, row, name, 16, 256) for name in ("block_m", "block_n")},
            num_warps=_number(where, row, "num_warps", 1, 16),
            num_stages=_number(where, row, "num_stages", 1, 8, power_of_two=False),
        )
        kernel = _one_of(where, row, "kernel", KERNELS)
        key = Key(
            kernel,
            _one_of(where, row, "head_dim", HEAD_DIMS),
            _one_of(where, row, "dtype", DTYPES),
            _one_of(where, row, "sets", SETS),
            config.own_block(kernel),
        )
        kernels[key] = config
    tiles: dict[Tile, float] = {}
    for where, row in _rows(path, data, "tiles"):
        speed = row.get("speed")
        if not isinstance(speed, (int, float)) or not 0 < speed <= 1:
            raise BackendError(f"{where}.speed must be a number in (0, 1], got {speed!r}")
        tile = Tile(
            _one_of(where, row, "head_dim", HEAD_DIMS),
            _one_of(where, row, "dtype", DTYPES),
            _number(where, row, "block_q", 8, 256, power_of_two=False),
            _number(where, row, "block_kv", 8, 256, power_of_two=False),
        )
        tiles[tile] = float(speed)
    return Table(str(data.get("architecture", "")), str(data.get("source", "")), kernels, tiles)


def _rows(path: Path, data: dict[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with its place in the file."""
    rows = data.get(name, [])
    if not isinstance(rows, list):
        raise BackendError(f"kernel table {path}: {name} must be a list, got {type(rows).__name__}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise BackendError(f"kernel table {path}: {name}[{i}] must be an object, got {row!r}")
    return [(f"kernel table {path}: {name}[{i}]", row) for i, row in enumerate(rows)]


def _one_of(where: str, row: dict[str, Any], name: str, allowed: tuple[Any, ...]) -> Any:
    value = row.get(name)
    if value not in allowed or isinstance(value, bool):
        raise BackendError(f"{where}.{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    return value


def _number(where: str, row: dict[str, Any], name: str, low: int, high: int, *, power_of_two: bool = True) -> int:
    value = row.get(name)
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or not low <= value <= high
        or (power_of_two and value & (value - 1))
    ):
        kind = "a power of two" if power_of_two else "an integer"
        raise BackendError(f"{where}.{name} must be {kind} from {low} to {high}, got {value!r}")
    return value


def write_table(path: Path, table: Table) -> None:
    """Write a table file, whole or not at all.

    Raises:
        OSError: The path cannot be written.
    """
    head = {"format": FORMAT, "architecture": table.architecture, "source": table.source}
    kernels = [
        {"kernel": key.kernel, "head_dim": key.head_dim, "dtype": key.dtype, "sets": key.sets, **asdict(config)}
        for key, config in sorted(table.kernels.items())
    ]
    tiles = [{**tile._asdict(), "speed": round(speed, 4)} for tile, speed in sorted(table.tiles.items())]

    def listed(rows: list[dict[str, Any]]) -> str:
        return "[" + ",".join("\n    " + json.dumps(row) for row in rows) + ("\n  ]" if rows else "]")

    text = json.dumps(head, indent=2)[:-2] + f',\n  "kernels": {listed(kernels)},\n  "tiles": {listed(tiles)}\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text)
