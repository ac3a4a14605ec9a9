"""What a kernel is compiled for, and the arrays it is given beside q, k and v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from jax import Array

from canvas_engineering.kernels.pallas.launch import Interpret
from canvas_engineering.kernels.pallas.lowering import ListFormat

Activation = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class KernelConfig:
    """Static and hashable: two calls with equal configurations share their compiled kernels.

    Attributes:
        scale: Factor of the scores, positive (the sign and a zero are put into q beforehand).
        multi_set: Some q tile has several softmax sets, so outputs are summed on chip.
        weighted: Row weights are applied; otherwise all that count are 1.
    """

    block_q: int
    block_kv: int
    num_sets: int
    multi_set: bool
    weighted: bool
    activation: Activation
    scale: float
    dropout_p: float
    rows: ListFormat
    cols: ListFormat
    interpret: Interpret

    @property
    def keeps_outputs_by_set(self) -> bool:
        """Whether the backward pass needs each set's own output, because it is not the call's output."""
        return self.multi_set or self.weighted


class PlanArrays(NamedTuple):
    """The lowered plan and per-token data as arrays: constants of a call, or one shard of them. A pytree.

    Attributes:
        rows, cols: The lists: per word ``(chunks, length)`` int32.
        set_tile: ``(num_sets,)`` int32, None where each q tile has exactly the set of its own number.
        row_masks, col_masks: Packed masks, None without partial tiles.
        q_hash: ``(B * Hq, q_tiles, 1, block_q)`` int32, hash of seed, head and query token; None without dropout.
        kv_hash: ``(kv_tiles, 1, block_kv)`` int32, hash of the key token; None without dropout.
    """

    rows: tuple[Array, ...]
    cols: tuple[Array, ...]
    set_tile: Array | None
    row_masks: Array | None
    col_masks: Array | None
    q_hash: Array | None
    kv_hash: Array | None
