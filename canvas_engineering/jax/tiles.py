"""Which tile sizes ``"auto"`` chooses from: those of the plans' default table, or those that a TPU takes."""

from __future__ import annotations

import jax

from canvas_engineering.kernels.pallas.tiles import TPU_TILES
from canvas_engineering.plan.auto import AUTO_TILES, TileTable


def tiles_of(backend: str) -> TileTable:
    """The table for what a JAX dispatcher with this ``backend`` will run on."""
    on_tpu = backend == "pallas" or (backend == "auto" and jax.default_backend() == "tpu")
    return TPU_TILES if on_tpu else AUTO_TILES
