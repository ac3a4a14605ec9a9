"""The TPU backend of ``block_sparse_attention``: JAX arrays on a TPU, or TPU interpret mode elsewhere.

Interpret mode simulates a TPU's memories on the CPU, raises on reads out of bounds and poisons uninitialised
memory. It is for tests, so it runs only when the backend is asked for by name.
"""

from __future__ import annotations

from typing import Any

from canvas_engineering._arrays import dtype_name
from canvas_engineering._optional import installed
from canvas_engineering.errors import PlanError
from canvas_engineering.kernels.pallas.tiles import MAX_HEAD_DIM, SUPPORTED_DTYPES, tile_problems
from canvas_engineering.plan import BlockSparsePlan

MIN_JAX = (0, 10)


def availability() -> tuple[bool, str]:
    """Whether JAX is there and new enough, and what the kernels would run on."""
    if not installed("jax"):
        return False, "the package 'jax' is not installed: pip install 'canvas-engineering[jax]'"
    import jax

    outdated = jax_is_outdated()
    if outdated:
        return False, outdated
    platform = jax.default_backend()
    if platform == "tpu":
        return True, f"jax {jax.__version__} on {jax.devices()[0].device_kind}"
    return True, f"jax {jax.__version__} in TPU interpret mode on {platform}: for comparison, not for speed"


def jax_is_outdated() -> str:
    """The requirement and the version found where JAX is too old, else an empty string."""
    import jax

    version = tuple(int(part) for part in jax.__version_info__[:2])
    return "" if version >= MIN_JAX else f"needs jax >= {'.'.join(map(str, MIN_JAX))}, got {jax.__version__}"


def reasons(
    q: Any,
    k: Any,
    v: Any,
    plan: BlockSparsePlan,
    *,
    activation: str,
    return_lse: bool,
    dropout_p: float,
    row_weight: Any,
) -> list[str]:
    """Why this call cannot run here; empty if it can."""
    found = []
    dtype, head_dim = dtype_name(q), q.shape[-1]
    if dtype not in SUPPORTED_DTYPES:
        found.append(f"dtype must be one of {', '.join(SUPPORTED_DTYPES)}, got {dtype}")
    if head_dim > MAX_HEAD_DIM:
        found.append(f"head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}")
    found += tile_problems(plan.block_q, plan.block_kv, min(head_dim, MAX_HEAD_DIM), dtype)
    if not found:
        from canvas_engineering.kernels.pallas.lowering import lower_plan

        try:
            plan.lowered("pallas", lower_plan)
        except PlanError as error:  # the lists of the plan do not fit into scalar memory
            found.append(str(error))
    return found


def attention(
    q: Any,  # (B, Hq, Nq, D)
    k: Any,  # (B, Hkv, Nkv, D)
    v: Any,  # (B, Hkv, Nkv, D)
    plan: BlockSparsePlan,
    *,
    scale: float,
    row_weight: Any,  # (num_sets, block_q) or None for the plan's
    activation: Any,
    dropout_p: float,
    seed: Any,  # int, or uint32 array (2,)
    return_lse: bool,
) -> Any:
    """Output, or output and log-sum-exp; differentiable, and usable under ``jit``, ``vmap`` and ``shard_map``."""
    import numpy as np

    from canvas_engineering.kernels.pallas.attention import plan_attention

    if isinstance(seed, (int, np.integer)):
        seed = np.array([int(seed) & 0xFFFFFFFF, int(seed) >> 32], np.uint32)
    return plan_attention(
        q,
        k,
        v,
        row_weight,
        seed if dropout_p else None,
        plan=plan,
        scale=float(scale),
        activation=activation,
        dropout_p=float(dropout_p),
        return_lse=return_lse,
        interpret=interpret_here(),
    )


def interpret_here() -> Any:
    """False where the call is traced for a TPU, else the parameters of TPU interpret mode.

    To trace for a TPU on a host without one (to export, or to compile ahead of time), set an abstract mesh whose
    device is a TPU: ``with jax.sharding.use_abstract_mesh(...)``.
    """
    from jax.experimental.pallas import tpu as pltpu

    return False if pltpu.is_tpu_device() else pltpu.InterpretParams()
