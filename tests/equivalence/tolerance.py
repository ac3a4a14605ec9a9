"""How far a backend may be from the float64 reference: as far as a plain dense computation in its own dtype.

The dense computation of the same case runs in torch, in the dtype under test, with every product and softmax
rounded to that dtype. Its maximal and root-mean-square errors against float64 are what the dtype costs; a
backend gets a small factor over them for its different order of summation, and one rounding error of the
terms that a result is the sum of, because a dense result may happen to be exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from canvas_engineering.kernels.reference.attention import attention_backward, attention_forward
from canvas_engineering.kernels.reference.dropout import keep_mask
from canvas_engineering.plan import BlockSparsePlan
from equivalence.cases import Inputs

#: One rounding error more or less moves a maximum more than it moves an average.
MAX_FACTOR = 4.0
RMS_FACTOR = 2.0

Arrays = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Options:
    """The keyword arguments of a call, and what is compared."""

    activation: str = "softmax"
    dropout_p: float = 0.0
    seed: int | None = None
    scale: float | None = None
    lse: bool = False  # ask for the log-sum-exp, and differentiate through it
    override_weight: bool = False  # pass row_weight, and differentiate with respect to it

    def __str__(self) -> str:
        words = [
            self.activation if self.activation != "softmax" else "",
            "dropout" if self.dropout_p else "",
            "scale" if self.scale is not None else "",
            "lse" if self.lse else "",
            "weight" if self.override_weight else "",
        ]
        return "-".join(word for word in words if word) or "plain"


def torch_dtype(dtype: str) -> torch.dtype:
    result = getattr(torch, dtype)
    if not isinstance(result, torch.dtype):
        raise TypeError(f"no dtype {dtype!r}")
    return result


def round_inputs(inputs: Inputs, dtype: str) -> Inputs:
    """Operands and cotangents that ``dtype`` can hold, still as float64: every computation starts from these."""

    def rounded(array: NDArray[np.float64], to: torch.dtype) -> NDArray[np.float64]:
        return torch.from_numpy(array).to(to).double().numpy()

    to = torch_dtype(dtype)
    accumulate = torch.float64 if to == torch.float64 else torch.float32
    return Inputs(
        q=rounded(inputs.q, to),
        k=rounded(inputs.k, to),
        v=rounded(inputs.v, to),
        row_weight=inputs.row_weight,
        grad_out=rounded(inputs.grad_out, to),
        grad_lse=rounded(inputs.grad_lse, accumulate),
    )


def expected(plan: BlockSparsePlan, inputs: Inputs, options: Options) -> Arrays:
    """The float64 reference: ``out``, ``dq``, ``dk``, ``dv`` and, where asked for, ``lse``, ``drow_weight``."""
    row_weight = inputs.row_weight if options.override_weight else None
    keywords = {
        "scale": options.scale,
        "row_weight": row_weight,
        "activation": options.activation,
        "dropout_p": options.dropout_p,
        "seed": options.seed,
    }
    out, lse = attention_forward(inputs.q, inputs.k, inputs.v, plan, **keywords)  # type: ignore[arg-type]
    grads = attention_backward(
        inputs.q,
        inputs.k,
        inputs.v,
        plan,
        inputs.grad_out,
        inputs.grad_lse if options.lse else None,
        **keywords,  # type: ignore[arg-type]
    )
    result = {"out": out, "dq": grads.q, "dk": grads.k, "dv": grads.v}
    if options.lse:
        result["lse"] = lse
    if options.override_weight:
        result["drow_weight"] = grads.row_weight
    return result


def dense(plan: BlockSparsePlan, inputs: Inputs, options: Options, dtype: str) -> Arrays:
    """The same results from dense masks and torch's autograd, rounding to ``dtype`` after every operation."""
    to = torch_dtype(dtype)
    accumulate = torch.float64 if to == torch.float64 else torch.float32

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


