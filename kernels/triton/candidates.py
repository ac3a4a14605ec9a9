"""Block sizes worth trying for each entry of a table, best guess first; for the compiler's evidence and for tuning.

Plain Python: neither torch nor triton is needed.
"""

from __future__ import annotations

from collections.abc import Iterator

from canvas_engineering.kernels.triton.config import DTYPES, HEAD_DIMS, KERNELS, OWN_BLOCKS, SETS, KernelConfig, Key

#: Multiplications of float32 keep their operands in registers, so its blocks are small and its warps many.
FLOAT32_OWN_BLOCKS = (64, 32, 16)

#: Accumulators and products of a step, in 32-bit registers per thread: every configuration compiled above this spilled
#: its 255 registers, on GPUs that keep these neither in tensor memory (sm_100) nor in registers of their own (AMD).
MOST_REGISTERS = 190
REGISTERS_ONLY = ("sm_80", "sm_90")
#: Columns of the tensor memory of sm_100, where blocks of at least 64 rows are multiplied.
TENSOR_COLUMNS = 512


def table_keys(
    head_dims: tuple[int, ...] = HEAD_DIMS, dtypes: tuple[str, ...] = DTYPES, kernels: tuple[str, ...] = KERNELS
) -> list[Key]:
    """The entries of a table, the most used first: 16 bit before float32, small head_dims before large ones.

    Of two entries that differ only in ``sets``, ``"many"`` comes first: what holds a second accumulator in
    registers does so for one.
    """
    return [
        Key(kernel, head_dim, dtype, sets, own)
        for dtype in dtypes
        for head_dim in head_dims
        for kernel in kernels
        for own in (FLOAT32_OWN_BLOCKS if dtype == "float32" else OWN_BLOCKS)
        for sets in reversed(SETS)
    ]


def candidates(key: Key, architecture: str) -> Iterator[KernelConfig]:
    """Configurations for one entry, best guess first: the largest block, then the deepest pipeline.

    128 rows are two warp groups of 64 on Hopper. The scheduler of AMD GPUs overlaps loads of different warps, so
    they get short pipelines. Some entries have none: a smaller block serves in their place.
    """
    if key.dtype == "float32":
        warps: tuple[int, ...] = (8, 4)
        others: tuple[int, ...] = (64, 32)
    else:
        warps = (8, 4) if key.own_block == 128 else (4, 8)
        others = (128, 64, 32)
    if key.kernel == "backward_kv" or (key.dtype == "float32" and key.head_dim == HEAD_DIMS[-1]):
        others = (*others, 16)  # of keys this is half a word of a mask, so it is the last resort
    stages = (2, 1) if key.dtype == "float32" or architecture.startswith("gfx") else (3, 2)
    for other in others:
        for num_warps in warps:
            for num_stages in stages:
                config = KernelConfig.of(key.kernel, key.own_block, other, num_warps, num_stages)
                if _can_hold(key, config, architecture):
                    yield config


def _can_hold(key: Key, config: KernelConfig, architecture: str) -> bool:
    """Whether there is a chance that a GPU holds what a program adds up, and the products of one step."""
    if architecture in REGISTERS_ONLY:
        return accumulator_registers(key, config) <= MOST_REGISTERS
    if architecture == "sm_100" and key.dtype != "float32" and key.own_block >= 64:
        products = 1 if key.kernel == "forward" else 2
        accumulators = 2 if key.kernel == "backward_kv" else 1
        return accumulators * key.head_dim + products * config.other_block(key.kernel) <= TENSOR_COLUMNS
    return True


def accumulator_registers(key: Key, config: KernelConfig) -> float:
    """32-bit registers per thread for what a program adds up, and for the products of one step."""
    accumulators = {"forward": 2 if key.sets == "many" else 1, "backward_q": 1, "backward_kv": 2}[key.kernel]
    products = 1 if key.kernel == "forward" else 2
    columns = accumulators * key.head_dim + products * config.other_block(key.kernel)
    return key.own_block * columns / (32 * config.num_warps)
