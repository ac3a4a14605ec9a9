"""The dispatcher for JAX: pure functions on a tree of parameters, torch not needed.

from canvas_engineering.jax import AttentionDispatcher

d = AttentionDispatcher(topology, layout, d_model=256)
params = d.init(jax.random.key(0))
y = d.apply(params, x)
"""

from __future__ import annotations

from canvas_engineering._optional import require

require("jax", "jax", __name__)

from canvas_engineering.jax.base import AttentionFunction  # noqa: E402 - after the check, which names the extra
from canvas_engineering.jax.convert import from_torch, residual_state_from_torch, to_torch  # noqa: E402
from canvas_engineering.jax.dispatcher import AttentionDispatcher  # noqa: E402
from canvas_engineering.jax.registry import ATTENTION_REGISTRY, create_attention, register_attention  # noqa: E402
from canvas_engineering.jax.residuals import ResidualAccumulator, ResidualState  # noqa: E402
from canvas_engineering.jax.slots import SlotBinding  # noqa: E402
from canvas_engineering.jax.weights import RowWeights  # noqa: E402
from canvas_engineering.kernels.pallas.sharding import PlanShards, shard_plan, sharded_attention  # noqa: E402

__all__ = [
    "ATTENTION_REGISTRY",
    "AttentionDispatcher",
    "AttentionFunction",
    "PlanShards",
    "ResidualAccumulator",
    "ResidualState",
    "RowWeights",
    "SlotBinding",
    "create_attention",
    "from_torch",
    "register_attention",
    "residual_state_from_torch",
    "shard_plan",
    "sharded_attention",
    "to_torch",
]
