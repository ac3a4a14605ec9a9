"""No time without a right answer: every variant is compared with the float64 reference before it is timed.

The allowed error is not a constant. The same case is computed once more in the dtype under test, written plainly
in torch, and its error against float64 is measured; a variant may be a small factor worse, because it sums in
another order. On large canvases the reference computes the rows of evenly spread q tiles. The cotangent is zero
in all other rows, so that gradients of keys, values and parameters are complete and comparable all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.variant import Arrays
from canvas_engineering.cli.compare import MAX_ERROR_FACTOR, RMS_ERROR_FACTOR
from canvas_engineering.dispatch import AttentionDispatcher
from canvas_engineering.kernels.reference.attention import attention_backward, attention_forward
from canvas_engineering.plan import BlockSparsePlan
from canvas_engineering.routing import torch_run

#: (query, key) pairs times heads that the reference computes, and what one softmax set of a tile counts for: about
#: a second, forward and backward.
BUDGET = 6_000_000
SET_COST = 20_000


@dataclass(frozen=True)
class Allowed:
    """Largest and root-mean-square error of one array."""

    largest: float
    rms: float


@dataclass(frozen=True)
class Verdict:
    """What the comparison says.

    Attributes:
        reason: Why the result is wrong; empty when it is right.
        error: Largest error of the output.
        allowed: What was allowed there.
    """

    reason: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Expected:
    """The reference's answer.

    Attributes:
        rows: Tokens whose output was computed.
        cotangent: ``(..., N, ...)`` zero in all other rows; None when no gradients are compared.
        arrays: ``out`` at ``rows`` only, gradients whole; float64.
        allowed: By array.
        tokens_axis: Axis of ``out`` that ``rows`` index.
    """

    rows: NDArray[np.int64]
    cotangent: NDArray[Any] | None
    arrays: Arrays
    allowed: dict[str, Allowed]
    tokens_axis: int

    def judge(self, actual: Mapping[str, NDArray[Any]], *, gradients: bool) -> Verdict:
        """Compare every array, or only the output; what is missing or NaN is wrong."""
        problems = []
        error = float("nan")
        for name, wanted in self.arrays.items():
            if name != "out" and not gradients:
                continue
            if name not in actual:
                problems.append(f"{name} is missing")
                continue
            got = np.asarray(actual[name], np.float64)
            if name == "out":
                got = got.take(self.rows, axis=self.tokens_axis)
            if got.shape != wanted.shape:
                problems.append(f"{name} has shape {got.shape}, expected {wanted.shape}")
                continue
            largest, rms = _errors(got, wanted)
            if name == "out":
                error = largest
            # `not <=` rather than `>`, so that NaN fails
            if not largest <= self.allowed[name].largest:
                problems.append(f"{name}: max error {largest:.2e}, at most {self.allowed[name].largest:.2e}")
            elif not rms <= self.allowed[name].rms:
                problems.append(f"{name}: RMS error {rms:.2e}, at most {self.allowed[name].rms:.2e}")
        return Verdict("; ".join(problems), error, self.allowed["out"].largest)


def _errors(got: NDArray[np.float64], wanted: NDArray[np.float64]) -> tuple[float, float]:
    difference = got - wanted
    if difference.size == 0:
        return 0.0, 0.0
    return float(np.abs(difference).max()), float(np.sqrt(np.mean(np.square(difference))))


def _allowed(plain: Arrays, exact: Arrays, eps: float) -> dict[str, Allowed]:
    """What the dtype costs, array by array.

    The error of a plain computation may happen to be tiny, above all that of a single number such as a gate's
    gradient; so no array is held to less than the typical relative error of all of them.
    """
    errors = {name: _errors(plain[name], wanted) for name, wanted in exact.items()}
    sizes = {name: _errors(wanted, np.zeros_like(wanted)) for name, wanted in exact.items()}
    typical = float(np.median([errors[name][1] / sizes[name][1] for name in exact if sizes[name][1] > 0] or [0.0]))
    return {
        name: Allowed(
            MAX_ERROR_FACTOR * max(errors[name][0], typical * largest) + eps * largest,
            RMS_ERROR_FACTOR * max(errors[name][1], typical * rms) + eps * largest,
        )
        for name, (largest, rms) in sizes.items()
    }


# -- attention ----------------------------------------------------------------------------------------------


def sampled_tiles(plan: BlockSparsePlan, heads: int, budget: int = BUDGET) -> list[int]:
    """Evenly spread q tiles whose visited pairs fit the budget; at least one, all if they fit."""
    cost = plan.num_entries * plan.block_q * plan.block_kv * heads + plan.num_sets * SET_COST
    count = max(1, min(plan.num_q_tiles, int(plan.num_q_tiles * budget / max(cost, 1))))
    return [int(tile) for tile in np.unique(np.linspace(0, plan.num_q_tiles - 1, count).round())]


def tokens_of(plan: BlockSparsePlan, tiles: list[int]) -> NDArray[np.int64]:
    """Query tokens of some q tiles."""
    return np.concatenate([plan.q_tokens[tile][: plan.q_count[tile]] for tile in tiles]).astype(np.int64)


def expect_attention(plan: BlockSparsePlan, q: Tensor, k: Tensor, v: Tensor, *, gradients: bool = True) -> Expected:
    """The reference's answer to ``block_sparse_attention(q, k, v, plan)``, operands ``(B, H, N, D)``."""
    tiles = sampled_tiles(plan, q.shape[0] * q.shape[1])
    rows = tokens_of(plan, tiles)
    arrays = (_array(q), _array(k), _array(v), plan)
    out, _ = attention_forward(*arrays, tiles=tiles)
    exact = {"out": out[:, :, rows]}
    cotangent = None
    if gradients:
        cotangent = cotangent_at(rows, q.shape, 2, q.dtype)
        found = attention_backward(*arrays, cotangent, tiles=tiles)
        exact |= {"dq": found.q, "dk": found.k, "dv": found.v}
    q, k, v = (x.detach().cpu().requires_grad_(gradients) for x in (q, k, v))
    out_plain = plain_attention(q, k, v, plan, tiles=tiles, scale=q.shape[-1] ** -0.5)
    plain = {"out": _array(out_plain)[:, :, rows]}
    if cotangent is not None:
        grads = torch.autograd.grad(out_plain, [q, k, v], torch.from_numpy(cotangent).to(q.dtype))
        plain |= {name: _array(grad) for name, grad in zip(("dq", "dk", "dv"), grads, strict=True)}
    return Expected(rows, cotangent, exact, _allowed(plain, exact, torch.finfo(q.dtype).eps), 2)


