"""Does this plan fit that TPU? Ahead-of-time compilation by libtpu, with no TPU present."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from canvas_engineering._optional import require
from canvas_engineering.errors import BackendError, PlanError
from canvas_engineering.kernels.pallas.aot_worker import TARGETS
from canvas_engineering.kernels.pallas.backend import jax_is_outdated
from canvas_engineering.kernels.pallas.lowering import lower_plan
from canvas_engineering.kernels.pallas.tiles import (
    MAX_HEAD_DIM,
    SUPPORTED_DTYPES,
    recommended_tiles,
    tile_problems,
)
from canvas_engineering.plan import BlockSparsePlan

TIMEOUT_SECONDS = 900


def compile_report(target: str, head_dim: int, dtype: str, plan: BlockSparsePlan | None) -> dict[str, Any]:
    """Compile forward, dQ and dK/dV for one head of ``plan`` and say what they need.

    Args:
        target: ``"v5e"``, ``"v5p"``, ``"v6e"`` or ``"tpu7x"``.
        head_dim: 1 to 256; the kernels run with 64, 128 or 256.
        dtype: ``"bfloat16"`` or ``"float32"``.
        plan: The plan; None for an example with full and partial tiles at the recommended sizes.

    Returns:
        ``"kernels"``: a list of ``{"name", "block_q", "block_kv", "bundles", "total_bundles", "vmem_bytes",
        "smem_bytes", "argument_bytes", "output_bytes", "temp_bytes"}``, one per kernel, or with ``"error"`` in
        place of the numbers where the compiler refused; ``bundles`` are those that one visited tile executes.
        ``"fits"``: whether all compiled and the memory suffices. ``"sentence"``: the answer in words.

    Raises:
        BackendError: An unknown target, dtype or head_dim, a jax that is too old, or the compiler crashed.
        MissingDependencyError: jax or libtpu is not installed.
    """
    if target not in TARGETS:
        raise BackendError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if dtype not in SUPPORTED_DTYPES:
        raise BackendError(f"dtype must be one of {', '.join(SUPPORTED_DTYPES)}, got {dtype!r}")
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or not 1 <= head_dim <= MAX_HEAD_DIM:
        raise BackendError(f"head_dim must be an integer from 1 to {MAX_HEAD_DIM}, got {head_dim!r}")
    if plan is None:
        plan = example_plan(*recommended_tiles(head_dim, dtype))
    what = (
        f"{plan.num_q:,} x {plan.num_kv:,} tokens in tiles of {plan.block_q} x {plan.block_kv}, {dtype}, "
        f"head_dim {head_dim}"
    )
    problems = tile_problems(plan.block_q, plan.block_kv, head_dim, dtype)
    if problems:
        return {"kernels": [], "fits": False, "sentence": f"No: a {target} cannot run {what}: {'; '.join(problems)}."}
    require("jax", "tpu", "compiling for a TPU")
    require("libtpu", "tpu", "compiling for a TPU")
    outdated = jax_is_outdated()
    if outdated:
        raise BackendError(f"compiling for a TPU {outdated}")
    try:
        plan.lowered("pallas", lower_plan)
    except PlanError as error:  # the lists of the plan do not fit into scalar memory
        return {"kernels": [], "fits": False, "sentence": f"No: a {target} cannot run {what}: {error}."}
    kernels = _compile_elsewhere(target, head_dim, dtype, plan)
    errors = [f"{kernel['name']}: {_first_sentence(kernel['error'])}" for kernel in kernels if "error" in kernel]
    if errors:
        return {"kernels": kernels, "fits": False, "sentence": f"No: a {target} cannot run {what}: {'; '.join(errors)}"}
    need = max(kernel["argument_bytes"] + kernel["output_bytes"] + kernel["temp_bytes"] for kernel in kernels)
    has = TARGETS[target].hbm_bytes
    vmem = max(kernel["vmem_bytes"] for kernel in kernels)
    smem = max(kernel["smem_bytes"] for kernel in kernels)
    return {
        "kernels": kernels,
        "fits": need <= has,
        "sentence": (
            f"{'Yes' if need <= has else 'No'}: {what}: one head needs {_readable(need)} of the {_readable(has)} of a "
            f"{target}, and its kernels {_readable(vmem)} of vector memory and {_readable(smem)} of scalar memory."
        ),
    }


def example_plan(block_q: int, block_kv: int, tiles: int = 32) -> BlockSparsePlan:
    """A plan of ``tiles`` x ``tiles`` tiles: full ones on one side of the diagonal, partial ones on it."""
    rows, cols = np.tril_indices(tiles)
    diagonal = np.arange(block_q)[:, None] * block_kv >= np.arange(block_kv) * block_q
    return BlockSparsePlan(
        num_q=tiles * block_q,
        num_kv=tiles * block_kv,
        block_q=block_q,
        block_kv=block_kv,
        softmax="joint",
        q_tokens=np.arange(tiles * block_q, dtype=np.int32).reshape(tiles, block_q),
        kv_tokens=np.arange(tiles * block_kv, dtype=np.int32).reshape(tiles, block_kv),
        set_ptr=np.arange(tiles + 1, dtype=np.int32),
        entry_ptr=np.searchsorted(rows, np.arange(tiles + 1)).astype(np.int64),
        entry_kv=cols.astype(np.int32),
        entry_mask=np.where(rows == cols, 0, -1).astype(np.int32),
        masks=np.packbits(diagonal, axis=-1, bitorder="little")[None],
        row_weight=np.ones((tiles, block_q), np.float32),
        row_connection=np.zeros((tiles, block_q), np.int32),
        source="example",
    )


def _compile_elsewhere(target: str, head_dim: int, dtype: str, plan: BlockSparsePlan) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="canvas-plan-") as folder:
        path = Path(folder) / "plan.npz"
        plan.save(path)
        request = {"target": target, "head_dim": head_dim, "dtype": dtype, "plan": str(path)}
        try:
            process = subprocess.run(
                [sys.executable, "-m", "canvas_engineering.kernels.pallas.aot_worker"],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BackendError(
                f"compiling for {target} must take at most {TIMEOUT_SECONDS} s; it took longer"
            ) from None
    if process.returncode:
        tail = next((line for line in reversed(process.stderr.splitlines()) if line.strip()), "no message")
        raise BackendError(f"compiling for {target} must succeed, got exit status {process.returncode}: {tail}")
    kernels: list[dict[str, Any]] = json.loads(process.stdout)["kernels"]
    return kernels


def _first_sentence(message: str) -> str:
    """The line of the compiler's message that says what is wrong, without its code and location."""
    line = next((line for line in message.splitlines() if line.strip()), "no message")
    return re.sub(r"\s+", " ", line).strip()[:300]


def _readable(count: int) -> str:
    """Bytes in the largest unit of which there is at least one."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} B"
