"""Choose the block sizes that the package ships for the Triton kernels, from what the compiler says; no GPU needed.

    python bench/triton_table.py sm_90 [--head-dim 128] [--dtype float16] [--kernel forward] [--again]
    python bench/triton_table.py sm_90 --check

For every entry of a table the candidates are tried, best guess first. The first one wins that keeps everything in
registers (stack 0) in the variants of the kernel that take the most registers, fits the target's shared memory, and
uses its tensor cores. The table is written after every entry, and entries that it holds are kept unless ``--again``
is given, so an interrupted run goes on where it stopped. ``--check`` compiles every entry in every variant.
``canvas-engineering tune`` measures on a real GPU; this is what those without a measurement get.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

from tqdm import tqdm

from canvas_engineering.kernels.triton import aot
from canvas_engineering.kernels.triton.candidates import candidates, table_keys
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

SOURCE = "ahead-of-time compilation: no spilled registers, fits the shared memory"
#: Shared memory of the smallest GPU that a table serves; the table of sm_80 also serves sm_86, sm_89 and sm_120.
SMALLEST_SHARED_MEMORY = {"sm_80": 101_376}
#: Accumulators and products of a step, in 32-bit registers per thread: every configuration seen above this spills its
#: 255 registers, where these are not in tensor memory (sm_100) or in registers of their own (AMD).
HOPELESS_REGISTERS = 190
#: Above this many bytes of stack a shorter pipeline does not bring everything into registers.
HOPELESS_STACK = 64


def training(key: Key, config: KernelConfig) -> Variant:
    """The variant that training compiles, with tiles of 128 in the direction that a program loops over."""
    many = key.sets == "many"
    tiles = {"block_q": config.block_m, "block_kv": config.block_n}
    tiles["block_q" if key.kernel == "backward_kv" else "block_kv"] = 128
    return Variant(head_dim=key.head_dim, many_sets=many, store_sets=many, skip_dead=not many, group=4, **tiles)


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
    yield replace(base, dropout=True)
    yield replace(base, head_dim=key.head_dim * 3 // 4)
    tile_other = "block_q" if key.kernel == "backward_kv" else "block_kv"
    yield replace(base, **{tile_other: 16})
    yield replace(base, **{tile_other: 120})  # a block beyond the end of the tile
    if key.sets == "one" and key.kernel == "backward_q":
        yield replace(base, grad_lse=True)
    if key.dtype == "float32":
        yield replace(base, precision="tf32")
        yield replace(base, precision="tf32", contiguous=False, dropout=True, head_dim=key.head_dim - 8)


def compiled(key: Key, config: KernelConfig, variant: Variant, target: str) -> aot.KernelReport:
    """The report of one variant, its blocks fitted as a launch fits them."""
    tile_other = variant.block_q if key.kernel == "backward_kv" else variant.block_kv
    heavy = is_heavy(key.kernel, variant.head_dim, dropout=variant.dropout, contiguous=variant.contiguous)
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
    if report.tensor_columns > aot.TENSOR_COLUMNS:
        return f"tensor memory {report.tensor_columns} > {aot.TENSOR_COLUMNS}"
    if key.dtype != "float32" and key.own_block >= 64 and report.wgmma == 0:
        return f"no {report.instruction}"
    return ""


def accumulator_registers(key: Key, config: KernelConfig) -> float:
    """32-bit registers per thread for what a program adds up, and for the products of one step."""
    accumulators = {"forward": 2 if key.sets == "many" else 1, "backward_q": 1, "backward_kv": 2}[key.kernel]
    products = 1 if key.kernel == "forward" else 2
    columns = accumulators * key.head_dim + products * config.other_block(key.kernel)
    return key.own_block * columns / (32 * config.num_warps)


def choose(key: Key, target: str, known: dict[Key, KernelConfig]) -> KernelConfig | None:
    """The first candidate that suits, or None: then a smaller block serves in its place."""
    tried = list(candidates(key, target))
    # Only the forward kernel holds something per softmax set, so the others take what several sets took.
    sibling = known.get(key._replace(sets="many"))
    if key.sets == "one" and key.kernel != "forward" and sibling is not None:
        tried = [sibling, *tried]
    hopeless: set[tuple[int, int, int]] = set()
    for config in tried:
        blocks = (config.block_m, config.block_n, config.num_warps)
        if blocks in hopeless:
            continue
        if target in ("sm_80", "sm_90") and accumulator_registers(key, config) > HOPELESS_REGISTERS:
            continue
        for variant in hardest_variants(key, config):
            report = compiled(key, config, variant, target)
            found = problem(key, report, target)
            if found:
                if report.stack_bytes > HOPELESS_STACK:
                    hopeless.add(blocks)
                break
        else:
            return config
    return None


def generate(target: str, keys: list[Key], *, again: bool) -> int:
    """Choose the entries and write them; returns how many have no configuration."""
    path = SHIPPED / f"{target}.json"
    kernels = read_table(path).kernels if path.exists() else {}
    missing = 0
    for key in tqdm(keys, desc=target, unit="entry"):
        if key in kernels and not again:
            continue
        found = choose(key, target, kernels)
        kernels.pop(key, None)
        if found is None:
            missing += 1
        else:
            kernels[key] = found
            write_table(path, Table(target, SOURCE, kernels))
        tqdm.write(f"{target} {' '.join(map(str, key))}: {found or 'no configuration without spills'}")
    return missing


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
    parser.add_argument("--again", action="store_true", help="choose entries anew that the table holds")
    parser.add_argument("--check", action="store_true", help="compile the shipped entries in every variant instead")
    args = parser.parse_args()
    keys = table_keys(tuple(args.head_dim or HEAD_DIMS), tuple(args.dtype or DTYPES), tuple(args.kernel or KERNELS))
    if args.check:
        return 1 if check(args.target, keys) else 0
    generate(args.target, keys, again=args.again)
    return 0


if __name__ == "__main__":
    sys.exit(main())
