"""Choose the block sizes that the package ships for the Triton kernels, from what the compiler says; no GPU needed.

    python bench/triton_table.py sm_90 [--head-dim 128] [--dtype float16] [--write]

For every entry of a table the candidates are tried in order of preference: the largest block, then the fewest
warps, then the deepest pipeline. The first one wins that keeps everything in registers (stack 0) in every variant
of the kernel and fits the target's shared memory. ``canvas-engineering tune`` measures on a real GPU; this is
what those without a measurement get.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

from canvas_engineering.kernels.triton import aot
from canvas_engineering.kernels.triton.config import (
    ARCHITECTURES,
    DTYPES,
    HEAD_DIMS,
    KERNELS,
    OWN_BLOCKS,
    SETS,
    SHIPPED,
    KernelConfig,
    Key,
    Table,
    read_table,
    write_table,
)
from canvas_engineering.kernels.triton.constants import Variant


def candidates(kernel: str, own: int, dtype: str, target: str) -> Iterator[KernelConfig]:
    """Configurations for one entry, best guess first.

    128 rows are two warp groups of 64 on Hopper; smaller blocks leave room for several programs per multiprocessor.
    """
    amd = target.startswith("gfx")
    stages = (2, 1) if amd or dtype == "float32" else (3, 2)
    blocks = (64, 32) if dtype == "float32" else (128, 64, 32)
    for num_warps in (8, 4) if own == 128 and not amd else (4, 8):
        for other in blocks:
            for num_stages in stages:
                block_m, block_n = (other, own) if kernel == "backward_kv" else (own, other)
                yield KernelConfig(block_m, block_n, num_warps, num_stages)


def variants(key: Key) -> Iterator[Variant]:
    """What an entry must serve, the most likely to fail first."""
    many = key.sets == "many"
    training = Variant(
        head_dim=key.head_dim,
        block_q=128,
        block_kv=128,
        many_sets=many,
        store_sets=many,
        skip_dead=not many,
        group=4,
    )
    yield training
    yield replace(training, contiguous=False, group=1, store_lse=False, store_sets=False, skip_dead=True)


def suits(key: Key, config: KernelConfig, target: str) -> bool:
    """Whether every variant compiles to registers alone and fits the shared memory; small blocks twice."""
    programs = 1 if key.own_block == 128 else 2
    for variant in variants(key):
        report = aot.report(
            key.kernel,
            replace(variant, block_q=config.block_m, block_kv=config.block_n),
            key.dtype,
            target,
            config,
        )
        if report.stack_bytes or programs * report.shared_bytes > report.shared_limit:
            return False
    return True


def choose(key: Key, target: str) -> KernelConfig | None:
    """The first candidate that suits, or None: then a smaller block serves in its place."""
    for config in candidates(key.kernel, key.own_block, key.dtype, target):
        if suits(key, config, target):
            return config
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("target", choices=ARCHITECTURES)
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, action="append")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--kernel", choices=KERNELS, action="append")
    parser.add_argument("--write", action="store_true", help="replace these entries of the shipped table")
    args = parser.parse_args()
    path = SHIPPED / f"{args.target}.json"
    kernels = read_table(path).kernels if path.exists() else {}
    for head_dim in args.head_dim or HEAD_DIMS:
        for dtype in args.dtype or DTYPES:
            for kernel in args.kernel or KERNELS:
                for sets in SETS:
                    for own in OWN_BLOCKS:
                        key = Key(kernel, head_dim, dtype, sets, own)
                        found = choose(key, args.target)
                        print(*key, found or "no configuration without spills", flush=True)
                        kernels.pop(key, None)
                        if found is not None:
                            kernels[key] = found
                        if args.write:
                            write_table(path, Table(args.target, "ahead-of-time compilation", kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
