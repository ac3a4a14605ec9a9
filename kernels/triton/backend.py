"""The triton backend: whether it can run here, why it refuses a call, and the call itself."""

from __future__ import annotations

from typing import Any, Literal

import torch

from canvas_engineering._optional import installed
from canvas_engineering.plan import BlockSparsePlan

MINIMUM_TRITON = (3, 6)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256
MINIMUM_CAPABILITY = (8, 0)
Activation = Literal["softmax", "sigmoid"]


@torch.compiler.assume_constant_result
def availability() -> tuple[bool, str]:
    """Whether the backend can run on this machine, and the reason either way."""
    if not installed("triton"):
        return False, "triton is not installed: pip install 'canvas-engineering[triton]' (Linux)"
    import triton

    version = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in triton.__version__.split(".")[:2])
    if version < MINIMUM_TRITON:
        return False, f"triton must be at least {'.'.join(map(str, MINIMUM_TRITON))}, got {triton.__version__}"
    if interpreted():
        return True, "interpreted on the CPU (TRITON_INTERPRET=1): for tests, slow"
    if not torch.cuda.is_available():
        return False, "needs an NVIDIA or AMD GPU, and torch.cuda.is_available() is False"
    if (reason := _capability_reason(torch.cuda.current_device())) is not None:
        return False, reason
    return True, f"triton {triton.__version__} on {torch.cuda.get_device_name()}"


@torch.compiler.assume_constant_result
def _capability_reason(device: torch.device | int) -> str | None:
    """Why the kernels cannot run on this one of the machine's GPUs."""
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= MINIMUM_CAPABILITY:
        return None
    needed, got = (".".join(map(str, version)) for version in (MINIMUM_CAPABILITY, capability))
    return f"needs compute capability at least {needed}, got {got} ({torch.cuda.get_device_name(device)})"


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether the kernels are run by Triton's interpreter, which is settled when they are first imported."""
    from canvas_engineering.kernels.triton.tiles import INTERPRETED

    return bool(INTERPRETED.value)


