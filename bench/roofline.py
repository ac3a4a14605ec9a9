"""What the device can do at best, measured, and what a plan therefore needs at least."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from bench.machine import synchronize
from canvas_engineering.plan import BlockSparsePlan

Phase = Literal["forward", "backward", "step"]
#: FLOPs per (query, key) pair and head_dim: two products forward, five backward (the scores again, dP, dQ, dK, dV).
FLOPS_PER_PAIR: dict[Phase, int] = {"forward": 4, "backward": 10, "step": 14}
#: Operands read or written once, in rows of head_dim: q, k, v, out; then also dout, dq, dk, dv with out read again.
ROWS_MOVED: dict[Phase, tuple[int, int]] = {"forward": (2, 2), "backward": (4, 4), "step": (6, 6)}


@dataclass(frozen=True)
class Ceilings:
    """Best rates of a device for one dtype, in FLOP/s and bytes/s."""

    dtype: str
    matmul: float
    copy: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def at_least(self, other: Ceilings | None) -> Ceilings:
        """The better of two measurements."""
        if other is None:
            return self
        return Ceilings(self.dtype, max(self.matmul, other.matmul), max(self.copy, other.copy))


@dataclass(frozen=True)
class Work:
    """What one call has to do, over all heads and batch elements.

    Attributes:
        true_flops: For the pairs that the declaration asks for.
        visited_flops: For all pairs of the visited tiles.
        moved: Bytes of the operands, once each.
        padding_share, partial_share: Pairs of the visited tiles that lie in padding, and that partial tiles mask.
    """

    true_flops: float
    visited_flops: float
    moved: float
    padding_share: float
    partial_share: float

    @classmethod
    def of(cls, plan: BlockSparsePlan, phase: Phase, head_dim: int, itemsize: int, heads: int, batch: int) -> Work:
        stats = plan.stats()
        in_tiles = int(
            (plan.q_count.astype("int64")[plan.set_tile[plan.entry_set]] * plan.kv_count[plan.entry_kv]).sum()
        )
        per_pair = FLOPS_PER_PAIR[phase] * head_dim * heads * batch
        of_q, of_kv = ROWS_MOVED[phase]
        rows = of_q * plan.num_q + of_kv * plan.num_kv
        computed = max(stats.computed_pairs, 1)
        return cls(
            true_flops=float(per_pair * stats.true_pairs),
            visited_flops=float(per_pair * stats.computed_pairs),
            moved=float(rows * head_dim * itemsize * heads * batch),
            padding_share=(stats.computed_pairs - in_tiles) / computed,
            partial_share=(in_tiles - stats.true_pairs) / computed,
        )


def floor_seconds(ceilings: dict[str, Any], flops: float, moved: float) -> float:
    """Least time for this much arithmetic and traffic, whichever binds; ``ceilings`` as in the results."""
    return float(max(flops / ceilings["matmul"], moved / ceilings["copy"]))


def measure_ceilings(device: str, dtype: str, seconds: float = 0.1) -> Ceilings:
    """Rates of a large matrix product and of a large copy: the fastest of several, since noise only slows down.

    A run measures them again and again and keeps the best: a ceiling is what the device can do, not what it did
    beside other work.
    """
    to = getattr(torch, dtype)
    large = device != "cpu"
    size = 8192 if large else 1024
    # A processor without instructions for half precision multiplies it faster in float32.
    dtypes = {to, torch.float32} if to.itemsize == 2 and not large else {to}
    matmul = max(_product_rate(size, one, device, seconds) for one in dtypes)
    source = torch.zeros((1 << 30 if large else 1 << 28) // to.itemsize, dtype=to, device=device)
    target = torch.empty_like(source)
    copied = 2.0 * source.numel() * to.itemsize
    return Ceilings(dtype, matmul, copied / _fastest(lambda: target.copy_(source), device, seconds))


def _product_rate(size: int, dtype: torch.dtype, device: str, seconds: float) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _fastest(lambda: torch.mm(a, b), device, seconds)


def _fastest(call: Any, device: str, seconds: float) -> float:
    took: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or not took:
        start = time.perf_counter()
        call()
        synchronize(device)
        took.append(time.perf_counter() - start)
    return min(took)