def cotangent_at(rows: NDArray[np.int64], shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> NDArray[np.float64]:
    """Normal numbers that ``dtype`` holds in some rows, zero elsewhere."""
    moved = np.zeros((shape[axis], *shape[:axis], *shape[axis + 1 :]))
    moved[rows] = np.random.default_rng(1).standard_normal((rows.size, *moved.shape[1:]))
    return _array(torch.from_numpy(np.ascontiguousarray(np.moveaxis(moved, 0, axis))).to(dtype))


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockSparsePlan, *, tiles: list[int], scale: float, weight: Any = None
) -> Tensor:
    """The decode loop of a plan for some q tiles in torch, every operation in the operands' dtype."""
    weight = torch.from_numpy(plan.row_weight) if weight is None else weight
    all_rows, pieces = [], []
    for tile in tiles:
        rows = torch.from_numpy(plan.q_tokens[tile][: plan.q_count[tile]].astype(np.int64))
        out = torch.zeros_like(q[:, :, rows])
        for s in range(plan.set_ptr[tile], plan.set_ptr[tile + 1]):
            entries = slice(plan.entry_ptr[s], plan.entry_ptr[s + 1])
            tokens = plan.kv_tokens[plan.entry_kv[entries]].ravel()
            if tokens.size == 0:
                continue
            masks = np.concatenate([plan.tile_mask(mask) for mask in plan.entry_mask[entries]], axis=1)
            keys = torch.from_numpy(tokens[tokens >= 0].astype(np.int64))
            allowed = torch.from_numpy(masks[: rows.numel(), tokens >= 0])
            has_key = allowed.any(-1, keepdim=True)
            scores = (q[:, :, rows] @ k[:, :, keys].transpose(-1, -2)) * scale
            prob = scores.masked_fill(~allowed & has_key, -torch.inf).softmax(-1) * has_key
            out = out + weight[s, : rows.numel(), None].to(q.dtype) * (prob @ v[:, :, keys])
        all_rows.append(rows)
        pieces.append(out)
    return torch.zeros_like(q).index_copy(2, torch.cat(all_rows), torch.cat(pieces, dim=2))


