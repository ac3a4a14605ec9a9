"""``block_sparse_attention``: one call for every plan, array type and device, and the choice of a backend.

A backend is a folder ``kernels/<name>`` whose module ``backend`` has three functions::

    availability() -> tuple[bool, str]       # can it run in this process, and on what, or why not
    reasons(q, k, v, plan, *, activation, return_lse, dropout_p, row_weight) -> list[str]
                                             # why it cannot run this call; empty if it can
    attention(q, k, v, plan, *, scale, row_weight, activation, dropout_p, seed, return_lse)
                                             # out, or (out, lse)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from canvas_engineering._arrays import dtype_name, framework_of, is_jax, is_torch
from canvas_engineering._optional import installed
from canvas_engineering.errors import BackendError, CanvasError, PlanError
from canvas_engineering.plan import BlockSparsePlan

BackendName = Literal["triton", "pallas", "portable", "reference"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
ACTIVATIONS = ("softmax", "sigmoid")


class Availability(NamedTuple):
    """Whether a backend can run in this process, and the reason either way; true in a condition if it can."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class Choice:
    """The backend of a call, and why each one that stood before it was passed over."""

    name: BackendName
    reasons_passed_over: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        passed = "".join(f"; not {name}: {', '.join(why)}" for name, why in self.reasons_passed_over.items())
        return f"{self.name}{passed}"


def block_sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    plan: BlockSparsePlan,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    row_weight: Any = None,
    dropout_p: float = 0.0,
    seed: Any = None,
    activation: str = "softmax",
) -> Any:
    """Attention over the pairs of ``plan``: ``out[i] = sum over sets g of w_g[i] * softmax_g(scale q_i kᵀ) v``.

    Args:
        q: ``(B, Hq, Nq, D)``; NumPy, torch or JAX, float16, bfloat16, float32 or float64. Tokens are numbered as
            in the plan, that is in canvas order unless the plan was renumbered.
        k, v: ``(B, Hkv, Nkv, D)`` of q's dtype and device. ``Hq`` is a multiple of ``Hkv``; query head ``h`` reads
            kv head ``h // (Hq // Hkv)``.
        plan: The compiled topology; ``plan.num_q == Nq`` and ``plan.num_kv == Nkv``.
        scale: Factor of the scores; ``D ** -0.5`` where omitted.
        backend: ``"auto"``, ``"triton"``, ``"pallas"``, ``"portable"`` or ``"reference"``; see :func:`choose_backend`.
        return_lse: Also return the log-sum-exp. Needs a plan with one softmax set per row, and softmax.
        row_weight: ``(num_sets, block_q)`` floating-point array of q's framework and device, instead of
            ``plan.row_weight``; differentiable.
        dropout_p: Probability in ``[0, 1)`` with which a pair's attention probability is dropped; those kept are
            scaled by ``1 / (1 - dropout_p)``.
        seed: Int in ``[0, 2**64)``, needed for dropout. Backends drop the same pairs for the same seed. It may be
            data: for JAX a uint32 array of shape ``(2,)`` (low and high word), so that a jitted function can take
            it; for torch an int64 tensor with one element, so that a CUDA graph can.
        activation: ``"softmax"``, or ``"sigmoid"`` for ``sum_g w_g[i] * sum_j sigmoid(scale q_i k_j) v_j``.

    Returns:
        ``(B, Hq, Nq, D)`` in q's dtype and on its device. With ``return_lse``, a pair of it and the natural
        log-sum-exp ``(B, Hq, Nq)`` of the scaled scores in float32 (float64 for float64), both differentiable.
        A row without keys is 0, its log-sum-exp ``-inf``, and its gradients 0.

    Raises:
        CanvasError: An argument that cannot be right, whatever the backend.
        PlanError: Operands whose sizes are not those of the plan, or a log-sum-exp that the plan does not have.
        BackendError: The backend asked for cannot run this call; the message has all of its reasons.
    """
    _check_operands(q, k, v, plan)
    _check_options(q, plan, return_lse, row_weight, dropout_p, seed, activation)
    choice = choose_backend(
        q,
        k,
        v,
        plan,
        backend=backend,
        activation=activation,
        return_lse=return_lse,
        dropout_p=dropout_p,
        row_weight=row_weight,
    )
    return _backend_module(choice.name).attention(
        q,
        k,
        v,
        plan,
        scale=q.shape[-1] ** -0.5 if scale is None else _number("scale", scale),
        row_weight=row_weight,
        activation=activation,
        dropout_p=float(dropout_p),
        seed=seed,
        return_lse=return_lse,
    )


def available_backends() -> dict[str, Availability]:
    """Which backends can run in this process, with the reason why or why not."""
    return {name: _availability(name) for name in BACKENDS}


