"""A lowered plan as tensors on a device, and the views, gathers and masks of its problems."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from canvas_engineering.kernels.portable.access import Access, Lowering, Read, lower
from canvas_engineering.plan import BlockSparsePlan

#: Bytes of gathered operands and masks that exist at once: on a CPU what stays in its caches.
CPU_GATHER_BYTES, DEVICE_GATHER_BYTES = 8 << 20, 256 << 20
#: Bytes of additive masks kept with one batch, so that they are not made in every call.
KEPT_BYTES = 64 << 20
#: Keys that torch's CPU operator handles at once (float32, AVX-512).
VECTOR = 16


@dataclass(frozen=True)
class Places:
    """An :class:`Access` on a device."""

    index: Tensor  # (G, L) int64
    run: tuple[int, int] | None
    assign: bool

    def part(self, problems: slice, rows: slice = slice(None)) -> Places:
        index = self.index[problems, rows]
        if index.shape == self.index.shape:
            return self
        run = None
        if self.run is not None and index.shape[1] == self.index.shape[1]:
            run = (self.run[0] + (problems.start or 0) * self.run[1], self.run[1])
        return Places(index, run, self.assign)

    def picked(self, problems: Tensor) -> Places:
        return Places(self.index[problems], None, self.assign)

    def widened(self, count: int) -> Places:
        """The same with ``count`` more places for each problem, which nobody looks at."""
        extra = self.index[:, :1].expand(-1, count)
        return Places(torch.cat([self.index, extra], dim=1), None, False)

    def take(self, x: Tensor, fold: int = 1) -> Tensor:
        """``(B, H, N, fold * D)`` to ``(B * H, G, L * fold, D)``, without a copy where the layout allows."""
        count, length = self.index.shape
        if self.run is not None:
            b, h, n, d = x.stride()
            size = (*x.shape[:2], count, length, x.shape[3])
            picked = x.as_strided(size, (b, h, self.run[1] * n, n, d), x.storage_offset() + self.run[0] * n)
        else:
            picked = x.index_select(2, self.index.flatten())
        return picked.reshape(x.shape[0] * x.shape[1], count, length * fold, x.shape[3] // fold)

    def put(self, x: Tensor, values: Tensor) -> Tensor:
        """``x (B, H, N, fold * D)`` with ``(B * H, G, L * fold, D)`` written or added at these places.

        In place, unless the values are all of ``x``.
        """
        count, length = self.index.shape
        if self.run is not None:
            if self.assign and count == 1 and length == x.shape[2]:
                return values.reshape(x.shape).to(x.dtype)
            b, h, n, d = x.stride()
            size = (*x.shape[:2], count, length, x.shape[3])
            target = x.as_strided(size, (b, h, self.run[1] * n, n, d), x.storage_offset() + self.run[0] * n)
            values = values.reshape(size)
            _ = target.copy_(values) if self.assign else target.add_(values)
            return x
        values = values.reshape(*x.shape[:2], count * length, x.shape[3]).to(x.dtype)
        place = self.index.flatten()
        return x.index_copy_(2, place, values) if self.assign else x.index_add_(2, place, values)


@dataclass(frozen=True)
class Masks:
    """The distinct masks of one batch."""

    allowed: Tensor  # (U, R, K) bool
    kept: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def keeps(self, dtype: torch.dtype) -> bool:
        """Whether the additive masks are small enough to be kept."""
        return self.allowed.numel() * dtype.itemsize <= KEPT_BYTES

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """``(U, R, K)``: 0 where allowed, ``-inf`` elsewhere; None where that is too large to keep."""
        if not self.keeps(dtype):
            return None
        if dtype not in self.kept:
            self.kept[dtype] = additive(self.allowed, dtype)
        return self.kept[dtype]


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, ``-inf`` elsewhere."""
    # 1 - 1/1 and 1 - 1/0; filling by a mask is several times slower.
    return allowed.to(dtype).reciprocal_().neg_().add_(1)


