"""``canvas-engineering tune``: measure block sizes on the GPU of this machine, and use the fastest from then on."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from canvas_engineering import __version__
from canvas_engineering._optional import require
from canvas_engineering.cli.compare import MAX_ERROR_FACTOR
from canvas_engineering.cli.output import print_json, seconds, table, writable_folder
from canvas_engineering.errors import BackendError
from canvas_engineering.kernels.triton import tune
from canvas_engineering.kernels.triton.config import (
    ARCHITECTURES,
    HEAD_DIMS,
    table_dtype,
    table_head_dim,
    tuned_table_path,
)

if TYPE_CHECKING:
    import torch

    from canvas_engineering.plan import BlockSparsePlan

DTYPES = ("bfloat16", "float16", "float32")

EPILOG = """examples:
  canvas-engineering tune --dry-run                        what would be measured; needs no GPU
  canvas-engineering tune --head-dim 128 --dtype bfloat16  one head_dim and dtype
  canvas-engineering tune --budget 600                     ten minutes; the next call goes on from there
  canvas-engineering tune --export sm_90.json              and write a table in the form that the package ships

Every candidate is compared with the portable backend before it is timed. Results are kept per kind of GPU in the
user's cache folder (CANVAS_ENGINEERING_CACHE overrides it) and used by every later call of the triton backend.
Nothing is ever tuned without this command.

exit status: 0 done, 1 an entry was left without a usable candidate, 2 refused input, or no GPU
"""


class Gpu(NamedTuple):
    """The GPU that is measured."""

    device: torch.device
    name: str
    architecture: str


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "tune",
        help="measure the fastest block sizes on this machine's GPU",
        description="Measure candidates of block sizes, warps and stages for the Triton kernels, and of tile sizes for "
        "plans, and keep the fastest.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--head-dim", type=head_dim, nargs="+", default=list(HEAD_DIMS), metavar="N", help="default: 64 128 256"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        nargs="+",
        default=["bfloat16", "float32"],
        help="default: bfloat16 float32; bfloat16 and float16 share their results",
    )
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument(
        "--budget", type=budget, metavar="SECONDS", help="start no entry after that time; the next call goes on"
    )
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write a whole table as the package ships it")
    parser.add_argument("--dry-run", action="store_true", help="list what would be measured, and stop")
    parser.add_argument(
        "--target", choices=ARCHITECTURES, help="with --dry-run: list for this GPU, not for the one that is there"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=main)


def head_dim(text: str) -> int:
    """A head_dim that the kernels take, as tables list it."""
    if not text.isdecimal() or not 8 <= int(text) <= HEAD_DIMS[-1]:
        raise argparse.ArgumentTypeError(f"must be a number from 8 to {HEAD_DIMS[-1]}, got {text!r}")
    return table_head_dim(int(text))


def budget(text: str) -> float:
    """A positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return value


def main(args: argparse.Namespace) -> int:
    if args.target is not None and not args.dry_run:
        raise BackendError(f"--target needs --dry-run: tune measures the GPU that is there, got --target {args.target}")
    head_dims = list(dict.fromkeys(args.head_dim))
    dtypes = list(dict.fromkeys(map(table_dtype, args.dtype)))
    if args.dry_run:
        return dry_run(args, head_dims, dtypes)
    gpu = find_gpu(args.device)
    if args.export is not None:
        writable_folder(args.export.parent)
        if args.export.is_dir():
            raise BackendError(f"--export must name a file, got the folder {args.export}")
    tqdm = require("tqdm", "triton", "tune").tqdm
    jobs = tune.make_jobs(gpu.architecture, head_dims, dtypes)
    measured = tune.resume(tuned_table_path(gpu.name), gpu.architecture, source(gpu.name), again=args.again)
    # None: no bar where standard error is no terminal.
    with tqdm(total=sum(job.size for job in jobs), unit="candidate", disable=None) as bar:

        def progress(candidates: int, job: str) -> None:
            bar.set_description(job, refresh=False)
            bar.update(candidates)

        outcome = tune.tune(jobs, make_measure(gpu), gpu.name, measured, budget=args.budget, progress=progress)
    if args.export is not None:
        tune.export(args.export, gpu.architecture, measured)
    found = report(gpu, outcome, args.export)
    if args.json:
        print_json(found)
    else:
        print(text(found))
    return 1 if outcome.hopeless else 0


def find_gpu(device: str) -> Gpu:
    """The GPU to measure.

    Raises:
        MissingDependencyError: torch or triton is not installed.
        BackendError: There is no GPU that the kernels run on, or ``device`` names none.
    """
    torch = require("torch", "triton", "tune")
    require("triton", "triton", "tune")
    from canvas_engineering.kernels.triton import backend, launch

    if not torch.cuda.is_available():
        raise BackendError("tune measures on an NVIDIA or AMD GPU, and torch.cuda.is_available() is False")
    if backend.interpreted():
        raise BackendError("tune measures compiled kernels: unset TRITON_INTERPRET, got TRITON_INTERPRET=1")
    ok, reason = backend.availability()
    if not ok:
        raise BackendError(reason)
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise BackendError(f"--device must name a torch device, got {device!r}") from error
    if found.type != "cuda" or (found.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"--device must be a GPU, cuda:0 to cuda:{torch.cuda.device_count() - 1}, got {device!r}")
    found = torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    return Gpu(found, torch.cuda.get_device_name(found), launch.architecture(found))


