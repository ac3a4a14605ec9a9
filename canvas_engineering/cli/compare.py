"""Run one plan on every backend that can, and hold each against the NumPy reference.

The tolerance is not a constant: the same computation is written plainly in NumPy float32 (the decode loop of the
plan's docstring), its error against the reference is measured, and a backend may be a small factor worse,
because it sums in another order.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from canvas_engineering._optional import installed
from canvas_engineering.cli.clip import FloatArray
from canvas_engineering.cli.output import progress, seconds as readable

if TYPE_CHECKING:
    from canvas_engineering.plan import BlockSparsePlan

# A backend sums in another order than the plain loop, and its largest error is taken over more rows than were
# sampled for the loop; both change an error by small factors, a wrong kernel changes it by orders of magnitude.
MAX_ERROR_FACTOR = 8.0
RMS_ERROR_FACTOR = 4.0
SAMPLED_TILES = 64
# (query, key, head) triples that the reference takes in a quarter of a minute or so; above it, only rows of some
# q tiles are computed and compared.
REFERENCE_BUDGET = 400_000_000


@dataclass(frozen=True)
class Tolerance:
    """Largest and root-mean-square error that a float32 backend may have."""

    max_error: float
    rms_error: float
    basis: str


@dataclass(frozen=True)
class Outcome:
    """What one backend did.

    Attributes:
        status: ``reference``, ``equal``, ``differs``, ``not compared`` or ``skipped``.
        reason: Why it was skipped, or by how much it differs; empty otherwise.
        first_seconds: The first call, with lowering and compiling; None when skipped.
        seconds: Median of the following calls.
    """

    backend: str
    arrays: str
    status: str
    reason: str = ""
    max_error: float | None = None
    rms_error: float | None = None
    first_seconds: float | None = None
    seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a NaN error, which JSON lacks, is given in words by ``reason`` and is None here."""
        found = asdict(self)
        for name in ("max_error", "rms_error"):
            if found[name] is not None and not np.isfinite(found[name]):
                found[name] = None
        return found

    def row(self) -> tuple[str, ...]:
        """For the table."""
        times = [("-" if value is None else readable(value)) for value in (self.seconds, self.first_seconds)]
        errors = ["-" if value is None else f"{value:.2e}" for value in (self.max_error, self.rms_error)]
        return (self.backend, self.arrays, self.status, *errors, *times, self.reason)


OUTCOME_HEADER = ("backend", "arrays", "result", "max error", "RMS error", "time", "first call", "")


def max_and_rms(difference: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """Largest magnitude and root mean square; NaN where anything is NaN."""
    if difference.size == 0:
        return 0.0, 0.0
    return float(np.abs(difference).max()), float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))


def judge(
    backend: str, arrays: str, error: tuple[float, float], times: tuple[float, float], allowed: Tolerance
) -> Outcome:
    """Compare an error with what is allowed; NaN is never equal."""
    reason = "; ".join(
        f"{name} error {value:.2e} is above {limit:.2e}"
        for name, value, limit in zip(("max", "RMS"), error, (allowed.max_error, allowed.rms_error), strict=True)
        if not value <= limit
    )
    return Outcome(backend, arrays, "differs" if reason else "equal", reason, *error, *times)


def plain_tile(
    plan: BlockSparsePlan, tile: int, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]
) -> NDArray[np.floating[Any]]:
    """The decode loop for the rows of one q tile, in the dtype of its inputs ``(H, N, D)``."""
    rows = plan.q_tokens[tile][: plan.q_count[tile]]
    scale = q.dtype.type(q.shape[-1] ** -0.5)
    out = np.zeros((q.shape[0], rows.size, v.shape[-1]), q.dtype)
    for s in range(plan.set_ptr[tile], plan.set_ptr[tile + 1]):
        entries = range(plan.entry_ptr[s], plan.entry_ptr[s + 1])
        if not entries:
            continue
        keys = np.concatenate([plan.kv_tokens[plan.entry_kv[e]] for e in entries])
        allowed = np.concatenate([plan.tile_mask(plan.entry_mask[e]) for e in entries], axis=1)
        allowed = allowed[: rows.size, keys >= 0]
        keys = keys[keys >= 0]
        logits = np.where(allowed, (q[:, rows] * scale) @ k[:, keys].swapaxes(1, 2), -np.inf)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=np.finfo(q.dtype).min))
        total = weights.sum(axis=-1, keepdims=True)
        softmax = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        out += plan.row_weight[s, : rows.size, None].astype(q.dtype) * (softmax @ v[:, keys])
    return out