@dataclass(frozen=True)
class DeviceRead:
    """A :class:`Read` on a device."""

    keys: Places
    slots: Tensor  # (G, R) int64
    weight: Tensor | None  # (G, R) the plan's weights, None where all are 1
    mask_index: Tensor | None  # (G,) int64
    masks: Masks | None
    mask_rows: slice  # the rows of the masks that the problems have
    row_token: Tensor  # (G, R) int32, for dropout
    key_token: Tensor  # (G, K) int32
    padded: Places | None  # keys at a width that torch's CPU operator prefers

    def part(self, problems: slice, rows: slice) -> DeviceRead:
        # Other rows of the same problems read the same keys.
        whole = self.slots[problems, rows].shape[1] == self.slots.shape[1]
        keys = self.keys.part(problems)
        return DeviceRead(
            keys if whole else replace(keys, assign=False),
            self.slots[problems, rows],
            None if self.weight is None else self.weight[problems, rows],
            None if self.mask_index is None else self.mask_index[problems],
            self.masks,
            self.mask_rows if whole else rows,
            self.row_token[problems, rows],
            self.key_token[problems],
            None if self.padded is None else self.padded.part(problems),
        )

    def picked(self, problems: Tensor) -> DeviceRead:
        return DeviceRead(
            self.keys.picked(problems),
            self.slots[problems],
            None if self.weight is None else self.weight[problems],
            None if self.mask_index is None else self.mask_index[problems],
            self.masks,
            self.mask_rows,
            self.row_token[problems],
            self.key_token[problems],
            None if self.padded is None else self.padded.picked(problems),
        )

    def weights(self, row_weight: Tensor | None, group: int) -> Tensor | None:
        """``(G, R * group, 1)`` weights, or None where all are 1."""
        weight = self.weight if row_weight is None else row_weight.flatten()[self.slots]
        if weight is None:
            return None
        return (weight.repeat_interleave(group, dim=1) if group > 1 else weight)[..., None]

    def allowed(self, group: int) -> Tensor | None:
        """``(G, R * group, K)`` bool: the mask of every problem, each row once per query head of its kv head."""
        return None if self.masks is None else self._of_problems(self.masks.allowed, group)

    def bias(self, dtype: torch.dtype, group: int) -> Tensor | None:
        """``(1, G, R * group, K)`` at the width of ``padded``, or one row of it for all: 0 or ``-inf``."""
        if self.padded is not None:
            bias = torch.zeros((1, 1, 1, self.padded.index.shape[1]), dtype=dtype, device=self.slots.device)
            bias[..., self.keys.index.shape[1] :] = -torch.inf
            return bias
        return self.mask_bias(dtype, group)

    def mask_bias(self, dtype: torch.dtype, group: int) -> Tensor | None:
        """The same at the width of ``keys``; None without a mask."""
        if self.masks is None:
            return None
        kept = self.masks.bias(dtype)
        if kept is None:
            return additive(self._of_problems(self.masks.allowed, group), dtype)[None]
        return self._of_problems(kept, group)[None]

    def mask_bytes_per_row(self, dtype: torch.dtype, group: int) -> int:
        """What a row of a problem's mask takes while it is used; a single mask that is kept is only viewed."""
        if self.masks is None or (self._single and group == 1 and self.masks.keeps(dtype)):
            return 0
        return group * self.keys.index.shape[1] * dtype.itemsize

    @property
    def _single(self) -> bool:
        return self.masks is not None and self.masks.allowed.shape[0] == 1

    def _of_problems(self, masks: Tensor, group: int) -> Tensor:
        masks = masks[:, self.mask_rows]
        mask = masks.expand(self.slots.shape[0], -1, -1) if self._single else masks[self.mask_index]
        return mask.repeat_interleave(group, dim=1) if group > 1 else mask


@dataclass(frozen=True)
class DeviceProblems:
    """A :class:`Problems` on a device."""

    rows: Places
    reads: tuple[DeviceRead, ...]

    def part(self, problems: slice, rows: slice) -> DeviceProblems:
        """A slice of the problems, and of the rows of each."""
        return DeviceProblems(self.rows.part(problems, rows), tuple(read.part(problems, rows) for read in self.reads))

    def alive(self, row_weight: Tensor) -> DeviceProblems | None:
        """Those problems and reads that have a weight other than 0; None if there are none."""
        weights = row_weight.flatten()
        alive = [(weights[read.slots] != 0).any(dim=1) for read in self.reads]
        problems = torch.stack(alive).any(dim=0)
        reads = tuple(read for read, one in zip(self.reads, alive, strict=True) if bool(one.any()))
        if not reads:
            return None
        if bool(problems.all()):
            return DeviceProblems(self.rows, reads)
        chosen = problems.nonzero().flatten()
        return DeviceProblems(self.rows.picked(chosen), tuple(read.picked(chosen) for read in reads))