def source(device_name: str) -> str:
    """What results were measured by; those of another version are measured anew."""
    triton = require("triton", "triton", "tune")
    return f"measured on {device_name}, canvas-engineering {__version__}, triton {triton.__version__}"


def make_measure(gpu: Gpu) -> tune.Measure:
    """Measurements on a GPU."""
    from canvas_engineering.kernels.triton.measure import GpuMeasure

    return GpuMeasure(gpu.device, expect)


def expect(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad_out: torch.Tensor, plan: BlockSparsePlan
) -> Mapping[str, tuple[torch.Tensor, float]]:
    """What the portable backend computes in float64, and what its error in the dtype of ``q`` allows."""
    import torch

    from canvas_engineering import block_sparse_attention

    def portable(*operands: torch.Tensor) -> dict[str, torch.Tensor]:
        q, k, v = (t.detach().requires_grad_() for t in operands[:3])
        out = block_sparse_attention(q, k, v, plan, backend="portable")
        grads = torch.autograd.grad(out, (q, k, v), operands[3])
        return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))

    right = portable(*(t.double() for t in (q, k, v, grad_out)))
    plain = portable(q, k, v, grad_out)
    eps = torch.finfo(q.dtype).eps
    allowed = {
        name: MAX_ERROR_FACTOR * max(float((plain[name].double() - exact).abs().max()), eps * float(exact.abs().max()))
        for name, exact in right.items()
    }
    return {name: (exact, allowed[name]) for name, exact in right.items()}


# -- what is shown ------------------------------------------------------------------------------------------


def dry_run(args: argparse.Namespace, head_dims: Sequence[int], dtypes: Sequence[str]) -> int:
    """List the jobs: for ``--target``, else for the GPU that is there, else for an H100."""
    gpu = None if args.target is not None or not _has_gpu() else find_gpu(args.device)
    architecture = gpu.architecture if gpu is not None else args.target or "sm_90"
    jobs = tune.make_jobs(architecture, head_dims, dtypes)
    done = set()
    if gpu is not None:
        known = tune.resume(tuned_table_path(gpu.name), architecture, source(gpu.name), again=args.again)
        done = {str(job) for job in jobs if tune.is_done(job, known)}
    left = [job for job in jobs if str(job) not in done]
    candidates = sum(job.size for job in left)
    if args.json:
        print_json(
            {
                "architecture": architecture,
                "device": None if gpu is None else gpu.name,
                "entries": [{"name": str(job), "candidates": job.size, "measured": str(job) in done} for job in jobs],
                "candidates": candidates,
            }
        )
        return 0
    rows = [(str(job), str(job.size), "measured before" if str(job) in done else "") for job in jobs]
    print(table(("entry", "candidates", ""), rows))
    print(f"\n{len(left)} entries with {candidates:,} candidates would be measured for {architecture}.")
    return 0


def _has_gpu() -> bool:
    from canvas_engineering._optional import installed

    if not installed("torch") or not installed("triton"):
        return False
    import torch

    return torch.cuda.is_available()


def report(gpu: Gpu, outcome: tune.Outcome, exported: Path | None) -> dict[str, Any]:
    """Everything that a search found, for JSON."""
    return {
        "device": gpu.name,
        "architecture": gpu.architecture,
        "table": str(tuned_table_path(gpu.name)),
        "exported": None if exported is None else str(exported),
        "entries": [
            {
                **entry.key._asdict(),
                "block_m": entry.config.block_m,
                "block_n": entry.config.block_n,
                "num_warps": entry.config.num_warps,
                "num_stages": entry.config.num_stages,
                "seconds": entry.seconds,
                "shipped_seconds": entry.shipped_seconds,
            }
            for entry in outcome.entries
        ],
        "tiles": [{**tile._asdict(), "speed": speed} for tile, speed in outcome.tiles.items()],
        "kept": outcome.kept,
        "left": outcome.left,
        "measured": outcome.measured,
        "skipped": outcome.failures,
        "hopeless": outcome.hopeless,
    }


def text(found: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = []
    if found["entries"]:
        rows = [
            (
                f"{one['kernel']} {one['head_dim']} {one['dtype']} {one['sets']} {one['own_block']}",
                f"{one['block_m']} x {one['block_n']}",
                str(one["num_warps"]),
                str(one["num_stages"]),
                seconds(one["seconds"]),
                "-" if one["shipped_seconds"] is None else f"{one['shipped_seconds'] / one['seconds']:.2f} x",
            )
            for one in found["entries"]
        ]
        lines += [table(("entry", "block", "warps", "stages", "time", "against shipped"), rows), ""]
    fastest = [one for one in found["tiles"] if one["speed"] == 1]
    lines += [
        f"fastest tile of plans, {one['head_dim']} {one['dtype']}: {one['block_q']} x {one['block_kv']}"
        for one in fastest
    ]
    skipped = sum(found["skipped"].values())
    why = "".join(f"; {count} x {reason}" for reason, count in sorted(found["skipped"].items()))
    lines.append(f"{found['device']}: {found['measured']:,} candidates measured, {skipped:,} skipped{why}")
    if found["kept"]:
        lines.append(f"{found['kept']} entries were measured before and kept; --again measures them anew")
    if found["left"]:
        lines.append(f"{found['left']} entries are left: the budget is spent, the next call goes on")
    lines += [f"no candidate could be used for {name}" for name in found["hopeless"]]
    lines.append(f"written   {found['table']}")
    if found["exported"] is not None:
        lines.append(f"exported  {found['exported']}")
    return "\n".join(lines)