def choose_backend(
    q: Any,
    k: Any,
    v: Any,
    plan: BlockSparsePlan,
    *,
    backend: str = "auto",
    activation: str = "softmax",
    return_lse: bool = False,
    dropout_p: float = 0.0,
    row_weight: Any = None,
) -> Choice:
    """The backend that :func:`block_sparse_attention` takes for this call.

    ``"auto"``: triton for tensors on a CUDA or ROCm device, pallas for JAX arrays on a TPU, and portable where
    these give a reason against it; portable for every other torch or JAX array; reference for NumPy arrays.

    Raises:
        CanvasError: ``backend`` is no backend's name.
        BackendError: The backend asked for, or every backend in question, cannot run the call.
    """
    if backend == "auto":
        candidates = _preference(q)
    elif backend in BACKENDS:
        candidates = (backend,)
    else:
        raise CanvasError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    passed_over: dict[str, list[str]] = {}
    for name in candidates:
        found = backend_reasons(
            name,
            q,
            k,
            v,
            plan,
            activation=activation,
            return_lse=return_lse,
            dropout_p=dropout_p,
            row_weight=row_weight,
        )
        if not found:
            return Choice(name, passed_over)
        passed_over[name] = found
    raise BackendError(
        "\n".join(f"backend {name!r} cannot run this call: {'; '.join(why)}" for name, why in passed_over.items())
    )


