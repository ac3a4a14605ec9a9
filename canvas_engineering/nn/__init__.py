"""Torch modules around the attention: canvas tensor and embeddings, identity slots, residuals, conditioning."""

from __future__ import annotations

from canvas_engineering._optional import require

require("torch", "torch", __name__)

from canvas_engineering.nn.canvas import SpatiotemporalCanvas  # noqa: E402
from canvas_engineering.nn.embedding import (  # noqa: E402
    FamilyCarrierEmbedding,
    PeriodEmbedding,
    SinusoidalPositionalEncoding3D,
    SinusoidalPositionalEncodingND,
)
from canvas_engineering.nn.identity import SlotBindingModule  # noqa: E402
from canvas_engineering.nn.residuals import ResidualAccumulator  # noqa: E402
from canvas_engineering.nn.semantic import SemanticConditioner  # noqa: E402

__all__ = [
    "FamilyCarrierEmbedding",
    "PeriodEmbedding",
    "ResidualAccumulator",
    "SemanticConditioner",
    "SinusoidalPositionalEncoding3D",
    "SinusoidalPositionalEncodingND",
    "SlotBindingModule",
    "SpatiotemporalCanvas",
]
