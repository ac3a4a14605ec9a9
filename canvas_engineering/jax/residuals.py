"""Running summaries of the errors that regions emit, as a pytree that is passed in and returned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from canvas_engineering.canvas import UnknownRegionError
from canvas_engineering.errors import CanvasError
from canvas_engineering.jax.params import full_precision
from canvas_engineering.residuals import ResidualSpec


class ResidualState(NamedTuple):
    """The summaries of all regions of an accumulator; rows in the order of its ``region_names``.

    Attributes:
        summaries: (regions, kinds) float32.
        step_counts: (regions,) int32, how many errors each region has seen.
    """

    summaries: Array
    step_counts: Array


@dataclass(frozen=True, init=False)
class ResidualAccumulator:
    """How errors become summaries: ``summary = decay * summary + (1 - decay) * reduced``, per region and kind.

    Static; the numbers are in a ``ResidualState``. Reductions are those of ``ResidualSpec``: ``mean``, ``max``
    and ``l2`` (the norm of the whole array) give every kind the same number; ``max_mean`` gives the kinds
    maximum and mean by turns, or the mean when there is one kind.

    Args:
        region_names: the regions to keep summaries for; kept in sorted order.
        spec: kinds, reduction and decay; the default ``ResidualSpec()`` when None.
    """

    region_names: tuple[str, ...]
    spec: ResidualSpec

    def __init__(self, region_names: Iterable[str], spec: ResidualSpec | None = None) -> None:
        object.__setattr__(self, "region_names", tuple(sorted(region_names)))
        object.__setattr__(self, "spec", ResidualSpec() if spec is None else spec)

    def init(self) -> ResidualState:
        """All summaries and counts 0."""
        count = len(self.region_names)
        return ResidualState(jnp.zeros((count, len(self.spec.kinds)), jnp.float32), jnp.zeros(count, jnp.int32))

    def update(self, state: ResidualState, region: str, error: Array, active: Array | bool = True) -> ResidualState:
        """The state after an error array of any shape; no gradient flows into it.

        Args:
            state: The state before.
            region: Whose error it is.
            error: The error.
            active: Scalar bool, may be traced; where it is False the state stays as it is.

        Raises:
            UnknownRegionError: ``region`` is not one of ``region_names``.
            CanvasError: ``error`` has no elements.
        """
        if region not in self.region_names:
            known = ", ".join(map(repr, self.region_names)) or "none"
            raise UnknownRegionError(f"unknown region {region!r}; this accumulator tracks {known}")
        if error.size == 0:
            raise CanvasError(f"error of region {region!r} must have elements, got shape {tuple(error.shape)}")
        row = self.region_names.index(region)
        old = state.summaries[row]
        new = old * self.spec.decay + self._reduce(lax.stop_gradient(error)) * (1.0 - self.spec.decay)
        return ResidualState(
            state.summaries.at[row].set(jnp.where(active, new, old)),
            state.step_counts.at[row].add(jnp.asarray(active, jnp.int32)),
        )

    def _reduce(self, error: Array) -> Array:
        """One number per kind, (kinds,) float32."""
        n_kinds = len(self.spec.kinds)
        if not jnp.issubdtype(error.dtype, jnp.floating):
            error = error.astype(jnp.float32)
        single = error.astype(jnp.float32)
        match self.spec.reduce:
            case "mean":
                numbers = [single.mean()]
            case "max":
                numbers = [single.max()]
            case "l2":
                wide = full_precision(error)
                numbers = [jnp.sqrt(jnp.square(wide).sum()).astype(jnp.float32)]
            case _ if n_kinds == 1:
                numbers = [single.mean()]
            case _:
                numbers = [single.max(), single.mean()]
        return jnp.stack([numbers[kind % len(numbers)] for kind in range(n_kinds)])

    def summaries(self, state: ResidualState) -> dict[str, dict[str, float]]:
        """``{region: {kind: value}}`` as plain numbers, for triggers and diagnostics; not under ``jit``."""
        rows = state.summaries.tolist()
        return {
            name: dict(zip(self.spec.kinds, row, strict=True))
            for name, row in zip(self.region_names, rows, strict=True)
        }