@dataclass(frozen=True)
class Yardstick:
    """What the backends are held against.

    Attributes:
        rows: ``(R,)`` query tokens that the reference computed.
        output: ``(1, H, R, D)`` float64, its output there.
        seconds: What that took.
        tolerance: The error a float32 backend may have.
        complete: Whether these are all rows.
        compared: Which rows are compared, in words.
    """

    rows: NDArray[np.int32]
    output: NDArray[np.float64]
    seconds: float
    tolerance: Tolerance
    complete: bool
    compared: str


def evenly(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of ``range(count)``, evenly spread."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(count, wanted)).round())] if count else []


def measure_yardstick(plan: BlockSparsePlan, q: FloatArray, k: FloatArray, v: FloatArray) -> Yardstick:
    """Run the reference, on all rows or, for plans above the budget, on the rows of evenly spread q tiles.

    Args:
        q, k, v: ``(1, H, N, D)`` float32.
    """
    from canvas_engineering.kernels.reference.attention import attention_forward

    triples = plan.stats().computed_pairs * q.shape[1]
    share = min(1.0, REFERENCE_BUDGET / max(triples, 1))
    tiles = evenly(plan.num_q_tiles, max(1, int(plan.num_q_tiles * share)))
    reference = np.zeros(q.shape)
    start = time.perf_counter()
    for tile in progress(tiles, "reference"):
        rows = plan.q_tokens[tile][: plan.q_count[tile]]
        reference[:, :, rows] = attention_forward(q, k, v, plan, tiles=[tile])[0][:, :, rows]
    took = time.perf_counter() - start
    rows = np.concatenate([plan.q_tokens[tile][: plan.q_count[tile]] for tile in tiles] or [np.zeros(0, np.int32)])
    complete = len(tiles) == plan.num_q_tiles
    compared = (
        f"all {rows.size:,} rows of all {q.shape[1]} heads"
        if complete
        else f"{rows.size:,} of {plan.num_q:,} rows ({len(tiles)} of {plan.num_q_tiles} q tiles, evenly spread) of all "
        f"{q.shape[1]} heads"
    )
    tolerance = _measure_tolerance(plan, q, k, v, reference, [tiles[i] for i in evenly(len(tiles), SAMPLED_TILES)])
    return Yardstick(rows, reference[:, :, rows], took, tolerance, complete, compared)


def _measure_tolerance(
    plan: BlockSparsePlan,
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    reference: NDArray[np.float64],
    tiles: list[int],
) -> Tolerance:
    """What float32 itself costs here: the plain loop in float32 against the reference, on some q tiles."""
    differences = [np.zeros(0)]
    for tile in progress(tiles, "float32 yardstick"):
        rows = plan.q_tokens[tile][: plan.q_count[tile]]
        differences.append((plain_tile(plan, tile, q[0], k[0], v[0]) - reference[0][:, rows]).ravel())
    max_error, rms_error = max_and_rms(np.concatenate(differences))
    # Rows whose weight is all on one key are exact in float32; one rounding of the values is always allowed.
    rounding = float(np.finfo(np.float32).eps * np.abs(v).max(initial=0))
    return Tolerance(
        MAX_ERROR_FACTOR * max(max_error, rounding),
        RMS_ERROR_FACTOR * max(rms_error, rounding),
        f"{MAX_ERROR_FACTOR:g} x the largest and {RMS_ERROR_FACTOR:g} x the RMS error of the same computation written "
        f"plainly in NumPy float32 ({max_error:.2e} and {rms_error:.2e} on {len(tiles)} of {plan.num_q_tiles} q tiles)",
    )


@dataclass(frozen=True)
class Candidate:
    """One way to run the plan: a call that returns when the result is there, and its result as NumPy."""

    backend: str
    arrays: str
    operands: tuple[Any, Any, Any]
    call: Callable[[], Any]
    to_numpy: Callable[[Any], NDArray[Any]]


def candidates(plan: BlockSparsePlan, q: FloatArray, k: FloatArray, v: FloatArray, backend: str) -> Iterator[Candidate]:
    """The array types that ``backend`` takes on this machine."""
    if backend in ("portable", "triton") and installed("torch"):
        yield _torch_candidate(plan, (q, k, v), backend)
    if backend in ("portable", "pallas") and installed("jax"):
        yield _jax_candidate(plan, (q, k, v), backend)


def _torch_candidate(plan: BlockSparsePlan, arrays: tuple[FloatArray, ...], backend: str) -> Candidate:
    import torch

    from canvas_engineering import block_sparse_attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q, k, v = (torch.from_numpy(array).to(device) for array in arrays)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            out: torch.Tensor = block_sparse_attention(q, k, v, plan, backend=backend)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return out

    return Candidate(backend, f"torch {device.type}", (q, k, v), call, lambda out: out.cpu().numpy())


def _jax_candidate(plan: BlockSparsePlan, arrays: tuple[FloatArray, ...], backend: str) -> Candidate:
    import jax

    from canvas_engineering import block_sparse_attention

    q, k, v = (jax.numpy.asarray(array) for array in arrays)
    compiled = jax.jit(lambda q, k, v: block_sparse_attention(q, k, v, plan, backend=backend))
    return Candidate(
        backend,
        f"jax {jax.default_backend()}",
        (q, k, v),
        lambda: jax.block_until_ready(compiled(q, k, v)),
        np.asarray,
    )


def simulated(backend: str, arrays: str) -> bool:
    """Whether a backend made for other hardware would run in its simulator here: right, and slow."""
    return (backend == "triton" and arrays == "torch cpu") or (backend == "pallas" and arrays != "jax tpu")


def timed(call: Callable[[], Any], repeat: int) -> tuple[Any, float, float]:
    """The result of ``call``, the median time of ``repeat`` calls after the first, and the time of the first."""
    start = time.perf_counter()
    result = call()
    first = time.perf_counter() - start
    later = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        later.append(time.perf_counter() - start)
    return result, statistics.median(later), first


def compare_backends(
    plan: BlockSparsePlan, q: FloatArray, k: FloatArray, v: FloatArray, repeat: int, interpret: bool = False
) -> tuple[Yardstick, list[Outcome]]:
    """Run ``plan`` on the reference and on every backend that can, timing each.

    Args:
        q, k, v: ``(1, H, N, D)`` float32.
        repeat: Timed calls per backend, after a first one that is reported apart.
        interpret: Also run backends that are only simulated here.

    Returns:
        The yardstick, and one outcome per backend and array type.
    """
    from canvas_engineering.attention.api import BACKENDS, available_backends, backend_reasons

    yardstick = measure_yardstick(plan, q, k, v)
    outcomes = [Outcome("reference", "numpy", "reference", yardstick.compared, seconds=yardstick.seconds)]
    jobs: list[Candidate] = []
    available = available_backends()
    for name in BACKENDS:
        availability = available[name]
        if name == "reference":
            continue
        if not availability.ok:
            outcomes.append(Outcome(name, "-", "skipped", availability.reason))
            continue
        for job in candidates(plan, q, k, v, name):
            if simulated(name, job.arrays) and not interpret:
                outcomes.append(Outcome(name, job.arrays, "skipped", "only simulated here; --interpret runs it"))
                continue
            reasons = backend_reasons(name, *job.operands, plan)
            if reasons:
                outcomes.append(Outcome(name, job.arrays, "skipped", "; ".join(reasons)))
            else:
                jobs.append(job)
    for job in progress(jobs, "backends"):
        result, median, first = timed(job.call, repeat)
        error = max_and_rms(job.to_numpy(result)[:, :, yardstick.rows] - yardstick.output)
        outcomes.append(judge(job.backend, job.arrays, error, (first, median), yardstick.tolerance))
    return yardstick, outcomes
