"""Declare a canvas and its attention topology, compile it into one block-sparse plan, run it anywhere.

Importing this package loads nothing but the standard library: every public name is imported on first use,
so that a plan can be compiled without torch, and a JAX user never needs torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.6.0"

if TYPE_CHECKING:
    from canvas_engineering.attention import (
        ATTENTION_REGISTRY as ATTENTION_REGISTRY,
        CogVideoXAttention as CogVideoXAttention,
        CopyAttention as CopyAttention,
        CosineAttention as CosineAttention,
        CrossAttention as CrossAttention,
        GatedAttention as GatedAttention,
        HyenaAttention as HyenaAttention,
        LinearAttention as LinearAttention,
        LocalAttention as LocalAttention,
        MambaAttention as MambaAttention,
        MixtureAttention as MixtureAttention,
        NoneAttention as NoneAttention,
        PerceiverAttention as PerceiverAttention,
        PoolingAttention as PoolingAttention,
        RandomFixedAttention as RandomFixedAttention,
        RWKVAttention as RWKVAttention,
        SigmoidAttention as SigmoidAttention,
        SparseAttention as SparseAttention,
        create_attention as create_attention,
        register_attention as register_attention,
    )
    from canvas_engineering.attention.api import (
        Availability as Availability,
        available_backends as available_backends,
        block_sparse_attention as block_sparse_attention,
    )
    from canvas_engineering.canvas import (
        ATTENTION_TYPES as ATTENTION_TYPES,
        CanvasLayout as CanvasLayout,
        RegionSpec as RegionSpec,
        transfer_distance as transfer_distance,
    )
    from canvas_engineering.connectivity import (
        CanvasTopology as CanvasTopology,
        Connection as Connection,
        TemporalFill as TemporalFill,
    )
    from canvas_engineering.cortex import CortexRegistry as CortexRegistry, CortexSpec as CortexSpec
    from canvas_engineering.dispatch import AttentionDispatcher as AttentionDispatcher
    from canvas_engineering.errors import (
        BackendError as BackendError,
        CanvasError as CanvasError,
        MissingDependencyError as MissingDependencyError,
        PlanError as PlanError,
        SchemaError as SchemaError,
    )
    from canvas_engineering.identity import IdentitySpec as IdentitySpec
    from canvas_engineering.masks import (
        MaskSpec as MaskSpec,
        Rect as Rect,
        mask_to_index_pairs as mask_to_index_pairs,
        rect_cover as rect_cover,
    )
    from canvas_engineering.nn.canvas import SpatiotemporalCanvas as SpatiotemporalCanvas
    from canvas_engineering.nn.embedding import (
        FamilyCarrierEmbedding as FamilyCarrierEmbedding,
        PeriodEmbedding as PeriodEmbedding,
        SinusoidalPositionalEncoding3D as SinusoidalPositionalEncoding3D,
        SinusoidalPositionalEncodingND as SinusoidalPositionalEncodingND,
    )
    from canvas_engineering.nn.identity import SlotBindingModule as SlotBindingModule
    from canvas_engineering.nn.residuals import ResidualAccumulator as ResidualAccumulator
    from canvas_engineering.nn.semantic import SemanticConditioner as SemanticConditioner
    from canvas_engineering.plan import BlockSparsePlan as BlockSparsePlan
    from canvas_engineering.program import (
        CARRIERS as CARRIERS,
        COMPILE_MODES as COMPILE_MODES,
        OPERATOR_DEFAULTS as OPERATOR_DEFAULTS,
        OPERATORS as OPERATORS,
        REGION_FAMILIES as REGION_FAMILIES,
        WRITE_MODES as WRITE_MODES,
        CanvasProgram as CanvasProgram,
        ClockSpec as ClockSpec,
        ConnectionProgram as ConnectionProgram,
        ConstraintSpec as ConstraintSpec,
        LearningSpec as LearningSpec,
        RegionProgram as RegionProgram,
        resolve_operator_defaults as resolve_operator_defaults,
        validate_constraints as validate_constraints,
    )
    from canvas_engineering.residuals import ResidualSpec as ResidualSpec
    from canvas_engineering.schema import CanvasSchema as CanvasSchema
    from canvas_engineering.semantic import (
        auto_semantic_type as auto_semantic_type,
        compute_semantic_embeddings as compute_semantic_embeddings,
        program_distance as program_distance,
    )
    from canvas_engineering.triggers import evaluate_trigger as evaluate_trigger

_EXPORTS: dict[str, tuple[str, ...]] = {
    "attention": (
        "ATTENTION_REGISTRY",
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
        "create_attention",
        "register_attention",
    ),
    "attention.api": ("Availability", "available_backends", "block_sparse_attention"),
    "canvas": ("ATTENTION_TYPES", "CanvasLayout", "RegionSpec", "transfer_distance"),
    "connectivity": ("CanvasTopology", "Connection", "TemporalFill"),
    "cortex": ("CortexRegistry", "CortexSpec"),
    "dispatch": ("AttentionDispatcher",),
    "errors": ("BackendError", "CanvasError", "MissingDependencyError", "PlanError", "SchemaError"),
    "identity": ("IdentitySpec",),
    "masks": ("MaskSpec", "Rect", "mask_to_index_pairs", "rect_cover"),
    "nn.canvas": ("SpatiotemporalCanvas",),
    "nn.embedding": (
        "FamilyCarrierEmbedding",
        "PeriodEmbedding",
        "SinusoidalPositionalEncoding3D",
        "SinusoidalPositionalEncodingND",
    ),
    "nn.identity": ("SlotBindingModule",),
    "nn.residuals": ("ResidualAccumulator",),
    "nn.semantic": ("SemanticConditioner",),
    "plan": ("BlockSparsePlan",),
    "program": (
        "CARRIERS",
        "COMPILE_MODES",
        "OPERATORS",
        "OPERATOR_DEFAULTS",
        "REGION_FAMILIES",
        "WRITE_MODES",
        "CanvasProgram",
        "ClockSpec",
        "ConnectionProgram",
        "ConstraintSpec",
        "LearningSpec",
        "RegionProgram",
        "resolve_operator_defaults",
        "validate_constraints",
    ),
    "residuals": ("ResidualSpec",),
    "schema": ("CanvasSchema",),
    "semantic": ("auto_semantic_type", "compute_semantic_embeddings", "program_distance"),
    "triggers": ("evaluate_trigger",),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _EXPORTS.items() for name in names}
# `import canvas_engineering; canvas_engineering.masks.rect_cover` works without importing the module first.
_SUBMODULES = frozenset({*(module.partition(".")[0] for module in _EXPORTS), "cli", "jax", "kernels"})

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
