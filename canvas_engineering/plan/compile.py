"""The compiler: groups, softmax slots, token order, tiles, plan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.errors import PlanError
from canvas_engineering.groups import (
    BoxPattern,
    Group,
    PairPattern,
    mask_pattern,
    resolve_groups,
    with_pattern,
)
from canvas_engineering.plan.assemble import assemble, normalized
from canvas_engineering.plan.auto import AUTO_TILES, TileTable, choose, tile_table
from canvas_engineering.plan.parts import Parts, make_parts
from canvas_engineering.plan.plan import BlockSize, BlockSparsePlan, Softmax
from canvas_engineering.plan.tiling import Order, OrderName, order_atoms, spatial_ranks

if TYPE_CHECKING:
    from canvas_engineering.canvas import CanvasLayout
    from canvas_engineering.connectivity import CanvasTopology
    from canvas_engineering.masks import MaskSpec
    from canvas_engineering.program import CanvasProgram

Ranks = NDArray[np.int64]
#: Cell sizes of the spatial token orders that are tried for box patterns.
_CELL_SIZES = (32, 64, 128)
_MAX_CELL_SHAPES = 3


def check_block(name: str, block: BlockSize) -> BlockSize:
    """A block size as the compiler takes it.

    Raises:
        PlanError: Not ``"auto"`` and not a positive multiple of 8 up to 1024.
    """
    if block == "auto":
        return block
    if isinstance(block, bool) or not isinstance(block, (int, np.integer)) or block <= 0 or block % 8 or block > 1024:
        raise PlanError(f'{name} must be "auto" or a multiple of 8 between 8 and 1024, got {block!r}')
    return int(block)


def compile_topology(
    topology: CanvasTopology,
    layout: CanvasLayout,
    *,
    softmax: Softmax = "connection",
    block_q: BlockSize = "auto",
    block_kv: BlockSize = "auto",
    program: CanvasProgram | None = None,
    skip_temporal: bool = False,
    normalize: bool = True,
    tiles: TileTable = AUTO_TILES,
) -> BlockSparsePlan:
    """See :meth:`BlockSparsePlan.from_topology`; ``tiles`` is what ``"auto"`` chooses from."""
    if softmax not in ("connection", "joint"):
        raise PlanError(f'softmax must be "connection" or "joint", got {softmax!r}')
    groups = resolve_groups(topology, layout, program=program, skip_temporal=skip_temporal)
    plan = compile_groups(
        groups,
        layout.num_positions,
        layout.num_positions,
        joint=softmax == "joint",
        block_q=block_q,
        block_kv=block_kv,
        grid=(layout.T, *layout.spatial_shape),
        tiles=tiles,
        source=f"topology of {len(topology.connections)} connections on {(layout.T, *layout.spatial_shape)}",
    )
    return replace(
        plan,
        row_weight=normalized(plan) if normalize and softmax == "connection" else plan.row_weight,
        grid=(layout.T, *layout.spatial_shape),
        regions=tuple((name, tuple(layout.bounds(name))) for name in layout.regions),
        _lowered={},
    )


def compile_mask_spec(
    mask_spec: MaskSpec,
    layout: CanvasLayout,
    src: str,
    dst: str,
    *,
    block_q: BlockSize = "auto",
    block_kv: BlockSize = "auto",
) -> BlockSparsePlan:
    """See :meth:`BlockSparsePlan.from_mask_spec`."""
    num_q, num_kv = layout.region_numel(src), layout.region_numel(dst)
    rows, cols = np.arange(num_q, dtype=np.int64), np.arange(num_kv, dtype=np.int64)
    group: Group | None = Group(rows, cols, 1.0, 0)
    pattern = mask_pattern(mask_spec, layout, src, dst)
    if group is not None and pattern is not None:
        group = with_pattern(group, pattern)
    groups = [group] if group is not None and num_q and num_kv else []
    return compile_groups(
        groups,
        num_q,
        num_kv,
        joint=True,
        block_q=block_q,
        block_kv=block_kv,
        grid=layout.region_size(src),
        kv_grid=layout.region_size(dst),
        source=f"{mask_spec.kind} mask from {src!r} to {dst!r}",
    )


def compile_mask(
    mask: NDArray[np.bool_], *, block_q: BlockSize = "auto", block_kv: BlockSize = "auto"
) -> BlockSparsePlan:
    """See :meth:`BlockSparsePlan.from_mask`."""
    array = np.asarray(mask)
    if array.ndim != 2 or array.dtype != np.bool_:
        raise PlanError(f"mask must be a boolean array (num_q, num_kv), got {array.dtype} with shape {array.shape}")
    num_q, num_kv = array.shape
    groups = []
    if array.any():
        rows, cols = np.arange(num_q, dtype=np.int64), np.arange(num_kv, dtype=np.int64)
        full = Group(rows, cols, 1.0, 0)
        group = full if array.all() else with_pattern(full, PairPattern.from_dense(array))
        groups = [group] if group is not None else []
    return compile_groups(groups, num_q, num_kv, joint=True, block_q=block_q, block_kv=block_kv, source="mask")


def compile_groups(
    groups: Sequence[Group],
    num_q: int,
    num_kv: int,
    *,
    joint: bool,
    block_q: BlockSize = "auto",
    block_kv: BlockSize = "auto",
    grid: tuple[int, ...] | None = None,
    kv_grid: tuple[int, ...] | None = None,
    keep_order: bool = False,
    tiles: TileTable = AUTO_TILES,
    source: str = "",
) -> BlockSparsePlan:
    """Compile groups.

    Args:
        groups: What reads what; rows and columns are token ids.
        num_q, num_kv: Number of tokens.
        joint: One softmax per row over all of its groups, instead of one per group.
        block_q, block_kv: Tile sizes or ``"auto"``.
        grid: Shape whose row-major positions the query tokens are, for spatial token orders.
        kv_grid: The same for keys when they are other tokens than the queries; None means the same tokens
            (if ``grid`` is given).
        tiles: The tile sizes that ``"auto"`` chooses from, with their relative speeds.
        keep_order: Keep the tokens in the order in which they are numbered, instead of choosing one.
        source: What the groups came from, for messages.

    Raises:
        PlanError: A block size that is not allowed.
    """
    block_q, block_kv = check_block("block_q", block_q), check_block("block_kv", block_kv)
    same_tokens = grid is not None and kv_grid is None
    parts = make_parts(groups, num_q, num_kv, joint=joint, same_tokens=same_tokens)
    orders = list(_orders(parts, grid, kv_grid, same_tokens, keep_order))
    best = choose(parts, orders, tile_table(block_q, block_kv, tiles), same_tokens=same_tokens)
    return assemble(parts, best.rows, best.cols, num_q, num_kv, source)


def shared_order(
    groups: Sequence[Group], num_tokens: int, grid: tuple[int, ...], tiles: TileTable = AUTO_TILES
) -> NDArray[np.int64]:
    """``(num_tokens,)`` one token order for several plans of a canvas: the cheapest for all groups together."""
    plan = compile_groups(groups, num_tokens, num_tokens, joint=False, grid=grid, tiles=tiles)
    return plan.q_order.astype(np.int64)


def _orders(
    parts: Parts,
    grid: tuple[int, ...] | None,
    kv_grid: tuple[int, ...] | None,
    same_tokens: bool,
    keep_order: bool,
) -> Iterator[tuple[Order, Order]]:
    """Candidate (query order, key order) pairs."""
    if keep_order:
        q_order, kv_order = (
            Order(np.arange(atoms.of_token.size), *_runs(atoms.of_token, atoms.kind), "given")
            for atoms in (parts.q_atoms, parts.kv_atoms)
        )
        yield q_order, kv_order
        return
    inner_candidates: list[tuple[Ranks | None, Ranks | None]] = [(None, None)]
    if grid is not None:
        inner_candidates += list(_spatial_orders(parts, grid, kv_grid))
    elif any(isinstance(part.pattern, PairPattern) for part in parts.parts):
        inner_candidates.append(_clustered(parts))
    one_atom = parts.q_atoms.count <= 1 and parts.kv_atoms.count <= 1
    names: tuple[OrderName, ...] = ("kind",) if one_atom else ("kind", "mixed", "canvas")
    for q_inner, kv_inner in inner_candidates:
        for name in names:
            q_order = order_atoms(parts.q_atoms, name, q_inner)
            yield q_order, q_order if same_tokens else order_atoms(parts.kv_atoms, name, kv_inner)


def _runs(of_token: NDArray[np.int64], kind: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sizes and kinds of the maximal runs of equal atoms in a sequence of tokens."""
    if of_token.size == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts = np.flatnonzero(np.concatenate([[True], of_token[1:] != of_token[:-1]]))
    return np.diff(np.append(starts, of_token.size)), kind[of_token[starts]]