class _ReferenceTiles(torch.autograd.Function):
    """The NumPy reference on some q tiles, differentiable; rows of other tiles are 0."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, call: tuple[Any, ...]) -> Tensor:
        plan, tiles, scale = call
        ctx.save_for_backward(q, k, v, weight)
        ctx.call = call
        arrays = (_array(q), _array(k), _array(v), plan)
        out, _ = attention_forward(*arrays, scale=scale, row_weight=_array(weight), tiles=tiles)
        return torch.from_numpy(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, tiles, scale = ctx.call
        q, k, v, weight = (_array(x) for x in ctx.saved_tensors)
        found = attention_backward(q, k, v, plan, _array(grad), scale=scale, row_weight=weight, tiles=tiles)
        return (*(torch.from_numpy(array) for array in found), None)


# -- dispatcher ---------------------------------------------------------------------------------------------


def expect_dispatcher(dispatcher: AttentionDispatcher, x: Tensor, *, gradients: bool = True) -> Expected:
    """The reference's answer to ``dispatcher(x)``, ``x (B, N, d)``, with gradients of x and of all parameters.

    The dispatcher runs in float64 with its kernel calls taken by the reference, and once more in x's dtype with
    them taken by :func:`plain_attention`.
    """
    heads = x.shape[0] * dispatcher.n_heads

    def run(dtype: torch.dtype, attention: Callable[..., Tensor], cotangent: NDArray[Any] | None) -> Arrays:
        copy = AttentionDispatcher(
            dispatcher.topology, dispatcher.layout, dispatcher.d_model, n_heads=dispatcher.n_heads
        ).to(dtype)
        copy.load_state_dict({name: value.cpu() for name, value in dispatcher.state_dict().items()})
        leaf = x.detach().cpu().to(dtype).requires_grad_(cotangent is not None)
        with mock.patch.object(torch_run, "block_sparse_attention", attention):
            out = copy(leaf)
        if cotangent is None:
            return {"out": _array(out)}
        return {"out": _array(out)} | named_gradients(copy, leaf, out, torch.from_numpy(cotangent).to(dtype))

    def tiles_of(plan: BlockSparsePlan) -> list[int]:
        return sampled_tiles(plan, heads)

    def poisoned(q: Tensor, k: Tensor, v: Tensor, plan: BlockSparsePlan, **_: Any) -> Tensor:
        out = torch.full_like(q, torch.nan)
        out[:, :, tokens_of(plan, tiles_of(plan))] = 0
        return out

    def reference(q: Tensor, k: Tensor, v: Tensor, plan: BlockSparsePlan, **options: Any) -> Tensor:
        weight = torch.from_numpy(plan.row_weight) if options["row_weight"] is None else options["row_weight"]
        out: Tensor = _ReferenceTiles.apply(q, k, v, weight, (plan, tiles_of(plan), options["scale"]))
        return out

    def plain(q: Tensor, k: Tensor, v: Tensor, plan: BlockSparsePlan, **options: Any) -> Tensor:
        return plain_attention(
            q, k, v, plan, tiles=tiles_of(plan), scale=options["scale"], weight=options["row_weight"]
        )

    with torch.no_grad():
        known = run(x.dtype, poisoned, None)["out"]
    rows = np.flatnonzero(np.isfinite(known).all(axis=(0, 2))).astype(np.int64)
    cotangent = cotangent_at(rows, tuple(x.shape), 1, x.dtype) if gradients else None
    exact, rounded = run(torch.float64, reference, cotangent), run(x.dtype, plain, cotangent)
    for arrays in (exact, rounded):
        arrays["out"] = arrays["out"][:, rows]
    return Expected(rows, cotangent, exact, _allowed(rounded, exact, torch.finfo(x.dtype).eps), 1)


def named_gradients(module: torch.nn.Module, x: Tensor, out: Tensor, cotangent: Tensor) -> Arrays:
    """Gradients of x (``dx``) and of every parameter (``d`` and its name)."""
    named = {"x": x} | dict(module.named_parameters())
    grads = torch.autograd.grad(out, list(named.values()), cotangent)
    return {f"d{name}": _array(grad) for name, grad in zip(named, grads, strict=True)}


def _array(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().double().cpu().numpy()
