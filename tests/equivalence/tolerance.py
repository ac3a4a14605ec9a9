"""How far a backend may be from the float64 reference: as far as a plain dense computation in its own dtype.

The dense computation of the same case runs in torch, in the dtype under test, with every product and softmax
rounded to that dtype. Its maximal and root-mean-square errors against float64 are what the dtype costs; a
backend gets a small factor over them for its different order of summation, and one rounding error of the
terms that a result is the sum of, because a dense result may happen to be exact.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from canvas_engineering.kernels.reference.attention import attention_backward, attention_forward
from canvas_engineering.plan import BlockSparsePlan
from equivalence.cases import Arrays, Inputs, Options
from equivalence.dense import dense, rounding, torch_dtype, wide_dtype

__all__ = ["Arrays", "Options", "assert_close", "compare", "expected", "round_inputs", "torch_dtype", "wide_dtype"]

#: One rounding error more or less moves a maximum more than it moves an average.
MAX_FACTOR = 4.0
RMS_FACTOR = 2.0


def round_inputs(inputs: Inputs, dtype: str) -> Inputs:
    """Operands and cotangents that ``dtype`` can hold, still as float64: every computation starts from these."""

    def rounded(array: NDArray[np.float64], to: torch.dtype) -> NDArray[np.float64]:
        return torch.from_numpy(array).to(to).double().numpy()

    to, accumulate = torch_dtype(dtype), wide_dtype(dtype)
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


def assert_close(actual: Arrays, plan: BlockSparsePlan, inputs: Inputs, options: Options, dtype: str) -> None:
    """Compare every result of ``actual`` with the reference; a failure names array, errors and coordinates.

    ``inputs`` are those that the backend computed with: already passed through :func:`round_inputs`.
    """
    want = expected(plan, inputs, options)
    plain = dense(plan, inputs, options, dtype)
    one_rounding = rounding(plan, inputs, options, dtype)
    masks = plan.to_dense()[0]
    unread = {"out": ~masks.any((0, 2)), "dq": ~masks.any((0, 2)), "dk": ~masks.any((0, 1)), "dv": ~masks.any((0, 1))}
    assert actual.keys() == want.keys(), f"results {sorted(actual)} where {sorted(want)} are compared"
    problems = []
    for name, right in want.items():
        if name in unread and actual[name].shape == right.shape and actual[name][:, :, unread[name]].any():
            problems.append(f"{name}: tokens that take no part must be exactly 0")
        problems += compare(name, actual[name], right, plain[name], one_rounding[name])
    assert not problems, "\n".join([f"{dtype} {options} {plan!r}", *problems])


def compare(
    name: str,
    actual: NDArray[np.float64],
    right: NDArray[np.float64],
    plain: NDArray[np.float64],
    one_rounding: NDArray[np.float64],
) -> list[str]:
    """What is wrong with ``actual``, in words; nothing if it is within the tolerance that ``plain`` sets."""
    if actual.shape != right.shape:
        return [f"{name}: shape {actual.shape}, expected {right.shape}"]
    if right.size == 0:
        return []
    infinite = np.isinf(right)
    if not np.array_equal(actual[infinite], right[infinite]):
        return [f"{name}: {int((actual[infinite] != right[infinite]).sum())} rows without keys are not -inf"]
    actual, right, plain = (np.where(infinite, 0.0, array) for array in (actual, right, plain))
    problems = []
    error, cost = np.abs(actual - right), np.abs(plain - right)
    max_allowed = MAX_FACTOR * cost.max() + one_rounding.max()
    rms_allowed = RMS_FACTOR * _rms(cost) + _rms(one_rounding)
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
