"""The portable backend: torch or JAX operations on whatever device the arrays are on."""

from __future__ import annotations

from typing import Any

from canvas_engineering._arrays import FLOAT_DTYPES, dtype_name, framework_of
from canvas_engineering._optional import installed
from canvas_engineering.plan import BlockSparsePlan


def availability() -> tuple[bool, str]:
    """Wherever torch or JAX is installed."""
    found = [name for name in ("torch", "jax") if installed(name)]
    if not found:
        return False, "needs torch or jax, neither is installed: pip install 'canvas-engineering[torch]' or '[jax]'"
    return True, f"on {' and '.join(found)}"


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
    if dtype_name(q) not in FLOAT_DTYPES:
        found.append(f"dtype must be one of {', '.join(FLOAT_DTYPES)}, got {dtype_name(q)}")
    return found


def attention(q: Any, k: Any, v: Any, plan: BlockSparsePlan, **options: Any) -> Any:
    """Output, or output and log-sum-exp; see ``attention.api.block_sparse_attention`` for the arguments."""
    if framework_of(q) == "torch":
        from canvas_engineering.kernels.portable.torch_backend import attention as torch_attention

        return torch_attention(q, k, v, plan, **options)
    from canvas_engineering.kernels.portable.jax_backend import attention as jax_attention

    return jax_attention(q, k, v, plan, **options)
