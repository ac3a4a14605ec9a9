"""Static cost on TPUs, without a TPU: VLIW bundles per visited tile, beside JAX's Splash kernel.

Both are compiled by libtpu for the same target, tile sizes, head_dim, dtype and matrix-product precision, on the
same block-causal pattern of full and partial tiles. Bundles are those that one visited tile executes, read off the
compiler's final schedule (``canvas_engineering.kernels.pallas.schedule``). They are cycles without stalls, and say
nothing about waiting for memory.

    python bench/pallas_static.py [--targets v5e v6e] [--workers 2] [--out bench/results/pallas_static.json]

Needs libtpu (``make test-tpu`` installs it). Every configuration is compiled in a process of its own, half a minute
each. The figures do not depend on the machine that compiles.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from canvas_engineering._files import write_json
from canvas_engineering._optional import require
from canvas_engineering.errors import BackendError

TARGETS = ("v5e", "v5p", "v6e", "tpu7x")
TILES = ((128, 128), (256, 256), (512, 512))
#: (head_dim, dtype): float32 is multiplied in several passes, so that one head_dim says it all.
OPERANDS = ((64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (128, "float32"))
NUM_TILES = 8
# Enough that no operand fits into vector memory: XLA would put it there before the kernel starts, and the kernel
# would not load it block by block.
HEADS = 256
KERNELS = {"forward": "splash_mha_fwd", "dq": "splash_mha_dq", "dkv": "splash_mha_dkv"}
RATIO_AIM = 1.1


def measure(target: str, block_q: int, block_kv: int, head_dim: int, dtype: str) -> list[dict[str, Any]]:
    """One row per kernel: our bundles and Splash's. Loads libtpu, so once per process."""
    from canvas_engineering.kernels.pallas.aot import example_plan
    from canvas_engineering.kernels.pallas.aot_worker import Compiler, compile_kernels

    with tempfile.TemporaryDirectory(prefix="canvas-tpu-") as folder:
        compiler = Compiler(target, Path(folder))
        ours = compile_kernels(compiler, example_plan(block_q, block_kv, NUM_TILES), head_dim, dtype, HEADS)
        theirs = splash(compiler, block_q, block_kv, head_dim, dtype)
    rows = []
    for kernel in ours:
        row = {"target": target, "head_dim": head_dim, "dtype": dtype, **kernel}
        row["splash"] = theirs[kernel["name"]]
        if "bundles" in row and "bundles" in row["splash"]:
            row["ratio"] = round(row["bundles"] / row["splash"]["bundles"], 3)
        rows.append(row)
    return rows


def splash(compiler: Any, block_q: int, block_kv: int, head_dim: int, dtype: str) -> dict[str, dict[str, Any]]:
    """The same pattern through JAX's kernel: forward alone, then dQ and dK/dV from its gradient."""
    import jax
    import numpy as np
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
        splash_attention_mask as masks,
    )

    tokens_q, tokens_kv = NUM_TILES * block_q, NUM_TILES * block_kv
    dense = np.arange(tokens_q)[:, None] * block_kv >= np.arange(tokens_kv) * block_q
    mask = masks.MultiHeadMask([masks.NumpyMask(dense)])
    sizes = kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    attend = kernels.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    q = compiler.array((HEADS, tokens_q, head_dim), dtype)
    kv = compiler.array((HEADS, tokens_kv, head_dim), dtype)

    def gradients(q: Any, k: Any, v: Any, grad: Any) -> Any:
        _, pull_back = jax.vjp(attend, q, k, v)
        return pull_back(grad)

    # float32 at full precision, as ours; bfloat16 knows one precision only.
    precision = "highest" if dtype == "float32" else "default"
    found: dict[str, dict[str, Any]] = {}
    with jax.default_matmul_precision(precision):
        for function, arguments, names in (
            (attend, (q, kv, kv), ("forward",)),
            (gradients, (q, kv, kv, q), ("dq", "dkv")),
        ):
            try:
                compiled = compiler.compile(function, arguments, [KERNELS[name] for name in names])
            except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
                found |= {name: {"error": str(error).strip().splitlines()[0][:300]} for name in names}
                continue
            for name in names:
                schedule = compiled.schedules[KERNELS[name]]
                found[name] = {"bundles": schedule.bundles, "vmem_bytes": schedule.vmem_bytes}
    return found


def measure_elsewhere(configuration: tuple[Any, ...]) -> list[dict[str, Any]]:
    """``measure`` in a process of its own.

    Raises:
        BackendError: The process failed; the message ends with what it said last.
    """
    process = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(configuration)], capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise BackendError(f"compiling {configuration} must succeed, got: {process.stderr.strip()[-1000:]}")
    rows: list[dict[str, Any]] = json.loads(process.stdout)
    return rows


def document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written: tables as ``bench/report.py`` renders them."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu"))
    above = [row for row in rows if row.get("ratio", 0) > RATIO_AIM]
    summary = []
    for target, kernel in itertools.product(dict.fromkeys(row["target"] for row in rows), KERNELS):
        ratios = [row["ratio"] for row in rows if (row["target"], row["name"]) == (target, kernel) and "ratio" in row]
        if ratios:
            summary.append([target, kernel, len(ratios), min(ratios), round(statistics.median(ratios), 3), max(ratios)])
    shared = ("target", "block_q", "block_kv", "head_dim", "dtype", "name")
    every = [
        [
            *(row[name] for name in shared),
            row.get("bundles", row.get("error")),
            row["splash"].get("bundles", row["splash"].get("error")),
            row.get("ratio"),
            row.get("vmem_bytes"),
            row["splash"].get("vmem_bytes"),
        ]
        for row in rows
    ]
    return {
        "title": "TPU kernels, static cost",
        "command": "python bench/pallas_static.py",
        "note": (
            "VLIW bundles that one visited tile executes, ours and those of JAX's Splash at the same tile sizes, "
            "head_dim and dtype, from the final schedule of libtpu for a TPU that need not be there; not a time. "
            f"Below 1: ours executes fewer. {versions}. Of {len(rows)} kernels {len(above)} exceed the aim of "
            f"{RATIO_AIM}."
        ),
        "tables": [
            {"columns": ["target", "kernel", "compared", "least ratio", "median", "most"], "rows": summary},
            {
                "title": "Every configuration",
                "columns": [*shared[:5], "kernel", "bundles", "Splash", "ratio", "VMEM bytes", "Splash VMEM bytes"],
                "rows": every,
            },
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes at a time (default: 1)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pallas_static.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a configuration as JSON: measure it and print the rows
    arguments = parser.parse_args()
    if arguments.one:
        answer = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # libtpu writes to standard output as well
        rows = measure(*json.loads(arguments.one))
        with answer:
            json.dump(rows, answer)
        return
    if arguments.workers < 1:
        parser.error(f"--workers must be at least 1, got {arguments.workers}")

    require("libtpu", "tpu", "compiling for a TPU")
    configurations = [
        (target, *tiles, head_dim, dtype)
        for target, (head_dim, dtype), tiles in itertools.product(arguments.targets, OPERANDS, TILES)
    ]
    with ThreadPoolExecutor(arguments.workers) as pool:
        found = list(tqdm(pool.map(measure_elsewhere, configurations), total=len(configurations), unit="configuration"))
    rows = [row for some in found for row in some]
    for row in rows:
        print(*(row[name] for name in ("target", "block_q", "block_kv", "head_dim", "dtype", "name")), row.get("ratio"))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, document(rows))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
