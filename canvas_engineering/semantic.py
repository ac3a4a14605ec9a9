"""Semantic types: descriptions and embeddings of regions, and distances between them.

``SemanticConditioner``, the torch module that adds embeddings to a canvas, is importable from here and
loads torch on first use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from canvas_engineering._forward import torch_attribute
from canvas_engineering.canvas import RegionSpec, transfer_distance
from canvas_engineering.errors import CanvasError

if TYPE_CHECKING:
    from canvas_engineering.nn.semantic import SemanticConditioner as SemanticConditioner
    from canvas_engineering.program import RegionProgram

FAMILY_PENALTY = 0.3
"""Distance that two regions of different families have on top of their embeddings'."""
CARRIER_PENALTY = 0.2
"""Distance that two regions with different carriers have on top of their embeddings'."""


def __getattr__(name: str) -> Any:
    return torch_attribute(__name__, {"SemanticConditioner": "canvas_engineering.nn.semantic"}, name)


def program_distance(
    a_spec: RegionSpec, a_program: RegionProgram, b_spec: RegionSpec, b_program: RegionProgram
) -> float:
    """``transfer_distance`` of two regions, plus penalties for different families and carriers.

    Raises:
        CanvasError: as :func:`canvas_engineering.canvas.transfer_distance`.
    """
    distance = transfer_distance(a_spec, b_spec)
    if a_program.family != b_program.family:
        distance += FAMILY_PENALTY
    if a_program.carrier != b_program.carrier:
        distance += CARRIER_PENALTY
    return distance


def auto_semantic_type(path: str) -> str:
    """A readable description of a dotted field path.

    Example:
        >>> auto_semantic_type("robot_left.joints[2].torque_limit")
        'robot left / joints 2 / torque limit'
    """
    levels = (re.sub(r"\[(\d+)\]", r" \1", level).replace("_", " ") for level in path.split("."))
    return " / ".join(levels)


def compute_semantic_embeddings(
    field_paths: Sequence[str],
    embed_fn: Callable[[list[str]], Sequence[Sequence[float]]],
    semantic_types: Mapping[str, str] | None = None,
) -> dict[str, tuple[float, ...]]:
    """Embed the descriptions of many fields with one call of the caller's embedding model.

    Args:
        field_paths: Dotted field paths.
        embed_fn: From descriptions to as many vectors.
        semantic_types: Descriptions of some paths; the others get :func:`auto_semantic_type`.

    Returns:
        The embedding of each path, as ``SemanticConditioner`` takes them.

    Raises:
        CanvasError: ``embed_fn`` returned another number of vectors than it got descriptions.
    """
    given = semantic_types or {}
    texts = [given[path] if path in given else auto_semantic_type(path) for path in field_paths]
    vectors = list(embed_fn(texts))
    if len(vectors) != len(texts):
        raise CanvasError(f"embed_fn: expected {len(texts)} vectors for {len(texts)} texts, got {len(vectors)}")
    return {path: tuple(vector) for path, vector in zip(field_paths, vectors, strict=True)}