def reasons(
    q: Any,
    k: Any,
    v: Any,
    plan: BlockSparsePlan,
    *,
    activation: str = "softmax",
    return_lse: bool = False,
    dropout_p: float = 0.0,
    row_weight: Any = None,
) -> list[str]:
    """Why this backend cannot run the call; empty when it can. Each reason says what is required and what came.

    Args:
        q: ``(B, Hq, Nq, D)``; k, v: ``(B, Hkv, Nkv, D)``; torch tensors.
        plan: The plan to run.
        activation: ``"softmax"`` or ``"sigmoid"``.
        return_lse: Whether the log-sum-exp is wanted.
        dropout_p: Dropout probability.
        row_weight: Weights instead of the plan's own, ``(num_sets, block_q)`` float32, or None.
    """
    ok, reason = availability()
    found = [] if ok else [reason]
    if not all(isinstance(t, torch.Tensor) for t in (q, k, v)):
        names = ", ".join(type(t).__name__ for t in (q, k, v))
        return [*found, f"q, k and v must be torch tensors, got {names}"]
    found += _device_reasons(q, k, v, ok)
    found += _dtype_reasons(q, k, v)
    found += _weight_reasons(q, plan, row_weight)
    if not (q.ndim == k.ndim == v.ndim == 4):
        return [*found, f"q, k and v must have 4 dimensions, got {q.ndim}, {k.ndim}, {v.ndim}"]
    if not MIN_HEAD_DIM <= q.shape[3] <= MAX_HEAD_DIM:
        found.append(f"head_dim must be from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {q.shape[3]}")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        found.append(
            "k and v must have one shape and the batch and head_dim of q, "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    elif k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        found.append(f"query heads must be a multiple of kv heads, got {q.shape[1]} and {k.shape[1]}")
    if q.shape[2] != plan.num_q or k.shape[2] != plan.num_kv:
        found.append(
            f"the plan has {plan.num_q} queries and {plan.num_kv} keys, got {q.shape[2]} and {k.shape[2]} tokens"
        )
    if activation not in ("softmax", "sigmoid"):
        found.append(f"activation must be 'softmax' or 'sigmoid', got {activation!r}")
    if return_lse and activation != "softmax":
        found.append(f"return_lse needs activation='softmax', got {activation!r}")
    if return_lse and plan.max_sets > 1:
        found.append(f"return_lse needs a plan with one softmax set per row, got {plan.max_sets}")
    if not 0.0 <= dropout_p < 1.0:
        found.append(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    return found


def _device_reasons(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ok: bool) -> list[str]:
    found = []
    if not (q.device == k.device == v.device):
        found.append(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    if ok and interpreted() and q.device.type != "cpu":
        found.append(f"TRITON_INTERPRET=1 runs tensors on the CPU only, got device {q.device}")
    if ok and not interpreted():
        if q.device.type != "cuda":
            found.append(f"needs tensors on an NVIDIA or AMD GPU, got device {q.device}")
        elif (reason := _capability_reason(q.device)) is not None:
            found.append(reason)
    return found


def _weight_reasons(q: torch.Tensor, plan: BlockSparsePlan, row_weight: Any) -> list[str]:
    found = []
    if row_weight is not None and not isinstance(row_weight, torch.Tensor):
        found.append(f"row_weight must be a torch tensor, got {type(row_weight).__name__}")
    elif row_weight is not None:
        if row_weight.device != q.device:
            found.append(f"row_weight must be on the device of q, {q.device}, got {row_weight.device}")
        if tuple(row_weight.shape) != plan.row_weight.shape:
            found.append(f"row_weight must have shape {plan.row_weight.shape}, got {tuple(row_weight.shape)}")
        if not row_weight.is_floating_point():
            found.append(f"row_weight must have a floating-point dtype, got {_name(row_weight.dtype)}")
    return found


def _dtype_reasons(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[str]:
    autocast = _autocast_dtype(q.device)
    dtypes = {q.dtype, k.dtype, v.dtype} if autocast is None else {autocast}
    if len(dtypes) == 1 and dtypes <= set(DTYPES):
        return []
    got = ", ".join(sorted(map(_name, dtypes)))
    return [f"q, k and v must have one dtype of {', '.join(map(_name, DTYPES))}, got {got}"]


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What a call casts its operands to; torch raises for the types of device that have no autocast."""
    if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockSparsePlan,
    *,
    scale: float,
    row_weight: torch.Tensor | None = None,
    activation: Activation = "softmax",
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    allow_tf32: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Block-sparse attention of ``plan`` by one kernel launch, differentiable by q, k, v and ``row_weight``.

    Args:
        q: ``(B, Hq, Nq, D)``, float32, float16 or bfloat16, any strides (copied only if the last is not 1).
        k, v: ``(B, Hkv, Nkv, D)``; ``Hq`` a multiple of ``Hkv``.
        plan: Tokens are numbered as in ``q`` and ``k``.
        scale: Factor of the scores.
        row_weight: ``(num_sets, block_q)`` float32 weights instead of the plan's own.
        activation: ``"softmax"``, or ``"sigmoid"``: ``sigmoid(scale * q k^T) v`` without normalisation.
        dropout_p: Probability of dropping a pair; kept ones are scaled by ``1 / (1 - dropout_p)``.
        seed: Seed of the dropout mask: an int, or an int64 tensor with one element, which a CUDA graph can update.
        return_lse: Also return the natural log-sum-exp of the scaled scores, ``(B, Hq, Nq)`` float32, -inf for
            rows without keys.
        allow_tf32: Multiply float32 in TF32; None follows ``torch.backends.cuda.matmul.fp32_precision``, which
            ``torch.set_float32_matmul_precision("high")`` sets as well.

    Returns:
        ``(B, Hq, Nq, D)`` in the dtype and the memory order of ``q``, or that and the log-sum-exp.

    Under autocast q, k and v are cast to its dtype. Callers check :func:`reasons` first.
    """
    # Imported here: the operators register themselves, and triton may be missing where only reasons are asked for.
    from canvas_engineering.kernels.triton.operator import (
        SAVE_DEAD_SETS,
        SAVE_LSE,
        SAVE_NOTHING,
        SAVE_SETS,
        BlockSparseAttention,
    )

    autocast = _autocast_dtype(q.device)
    if autocast is not None:
        q, k, v = q.to(autocast), k.to(autocast), v.to(autocast)
    if scale <= 0:
        # The kernels multiply a row's maximum by the scale, so they want a positive one.
        q, scale = (-q, -scale) if scale < 0 else (0 * q, 1.0)
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    lowered = _lowered(plan, q.device)
    own_weight = row_weight is None
    weight = lowered.row_weight if row_weight is None else row_weight.to(torch.float32).contiguous()

    save = SAVE_NOTHING
    columns = lowered.tokens  # a stand-in where no backward pass will read it
    grad_weight = row_weight is not None and row_weight.requires_grad
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or grad_weight):
        if grad_weight:
            save = SAVE_DEAD_SETS
        else:
            save = SAVE_SETS if lowered.many_sets and activation == "softmax" else SAVE_LSE
        columns = _lowered_columns(plan, q.device)
    if allow_tf32 is None:
        allow_tf32 = q.device.type == "cuda" and tf32_allowed()

    # torch.compile takes the operator as it is; transforms of torch.func need an autograd.Function around it.
    operator: Any = torch.ops.canvas_engineering.block_sparse_attention
    out, lse, _ = (operator if torch.compiler.is_compiling() else BlockSparseAttention.apply)(
        q,
        k,
        v,
        lowered.rows,
        columns,
        lowered.tokens,
        lowered.masks,
        weight,
        lowered.block_q,
        lowered.block_kv,
        lowered.q_tiles,
        lowered.kv_tiles,
        lowered.contiguous,
        lowered.many_sets,
        activation == "sigmoid",
        float(scale),
        float(dropout_p),
        _seed_tensor(seed, q.device) if dropout_p > 0.0 else None,
        "tf32" if allow_tf32 else "ieee",
        save,
        return_lse,
        own_weight,
    )
    return (out, lse) if return_lse else out


def tf32_allowed() -> bool:
    """What torch is told about float32 products on GPUs."""
    # Not `allow_tf32`, which raises once the program has set `fp32_precision`; the latter knows of both.
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# Called while torch.compile traces, not traced themselves: their results are constants of (plan, device).
@torch.compiler.assume_constant_result
def _lowered(plan: BlockSparsePlan, device: torch.device) -> Any:
    from canvas_engineering.kernels.triton.lower import lower_plan

    return lower_plan(plan, device)


@torch.compiler.assume_constant_result
def _lowered_columns(plan: BlockSparsePlan, device: torch.device) -> Any:
    from canvas_engineering.kernels.triton.lower import lower_columns

    return lower_columns(plan, device)


def _seed_tensor(seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """An int64 tensor of one element; seeds of 64 bits wrap to negative numbers, which keeps their bits."""
    if isinstance(seed, torch.Tensor):
        return seed.to(device=device, dtype=torch.int64).reshape(1)
    value = 0 if seed is None else seed % 2**64
    # Filled on the device: a copy from the host would synchronise, and break CUDA-graph capture.
    return torch.full((1,), value - 2**64 if value >= 2**63 else value, dtype=torch.int64, device=device)