@dataclass(frozen=True)
class DevicePlan:
    problems: tuple[DeviceProblems, ...]
    q_order: Tensor | None
    kv_order: Tensor | None
    q_place: Tensor | None  # inverse of q_order
    kv_place: Tensor | None
    assigns_all_rows: bool


def on_device(plan: BlockSparsePlan, device: torch.device) -> DevicePlan:
    """The lowered plan on a device; made once and kept with the plan."""
    return plan.lowered(("portable", "torch", str(device)), lambda plan: _to_device(plan, lower(plan), device))


def _to_device(plan: BlockSparsePlan, lowering: Lowering, device: torch.device) -> DevicePlan:
    def tensor(array: Any, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array).to(device=device, dtype=dtype)

    def places(access: Access) -> Places:
        return Places(tensor(access.index, torch.int64), access.run, access.assign)

    def order(array: Any) -> tuple[Tensor | None, Tensor | None]:
        if array is None:
            return None, None
        forward = tensor(array, torch.int64)
        return forward, torch.argsort(forward)

    def read(one: Read) -> DeviceRead:
        batch = one.batch
        keys = places(one.keys)
        missing = -keys.index.shape[1] % VECTOR
        # torch's CPU operator takes the last keys one by one where they do not fill a vector.
        pad = device.type == "cpu" and batch.masks is None and 0 < missing <= VECTOR // 2
        return DeviceRead(
            keys,
            tensor(batch.slots, torch.int64),
            None if one.weight is None else tensor(one.weight, torch.float32),
            None if batch.mask_index is None else tensor(batch.mask_index, torch.int64),
            None if batch.masks is None else Masks(tensor(batch.masks, torch.bool)),
            slice(None),
            tensor(batch.rows, torch.int32),
            tensor(batch.keys, torch.int32),
            _padded(keys, missing, plan.num_kv) if pad else None,
        )

    problems = tuple(DeviceProblems(places(one.rows), tuple(map(read, one.reads))) for one in lowering.problems)
    q_order, q_place = order(lowering.q_order)
    kv_order, kv_place = order(lowering.kv_order)
    return DevicePlan(problems, q_order, kv_order, q_place, kv_place, lowering.assigns_all_rows)


def _padded(keys: Places, missing: int, num_kv: int) -> Places:
    """Keys with ``missing`` more per problem: the neighbours in a slice where there are some, else repeated ones."""
    padded = keys.widened(missing)
    if keys.run is None:
        return padded
    start, step = keys.run
    count, length = padded.index.shape
    fits = start + (count - 1) * step + length <= num_kv and (step >= length or count == 1)
    return replace(padded, run=(start, max(step, length))) if fits else padded


def pieces(problems: DeviceProblems, q: Tensor, k: Tensor, group: int) -> Iterator[DeviceProblems]:
    """Parts of a batch whose gathered operands and masks fit the limit.

    ``q`` is ``(B, Hkv, Nq, group * D)``, ``k`` ``(B, Hkv, Nkv, D)``.
    """
    limit = CPU_GATHER_BYTES if q.device.type == "cpu" else DEVICE_GATHER_BYTES
    count, rows = problems.rows.index.shape
    heads, item = k.shape[0] * k.shape[1], q.element_size()
    operands = 0 if problems.rows.run is not None else 2 * heads * rows * q.shape[3] * item
    per_row = 0
    for read in problems.reads:
        keys = read.keys.index.shape[1]
        operands = max(operands, 0 if read.keys.run is not None else 2 * heads * keys * k.shape[3] * item)
        per_row = max(per_row, read.mask_bytes_per_row(q.dtype, group))
    together = max(1, limit // max(operands + rows * per_row, 1))
    height = rows if rows * per_row <= limit else max(1, limit // per_row)
    if together >= count and height >= rows:
        yield problems
        return
    for g in range(0, count, together):
        for r in range(0, rows, height):
            yield problems.part(slice(g, min(g + together, count)), slice(r, min(r + height, rows)))