def backend_reasons(
    name: BackendName,
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
    """Every reason why backend ``name`` cannot run this call; an empty list if it can."""
    found = _array_reasons(name, q)
    # An array of its framework is all that a backend without a device of its own needs.
    available = _availability(name) if name in _NEEDS or found else Availability(True, "")
    if found:
        return found if available else [*found, available.reason]
    reasons: list[str] = _backend_module(name).reasons(
        q,
        k,
        v,
        plan,
        activation=activation,
        return_lse=return_lse,
        dropout_p=dropout_p,
        row_weight=row_weight,
    )
    return reasons if available or available.reason in reasons else [available.reason, *reasons]


# -- backends -----------------------------------------------------------------------------------------------


def _backend_module(name: BackendName) -> ModuleType:
    """The module of a backend, imported on first use."""
    match name:
        case "triton":
            from canvas_engineering.kernels.triton import backend as triton_backend

            return triton_backend
        case "pallas":
            from canvas_engineering.kernels.pallas import backend as pallas_backend

            return pallas_backend
        case "portable":
            from canvas_engineering.kernels.portable import backend as portable_backend

            return portable_backend
        case "reference":
            from canvas_engineering.kernels.reference import backend as reference_backend

            return reference_backend


#: What the module of a backend imports.
_NEEDS = {"triton": "torch", "pallas": "jax"}
_EXTRAS = {"triton": "triton", "pallas": "jax"}


def _availability(name: BackendName) -> Availability:
    package = _NEEDS.get(name)
    if package is not None and not installed(package):
        return Availability(
            False, f"the package {package!r} is not installed: pip install 'canvas-engineering[{_EXTRAS[name]}]'"
        )
    return Availability(*_backend_module(name).availability())


def _preference(q: Any) -> tuple[BackendName, ...]:
    """The backends that ``auto`` considers for an array, best first."""
    if is_torch(q):
        return ("triton", "portable") if q.device.type == "cuda" else ("portable",)
    if is_jax(q):
        return ("pallas", "portable") if jax_platform(q) == "tpu" else ("portable",)
    return ("reference",)


def _array_reasons(name: BackendName, q: Any) -> list[str]:
    """Why a backend has no use for arrays of this framework."""
    needed = {
        "triton": ("torch",),
        "pallas": ("jax",),
        "portable": ("torch", "jax"),
        "reference": ("numpy", "torch", "jax"),
    }[name]
    framework = framework_of(q)
    if framework in needed:
        return []
    words = {"numpy": "NumPy arrays", "torch": "torch tensors", "jax": "JAX arrays"}
    got = words[framework] if framework else type(q).__name__
    return [f"needs {' or '.join(words[one] for one in needed)}, got {got}"]


def jax_platform(array: Any) -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``: where a JAX array lies; for a tracer, JAX's default backend."""
    import jax

    if isinstance(array, jax.core.Tracer):
        return jax.default_backend()
    platform: str = next(iter(array.devices())).platform
    return platform


# -- arguments ----------------------------------------------------------------------------------------------


def _check_operands(q: Any, k: Any, v: Any, plan: BlockSparsePlan) -> None:
    """Frameworks, dtypes, devices and shapes of q, k and v, against each other and the plan."""
    if not isinstance(plan, BlockSparsePlan):
        raise CanvasError(f"plan must be a BlockSparsePlan, got {type(plan).__name__}")
    operands = {"q": q, "k": k, "v": v}
    for name, array in operands.items():
        if framework_of(array) is None:
            raise CanvasError(f"{name} must be a NumPy array, torch tensor or JAX array, got {type(array).__name__}")
        if framework_of(array) != framework_of(q):
            raise CanvasError(f"q, k and v must be arrays of one framework, got {_listed(operands, framework_of)}")
        if len(array.shape) != 4:
            raise CanvasError(f"{name} must have shape (batch, heads, tokens, head_dim), got {tuple(array.shape)}")
    if not is_floating(q) or not dtype_name(q) == dtype_name(k) == dtype_name(v):
        raise CanvasError(f"q, k and v must have one floating-point dtype, got {_listed(operands, dtype_name)}")
    if is_torch(q) and not q.device == k.device == v.device:
        raise CanvasError(f"q, k and v must be on one device, got {_listed(operands, lambda x: x.device)}")

    batch, heads_q, num_q, head_dim = q.shape
    _, heads_kv, num_kv, _ = k.shape
    if k.shape[0] != batch or v.shape[0] != batch:
        raise CanvasError(f"q, k and v must have one batch size, got {_listed(operands, lambda x: x.shape[0])}")
    if head_dim < 1 or k.shape[3] != head_dim or v.shape[3] != head_dim:
        raise CanvasError(f"q, k and v must have one head_dim >= 1, got {_listed(operands, lambda x: x.shape[3])}")
    if v.shape[1:3] != k.shape[1:3]:
        raise CanvasError(
            f"k and v must have the same heads and tokens, got k {tuple(k.shape[1:3])}, v {tuple(v.shape[1:3])}"
        )
    if heads_q < 1 or heads_kv < 1 or heads_q % heads_kv:
        raise CanvasError(f"heads of q must be a multiple of the heads of k and v, got {heads_q} and {heads_kv}")
    if num_q != plan.num_q or num_kv != plan.num_kv:
        raise PlanError(
            f"q must have the {plan.num_q} tokens of the plan and k and v its {plan.num_kv}, got {num_q} and {num_kv}"
        )


def _check_options(
    q: Any,
    plan: BlockSparsePlan,
    return_lse: bool,
    row_weight: Any,
    dropout_p: float,
    seed: Any,
    activation: str,
) -> None:
    """The keyword arguments but ``scale`` and ``backend``."""
    if activation not in ACTIVATIONS:
        raise CanvasError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    if return_lse and activation != "softmax":
        raise CanvasError(f"return_lse needs activation='softmax', got {activation!r}")
    if return_lse and plan.max_sets > 1:
        raise PlanError(
            f"return_lse needs a plan with one softmax set per row, got one with up to {plan.max_sets} "
            f"(softmax={plan.softmax!r})"
        )
    if not 0 <= _number("dropout_p", dropout_p) < 1:
        raise CanvasError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0:
        _check_seed(q, seed)
    if row_weight is not None:
        _check_row_weight(q, plan, row_weight)


def _check_seed(q: Any, seed: Any) -> None:
    if is_jax(seed) and is_jax(q):
        if dtype_name(seed) != "uint32" or seed.shape != (2,):
            raise CanvasError(
                f"seed as a JAX array must be uint32 of shape (2,), got {dtype_name(seed)} of shape {seed.shape}"
            )
    elif is_torch(seed) and is_torch(q):
        if dtype_name(seed) != "int64" or seed.numel() != 1:
            raise CanvasError(
                f"seed as a tensor must be int64 with one element, got {dtype_name(seed)} of shape {tuple(seed.shape)}"
            )
    elif isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise CanvasError(f"seed must be an int in [0, 2**64) when dropout_p > 0, got {seed!r}")


def _check_row_weight(q: Any, plan: BlockSparsePlan, row_weight: Any) -> None:
    if framework_of(row_weight) != framework_of(q):
        raise CanvasError(
            f"row_weight must be an array of q's framework ({framework_of(q)}), got {type(row_weight).__name__}"
        )
    if tuple(row_weight.shape) != plan.row_weight.shape:
        raise PlanError(
            f"row_weight must have the shape of plan.row_weight, {plan.row_weight.shape}, got {tuple(row_weight.shape)}"
        )
    if not is_floating(row_weight):
        raise CanvasError(f"row_weight must have a floating-point dtype, got {dtype_name(row_weight)}")
    if is_torch(q) and row_weight.device != q.device:
        raise CanvasError(f"row_weight must be on q's device {q.device}, got {row_weight.device}")


def is_floating(array: Any) -> bool:
    """Whether an array of any of the three frameworks holds real floating-point numbers."""
    if is_torch(array):
        return bool(array.dtype.is_floating_point)
    # NumPy's own test does not know bfloat16 and the float8 types.
    return "float" in dtype_name(array)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise CanvasError(f"{name} must be a finite number, got {value!r}")
    if not -math.inf < value < math.inf:  # not math.isfinite, which torch.compile cannot trace for dynamic numbers
        raise CanvasError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _listed(operands: dict[str, Any], what: Any) -> str:
    return ", ".join(f"{name} {what(array)}" for name, array in operands.items())
