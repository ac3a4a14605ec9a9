"""Running summaries of the errors that regions emit; triggers and diagnostics read them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from canvas_engineering.attention.base import full_precision
from canvas_engineering.canvas import UnknownRegionError
from canvas_engineering.errors import CanvasError
from canvas_engineering.residuals import ResidualSpec


class ResidualAccumulator(nn.Module):
    """An exponential moving average of one number per region and kind of error; nothing is learned.

    ``summary = decay * summary + (1 - decay) * reduced``. Reductions: ``mean``, ``max`` and ``l2`` (the norm of
    the whole tensor) give every kind the same number; ``max_mean`` gives the kinds max and mean by turns, or
    the mean when there is one kind.

    Args:
        region_names: the regions to keep summaries for; kept in sorted order.
        spec: kinds, reduction and decay; the default ``ResidualSpec()`` when None.

    Buffers: ``_summaries`` (regions, kinds) float32, ``_step_counts`` (regions,) int64.
    """

    _summaries: Tensor
    _step_counts: Tensor

    def __init__(self, region_names: Iterable[str], spec: ResidualSpec | None = None) -> None:
        super().__init__()
        self.spec = ResidualSpec() if spec is None else spec
        self._region_names = sorted(region_names)
        self._rows = {name: row for row, name in enumerate(self._region_names)}
        n_regions = len(self._region_names)
        self.register_buffer("_summaries", torch.zeros(n_regions, len(self.spec.kinds)))
        self.register_buffer("_step_counts", torch.zeros(n_regions, dtype=torch.long))

    @property
    def region_names(self) -> list[str]:
        """The regions, sorted."""
        return list(self._region_names)

    @torch.no_grad()
    def update(self, region: str, error: Tensor) -> None:
        """Blend an error tensor of any shape into a region's summaries. Does not wait for the device.

        Raises:
            UnknownRegionError: ``region`` is not one of ``region_names``.
            CanvasError: ``error`` has no elements.
        """
        if region not in self._rows:
            known = ", ".join(map(repr, self._region_names)) or "none"
            raise UnknownRegionError(f"unknown region {region!r}; this accumulator tracks {known}")
        if error.numel() == 0:
            raise CanvasError(f"error of region {region!r} must have elements, got shape {tuple(error.shape)}")
        row = self._rows[region]
        reduced = self._reduce(error.detach()).to(self._summaries)
        self._summaries[row].mul_(self.spec.decay).add_(reduced, alpha=1.0 - self.spec.decay)
        self._step_counts[row] += 1

    def _reduce(self, error: Tensor) -> Tensor:
        """One number per kind, (kinds,), in float32."""
        n_kinds = len(self.spec.kinds)
        if not error.is_floating_point():
            error = error.float()
        match self.spec.reduce:
            case "mean":
                numbers = [error.mean(dtype=torch.float32)]
            case "max":
                numbers = [error.max().float()]
            case "l2":
                numbers = [torch.linalg.vector_norm(full_precision(error)).float()]
            case _ if n_kinds == 1:  # max_mean
                numbers = [error.mean(dtype=torch.float32)]
            case _:
                numbers = [error.max().float(), error.mean(dtype=torch.float32)]
        return torch.stack(numbers).repeat(-(-n_kinds // len(numbers)))[:n_kinds]

    def summaries(self) -> dict[str, dict[str, float]]:
        """``{region: {kind: value}}`` as plain numbers; waits for the device once."""
        rows = self._summaries.tolist()
        return {name: dict(zip(self.spec.kinds, rows[row], strict=True)) for name, row in self._rows.items()}

    def summary_tensor(self) -> Tensor:
        """The buffer behind ``summaries``, (regions, kinds), rows in the order of ``region_names``."""
        return self._summaries

    def reset(self) -> None:
        """Set all summaries and counts to 0."""
        self._summaries.zero_()
        self._step_counts.zero_()

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"regions={len(self._region_names)}, kinds={self.spec.kinds}, decay={self.spec.decay}"
