"""Residual signals: what error summaries a region keeps.

``ResidualAccumulator``, the torch module that keeps them, is importable from here and loads torch on first
use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from canvas_engineering._checks import check_choice, check_number, check_strings
from canvas_engineering._forward import torch_attribute
from canvas_engineering.errors import CanvasError

if TYPE_CHECKING:
    from canvas_engineering.nn.residuals import ResidualAccumulator as ResidualAccumulator

REDUCTIONS = ("max_mean", "mean", "max", "l2")
"""What ``ResidualSpec.reduce`` may be."""


def __getattr__(name: str) -> Any:
    return torch_attribute(__name__, {"ResidualAccumulator": "canvas_engineering.nn.residuals"}, name)


@dataclass(frozen=True)
class ResidualSpec:
    """Which error signals are summarised, and how.

    Args:
        kinds: Names of the signals; each has a running summary per region.
        reduce: From an error tensor to one number per kind: ``mean``, ``max`` or ``l2`` for all of them, or
            ``max_mean``: the mean for a single kind, else maximum and mean in turn.
        decay: Share of the old summary in the new one, in ``[0, 1]``.

    Raises:
        CanvasError: no kinds, an unknown reduction, or a decay outside ``[0, 1]``.
    """

    kinds: tuple[str, ...] = ("prediction",)
    reduce: str = "max_mean"
    decay: float = 0.95

    def __post_init__(self) -> None:
        kinds = check_strings(self.kinds, "ResidualSpec.kinds")
        if not kinds:
            raise CanvasError("ResidualSpec.kinds: expected at least one name, got ()")
        object.__setattr__(self, "kinds", kinds)
        check_choice(self.reduce, "ResidualSpec.reduce", REDUCTIONS)
        if check_number(self.decay, "ResidualSpec.decay", minimum=0) > 1:
            raise CanvasError(f"ResidualSpec.decay: expected a number in [0, 1], got {self.decay!r}")
