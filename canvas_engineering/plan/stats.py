"""What a plan costs: pairs, tiles, padding, FLOPs and bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from canvas_engineering.plan.plan import BlockSparsePlan

_POPCOUNT_CHUNK = 1 << 16


@dataclass(frozen=True)
class PlanStats:
    """Counts of one plan, for one head and one batch element where FLOPs and bytes are concerned.

    Attributes:
        true_pairs: (query, key) pairs that some softmax reads, counted once per softmax set.
        computed_pairs: Pairs of the visited tiles: what a tiled kernel computes.
        q_tiles, kv_tiles, sets, entries: Sizes of the plan.
        full_tiles, partial_tiles, masks: Entries without and with a mask, and distinct masks.
        q_padding, kv_padding: Padding rows and keys in all tiles.
        metadata_bytes: Size of the plan's arrays.
    """

    num_q: int
    num_kv: int
    block_q: int
    block_kv: int
    true_pairs: int
    computed_pairs: int
    q_tiles: int
    kv_tiles: int
    sets: int
    entries: int
    full_tiles: int
    partial_tiles: int
    masks: int
    q_padding: int
    kv_padding: int
    metadata_bytes: int

    @property
    def computed_per_true(self) -> float:
        """Pairs computed per pair needed; 1.0 is perfect."""
        return self.computed_pairs / self.true_pairs if self.true_pairs else 1.0

    @property
    def density(self) -> float:
        """True pairs over ``num_q * num_kv``; above 1 where rows stand in several softmax sets."""
        return self.true_pairs / (self.num_q * self.num_kv) if self.num_q and self.num_kv else 0.0

    def forward_flops(self, head_dim: int) -> int:
        """FLOPs of the true pairs, forward: two products of ``2 * head_dim`` each."""
        return 4 * head_dim * self.true_pairs

    def backward_flops(self, head_dim: int) -> int:
        """FLOPs of the true pairs, backward: the scores again, dP, dQ, dK and dV."""
        return 10 * head_dim * self.true_pairs

    def forward_bytes(self, head_dim: int, itemsize: int) -> int:
        """Least traffic forward: q, k, v read once and the output written once."""
        return 2 * (self.num_q + self.num_kv) * head_dim * itemsize

    def as_dict(self) -> dict[str, int | float]:
        """All counts and the two ratios, ready for JSON."""
        return {**asdict(self), "computed_per_true": self.computed_per_true, "density": self.density}

    def describe(self, plan: BlockSparsePlan) -> str:
        """A few lines for people."""
        return "\n".join(
            [
                f"BlockSparsePlan  {self.num_q:,} queries x {self.num_kv:,} keys, softmax={plan.softmax}"
                + (f", from {plan.source}" if plan.source else ""),
                f"  tiles     {self.block_q} x {self.block_kv}; {self.q_tiles:,} q tiles, {self.kv_tiles:,} kv tiles, "
                f"padding {self.q_padding:,} rows and {self.kv_padding:,} keys",
                f"  visited   {self.entries:,} tiles in {self.sets:,} softmax sets: {self.full_tiles:,} full, "
                f"{self.partial_tiles:,} partial ({self.masks:,} distinct masks)",
                f"  pairs     {self.true_pairs:,} true ({self.density:.1%} of dense), {self.computed_pairs:,} computed "
                f"({self.computed_per_true:.2f} x)",
                f"  metadata  {self.metadata_bytes / 1024:,.1f} KiB, digest {plan.digest[:12]}",
            ]
        )


def mask_popcounts(plan: BlockSparsePlan) -> np.ndarray:
    """``(num_masks,)`` int64: allowed pairs of each stored mask."""
    counts = np.zeros(plan.num_masks, np.int64)
    for start in range(0, plan.num_masks, _POPCOUNT_CHUNK):
        chunk = plan.masks[start : start + _POPCOUNT_CHUNK]
        counts[start : start + _POPCOUNT_CHUNK] = np.bitwise_count(chunk).sum(axis=(1, 2), dtype=np.int64)
    return counts


def plan_stats(plan: BlockSparsePlan) -> PlanStats:
    """Count; cost follows the entries of the plan."""
    full = plan.entry_mask < 0
    q_count = plan.q_count.astype(np.int64)[plan.set_tile[plan.entry_set]]
    kv_count = plan.kv_count.astype(np.int64)[plan.entry_kv]
    # A stored mask holds no bits at padding, so its population count is its number of true pairs.
    true_pairs = int((q_count * kv_count)[full].sum()) + int(mask_popcounts(plan)[plan.entry_mask[~full]].sum())
    arrays = (
        plan.q_tokens,
        plan.kv_tokens,
        plan.set_ptr,
        plan.entry_ptr,
        plan.entry_kv,
        plan.entry_mask,
        plan.masks,
    )
    return PlanStats(
        num_q=plan.num_q,
        num_kv=plan.num_kv,
        block_q=plan.block_q,
        block_kv=plan.block_kv,
        true_pairs=true_pairs,
        computed_pairs=plan.num_entries * plan.block_q * plan.block_kv,
        q_tiles=plan.num_q_tiles,
        kv_tiles=plan.num_kv_tiles,
        sets=plan.num_sets,
        entries=plan.num_entries,
        full_tiles=int(full.sum()),
        partial_tiles=int((~full).sum()),
        masks=plan.num_masks,
        q_padding=plan.num_q_tiles * plan.block_q - plan.num_q,
        kv_padding=plan.num_kv_tiles * plan.block_kv - plan.num_kv,
        metadata_bytes=sum(a.nbytes for a in (*arrays, plan.row_weight, plan.row_connection)),
    )