def magnitude(plan: BlockSparsePlan, inputs: Inputs, options: Options) -> Arrays:
    """Sums of absolute values of the terms of every result: what one rounding error is measured by.

    Where terms cancel (the score gradient ``p (dp - sum(p dp))`` of a row with one key is 0), a dense computation
    may happen to be exact, while one that forms the same sum in another way is off by a rounding of the terms.
    """
    q, k, v, grad_out, grad_lse = (
        torch.from_numpy(x) for x in (inputs.q, inputs.k, inputs.v, inputs.grad_out, inputs.grad_lse)
    )
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
        one, grad = (prob * keep) @ v_heads.abs(), (weight[:, None] * grad_out).abs()
        terms = prob * ((grad @ v_heads.abs().transpose(-1, -2)) * keep + grad_lse.abs()[..., None] * options.lse)
        out += weight.abs()[:, None] * one
        lse += (prob * score_terms).sum(-1)
        dq += abs(scale) * (terms @ k_heads.abs())
        dk += abs(scale) * (terms.transpose(-1, -2) @ q.abs())
        dv += (prob * keep).transpose(-1, -2) @ grad
        dweight[slot] = (grad_out.abs() * one).sum((0, 1, 3))
    (slot_of, token), (s, column) = _slots(plan)
    row_terms = np.zeros(plan.row_weight.shape)
    row_terms[s, column] = dweight.numpy()[slot_of, token]
    dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
    arrays = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return {"drow_weight": row_terms, **{name: x.numpy() for name, x in arrays.items()}}


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


def assert_close(actual: Arrays, plan: BlockSparsePlan, inputs: Inputs, options: Options, dtype: str) -> None:
    """Compare every result of ``actual`` with the reference; a failure names array, errors and coordinates.

    ``inputs`` are those that the backend computed with: already passed through :func:`round_inputs`.
    """
    want = expected(plan, inputs, options)
    plain = dense(plan, inputs, options, dtype)
    terms = magnitude(plan, inputs, options)
    masks = plan.to_dense()[0]
    unread = {"out": ~masks.any((0, 2)), "dq": ~masks.any((0, 2)), "dk": ~masks.any((0, 1)), "dv": ~masks.any((0, 1))}
    assert actual.keys() == want.keys(), f"results {sorted(actual)} where {sorted(want)} are compared"
    problems = []
    for name, right in want.items():
        if name in unread and actual[name].shape == right.shape and actual[name][:, :, unread[name]].any():
            problems.append(f"{name}: tokens that take no part must be exactly 0")
        wide = name in ("lse", "drow_weight") and dtype != "float64"
        eps = float(torch.finfo(torch.float32 if wide else torch_dtype(dtype)).eps)
        problems += compare(
            name, actual[name], right, plain[name], terms[name] + np.abs(np.where(np.isinf(right), 0, right)), eps
        )
    assert not problems, "\n".join([f"{dtype} {options} {plan!r}", *problems])


def compare(
    name: str,
    actual: NDArray[np.float64],
    right: NDArray[np.float64],
    plain: NDArray[np.float64],
    terms: NDArray[np.float64],
    eps: float,
) -> list[str]:
    """What is wrong with ``actual``, in words; nothing if it is within the tolerance that ``plain`` sets."""
    if actual.shape != right.shape:
        return [f"{name}: shape {actual.shape}, expected {right.shape}"]
    if right.size == 0:
        return []
    infinite = np.isinf(right)
    if not np.array_equal(actual[infinite], right[infinite]):
        return [f"{name}: {int((actual[infinite] != right[infinite]).sum())} rows without keys are not -inf"]
    actual, right, plain, terms = (np.where(infinite, 0.0, array) for array in (actual, right, plain, terms))
    problems = []
    error, cost = np.abs(actual - right), np.abs(plain - right)
    max_allowed = MAX_FACTOR * cost.max() + eps * np.abs(terms).max()
    rms_allowed = RMS_FACTOR * _rms(cost) + eps * _rms(terms)
    # `not <=` rather than `>`, so that NaN fails
    if not error.max() <= max_allowed:
        problems.append(f"{name}: max error {error.max():.3g}, at most {max_allowed:.3g}, {_worst(error)}")
    if not _rms(error) <= rms_allowed:
        problems.append(f"{name}: RMS error {_rms(error):.3g}, at most {rms_allowed:.3g}, {_worst(error)}")
    return problems


def _rms(array: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(array))))


def _worst(error: NDArray[np.float64]) -> str:
    """Coordinates of the largest errors, NaN first."""
    flat = np.where(np.isnan(error), np.inf, np.abs(error)).ravel()
    worst = np.argsort(-flat, kind="stable")[:3]
    places = (tuple(int(i) for i in np.unravel_index(index, error.shape)) for index in worst)
    return "worst at " + ", ".join(f"{place}: {error[place]:.3g}" for place in places)
