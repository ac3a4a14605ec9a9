"""Choose the block sizes that the package ships for the Triton kernels, from what the compiler says; no GPU needed.

    python bench/triton_table.py sm_90 [--head-dim 128] [--dtype float16] [--kernel forward] [--like sm_80]
    python bench/triton_table.py sm_90 --repair
    python bench/triton_table.py sm_90 --check

For every entry of a table the candidates are tried, best guess first. The first one wins that keeps everything in
registers (stack 0) in the variants of the kernel that take the most registers, fits the target's shared memory, and
uses its tensor cores. The table is written after every entry, and entries that it holds are kept, so an interrupted
run goes on where it stopped; ``--repair`` keeps only those that still suit, as after a change of the kernels or of the
compiler, and ``--again`` none. ``--like`` tries the entries of another table first, and leaves out what that lacks.
``--check`` compiles every entry in every variant. ``canvas-engineering tune`` measures on a real GPU; this is what
those without a measurement get.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

import triton
from tqdm import tqdm

from canvas_engineering.errors import BackendError
from canvas_engineering.kernels.triton import aot
from canvas_engineering.kernels.triton.candidates import TENSOR_COLUMNS, candidates, table_keys
from canvas_engineering.kernels.triton.config import (
    ARCHITECTURES,
    DTYPES,
    HEAD_DIMS,
    KERNELS,
    SHIPPED,
    KernelConfig,
    Key,
    Table,
    fit_config,
    is_heavy,
    read_table,
    write_table,
)
from canvas_engineering.kernels.triton.constants import Variant

SOURCE = f"ahead-of-time compilation by triton {triton.__version__}: no spilled registers, fits the shared memory"
#: Shared memory of the smallest GPU that a table serves; the table of sm_80 also serves sm_86, sm_89 and sm_120.
SMALLEST_SHARED_MEMORY = {"sm_80": 101_376}
#: Above this many bytes of stack a shorter pipeline does not bring everything into registers, except on AMD GPUs,
#: whose pipelines pass through registers.
HOPELESS_STACK = 64


def training(key: Key, config: KernelConfig) -> Variant:
    """The variant that training compiles, with tiles of 128 in the direction that a program loops over."""
    many = key.sets == "many"
    by_keys = key.kernel == "backward_kv"
    return Variant(
        head_dim=key.head_dim,
        block_q=128 if by_keys else config.block_m,
        block_kv=config.block_n if by_keys else 128,
        many_sets=many,
        store_sets=many,
        skip_dead=True,
        group=4,
    )


def hardest_variants(key: Key, config: KernelConfig) -> Iterator[Variant]:
    """The variants that take the most registers, the most likely to fail first."""
    base = training(key, config)
    yield base
    yield replace(base, contiguous=False, dropout=True, head_dim=key.head_dim - 8)
    if key.own_block >= 64:
        yield replace(base, contiguous=False)


def all_variants(key: Key, config: KernelConfig) -> Iterator[Variant]:
    """Every kind of variant."""
    base = training(key, config)
    yield from hardest_variants(key, config)
    yield replace(base, contiguous=False, skip_dead=True, store_lse=False, store_sets=False, group=1)  # inference
    yield replace(base, sigmoid=True, store_lse=False)
    yield replace(base, store_sets=True, skip_dead=False)  # gradients of the row weights
    yield replace(base, dropout=True)
    yield replace(base, head_dim=key.head_dim * 3 // 4)
    for tile in (16, 120):  # a small block, and one that reaches beyond the end of its tile
        yield replace(base, block_q=tile) if key.kernel == "backward_kv" else replace(base, block_kv=tile)
    if key.sets == "one" and key.kernel == "backward_q":
        yield replace(base, grad_lse=True)
    if key.dtype == "float32":
        yield replace(base, precision="tf32")
        yield replace(base, precision="tf32", contiguous=False, dropout=True, head_dim=key.head_dim - 8)


def compiled(key: Key, config: KernelConfig, variant: Variant, target: str) -> aot.KernelReport:
    """The report of one variant, its blocks fitted as a launch fits them."""
    tile_other = variant.block_q if key.kernel == "backward_kv" else variant.block_kv
    heavy = is_heavy(
        key.kernel,
        variant.head_dim,
        dropout=variant.dropout,
        contiguous=variant.contiguous,
        sigmoid=variant.sigmoid,
    )
    return aot.report(key.kernel, variant, key.dtype, target, fit_config(config, key.kernel, tile_other, heavy=heavy))


def problem(key: Key, report: aot.KernelReport, target: str) -> str:
    """What speaks against a compiled kernel; empty if nothing. Two programs with small blocks have to fit at once."""
    limit = SMALLEST_SHARED_MEMORY.get(target, report.shared_limit)
    if key.own_block < 128 and key.head_dim < 256 and key.dtype != "float32":
        limit //= 2
    if report.stack_bytes:
        return f"stack {report.stack_bytes}"
    if report.shared_bytes > limit:
        return f"shared memory {report.shared_bytes} > {limit}"
    if report.tensor_columns > TENSOR_COLUMNS:
        return f"tensor memory {report.tensor_columns} > {TENSOR_COLUMNS}"
    if key.dtype != "float32" and key.own_block >= 64 and report.wgmma == 0:
        return f"no {report.instruction}"
    return ""


def choose(key: Key, target: str, first: list[KernelConfig]) -> KernelConfig | None:
    """The first candidate that suits, or None: then a smaller block serves in its place. ``first`` are tried first."""
    tried = dict.fromkeys([*first, *candidates(key, target)])
    hopeless: set[tuple[int, int, int]] = set()
    for config in tried:
        blocks = (config.block_m, config.block_n, config.num_warps)
        if blocks in hopeless:
            continue
        stack = failing_stack(key, config, target)
        if stack is None:
            return config
        if stack > HOPELESS_STACK and not target.startswith("gfx"):
            hopeless.add(blocks)
    return None


def failing_stack(key: Key, config: KernelConfig, target: str) -> int | None:
    """Stack bytes of the first of the hardest variants that has something against it; None if none has."""
    for variant in hardest_variants(key, config):
        try:
            report = compiled(key, config, variant, target)
        except BackendError as error:  # a pass of the compiler failed
            tqdm.write(f"{target} {' '.join(map(str, key))}: {error}")
            return 0
        if problem(key, report, target):
            return report.stack_bytes
    return None


def generate(target: str, keys: list[Key], keep: str, like: dict[Key, KernelConfig]) -> None:
    """Choose the entries and write them.

    Args:
        target: Whose table.
        keys: Which entries.
        keep: Which of those that are there stay: ``"all"``, those that are still ``"sound"``, or ``"none"``.
        like: Entries of another table, to be tried first.
    """
    path = SHIPPED / f"{target}.json"
    kernels = read_table(path).kernels if path.exists() else {}
    for key in tqdm(keys, desc=target, unit="entry"):
        known = kernels.get(key)
        if known is not None and keep == "all":
            continue
        if known is not None and keep == "sound" and failing_stack(key, known, target) is None:
            continue
        first = [like[key]] if key in like else []
        # Only the forward kernel holds something per softmax set: the others take what several sets took, or nothing.
        sibling = kernels.get(key._replace(sets="many"))
        if key.sets == "many" or key.kernel == "forward":
            found = choose(key, target, first)
        else:
            found = None if sibling is None else choose(key, target, [sibling, *first])
        if found is not None:
            kernels[key] = found
        else:
            kernels.pop(key, None)
        write_table(path, Table(target, SOURCE, kernels))
        tqdm.write(f"{target} {' '.join(map(str, key))}: {found or 'no configuration without spills'}")


def check(target: str, keys: list[Key]) -> int:
    """Compile the shipped entries in every variant; returns how many have something against them."""
    kernels = read_table(SHIPPED / f"{target}.json").kernels
    work = [(key, variant) for key in keys if key in kernels for variant in all_variants(key, kernels[key])]
    failed = 0
    for key, variant in tqdm(work, desc=f"{target} check", unit="variant"):
        found = problem(key, compiled(key, kernels[key], variant, target), target)
        if found:
            failed += 1
            tqdm.write(f"{target} {' '.join(map(str, key))}: {found}: {kernels[key]}, {variant}")
    print(f"{target}: {len(work)} variants, {failed} with something against them")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("target", choices=ARCHITECTURES)
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, action="append")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--kernel", choices=KERNELS, action="append")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--repair", action="store_true", help="choose entries anew that no longer suit")
    action.add_argument("--again", action="store_true", help="choose all entries anew")
    action.add_argument("--check", action="store_true", help="compile the shipped entries in every variant instead")
    parser.add_argument("--like", choices=ARCHITECTURES, help="try the entries of this table first, leave out others")
    args = parser.parse_args()
    keys = table_keys(tuple(args.head_dim or HEAD_DIMS), tuple(args.dtype or DTYPES), tuple(args.kernel or KERNELS))
    if args.check:
        return 1 if check(args.target, keys) else 0
    like = read_table(SHIPPED / f"{args.like}.json").kernels if args.like else {}
    if like:
        keys = [key for key in keys if key in like]
    generate(args.target, keys, "none" if args.again else "sound" if args.repair else "all", like)
    return 0


if __name__ == "__main__":
    sys.exit(main())
