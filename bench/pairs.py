"""What a declaration allows, in the forms in which peers want to hear it; made without any plan.

``groups`` are the (query rows, key columns, weight) triples that define a topology. Peers get them as they are
(one call per group), as a dense mask, or as a function of (query, key) that looks up as little as possible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.canvases import Declared
from canvas_engineering.groups import BoxPattern, Group, resolve_groups

MaskMod = Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True)
class Classes:
    """Tokens with equal rights: ``table[row_class[i], col_class[j]]`` says whether ``i`` reads ``j``."""

    row_class: NDArray[np.int64]
    col_class: NDArray[np.int64]
    table: NDArray[np.bool_]

    def true_pairs(self) -> int:
        rows = np.bincount(self.row_class, minlength=self.table.shape[0])
        cols = np.bincount(self.col_class, minlength=self.table.shape[1])
        return int(rows @ self.table.astype(np.int64) @ cols)

    def visited_blocks(self, block: int) -> int:
        """Square blocks with at least one pair, tokens in the order in which they are numbered."""
        touched = [self._touched(classes, block) for classes in (self.row_class, self.col_class)]
        rows = (touched[0].astype(np.int32) @ self.table.astype(np.int32)) > 0  # (row blocks, column classes)
        return int(((rows.astype(np.int32) @ touched[1].T.astype(np.int32)) > 0).sum())

    @staticmethod
    def _touched(classes: NDArray[np.int64], block: int) -> NDArray[np.bool_]:
        table = np.zeros((-(-classes.size // block), int(classes.max()) + 1), np.bool_)
        table[np.arange(classes.size) // block, classes] = True
        return table


class Pairs:
    """The allowed pairs of a declared canvas."""

    def __init__(self, declared: Declared) -> None:
        self.num_tokens = declared.layout.num_positions
        self.groups: list[Group] = resolve_groups(declared.topology, declared.layout)

    @cached_property
    def weights(self) -> list[NDArray[np.float32]]:
        """For each group, the weight of each of its rows, scaled so that those of one token sum to 1."""
        total = np.zeros(self.num_tokens)
        for group in self.groups:
            total[group.rows] += group.weight
        share = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
        return [(group.weight * share[group.rows]).astype(np.float32) for group in self.groups]

    @cached_property
    def classes(self) -> Classes | None:
        """Token classes, or None where some group has a pattern of its own."""
        if any(group.pattern is not None for group in self.groups):
            return None
        sides = []
        for side in ("rows", "cols"):
            code = np.zeros(self.num_tokens, np.int64)
            for tokens in {id(getattr(group, side)): getattr(group, side) for group in self.groups}.values():
                inside = np.zeros(self.num_tokens, np.int64)
                inside[tokens] = 1
                # Renumbered after every set, so that codes stay small.
                code = np.unique(2 * code + inside, return_inverse=True)[1].ravel()
            sides.append(code)
        table = np.zeros((sides[0].max() + 1, sides[1].max() + 1), np.bool_)
        for group in self.groups:
            table[np.ix_(np.unique(sides[0][group.rows]), np.unique(sides[1][group.cols]))] = True
        return Classes(sides[0], sides[1], table)

    def dense(self) -> NDArray[np.bool_]:
        """``(N, N)`` bool: some group allows the pair."""
        if self.classes is not None:
            by_row: NDArray[np.bool_] = self.classes.table[:, self.classes.col_class]
            return by_row[self.classes.row_class]
        mask = np.zeros((self.num_tokens, self.num_tokens), np.bool_)
        for group in self.groups:
            allowed = True if group.pattern is None else group.pattern.dense()
            mask[np.ix_(group.rows, group.cols)] |= allowed
        return mask

    def mask_mod(self, device: str) -> MaskMod:
        """The mask as FlexAttention wants it: by token class, by window, or by looking it up."""
        import torch

        def tensor(array: NDArray[Any]) -> Any:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        if self.classes is not None:
            row_class, col_class = tensor(self.classes.row_class), tensor(self.classes.col_class)
            table = tensor(self.classes.table)

            def by_class(batch: Any, head: Any, q: Any, kv: Any) -> Any:
                return table[row_class[q], col_class[kv]]

            return by_class
        box = self._one_box()
        if box is not None:
            axes = range(box.lo.shape[1])
            lo, hi = [tensor(box.lo[:, axis]) for axis in axes], [tensor(box.hi[:, axis]) for axis in axes]
            at = [tensor(box.coords[:, axis]) for axis in axes]

            def in_window(batch: Any, head: Any, q: Any, kv: Any) -> Any:
                inside = (lo[0][q] <= at[0][kv]) & (at[0][kv] < hi[0][q])
                for axis in axes[1:]:
                    inside = inside & (lo[axis][q] <= at[axis][kv]) & (at[axis][kv] < hi[axis][q])
                return inside

            return in_window
        mask = tensor(self.dense())

        def looked_up(batch: Any, head: Any, q: Any, kv: Any) -> Any:
            return mask[q, kv]

        return looked_up

    def _one_box(self) -> BoxPattern | None:
        """The pattern of the only group, if it is made of boxes and covers all tokens in their order."""
        if len(self.groups) != 1:
            return None
        group, everything = self.groups[0], np.arange(self.num_tokens)
        whole = np.array_equal(group.rows, everything) and np.array_equal(group.cols, everything)
        return group.pattern if whole and isinstance(group.pattern, BoxPattern) else None
