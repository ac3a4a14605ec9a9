"""The schedule of a dispatcher: which groups run through which plan, and which are computed directly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.groups import BoxPattern, Group, PairPattern, Pattern, resolve_groups, with_pattern
from canvas_engineering.plan import BlockSize, BlockSparsePlan
from canvas_engineering.plan.auto import AUTO_TILES, TileTable
from canvas_engineering.plan.compile import compile_groups, shared_order
from canvas_engineering.routing.edges import Edge

if TYPE_CHECKING:
    from canvas_engineering.canvas import CanvasLayout
    from canvas_engineering.connectivity import CanvasTopology
    from canvas_engineering.program import CanvasProgram

Tokens = NDArray[np.int64]
#: A plan that uses at least this share of the canvas takes the whole of it, instead of gathering its tokens.
WHOLE_CANVAS = 0.9


@dataclass(frozen=True)
class FunctionTraits:
    """How an attention function runs.

    Attributes:
        plan: Through a block-sparse plan; otherwise it is called with queries, keys and values.
        pattern: ``(rows, columns, group number)`` to the pattern of one group, for functions that restrict keys.
        chunks: ``columns`` to the half-open column ranges of the experts, for functions made of several.
    """

    plan: bool
    pattern: Callable[[int, int, int], Pattern | None] | None = None
    chunks: Callable[[int], list[tuple[int, int]]] | None = None

    @property
    def sees_whole_group(self) -> bool:
        """Whether the result depends on where a group begins and ends, so that masks must be split into groups."""
        return not self.plan or self.pattern is not None or self.chunks is not None


@dataclass(frozen=True, eq=False)
class PlanCall:
    """One kernel call.

    Attributes:
        fn: Attention function.
        expert: Which expert of the function; None if it has none.
        plan: Weighs groups by their declared weights; ``row_connection`` holds indices into the schedule's edges.
        rows, cols: Places in plan order of the call's query and key tokens; None for all.
        row_tokens: ``(num_sets, block_q)`` canvas token of each row of each softmax set, -1 for padding.
    """

    fn: str
    expert: int | None
    plan: BlockSparsePlan
    rows: Tokens | None
    cols: Tokens | None
    row_tokens: Tokens


@dataclass(frozen=True, eq=False)
class DirectCall:
    """Equally shaped groups of one function, computed in one batch.

    Attributes:
        fn: Attention function.
        rows, cols: ``(G, n)``, ``(G, m)`` canvas tokens.
        edge: ``(G,)`` indices into the schedule's edges.
        weight: ``(G,)`` declared group weights.
        slots: Region whose slot bank stands in for keys and values, or None.
        residual: Region whose error is accumulated, or None; such a call holds one edge.
    """

    fn: str
    rows: Tokens
    cols: Tokens
    edge: NDArray[np.int64]
    weight: NDArray[np.float32]
    slots: str | None
    residual: str | None


@dataclass(frozen=True, eq=False)
class Schedule:
    """Everything of a dispatcher that does not depend on parameters or inputs.

    Attributes:
        num_tokens: Canvas positions.
        edges: The edges, in order.
        groups: All groups; ``connection`` is an index into ``edges``.
        planned: Those that run through plans.
        order: ``(num_tokens,)`` canvas tokens in the order that all plans share; None when no plan needs one.
        plan_calls, direct_calls: The work, plans by function.
    """

    num_tokens: int
    edges: list[Edge]
    groups: list[Group]
    planned: list[Group]
    order: Tokens | None
    plan_calls: list[PlanCall]
    direct_calls: list[DirectCall]


def build_schedule(
    topology: CanvasTopology,
    layout: CanvasLayout,
    edges: Sequence[Edge],
    traits: Mapping[str, FunctionTraits],
    *,
    program: CanvasProgram | None = None,
    skip_temporal: bool = False,
    block_q: BlockSize = "auto",
    block_kv: BlockSize = "auto",
    tiles: TileTable = AUTO_TILES,
) -> Schedule:
    """Sort the groups of a topology into plans and direct calls.

    Args:
        topology, layout, program, skip_temporal: The declaration.
        edges: Its edges (``resolve_edges``).
        traits: How each function named by an edge runs.
        block_q, block_kv: Tile sizes of the plans.
        tiles: What ``"auto"`` chooses from: tile sizes that the backend takes, with their relative speeds.

    Raises:
        PlanError: A tile size that is not allowed.
    """
    position = {edge.index: i for i, edge in enumerate(edges)}
    by_function: dict[str, list[Group]] = {}
    planned: list[Group] = []
    direct: list[Group] = []
    split = [edge.index for edge in edges if edge.needs_own_output or traits[edge.fn].sees_whole_group]
    whole = [edge.index for edge in edges if edge.index not in set(split)]
    resolve = partial(resolve_groups, topology, layout, program=program, skip_temporal=skip_temporal)
    groups = resolve(split_masks=True, connections=split) + resolve(connections=whole, warn=False)
    groups = [replace(group, connection=position[group.connection]) for group in groups]
    groups.sort(key=lambda group: group.connection)  # stable: within an edge the groups keep their order
    for group in groups:
        edge = edges[group.connection]
        if traits[edge.fn].plan and not edge.needs_own_output and not _has_empty_chunk(traits[edge.fn], group):
            by_function.setdefault(edge.fn, []).append(group)
            planned.append(group)
        else:
            direct.append(group)

    pieces = [piece for fn, mine in by_function.items() for piece in _expert_groups(fn, mine, traits[fn])]
    order, plan_calls = None, []
    if pieces:
        everything = [group for _, _, mine in pieces for group in mine]
        order = shared_order(everything, layout.num_positions, (layout.T, *layout.spatial_shape), tiles)
        place = np.empty(order.size, np.int64)
        place[order] = np.arange(order.size)
        plan_calls = [
            # Rows without keys still get the output projection's bias, so the rows are those of the whole groups.
            _plan_call(fn, expert, mine, _used(by_function[fn], "rows", place), order, place, block_q, block_kv, tiles)
            for fn, expert, mine in pieces
        ]
    return Schedule(
        layout.num_positions, list(edges), groups, planned, order, plan_calls, _direct_calls(direct, list(edges))
    )


def _has_empty_chunk(traits: FunctionTraits, group: Group) -> bool:
    """Whether the group has too few keys for all experts: an expert without keys still adds its output bias."""
    return traits.chunks is not None and any(start >= stop for start, stop in traits.chunks(group.cols.size))


def _expert_groups(fn: str, groups: list[Group], traits: FunctionTraits) -> list[tuple[str, int | None, list[Group]]]:
    """(function, expert, groups) of each kernel call of a function."""
    patterned = []
    for number, group in enumerate(groups):
        pattern = None if traits.pattern is None else traits.pattern(group.rows.size, group.cols.size, number)
        kept = group if pattern is None else with_pattern(group, pattern)
        if kept is not None:
            patterned.append(kept)
    if traits.chunks is None:
        return [(fn, None, patterned)]
    chunk_arrays: dict[tuple[int, int, int], Tokens] = {}  # equal chunks stay the same array object
    experts: list[list[Group]] = []
    for group in patterned:
        for expert, (start, stop) in enumerate(traits.chunks(group.cols.size)):
            if expert == len(experts):
                experts.append([])
            cols = chunk_arrays.setdefault((id(group.cols), start, stop), group.cols[start:stop])
            experts[expert].append(replace(group, cols=cols))
    return [(fn, expert, mine) for expert, mine in enumerate(experts)]


def key_pattern(lo: Tokens, hi: Tokens, num_cols: int) -> BoxPattern:
    """The pattern of per-row half-open column ranges."""
    return BoxPattern(
        lo[:, None].astype(np.int32), hi[:, None].astype(np.int32), np.arange(num_cols, dtype=np.int32)[:, None]
    )


def index_pattern(index: Tokens, num_cols: int) -> PairPattern:
    """The pattern of per-row column indices ``(rows, k)``."""
    rows = np.repeat(np.arange(index.shape[0], dtype=np.int64), index.shape[1])
    return PairPattern(rows, index.ravel(), (index.shape[0], num_cols))


def _used(groups: list[Group], side: str, place: Tokens) -> Tokens | None:
    """Places in plan order that one side of the groups uses, ascending; None for (nearly) all."""
    used = np.zeros(place.size, np.bool_)
    for tokens in {id(getattr(group, side)): getattr(group, side) for group in groups}.values():
        used[place[tokens]] = True
    places = np.flatnonzero(used)
    return None if places.size >= WHOLE_CANVAS * place.size else places


def _plan_call(
    fn: str,
    expert: int | None,
    groups: list[Group],
    rows: Tokens | None,
    order: Tokens,
    place: Tokens,
    block_q: BlockSize,
    block_kv: BlockSize,
    tiles: TileTable,
) -> PlanCall:
    """Compile the groups of one kernel call on the tokens it uses, numbered in the shared order.

    ``rows``: places in plan order of the rows it gives, None for all.
    """
    cols = _used(groups, "cols", place)

    def renumbering(used: Tokens | None) -> tuple[Tokens, int]:
        if used is None:
            return place, place.size
        number = np.full(place.size, -1, np.int64)
        number[order[used]] = np.arange(used.size)
        return number, used.size

    row_number, num_q = renumbering(rows)
    col_number, num_kv = renumbering(cols)
    renumbered: dict[tuple[int, bool], Tokens] = {}

    def tokens(array: Tokens, number: Tokens, is_col: bool) -> Tokens:
        key = (id(array), is_col)
        if key not in renumbered:
            renumbered[key] = number[array]
        return renumbered[key]

    plan = compile_groups(
        [
            replace(group, rows=tokens(group.rows, row_number, False), cols=tokens(group.cols, col_number, True))
            for group in groups
        ],
        num_q,
        num_kv,
        joint=False,
        block_q=block_q,
        block_kv=block_kv,
        keep_order=True,
        tiles=tiles,
        source=fn if expert is None else f"{fn}, expert {expert}",
    )
    to_canvas = order if rows is None else order[rows]
    placed = plan.q_tokens[plan.set_tile]
    row_tokens = np.where(placed >= 0, to_canvas[placed], -1) if placed.size else placed.astype(np.int64)
    return PlanCall(fn, expert, plan, rows, cols, row_tokens)


def _direct_calls(groups: list[Group], edges: Sequence[Edge]) -> list[DirectCall]:
    """Batch groups of equal shape, function and treatment."""
    batches: dict[tuple[object, ...], list[Group]] = {}
    for group in groups:
        edge = edges[group.connection]
        own = group.connection if edge.residual else None
        slots = edge.dst if edge.slots else None
        key = (edge.fn, group.rows.size, group.cols.size, slots, own)
        batches.setdefault(key, []).append(group)
    return [
        DirectCall(
            fn=edges[mine[0].connection].fn,
            rows=np.stack([group.rows for group in mine]),
            cols=np.stack([group.cols for group in mine]),
            edge=np.array([group.connection for group in mine], np.int64),
            weight=np.array([group.weight for group in mine], np.float32),
            slots=edges[mine[0].connection].dst if edges[mine[0].connection].slots else None,
            residual=edges[mine[0].connection].dst if edges[mine[0].connection].residual else None,
        )
        for mine in batches.values()
    ]
