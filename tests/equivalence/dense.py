"""Dense attention in plain torch operations, in any dtype: what a dtype costs, and what one rounding amounts to."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from canvas_engineering.kernels.reference.dropout import keep_mask
from canvas_engineering.plan import BlockSparsePlan
from equivalence.cases import Arrays, Inputs, Options


def torch_dtype(dtype: str) -> torch.dtype:
    result = getattr(torch, dtype)
    if not isinstance(result, torch.dtype):
        raise TypeError(f"no dtype {dtype!r}")
    return result


def wide_dtype(dtype: str) -> torch.dtype:
    """The dtype of log-sum-exps and of sums: float32, but float64 for float64."""
    return torch.float64 if dtype == "float64" else torch.float32


def dense(plan: BlockSparsePlan, inputs: Inputs, options: Options, dtype: str) -> Arrays:
    """The same results from dense masks and torch's autograd, rounding to ``dtype`` after every operation."""
    to, accumulate = torch_dtype(dtype), wide_dtype(dtype)

    def leaf(array: NDArray[np.float64], kind: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(array).to(kind).requires_grad_()

    q, k, v = leaf(inputs.q, to), leaf(inputs.k, to), leaf(inputs.v, to)
    row_weight = leaf(_row_weight(plan, inputs, options), accumulate)
    masks, weights = _dense_plan(plan, row_weight)
    scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
    k_heads, v_heads = _for_every_head(q, k), _for_every_head(q, v)
    scores = (q @ k_heads.transpose(-1, -2)) * scale
    keep = _keep(plan, q, options)

    out = q.to(accumulate) * 0  # a function of q even where the plan is empty
    for mask, weight in zip(masks, weights, strict=True):
        prob = _probabilities(scores, mask, options)
        out = out + weight[:, None] * ((prob * keep) @ v_heads).to(accumulate)
    out = out.to(to)

    outputs, cotangents = [out], [torch.from_numpy(inputs.grad_out).to(to)]
    if options.lse:
        # Log-sum-exps are float32 in every backend, also for half precision, so the scores are as well.
        full = (q.to(accumulate) @ k_heads.to(accumulate).transpose(-1, -2)) * scale
        mask = masks.any(0)
        lse = full.masked_fill(~mask & mask.any(-1, keepdim=True), -torch.inf).logsumexp(-1)
        lse = torch.where(mask.any(-1), lse, -torch.inf)
        outputs.append(lse)
        cotangents.append(torch.from_numpy(inputs.grad_lse).to(accumulate))
    grads = torch.autograd.grad(outputs, [q, k, v, row_weight], cotangents, allow_unused=True)

    def array(tensor: torch.Tensor | None, like: torch.Tensor) -> NDArray[np.float64]:
        return (torch.zeros_like(like) if tensor is None else tensor).detach().double().numpy()

    result = {"out": array(out, q)}
    result |= {f"d{name}": array(grad, x) for name, grad, x in zip("qkv", grads, (q, k, v), strict=False)}
    if options.lse:
        result["lse"] = array(lse, lse)
    if options.override_weight:
        result["drow_weight"] = array(grads[3], row_weight)
    return result


def rounding(plan: BlockSparsePlan, inputs: Inputs, options: Options, dtype: str) -> Arrays:
    """One rounding error of every result: the unit roundoff times the sum of the absolute values of its terms.

    Where terms cancel (the score gradient ``p (dp - sum(p dp))`` of a row with one key is 0), a dense computation
    may happen to be exact, while one that forms the same sum in another way is off by a rounding of the terms.
    A backward pass recomputes probabilities as ``exp(score - lse)``; the roundings of the log-sum-exp and of the
    score, whose products it may add in another order than the forward pass did, are relative errors of the
    probability. Both are held in float32 or wider.
    """
    q, k, v, grad_out, grad_lse = (
        torch.from_numpy(x) for x in (inputs.q, inputs.k, inputs.v, inputs.grad_out, inputs.grad_lse)
    )
    eps = torch.finfo(torch_dtype(dtype)).eps
    eps_wide = torch.finfo(wide_dtype(dtype)).eps
    masks, weights = _dense_plan(plan, torch.from_numpy(_row_weight(plan, inputs, options)))
    scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
    k_heads, v_heads = _for_every_head(q, k), _for_every_head(q, v)
    scores, keep = (q @ k_heads.transpose(-1, -2)) * scale, _keep(plan, q, options)
    score_terms = abs(scale) * (q.abs() @ k_heads.abs().transpose(-1, -2))
    out, dq = torch.zeros_like(q), torch.zeros_like(q)
    dk, dv = torch.zeros_like(k_heads), torch.zeros_like(v_heads)
    lse, dweight = torch.zeros(q.shape[:-1]).double(), torch.zeros_like(weights)
    for slot, (mask, weight) in enumerate(zip(masks, weights, strict=True)):
        prob = _probabilities(scores, mask, options)
        lse_one = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
        lse_one = torch.where(mask.any(-1), lse_one, 0.0).abs()
        one, grad = (prob * keep) @ v_heads.abs(), (weight[:, None] * grad_out).abs()
        out += eps * weight.abs()[:, None] * one
        dweight[slot] = eps_wide * (grad_out.abs() * one).sum((0, 1, 3))
        lse += eps_wide * (lse_one + (prob * score_terms).sum(-1))
        prob = prob * (eps + eps_wide * (lse_one[..., None] + score_terms))
        terms = prob * ((grad @ v_heads.abs().transpose(-1, -2)) * keep + grad_lse.abs()[..., None] * options.lse)
        dq += abs(scale) * (terms @ k_heads.abs())
        dk += abs(scale) * (terms.transpose(-1, -2) @ q.abs())
        dv += (prob * keep).transpose(-1, -2) @ grad
    (slot_of, token), (s, column) = _slots(plan)
    of_rows = np.zeros(plan.row_weight.shape)
    of_rows[s, column] = dweight.numpy()[slot_of, token]
    dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
    arrays = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return {"drow_weight": of_rows, **{name: x.numpy() for name, x in arrays.items()}}


def _slots(plan: BlockSparsePlan) -> tuple[tuple[NDArray[np.intp], ...], tuple[NDArray[np.intp], ...]]:
    """Indices of all rows in dense weights ``(S, Nq)`` and, in the same order, in ``row_weight``."""
    tokens = plan.q_tokens[plan.set_tile]
    s, column = np.nonzero(tokens >= 0)
    slot = s - plan.set_ptr[plan.set_tile[s]]
    return (slot.astype(np.intp), tokens[s, column].astype(np.intp)), (s, column)


def _row_weight(plan: BlockSparsePlan, inputs: Inputs, options: Options) -> NDArray[np.float64]:
    return inputs.row_weight if options.override_weight else plan.row_weight.astype(np.float64)


def _for_every_head(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], 1)


