"""This package: ``block_sparse_attention`` on a plan, and ``AttentionDispatcher``."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from bench.canvases import Declared
from bench.roofline import Phase
from bench.variant import TorchVariant
from canvas_engineering.attention.api import block_sparse_attention, choose_backend
from canvas_engineering.dispatch import AttentionDispatcher
from canvas_engineering.plan import BlockSparsePlan
from canvas_engineering.plan.plan import Softmax

OURS = "canvas-engineering"
#: The fallback of a GPU, beside the Triton kernels that ``auto`` takes there.
OURS_PORTABLE = f"{OURS}, portable"


def build_plan(declared: Declared, softmax: Softmax) -> tuple[BlockSparsePlan, float]:
    """The plan, and the seconds that compiling it took."""
    start = time.perf_counter()
    plan = BlockSparsePlan.from_topology(declared.topology, declared.layout, softmax=softmax)
    return plan, time.perf_counter() - start


def attention(
    plan: BlockSparsePlan,
    leaves: dict[str, Tensor],
    grad_out: Tensor,
    phase: Phase,
    device: str,
    plan_seconds: float,
    backend: str = "auto",
) -> TorchVariant:
    """``block_sparse_attention`` on the backend that ``auto`` chooses, or on another one beside it."""
    variant = TorchVariant(
        OURS if backend == "auto" else f"{OURS}, {backend}",
        lambda q, k, v: block_sparse_attention(q, k, v, plan, backend=backend),
        leaves,
        grad_out,
        phase,
        device,
        {"plan": plan_seconds},
    )
    variant.setup["first call"] = variant.sample()
    return variant


def backend_name(plan: BlockSparsePlan, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The backend that ``auto`` takes for these operands, and why not another."""
    return str(choose_backend(q, k, v, plan))


class Dispatcher(TorchVariant):
    """``AttentionDispatcher``, gradients with respect to the canvas and all parameters."""

    def __init__(self, module: AttentionDispatcher, x: Tensor, grad_out: Tensor, phase: Phase, device: str) -> None:
        named: dict[str, Any] = {"x": x} | {name: value.data for name, value in module.named_parameters()}
        super().__init__(OURS, self._apply, named, grad_out, phase, device)
        # The leaves are the module's own parameters from here on.
        self._module = module
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(phase != "forward")
            self._leaves[name] = parameter

    def _apply(self, x: Tensor, *parameters: Tensor) -> Tensor:
        out: Tensor = self._module(x)
        return out


def build_dispatcher(declared: Declared, heads: int, device: str) -> tuple[AttentionDispatcher, float]:
    """The module with seeded parameters, and the seconds that building it took."""
    torch.manual_seed(0)
    start = time.perf_counter()
    module = AttentionDispatcher(declared.topology, declared.layout, declared.layout.d_model, n_heads=heads)
    return module.to(device), time.perf_counter() - start
