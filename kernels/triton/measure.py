"""Measuring candidates on the GPU that is there: each is compared with another backend before it is timed.

How long a launch takes and what is right are parameters, so that the same code runs under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from triton.errors import TritonError

from canvas_engineering.kernels.triton import launch
from canvas_engineering.kernels.triton.config import KernelConfig, Key, Tile
from canvas_engineering.kernels.triton.launch import Options, Plan
from canvas_engineering.kernels.triton.lower import lower_columns, lower_plan
from canvas_engineering.kernels.triton.tune import CandidateError
from canvas_engineering.plan import BlockSparsePlan
from canvas_engineering.plan.bits import pack_masks

#: The problem that is timed: enough programs to fill a large GPU several times, in one head_dim of any size.
TOKENS = 4096
HEADS = 32
#: Heads of it that are compared; in float64 a head takes a gigabyte.
CHECKED_HEADS = 2
#: Softmax sets of a tile where there are several, and how many of the visited tiles have a mask: one in so many.
SETS = 4
MASKED = 4
#: What a kernel writes.
RESULTS = {"forward": ("out",), "backward_q": ("dq",), "backward_kv": ("dk", "dv")}
#: How messages of failed compiler passes begin; other runtime errors are no candidate's fault and end the search.
COMPILER_FAILURES = ("PassManager::run failed", "AMD LLVM")

#: The right results ``out, dq, dk, dv`` of ``(q, k, v, grad_out, plan)``, and the largest error allowed in each.
Expect = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, BlockSparsePlan],
    Mapping[str, tuple[torch.Tensor, float]],
]
#: Median seconds of a call.
Timer = Callable[[Callable[[], None]], float]


def gpu_timer(call: Callable[[], None]) -> float:
    """Median seconds on the GPU, by events, with a cold L2 cache."""
    from triton.testing import do_bench

    milliseconds: float = do_bench(call, warmup=25, rep=100, return_mode="median")
    return milliseconds / 1e3


def tuning_plan(block_q: int, block_kv: int, *, many_sets: bool, tokens: int = TOKENS) -> BlockSparsePlan:
    """A plan in which every q tile reads every key, in one softmax set or several; some tiles are partial."""
    q_tiles, kv_tiles = tokens // block_q, tokens // block_kv
    sets = min(SETS, kv_tiles) if many_sets else 1
    bounds = np.linspace(0, kv_tiles, sets + 1).astype(np.int64)
    entries = np.arange(q_tiles * kv_tiles)
    diagonal = np.arange(block_q)[:, None] * block_kv >= np.arange(block_kv) * block_q
    return BlockSparsePlan(
        num_q=tokens,
        num_kv=tokens,
        block_q=block_q,
        block_kv=block_kv,
        softmax="connection" if many_sets else "joint",
        q_tokens=np.arange(tokens, dtype=np.int32).reshape(q_tiles, block_q),
        kv_tokens=np.arange(tokens, dtype=np.int32).reshape(kv_tiles, block_kv),
        set_ptr=np.arange(0, (q_tiles + 1) * sets, sets, dtype=np.int32),
        entry_ptr=np.append((np.arange(q_tiles)[:, None] * kv_tiles + bounds[:-1]).ravel(), entries.size),
        entry_kv=(entries % kv_tiles).astype(np.int32),
        entry_mask=np.where(entries % MASKED == 0, 0, -1).astype(np.int32),
        masks=pack_masks(diagonal[None]),
        row_weight=np.full((q_tiles * sets, block_q), 1 / sets, np.float32),
        row_connection=np.zeros((q_tiles * sets, block_q), np.int32),
        source="tuning",
    )


@dataclass
class Problem:
    """The operands of the kernels and what they write."""

    plan: Plan
    options: Options
    q: torch.Tensor  # (1, H, N, D), as all of these
    k: torch.Tensor
    v: torch.Tensor
    grad_out: torch.Tensor
    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    lse: torch.Tensor  # float32
    set_out: torch.Tensor | None
    delta: torch.Tensor  # float32, shaped as lse
    shift: torch.Tensor

    @classmethod
    def of(cls, plan: BlockSparsePlan, operands: tuple[torch.Tensor, ...]) -> Problem:
        q, k, v, grad_out = operands
        lowered = lower_plan(plan, q.device)
        arrays = Plan(
            lowered.rows,
            lower_columns(plan, q.device),
            lowered.tokens,
            lowered.masks,
            lowered.row_weight,
            lowered.block_q,
            lowered.block_kv,
            lowered.q_tiles,
            lowered.kv_tiles,
            lowered.contiguous,
            lowered.many_sets,
        )
        rows = tuple(lowered.row_weight.shape) if lowered.many_sets else (q.shape[2],)
        lse = q.new_empty((*q.shape[:2], *rows), dtype=torch.float32)
        return cls(
            plan=arrays,
            options=Options(sigmoid=False, scale=q.shape[3] ** -0.5, dropout_p=0.0, seed=None, precision="ieee"),
            q=q,
            k=k,
            v=v,
            grad_out=grad_out,
            out=torch.empty_like(q),
            dq=torch.empty_like(q),
            dk=torch.empty_like(k),
            dv=torch.empty_like(v),
            lse=lse,
            set_out=q.new_empty((*q.shape[:2], *rows, q.shape[3])) if lowered.many_sets else None,
            delta=torch.empty_like(lse),
            shift=torch.empty_like(lse),
        )

    def run(self, kernel: str, config: KernelConfig | None = None) -> None:
        """One launch, as training does it; in the configuration of the tables by default."""
        operands = (self.q, self.k, self.v)
        backward = (*operands, self.grad_out, self.delta, self.shift, self.plan, self.options)
        match kernel:
            case "forward":
                launch.forward(
                    *operands,
                    self.plan,
                    self.options,
                    out=self.out,
                    lse=self.lse,
                    set_out=self.set_out,
                    skip_dead=True,
                    config=config,
                )
            case "delta":
                launch.delta(
                    self.out if self.set_out is None else self.set_out,
                    self.grad_out,
                    self.lse,
                    None,
                    self.plan,
                    self.options,
                    per_set=self.set_out is not None,
                    delta=self.delta,
                    shift=self.shift,
                    grad_weight=None,
                )
            case "backward_q":
                launch.backward_q(*backward, grad_lse=False, grad_q=self.dq, config=config)
            case "backward_kv":
                launch.backward_kv(*backward, grad_k=self.dk, grad_v=self.dv, config=config)

    def prepare(self, kernel: str) -> None:
        """Compute what a kernel reads."""
        if kernel != "forward":
            self.run("forward")
            self.run("delta")

    def run_all(self) -> None:
        """Forward and backward pass."""
        for kernel in ("forward", "delta", "backward_q", "backward_kv"):
            self.run(kernel)


class GpuMeasure:
    """Measures on one device; see ``tune.Measure``.

    Args:
        device: A GPU (or the CPU, under the interpreter).
        expect: What is right; see ``Expect``.
        timer: How long a call takes.
        tokens, heads: Size of the problem.
    """

    def __init__(
        self,
        device: torch.device,
        expect: Expect,
        timer: Timer = gpu_timer,
        *,
        tokens: int = TOKENS,
        heads: int = HEADS,
    ) -> None:
        self.device, self.expect, self.timer, self.tokens, self.heads = device, expect, timer, tokens, heads
        # Candidates of one entry come one after the other: its problem is made and its right results found once.
        self._problem = lru_cache(maxsize=1)(self._make_problem)
        self._checked = lru_cache(maxsize=1)(self._make_checked)

    def kernel(self, key: Key, config: KernelConfig) -> float:
        """Median seconds of one launch, after its results were compared.

        Raises:
            CandidateError: It does not compile, does not fit the GPU, or its results are wrong.
        """
        tiles = (128, key.own_block) if key.kernel == "backward_kv" else (key.own_block, 128)
        what = (*tiles, key.sets == "many", key.head_dim, key.dtype, key.kernel)
        problem, expected = self._checked(*what)
        for name in RESULTS[key.kernel]:
            getattr(problem, name).fill_(float("nan"))  # so that what is not written is seen
        with launch.on_device(problem.q):
            self._guarded(lambda: problem.run(key.kernel, config))
            for name in RESULTS[key.kernel]:
                right, allowed = expected[name]
                error = float((getattr(problem, name).double() - right).abs().max())
                if not error <= allowed:  # NaN fails
                    raise CandidateError("wrong results")
            timed = self._problem(*what)
            return self._guarded(lambda: self.timer(lambda: timed.run(key.kernel, config)))

    def tile(self, tile: Tile) -> float:
        """Median seconds of forward and backward pass in a plan of this tile size, in the configurations in use.

        Raises:
            CandidateError: A kernel does not compile or does not fit the GPU.
        """
        launch.forget_configs()  # entries were written since
        problem = self._problem(tile.block_q, tile.block_kv, False, tile.head_dim, tile.dtype, "forward")
        with launch.on_device(problem.q):
            return self._guarded(lambda: self.timer(problem.run_all))

    def _operands(self, head_dim: int, dtype: str) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (4, 1, self.heads, self.tokens, head_dim)
        return tuple(torch.randn(shape, generator=generator, device=self.device).to(getattr(torch, dtype)).unbind())

    def _make_problem(
        self, block_q: int, block_kv: int, many_sets: bool, head_dim: int, dtype: str, kernel: str
    ) -> Problem:
        plan = tuning_plan(block_q, block_kv, many_sets=many_sets, tokens=self.tokens)
        problem = Problem.of(plan, self._operands(head_dim, dtype))
        with launch.on_device(problem.q):
            problem.prepare(kernel)
        return problem

    def _make_checked(
        self, block_q: int, block_kv: int, many_sets: bool, head_dim: int, dtype: str, kernel: str
    ) -> tuple[Problem, Mapping[str, tuple[torch.Tensor, float]]]:
        plan = tuning_plan(block_q, block_kv, many_sets=many_sets, tokens=self.tokens)
        operands = tuple(t[:, :CHECKED_HEADS].contiguous() for t in self._operands(head_dim, dtype))
        problem = Problem.of(plan, operands)
        with launch.on_device(problem.q):
            problem.prepare(kernel)
        q, k, v, grad_out = operands
        return problem, self.expect(q, k, v, grad_out, plan)

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """The result of ``call``, with the compiler's refusals as ``CandidateError``."""
        try:
            return call()
        except TritonError as error:
            raise CandidateError(type(error).__name__) from error
        except RuntimeError as error:
            if not str(error).startswith(COMPILER_FAILURES):
                raise
            raise CandidateError("a pass of the compiler failed") from error
