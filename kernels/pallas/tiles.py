"""Which tile sizes a TPU takes, which are best, and how much vector memory a kernel needs for them."""

from __future__ import annotations

import numpy as np

from canvas_engineering.plan.auto import TileTable

LANES = 128
#: Vector memory of the smallest supported core (v5p, tpu7x), less what the compiler keeps for itself.
VMEM_BYTES = 48 * 2**20
MAX_HEAD_DIM = 256
SUPPORTED_DTYPES = ("bfloat16", "float32")


def _relative_speed(block_q: int, block_kv: int) -> float:
    """Speed of one pair against tiles of 512 x 512: arithmetic grows with the tile, the cost of a step does not.

    A model constant, not a measurement: a step is taken to cost what a quarter of a 512 x 512 tile's arithmetic does.
    """
    work = block_q * block_kv / 512**2
    return 1.25 * work / (work + 0.25)


#: What ``"auto"`` chooses from for a TPU. A register holds 128 lanes, and 8 sublanes of 32 bits or 16 of 16 bits.
TPU_TILES: TileTable = {
    (block_q, block_kv): _relative_speed(block_q, block_kv)
    for block_q in (16, 32, 64, 128, 256, 512)
    for block_kv in (128, 256, 512)
}


def padded_head_dim(head_dim: int) -> int:
    """The head dimension that the kernels run with: 64, or a multiple of 128; the rest is zeros."""
    return 64 if head_dim <= 64 else LANES * -(-head_dim // LANES)


def legal_block_q(dtype: str) -> int:
    """``block_q`` must be a multiple of this: the sublanes of a register of ``dtype``."""
    return 8 * (4 // np.dtype("float32" if dtype == "float32" else "uint16").itemsize)


def tile_problems(block_q: int, block_kv: int, head_dim: int, dtype: str) -> list[str]:
    """Why a TPU cannot run these tiles, with requirement and value; empty if it can."""
    problems = []
    if block_q % legal_block_q(dtype):
        problems.append(f"block_q must be a multiple of {legal_block_q(dtype)} on a TPU for {dtype}, got {block_q}")
    if block_kv % LANES:
        problems.append(f"block_kv must be a multiple of {LANES} on a TPU, got {block_kv}")
    if problems:
        best = recommended_tiles(head_dim, dtype)
        problems[-1] += f" (compile the plan with block_q={best[0]}, block_kv={best[1]})"
    need = vmem_bytes(block_q, block_kv, padded_head_dim(head_dim), 4 if dtype == "float32" else 2)
    if need > VMEM_BYTES:
        problems.append(
            f"tiles must fit into {VMEM_BYTES} bytes of vector memory, got about {need} bytes for "
            f"block_q={block_q}, block_kv={block_kv}, head_dim={head_dim}, {dtype}"
        )
    return problems


def vmem_bytes(block_q: int, block_kv: int, head_dim: int, itemsize: int) -> int:
    """An estimate of what the largest kernel (dK/dV) keeps in vector memory.

    Blocks that are streamed are held twice, because one is loaded while the other is used.
    """
    lanes = max(head_dim, LANES)
    q_side = 2 * 2 * block_q * lanes * itemsize  # q and dO
    kv_side = 2 * 4 * block_kv * lanes * itemsize  # k, v, dK, dV
    accumulators = 2 * max(block_q, block_kv) * lanes * 4
    scores = 4 * block_q * block_kv * 4  # scores, probabilities, dP, dS
    return q_side + kv_side + accumulators + scores


def recommended_tiles(head_dim: int, dtype: str) -> tuple[int, int]:
    """``(block_q, block_kv)`` with the fewest instruction bundles per pair that still fit well."""
    return 512, 512