def _probabilities(scores: torch.Tensor, mask: torch.Tensor, options: Options) -> torch.Tensor:
    if options.activation == "sigmoid":
        return scores.sigmoid() * mask
    # A row without keys is left unmasked and multiplied by 0, because a softmax of nothing is NaN.
    return scores.masked_fill(~mask & mask.any(-1, keepdim=True), -torch.inf).softmax(-1) * mask


def _keep(plan: BlockSparsePlan, q: torch.Tensor, options: Options) -> torch.Tensor:
    """The scaled dropout mask ``(B, Hq, Nq, Nkv)``, or 1."""
    if not options.dropout_p:
        return torch.ones((), dtype=q.dtype)
    bh = np.arange(q.shape[0] * q.shape[1]).reshape(*q.shape[:2], 1, 1)
    rows, keys = np.arange(plan.num_q)[:, None], np.arange(plan.num_kv)
    kept = keep_mask(options.seed or 0, options.dropout_p, bh, rows, keys)
    return torch.from_numpy(kept).to(q.dtype) / (1 - options.dropout_p)


def _dense_plan(plan: BlockSparsePlan, row_weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks ``(S, Nq, Nkv)`` and, differentiably, the weights ``(S, Nq)`` that ``row_weight`` means."""
    masks = torch.from_numpy(plan.to_dense()[0])
    dense_at, plan_at = (tuple(map(torch.from_numpy, where)) for where in _slots(plan))
    weights = torch.zeros(masks.shape[:2], dtype=row_weight.dtype)
    return masks, weights.index_put(dense_at, row_weight[plan_at])
