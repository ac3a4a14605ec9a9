"""A plan over several TPUs: heads over one axis of a mesh, q tiles over another.

Each device along the query axis gets the same number of q tiles, chosen so that all visit equally many tiles: a
device's time follows the tiles it visits, not the tokens it holds. Keys and values are replicated along that
axis, so the forward pass needs no communication, and the backward pass one sum of dK and dV.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from numpy.typing import NDArray

from canvas_engineering.errors import BackendError, PlanError
from canvas_engineering.kernels.pallas.attention import (
    dropout_hashes,
    kernel_operand,
    signed_query,
    tiled_attention,
)
from canvas_engineering.kernels.pallas.backend import interpret_here, reasons
from canvas_engineering.kernels.pallas.config import Activation, KernelConfig, PlanArrays
from canvas_engineering.kernels.pallas.launch import Interpret, vary
from canvas_engineering.kernels.pallas.lowering import (
    ListFormat,
    LoweredPlan,
    flat_lists,
    lower_plan,
    pack_lists,
)
from canvas_engineering.kernels.pallas.order import TokenOrder, from_tiles, to_tiles
from canvas_engineering.plan import BlockSparsePlan


@dataclass(frozen=True, eq=False)
class PlanShards:
    """The q tiles of a plan dealt out to shards, and the lists of every shard.

    Attributes:
        tiles: ``(shards, tiles_per_shard)`` int32, q tile in each slot, -1 for an empty slot.
        work: ``(shards,)`` int64, tiles that each shard visits.
        q_tokens: ``(shards * tiles_per_shard, block_q)`` int32, the tokens in shard order.
        num_sets: Softmax sets of a shard, the same for all.
        sets: ``(shards, num_sets)`` int32, the plan's set in each slot, ``plan.num_sets`` for none.
        set_tile, tile_set: ``(shards, num_sets)`` and ``(shards, tiles_per_shard)`` int32, within the shard.
        rows, cols: Per word ``(shards, chunks, length)`` int32.
    """

    tiles: NDArray[np.int32]
    work: NDArray[np.int64]
    q_tokens: NDArray[np.int32]
    num_sets: int
    sets: NDArray[np.int32]
    set_tile: NDArray[np.int32]
    tile_set: NDArray[np.int32]
    row_format: ListFormat
    col_format: ListFormat
    rows: tuple[NDArray[np.int32], ...]
    cols: tuple[NDArray[np.int32], ...]

    @property
    def imbalance(self) -> float:
        """How much longer the busiest shard works than the average one: 0 is perfect."""
        mean = self.work.mean()
        return float(self.work.max() / mean - 1) if mean else 0.0


def shard_plan(plan: BlockSparsePlan, q_shards: int) -> PlanShards:
    """Deal the q tiles of ``plan`` out to ``q_shards`` shards.

    Raises:
        PlanError: ``q_shards`` is not positive or exceeds the number of q tiles, or a list does not fit.
    """
    if not 1 <= q_shards <= max(plan.num_q_tiles, 1):
        raise PlanError(f"q_shards must be between 1 and the plan's {plan.num_q_tiles} q tiles, got {q_shards}")
    tiles = deal_tiles(np.diff(plan.entry_ptr[plan.set_ptr]), q_shards)
    parts = [_restrict(plan, row) for row in tiles]
    lists = [flat_lists(part) for part in parts]
    row_format, rows = pack_lists([row_list for row_list, _, _ in lists], "q")
    col_format, cols = pack_lists([col_list for _, col_list, _ in lists], "kv")

    num_sets = max(int(row_list.softmax_set.max()) + 1 for row_list, _, _ in lists)
    sets = np.full((q_shards, num_sets), plan.num_sets, np.int32)
    set_tile = np.zeros((q_shards, num_sets), np.int32)
    tile_set = np.zeros(tiles.shape, np.int32)
    for shard, (part, row) in enumerate(zip(parts, tiles, strict=True)):
        sets[shard, : part.num_sets] = _sets_of(plan, row)
        set_tile[shard, : part.num_sets] = part.set_tile
        has_set = np.diff(part.set_ptr) > 0
        # Tiles without sets share the one after the shard's own.
        tile_set[shard] = np.where(has_set, part.set_ptr[:-1], min(part.num_sets, num_sets - 1))
    return PlanShards(
        tiles=tiles,
        work=np.array([part.num_entries for part in parts], np.int64),
        q_tokens=np.concatenate([part.q_tokens for part in parts]),
        num_sets=num_sets,
        sets=sets,
        set_tile=set_tile,
        tile_set=tile_set,
        row_format=row_format,
        col_format=col_format,
        rows=tuple(np.stack(words) for words in zip(*rows, strict=True)),
        cols=tuple(np.stack(words) for words in zip(*cols, strict=True)),
    )


def deal_tiles(visits: NDArray[np.integer], shards: int) -> NDArray[np.int32]:
    """``(shards, slots)``: tiles to shards, none with more than its share of slots, by work.

    Longest processing time first (R. Graham, "Bounds on multiprocessing timing anomalies", 1969): the tile with
    the most visits goes to the shard with the least work that has a free slot. Then tiles are exchanged as long as
    that relieves the busiest shard, which matters where a shard has few. Each shard keeps its tiles in plan order.
    Empty slots (-1) come last.
    """
    slots = -(-visits.size // shards)
    assigned: list[list[int]] = [[] for _ in range(shards)]
    queue = [(0, shard) for shard in range(shards)]
    for tile in np.argsort(-visits, kind="stable"):
        work, shard = heapq.heappop(queue)
        assigned[shard].append(int(tile))
        if len(assigned[shard]) < slots:
            heapq.heappush(queue, (work + int(visits[tile]), shard))
    tiles = np.full((shards, slots), -1, np.int32)
    for shard, its in enumerate(assigned):
        tiles[shard, : len(its)] = its
    _exchange(tiles, visits)
    by_place = np.sort(np.where(tiles < 0, visits.size, tiles), axis=1)
    return np.where(by_place == visits.size, -1, by_place).astype(np.int32)


def _exchange(tiles: NDArray[np.int32], visits: NDArray[np.integer]) -> None:
    """Swap slots of the busiest shard with those of others, in place, while the busier of the two gets less work."""
    cost = np.append(visits, 0)[tiles]  # (shards, slots); an empty slot costs nothing
    while cost.size:
        total = cost.sum(axis=1)
        busiest = int(total.argmax())
        best: tuple[int, int, int, int] | None = None
        values, places = np.unique(cost[busiest], return_index=True)
        for other in map(int, np.flatnonzero(total < total[busiest] - 1)):
            other_values, other_places = np.unique(cost[other], return_index=True)
            moved = values[:, None] - other_values
            relief = np.minimum(moved, total[busiest] - total[other] - moved)  # of the busier of the two
            i, j = np.unravel_index(int(relief.argmax()), relief.shape)
            if relief[i, j] > (0 if best is None else best[0]):
                best = int(relief[i, j]), other, int(places[i]), int(other_places[j])
        if best is None:
            return
        _, other, slot, other_slot = best
        for array in (tiles, cost):
            array[busiest, slot], array[other, other_slot] = array[other, other_slot], array[busiest, slot]


def sharded_attention(
    q: Array,  # (B, Hq, Nq, D)
    k: Array,  # (B, Hkv, Nkv, D)
    v: Array,  # (B, Hkv, Nkv, D)
    plan: BlockSparsePlan,
    mesh: Mesh,
    *,
    head_axis: str | None = None,
    q_axis: str | None = None,
    scale: float | None = None,
    row_weight: Array | None = None,
    activation: Activation = "softmax",
    dropout_p: float = 0.0,
    seed: Array | None = None,
    return_lse: bool = False,
    interpret: Interpret | None = None,
) -> Array | tuple[Array, Array]:
    """``block_sparse_attention(..., backend="pallas")`` over the devices of ``mesh``: differentiable, the same numbers.

    Args:
        q, k, v, scale, row_weight, activation, dropout_p, return_lse: As there, whole; bfloat16 or float32.
        head_axis: Mesh axis over which the heads are divided.
        q_axis: Mesh axis over which the q tiles are divided, by work (see :func:`shard_plan`).
        seed: ``(2,)`` uint32, low and high word; needed for dropout.
        interpret: False for a TPU; None to ask JAX's default device, which on a CPU means TPU interpret mode.

    Raises:
        BackendError: A dtype, head_dim or tile size that the kernels do not take; the message has every reason.
        PlanError: Sizes that are not the plan's, an axis the mesh lacks, heads that its size does not divide, more
            shards than q tiles, a log-sum-exp that the plan does not have.
    """
    _check(q, k, v, plan, activation, return_lse)
    interpret = interpret_here() if interpret is None else interpret
    sizes = dict(mesh.shape)
    for name, axis in (("head_axis", head_axis), ("q_axis", q_axis)):
        if axis is not None and axis not in sizes:
            raise PlanError(f"{name} must be an axis of the mesh, one of {', '.join(sizes)}, got {axis!r}")
    head_shards = sizes[head_axis] if head_axis else 1
    if k.shape[1] % head_shards or q.shape[1] % head_shards:
        raise PlanError(
            f"the {q.shape[1]} query heads and {k.shape[1]} kv heads must be divisible by the {head_shards} devices "
            f"of mesh axis {head_axis!r}"
        )
    return _sharded_attention(
        q,
        k,
        v,
        row_weight,
        seed,
        plan=plan,
        mesh=mesh,
        head_axis=head_axis,
        q_axis=q_axis,
        scale=float(q.shape[-1] ** -0.5 if scale is None else scale),
        activation=activation,
        dropout_p=float(dropout_p),
        return_lse=return_lse,
        interpret=interpret,
    )


@partial(
    jax.jit,
    static_argnames=(
        "plan",
        "mesh",
        "head_axis",
        "q_axis",
        "scale",
        "activation",
        "dropout_p",
        "return_lse",
        "interpret",
    ),
)
def _sharded_attention(
    q: Array,
    k: Array,
    v: Array,
    row_weight: Array | None,
    seed: Array | None,
    *,
    plan: BlockSparsePlan,
    mesh: Mesh,
    head_axis: str | None,
    q_axis: str | None,
    scale: float,
    activation: Activation,
    dropout_p: float,
    return_lse: bool,
    interpret: Interpret,
) -> Array | tuple[Array, Array]:
    q_shards = mesh.shape[q_axis] if q_axis else 1
    shards = plan.lowered(("pallas shards", q_shards), lambda p: shard_plan(p, q_shards))
    lowered = plan.lowered("pallas", lower_plan)
    q_order = plan.lowered(
        ("pallas shard order", q_shards),
        lambda p: TokenOrder.of(shards.q_tokens, p.num_q, f"{p.digest}/{q_shards}"),
    )
    kv_order = plan.lowered("pallas kv order", lambda p: TokenOrder.of(p.kv_tokens, p.num_kv, p.digest))
    config = KernelConfig(
        block_q=plan.block_q,
        block_kv=plan.block_kv,
        num_sets=shards.num_sets,
        multi_set=lowered.max_sets > 1,
        weighted=row_weight is not None or not lowered.unit_weight,
        activation=activation,
        scale=abs(scale) or 1.0,
        dropout_p=dropout_p,
        rows=shards.row_format,
        cols=shards.col_format,
        interpret=interpret,
    )
    weight = jnp.asarray(plan.row_weight) if row_weight is None else row_weight.astype(jnp.float32)
    weight = jnp.pad(weight, ((0, 1), (0, 0)))[shards.sets]  # (shards, num_sets, block_q)
    q_hash, kv_hash = dropout_hashes(plan, q_order, kv_order, q.shape, seed) if dropout_p else (None, None)

    by_shard = PartitionSpec(q_axis)
    q_spec = PartitionSpec(None, head_axis, q_axis)
    kv_spec = PartitionSpec(None, head_axis)
    inputs: dict[str, tuple[Any, PartitionSpec]] = {
        "q": (to_tiles(q_order, signed_query(q, scale)), q_spec),
        "k": (to_tiles(kv_order, k), kv_spec),
        "v": (to_tiles(kv_order, v), kv_spec),
        "weight": (weight, by_shard),
        "rows": (tuple(map(jnp.asarray, shards.rows)), by_shard),
        "cols": (tuple(map(jnp.asarray, shards.cols)), by_shard),
        "set_tile": (jnp.asarray(shards.set_tile), by_shard),
        "tile_set": (jnp.asarray(shards.tile_set), by_shard),
        "q_hash": (q_hash, q_spec),
    }
    names, axes = tuple(inputs), tuple(axis for axis in (head_axis, q_axis) if axis)
    body = partial(_one_shard, config, lowered, kv_hash, row_weight is not None and not return_lse, axes, names)
    out, lse = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=tuple(spec for _, spec in inputs.values()),
        out_specs=(q_spec, q_spec),
        check_vma=not interpret,  # JAX's interpreters do not carry the types of what varies
    )(*(value for value, _ in inputs.values()))
    out = from_tiles(q_order, out)
    return (out, from_tiles(q_order, lse)) if return_lse else out


def _check(q: Array, k: Array, v: Array, plan: BlockSparsePlan, activation: Activation, return_lse: bool) -> None:
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or (q.shape[2], k.shape[2]) != (plan.num_q, plan.num_kv):
        raise PlanError(
            f"q must have shape (batch, heads, {plan.num_q}, head_dim) and k and v (batch, kv heads, {plan.num_kv}, "
            f"head_dim), got {q.shape}, {k.shape} and {v.shape}"
        )
    if return_lse and plan.max_sets > 1:
        raise PlanError(f"return_lse needs a plan with one softmax set per row, got one with up to {plan.max_sets}")
    found = reasons(q, k, v, plan, activation=activation, return_lse=return_lse, dropout_p=0.0, row_weight=None)
    if found:
        raise BackendError(f"backend 'pallas' cannot run this call: {'; '.join(found)}")


def _one_shard(
    config: KernelConfig,
    lowered: LoweredPlan,
    kv_hash: Array | None,
    skip_zero_weight: bool,
    axes: Sequence[str],
    names: Sequence[str],
    *arguments: Any,
) -> tuple[Array, Array]:
    """What one device computes: its heads of its q tiles, as if they were a plan of their own."""
    # Everything is marked as differing between the devices: then the gradient of what is shared (keys, values,
    # weights) becomes a sum over them.
    given = vary(dict(zip(names, arguments, strict=True)), frozenset(axes))
    batch, heads, _, head_dim = given["q"].shape
    has_masks = lowered.row_masks.shape[0] > 0
    q_hash = given["q_hash"]
    arrays = PlanArrays(
        rows=tuple(word[0] for word in given["rows"]),
        cols=tuple(word[0] for word in given["cols"]),
        set_tile=given["set_tile"][0],
        row_masks=jnp.asarray(lowered.row_masks) if has_masks else None,
        col_masks=jnp.asarray(lowered.col_masks) if has_masks else None,
        q_hash=None if q_hash is None else q_hash.reshape(batch * heads, -1, 1, config.block_q),
        kv_hash=kv_hash,
    )
    q, k, v = (kernel_operand(given[name]) for name in ("q", "k", "v"))
    out, lse = tiled_attention(config, skip_zero_weight, arrays, q, k, v, given["weight"][0][:, None])
    lse = lse[:, given["tile_set"][0]].reshape(batch, heads, -1)
    return out.reshape(batch, heads, -1, out.shape[-1])[..., :head_dim], lse


def _sets_of(plan: BlockSparsePlan, tiles: NDArray[np.int32]) -> NDArray[np.intp]:
    """The plan's sets of the given q tiles, tile after tile."""
    real = tiles[tiles >= 0]
    ranges = [np.arange(plan.set_ptr[tile], plan.set_ptr[tile + 1]) for tile in real]
    return np.concatenate([np.zeros(0, np.intp), *ranges]).astype(np.intp)


def _restrict(plan: BlockSparsePlan, tiles: NDArray[np.int32]) -> BlockSparsePlan:
    """The plan of the given q tiles only; empty slots become tiles of padding without sets.

    Not a whole plan (tokens are missing), but all that ``flat_lists`` looks at.
    """
    sets = _sets_of(plan, tiles)
    visits = np.diff(plan.entry_ptr)[sets]
    entry_ptr = np.concatenate([[0], np.cumsum(visits)]).astype(np.int64)
    entries = np.repeat(plan.entry_ptr[sets] - entry_ptr[:-1], visits) + np.arange(entry_ptr[-1])
    real = tiles >= 0
    set_count = np.where(real, np.diff(plan.set_ptr)[tiles], 0)
    return replace(
        plan,
        q_tokens=np.where(real[:, None], plan.q_tokens[tiles], -1).astype(np.int32),
        set_ptr=np.concatenate([[0], np.cumsum(set_count)]).astype(np.int32),
        entry_ptr=entry_ptr,
        entry_kv=plan.entry_kv[entries],
        entry_mask=plan.entry_mask[entries],
        row_weight=plan.row_weight[sets],
        row_connection=plan.row_connection[sets],
        _lowered={},
    )
