"""The compiled form of a canvas topology: format, compiler, files and pictures."""

from canvas_engineering.plan.plan import BlockSize, BlockSparsePlan, Softmax, Transpose
from canvas_engineering.plan.stats import PlanStats

__all__ = ["BlockSize", "BlockSparsePlan", "PlanStats", "Softmax", "Transpose"]
