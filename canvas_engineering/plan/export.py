"""A joint plan in the formats of other people's kernels: JAX Splash and PyTorch FlexAttention.

Both see the tokens in plan order, padded to whole tiles: gather the queries by ``plan.q_tokens.ravel()`` (any row
for padding), the keys and values by ``plan.kv_tokens.ravel()``, and scatter the output back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from canvas_engineering._optional import require
from canvas_engineering.errors import PlanError
from canvas_engineering.plan.bits import pack_masks, unpack_masks

if TYPE_CHECKING:
    from canvas_engineering.plan.plan import BlockSparsePlan


#: Entries of an index table that may be as wide as the number of tiles.
_WHOLE_TABLE = 1 << 24


def _require_one_set(plan: BlockSparsePlan, target: str) -> None:
    if plan.max_sets > 1:
        raise PlanError(
            f"{target} holds one softmax per row, so the plan must have at most 1 softmax set per q tile, "
            f'got {plan.max_sets}; compile it with softmax="joint"'
        )


def padded_masks(plan: BlockSparsePlan) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Entry masks and packed masks that also rule out padding keys and rows, for kernels that know no counts.

    Returns:
        ``(entry_mask, masks)`` as in the plan, except that a full entry of a padded tile has a mask.
    """
    q_count = plan.q_count[plan.set_tile[plan.entry_set]].astype(np.int64)
    kv_count = plan.kv_count[plan.entry_kv].astype(np.int64)
    padded = (plan.entry_mask < 0) & ((q_count < plan.block_q) | (kv_count < plan.block_kv))
    if not padded.any():
        return plan.entry_mask, plan.masks
    code, inverse = np.unique(q_count[padded] * (plan.block_kv + 1) + kv_count[padded], return_inverse=True)
    rows, keys = np.divmod(code, plan.block_kv + 1)
    extra = (np.arange(plan.block_q) < rows[:, None])[:, :, None] & (np.arange(plan.block_kv) < keys[:, None])[:, None]
    entry_mask = plan.entry_mask.copy()
    entry_mask[padded] = plan.num_masks + inverse
    return entry_mask, np.concatenate([plan.masks, pack_masks(extra)])


def entry_rows(plan: BlockSparsePlan) -> NDArray[np.int64]:
    """``(num_q_tiles + 1,)`` pointer to the entries of each q tile of a plan with at most one set per tile."""
    return plan.entry_ptr[plan.set_ptr].astype(np.int64)


def to_mask_info(plan: BlockSparsePlan, head_shards: int, q_seq_shards: int, is_dkv: bool) -> Any:
    """See :meth:`BlockSparsePlan.to_mask_info`."""
    _require_one_set(plan, "MaskInfo")
    from canvas_engineering.kernels.pallas.mask_info import mask_info_from_blocks

    entry_mask, masks = padded_masks(plan)
    return mask_info_from_blocks(
        num_q_blocks=plan.num_q_tiles,
        num_kv_blocks=plan.num_kv_tiles,
        block_q=plan.block_q,
        block_kv=plan.block_kv,
        row_ptr=entry_rows(plan),
        kv_index=plan.entry_kv,
        mask_index=entry_mask,
        partial_mask_blocks=unpack_masks(masks),
        head_shards=head_shards,
        q_seq_shards=q_seq_shards,
        is_dkv=is_dkv,
    )


def to_block_mask(plan: BlockSparsePlan, device: Any) -> Any:
    """See :meth:`BlockSparsePlan.to_block_mask`.

    Its index tables are ``q tiles x kv tiles`` where that is at most ``_WHOLE_TABLE``, which ``BlockMask``'s own
    ``to_dense`` and printing expect; above, they are only as wide as the longest list, which is all a kernel reads.
    """
    _require_one_set(plan, "BlockMask")
    torch = require("torch", "torch", "plan.to_block_mask")
    from torch.nn.attention.flex_attention import BlockMask

    def tensor(array: NDArray[np.generic]) -> Any:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    entry_mask, masks = padded_masks(plan)
    tile, kv, partial = plan.set_tile[plan.entry_set], plan.entry_kv, entry_mask >= 0
    by_kv = np.argsort(kv, kind="stable")
    tables: dict[str, Any] = {}
    for name, some in (("", partial), ("full_", ~partial)):
        back = by_kv[some[by_kv]]
        rows = _index_table(tile[some], kv[some], plan.num_q_tiles, plan.num_kv_tiles)
        columns = _index_table(kv[back], tile[back], plan.num_kv_tiles, plan.num_q_tiles)
        for side, (count, index) in (("kv", rows), ("q", columns)):
            tables[f"{name}{side}_num_blocks"] = tensor(count)[None, None]
            tables[f"{name}{side}_indices"] = tensor(index)[None, None]
    # (q tile, kv tile) -> entry, as a sorted key list, so that mask_mod needs no table of all tile pairs. mask_mod is
    # the whole truth, also for tiles that the kernels would not ask about: uncompiled FlexAttention uses nothing else.
    keys = tile.astype(np.int64) * plan.num_kv_tiles + kv  # ascending, as the entries are
    key_table = tensor(keys if keys.size else np.full(1, -1, np.int64))
    mask_table = tensor(entry_mask.astype(np.int64) if keys.size else np.zeros(1, np.int64))
    bits = tensor(masks if masks.size else np.zeros((1, plan.block_q, plan.block_kv // 8), np.uint8))
    block_q, block_kv, num_kv_tiles = plan.block_q, plan.block_kv, plan.num_kv_tiles

    def mask_mod(batch: Any, head: Any, q_index: Any, kv_index: Any) -> Any:
        key = (q_index // block_q) * num_kv_tiles + kv_index // block_kv
        place = torch.searchsorted(key_table, key.to(torch.int64)).clamp(max=key_table.numel() - 1)
        mask = mask_table[place]
        byte = bits[mask.clamp(min=0), q_index % block_q, (kv_index % block_kv) // 8]
        allowed = ((byte >> (kv_index % 8)) & 1).to(torch.bool)
        return (key_table[place] == key) & ((mask < 0) | allowed)

    return BlockMask(
        seq_lengths=(plan.num_q_tiles * block_q, plan.num_kv_tiles * block_kv),
        BLOCK_SIZE=(block_q, block_kv),
        mask_mod=mask_mod,
        **tables,
    )


def _index_table(
    owner: NDArray[np.int32], member: NDArray[np.int32], num_owners: int, num_members: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Counts ``(owners,)`` and members ``(owners, width)`` of each owner; ``owner`` is ascending."""
    count = np.bincount(owner, minlength=num_owners).astype(np.int32)
    width = num_members if num_owners * num_members <= _WHOLE_TABLE else int(count.max(initial=0))
    index = np.zeros((num_owners, max(width, 1)), np.int32)
    within = np.arange(owner.size) - np.repeat(np.cumsum(count) - count, count)
    index[owner, within] = member
    return count, index
