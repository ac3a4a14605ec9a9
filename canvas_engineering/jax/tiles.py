"""Which tile sizes ``"auto"`` chooses from: those of the plans' default table, or those that a TPU takes."""

from __future__ import annotations

import jax

from canvas_engineering.plan.auto import AUTO_TILES, TileTable


def _relative_speed(block_q: int, block_kv: int) -> float:
    """Speed of one pair against tiles of 512 x 512: arithmetic grows with the tile, the cost of a step does not.

    A model constant, not a measurement: a step is taken to cost what a quarter of a 512 x 512 tile's arithmetic does.
    """
    work = block_q * block_kv / 512**2
    return 1.25 * work / (work + 0.25)


#: A register of a TPU holds 128 lanes, and 8 sublanes of 32 bits or 16 of 16 bits.
TPU_TILES: TileTable = {
    (block_q, block_kv): _relative_speed(block_q, block_kv)
    for block_q in (16, 32, 64, 128, 256, 512)
    for block_kv in (128, 256, 512)
}


def tiles_of(backend: str) -> TileTable:
    """The table for what a JAX dispatcher with this ``backend`` will run on."""
    on_tpu = backend == "pallas" or (backend == "auto" and jax.default_backend() == "tpu")
    return TPU_TILES if on_tpu else AUTO_TILES
