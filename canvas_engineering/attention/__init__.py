"""Attention functions of connections (torch) with their registry, block-sparse attention for any array.

Names load on first use: the functions need torch, ``block_sparse_attention`` works without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from canvas_engineering._optional import require

if TYPE_CHECKING:
    from canvas_engineering.attention.api import Availability, available_backends, block_sparse_attention
    from canvas_engineering.attention.dense import (
        CogVideoXAttention,
        CosineAttention,
        CrossAttention,
        GatedAttention,
        SigmoidAttention,
    )
    from canvas_engineering.attention.hyena import HyenaAttention
    from canvas_engineering.attention.linear import (
        CopyAttention,
        LinearAttention,
        NoneAttention,
        PerceiverAttention,
        PoolingAttention,
    )
    from canvas_engineering.attention.patterned import (
        LocalAttention,
        MixtureAttention,
        RandomFixedAttention,
        SparseAttention,
    )
    from canvas_engineering.attention.recurrent import MambaAttention, RWKVAttention
    from canvas_engineering.attention.registry import (
        ATTENTION_REGISTRY,
        create_attention,
        is_plan_capable,
        register_attention,
    )

__all__ = [
    "ATTENTION_REGISTRY",
    "Availability",
    "CogVideoXAttention",
    "CopyAttention",
    "CosineAttention",
    "CrossAttention",
    "GatedAttention",
    "HyenaAttention",
    "LinearAttention",
    "LocalAttention",
    "MambaAttention",
    "MixtureAttention",
    "NoneAttention",
    "PerceiverAttention",
    "PoolingAttention",
    "RWKVAttention",
    "RandomFixedAttention",
    "SigmoidAttention",
    "SparseAttention",
    "available_backends",
    "block_sparse_attention",
    "create_attention",
    "is_plan_capable",
    "register_attention",
]

#: Names that do not need torch.
_ANY_FRAMEWORK = ("Availability", "available_backends", "block_sparse_attention")
#: Module of every name; the classes of functions are all reachable through the registry's module.
_API, _REGISTRY = "canvas_engineering.attention.api", "canvas_engineering.attention.registry"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _ANY_FRAMEWORK:
        require("torch", "torch", f"{__name__}.{name}")
    value = getattr(importlib.import_module(_API if name in _ANY_FRAMEWORK else _REGISTRY), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
