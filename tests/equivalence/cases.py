"""The named plans that every backend must compute, and the inputs that go with them.

A case is made for tile sizes, because a backend may not have small ones: its sizes are written in tiles.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.connectivity import CanvasTopology, Connection, TemporalFill
from canvas_engineering.masks import MaskSpec
from canvas_engineering.plan import BlockSparsePlan
from equivalence.build import plan_from_dense

Float64 = NDArray[np.float64]
Arrays = dict[str, Float64]


@dataclass(frozen=True, eq=False)
class Inputs:
    """Operands and cotangents of one call, float64."""

    q: Float64  # (B, Hq, Nq, D)
    k: Float64  # (B, Hkv, Nkv, D)
    v: Float64  # (B, Hkv, Nkv, D)
    row_weight: Float64  # (num_sets, block_q), to override the plan's
    grad_out: Float64  # (B, Hq, Nq, D)
    grad_lse: Float64  # (B, Hq, Nq)


@dataclass(frozen=True)
class Options:
    """The keyword arguments of a call, and what is compared."""

    activation: str = "softmax"
    dropout_p: float = 0.0
    seed: int | None = None
    scale: float | None = None
    lse: bool = False  # ask for the log-sum-exp, and differentiate through it
    override_weight: bool = False  # pass row_weight, and differentiate with respect to it

    def __str__(self) -> str:
        words = [
            self.activation if self.activation != "softmax" else "",
            "dropout" if self.dropout_p else "",
            "scale" if self.scale is not None else "",
            "lse" if self.lse else "",
            "weight" if self.override_weight else "",
        ]
        return "-".join(word for word in words if word) or "plain"


@dataclass(frozen=True)
class Case:
    """A plan for given tile sizes, and the shape of its operands."""

    name: str
    build: Callable[[int, int], BlockSparsePlan]
    batch: int = 1
    heads_q: int = 2
    heads_kv: int = 2
    head_dim: int = 16

    def plan(self, block_q: int = 16, block_kv: int = 16) -> BlockSparsePlan:
        return _built(self, block_q, block_kv)

    def inputs(self, plan: BlockSparsePlan) -> Inputs:
        """The same random operands on every call; the seed follows from the name."""
        return make_inputs(
            plan, self.batch, self.heads_q, self.heads_kv, self.head_dim, seed=zlib.crc32(self.name.encode())
        )

    def __str__(self) -> str:
        return self.name


@cache
def _built(case: Case, block_q: int, block_kv: int) -> BlockSparsePlan:
    return case.build(block_q, block_kv)


def make_inputs(plan: BlockSparsePlan, batch: int, heads_q: int, heads_kv: int, head_dim: int, seed: int) -> Inputs:
    """Standard normal operands; weights in [0, 2) with some exact zeros, as gates and triggers give."""
    rng = np.random.default_rng(seed)
    q_shape = (batch, heads_q, plan.num_q, head_dim)
    kv_shape = (batch, heads_kv, plan.num_kv, head_dim)
    row_weight = rng.uniform(0, 2, plan.row_weight.shape)
    row_weight[rng.uniform(size=row_weight.shape) < 0.2] = 0
    return Inputs(
        q=rng.standard_normal(q_shape),
        k=rng.standard_normal(kv_shape),
        v=rng.standard_normal(kv_shape),
        # float32 values, so that every backend gets the same weights
        row_weight=row_weight.astype(np.float32).astype(np.float64),
        grad_out=rng.standard_normal(q_shape),
        grad_lse=rng.standard_normal(q_shape[:-1]),
    )


# -- plans --------------------------------------------------------------------------------------------------


def _dense(bq: int, bkv: int) -> BlockSparsePlan:
    return plan_from_dense(np.ones((1, 2 * bq + 3, 3 * bkv + 5), np.bool_), block_q=bq, block_kv=bkv)


def _blocks(bq: int, bkv: int) -> BlockSparsePlan:
    """Regions of different sizes, each row reading one of them; boundaries cut tiles."""
    mask = np.zeros((1, 3 * bq + 1, 3 * bkv + 7), np.bool_)
    mask[0, : bq + 3, : 2 * bkv] = True
    mask[0, bq + 3 : 2 * bq, 2 * bkv - 5 : 2 * bkv + 2] = True
    mask[0, 2 * bq :, bkv:] = True
    return plan_from_dense(mask, block_q=bq, block_kv=bkv)


def _several_sets(bq: int, bkv: int) -> BlockSparsePlan:
    """Overlapping groups with weights: rows stand in none, one, two or three softmaxes."""
    n = 3 * max(bq, bkv) + 9
    masks = np.zeros((3, n, n), np.bool_)
    masks[0, : 2 * n // 3, : n // 2] = True
    masks[1, n // 4 : 2 * n // 3, n // 3 :] = True
    masks[2, n // 2 : n - 5, ::3] = True
    weights = np.random.default_rng(1).uniform(0.1, 1.5, masks.shape[:2])
    weights[1, n // 3] = 0  # a row that has keys, but no weight
    return plan_from_dense(masks, weights, block_q=bq, block_kv=bkv)


def _shared_keys(bq: int, bkv: int) -> BlockSparsePlan:
    """Every row reads the same few keys twice, with different weights: dK and dV collect from all tiles."""
    masks = np.zeros((2, 2 * bq + 5, 2 * bkv), np.bool_)
    masks[:, :, 3:9] = True
    weights = np.stack([np.full(masks.shape[1], 0.25), np.full(masks.shape[1], 0.75)])
    return plan_from_dense(masks, weights, block_q=bq, block_kv=bkv)


def _window(bq: int, bkv: int) -> BlockSparsePlan:
    """A band: every row has its own key set, and interior tiles repeat their masks."""
    num_q, num_kv = 4 * bq + 3, 4 * bkv + 3
    center = np.arange(num_q)[:, None] * num_kv / num_q
    mask = np.abs(center - np.arange(num_kv)) <= bkv * 0.7
    return plan_from_dense(mask[None], block_q=bq, block_kv=bkv)


def _random(bq: int, bkv: int) -> BlockSparsePlan:
    """Scattered keys; at one key in ten rows some rows of small plans have none."""
    rng = np.random.default_rng(2)
    mask = rng.uniform(size=(1, 3 * bq, 2 * bkv + 11)) < 0.1
    mask[0, [0, bq + 2]] = False
    return plan_from_dense(mask, block_q=bq, block_kv=bkv)


def _empty_rows(bq: int, bkv: int) -> BlockSparsePlan:
    """Rows without keys, alone and as a whole q tile, and keys that nothing reads."""
    mask = np.zeros((1, 4 * bq - 2, 3 * bkv), np.bool_)
    mask[0, : bq // 2, : bkv + 3] = True
    mask[0, 2 * bq + 1 :: 2, 2 * bkv + 4 :] = True
    return plan_from_dense(mask, block_q=bq, block_kv=bkv)


def _empty(bq: int, bkv: int) -> BlockSparsePlan:
    return plan_from_dense(np.zeros((1, bq + 1, bkv), np.bool_), block_q=bq, block_kv=bkv)


def _one_token(bq: int, bkv: int) -> BlockSparsePlan:
    return plan_from_dense(np.ones((1, 1, 1), np.bool_), block_q=bq, block_kv=bkv)


def _one_key(bq: int, bkv: int) -> BlockSparsePlan:
    """One key per row: the softmax is 1, its score gradient 0."""
    n = 2 * bq + 1
    mask = np.arange(n)[:, None] % (bkv + 2) == np.arange(bkv + 2)
    return plan_from_dense(mask[None], block_q=bq, block_kv=bkv)


def _permuted(bq: int, bkv: int) -> BlockSparsePlan:
    """Tokens of a tile scattered over the canvas, in two weighted sets."""
    rng = np.random.default_rng(3)
    num_q, num_kv = 3 * bq + 2, 2 * bkv + 9
    masks = np.zeros((2, num_q, num_kv), np.bool_)
    q_order, kv_order = rng.permutation(num_q), rng.permutation(num_kv)
    masks[0][np.ix_(q_order[: 2 * bq], kv_order[: bkv + 4])] = True
    masks[0][np.ix_(q_order[2 * bq :], kv_order[bkv:])] = True
    masks[1][np.ix_(q_order[bq // 2 :], kv_order[5 : bkv + 1])] = True
    return plan_from_dense(
        masks, rng.uniform(0, 1, masks.shape[:2]), block_q=bq, block_kv=bkv, q_order=q_order, kv_order=kv_order
    )


def _canvas(bq: int, bkv: int) -> tuple[CanvasLayout, CanvasTopology]:
    """Two overlapping regions of different rates and a third, with every fill mode, a window and an own frame."""
    side = max(2, max(bq, bkv) // 8)
    regions: dict[str, tuple[int, ...] | RegionSpec] = {
        "fast": (0, 5, 0, side, 0, 4),
        "slow": RegionSpec((0, 3, side - 1, side + 2, 1, 5), period=2),
        "goal": (0, 1, 0, 2, 4, 6),
    }
    layout = CanvasLayout(T=5, H=side + 3, W=6, d_model=8, regions=regions)
    hold, interpolate, drop = TemporalFill.HOLD, TemporalFill.INTERPOLATE, TemporalFill.DROP
    return layout, CanvasTopology(
        [
            Connection("fast", "fast", t_src=0, t_dst=0, weight=2.0),
            Connection("fast", "slow", t_src=0, t_dst=0, temporal_fill=interpolate),
            Connection("fast", "slow", t_src=0, t_dst=-1, temporal_fill=hold, weight=0.5),
            Connection("slow", "fast", t_src=0, t_dst=1, temporal_fill=drop),
            Connection("slow", "slow", mask=MaskSpec("window", window_shape=(1, 3, 3))),
            Connection("slow", "goal"),
            Connection("goal", "fast", t_dst=0),
        ]
    )


def _topology(bq: int, bkv: int) -> BlockSparsePlan:
    layout, topology = _canvas(bq, bkv)
    return BlockSparsePlan.from_topology(topology, layout, block_q=bq, block_kv=bkv)


def _joint(bq: int, bkv: int) -> BlockSparsePlan:
    layout, topology = _canvas(bq, bkv)
    return BlockSparsePlan.from_topology(topology, layout, softmax="joint", block_q=bq, block_kv=bkv)


def _in_plan_order(bq: int, bkv: int) -> BlockSparsePlan:
    return _topology(bq, bkv).in_plan_order


CASES = (
    Case("dense", _dense, batch=2),
    Case("blocks", _blocks, heads_q=4, heads_kv=2),
    Case("several_sets", _several_sets, batch=2),
    Case("shared_keys", _shared_keys, heads_q=3, heads_kv=1, head_dim=24),
    Case("window", _window, head_dim=64),
    Case("random", _random, heads_q=1, heads_kv=1),
    Case("empty_rows", _empty_rows, batch=2, heads_q=1, heads_kv=1),
    Case("empty", _empty),
    Case("one_token", _one_token, head_dim=8),
    Case("one_key", _one_key),
    Case("permuted", _permuted, batch=2, heads_q=4, heads_kv=2),
    Case("topology", _topology),
    Case("joint", _joint, heads_q=4, heads_kv=1),
    Case("in_plan_order", _in_plan_order, batch=2),
)
BY_NAME = {case.name: case for case in CASES}
