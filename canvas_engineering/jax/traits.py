"""How the attention functions run in a schedule: through a plan, over which keys, in how many parts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from canvas_engineering.attention.key_pattern import KeyRanges
from canvas_engineering.jax.base import AttentionFunction
from canvas_engineering.jax.patterned import LocalAttention, MixtureAttention, RandomFixedAttention
from canvas_engineering.routing.schedule import FunctionTraits, index_pattern, key_pattern

if TYPE_CHECKING:
    from canvas_engineering.groups import Pattern


def function_traits(function: AttentionFunction) -> FunctionTraits:
    """How an attention function runs in a schedule."""
    if isinstance(function, MixtureAttention):
        return FunctionTraits(plan=True, chunks=function.expert_ranges)
    if isinstance(function, (LocalAttention, RandomFixedAttention)):
        return FunctionTraits(plan=True, pattern=partial(_group_pattern, function))
    return FunctionTraits(plan=function.planned)


def _group_pattern(function: LocalAttention | RandomFixedAttention, rows: int, cols: int, group: int) -> Pattern:
    pattern = function.key_pattern(rows, cols, group)
    if isinstance(pattern, KeyRanges):
        return key_pattern(pattern.lo, pattern.hi, cols)
    return index_pattern(pattern.index, cols)