def _spatial_orders(
    parts: Parts, grid: tuple[int, ...], kv_grid: tuple[int, ...] | None
) -> Iterator[tuple[Ranks | None, Ranks | None]]:
    """Token orders by cells of the grid, for parts whose rows read boxes of a region's own grid."""
    boxes = [
        part
        for part in parts.parts
        if isinstance(part.pattern, BoxPattern) and part.pattern.coords.shape[1] == len(grid)
    ]
    if not boxes:
        return
    largest = max(boxes, key=lambda part: part.rows.size)
    coords = np.stack(np.unravel_index(np.arange(math.prod(grid)), grid), axis=1)
    kv_coords = (
        coords if kv_grid is None else np.stack(np.unravel_index(np.arange(math.prod(kv_grid)), kv_grid), axis=1)
    )
    mine = coords[largest.rows]
    origin = mine.min(axis=0)
    extent = tuple(int(n) for n in mine.max(axis=0) - origin + 1)
    for cell in cell_shapes(extent):
        yield (
            spatial_ranks(coords, origin, cell),
            spatial_ranks(kv_coords, origin if kv_grid is None else origin * 0, cell),
        )


def cell_shapes(extent: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Cell shapes worth trying: volumes of 32 to 128 that divide the extent evenly, the most cubic ones first."""
    divisors = [[n for n in range(1, min(size, 128) + 1) if size % n == 0] for size in extent]
    shapes = []
    for volume in _CELL_SIZES:
        fitting = [shape for shape in itertools.product(*divisors) if math.prod(shape) == volume]
        shapes += sorted(fitting, key=lambda shape: (sum(shape), shape))[:_MAX_CELL_SHAPES]
    return shapes


def _clustered(parts: Parts) -> tuple[Ranks, Ranks]:
    """Ranks that bring together rows with the same keys, and keys with the same rows (block masks in disguise)."""
    q_rank = np.zeros(parts.q_atoms.of_token.size, np.int64)
    kv_rank = np.zeros(parts.kv_atoms.of_token.size, np.int64)
    for part in parts.parts:
        if isinstance(part.pattern, PairPattern):
            q_rank[part.rows] = _signature_rank(part.pattern.row, part.pattern.col, part.rows.size)
            kv_rank[part.cols] = _signature_rank(part.pattern.col, part.pattern.row, part.cols.size)
    return q_rank, kv_rank


def _signature_rank(own: Ranks, other: Ranks, count: int) -> Ranks:
    """Number the distinct sets of ``other`` per ``own`` by first appearance."""
    from canvas_engineering.plan.atoms import mix64

    signature = np.zeros(count, np.uint64)
    np.add.at(signature, own, mix64(other.astype(np.uint64)))
    _, first, inverse = np.unique(signature, return_index=True, return_inverse=True)
    rank = np.empty(first.size, np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(first.size)
    return rank[inverse]
