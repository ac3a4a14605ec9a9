"""The backends of the suite: how to call each, and what it is allowed not to do.

To join, a backend adds one :class:`Backend` to ``BACKENDS``. A capability gap is declared here and asserted:
where a gap is declared the backend must refuse with a ``BackendError``, never compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from canvas_engineering.attention.api import block_sparse_attention
from canvas_engineering.kernels.reference.attention import attention_backward
from canvas_engineering.plan import BlockSparsePlan
from equivalence.cases import Inputs
from equivalence.tolerance import Arrays, Options, torch_dtype

ALL_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Backend:
    """One backend on one framework.

    Attributes:
        name: What is passed as ``backend=``.
        framework: Which arrays it gets.
        dtypes: The dtypes that it computes; others it must refuse.
        refuses: ``(plan, inputs, dtype, options) -> bool``: further declared gaps.
        block_q, block_kv: Tile sizes at which the cases are built.
        device: The torch device of the operands.
        poisoned: Memory that it allocates holds NaN, so that an element that it does not write is seen.
        unavailable: Why it cannot run in this process, or an empty string. Its tests are then skipped with this reason.
    """

    name: str
    framework: Literal["numpy", "torch", "jax"]
    dtypes: tuple[str, ...] = ALL_DTYPES
    refuses: Callable[[BlockSparsePlan, Inputs, str, Options], bool] = lambda *_: False
    block_q: int = 16
    block_kv: int = 16
    device: str = "cpu"
    poisoned: bool = False
    unavailable: str = ""

    def __str__(self) -> str:
        return f"{self.name}-{self.framework}" + ("" if self.device == "cpu" else f"-{self.device}")

    def run(self, plan: BlockSparsePlan, inputs: Inputs, dtype: str, options: Options) -> Arrays:
        """Forward and all gradients, as float64 NumPy: ``out``, ``dq``, ``dk``, ``dv`` [, ``lse``, ``drow_weight``].

        ``inputs`` must hold values of ``dtype`` (see ``tolerance.round_inputs``).
        """
        match self.framework:
            case "numpy":
                return _run_numpy(self, plan, inputs, dtype, options)
            case "torch" if self.poisoned:
                with poisoned_memory():
                    return _run_torch(self, plan, inputs, dtype, options)
            case "torch":
                return _run_torch(self, plan, inputs, dtype, options)
            case "jax":
                return _run_jax(self, plan, inputs, dtype, options)


def _keywords(backend: Backend, options: Options) -> dict[str, Any]:
    return {
        "backend": backend.name,
        "scale": options.scale,
        "activation": options.activation,
        "dropout_p": options.dropout_p,
        "seed": options.seed,
        "return_lse": options.lse,
    }


def _float64(array: Any) -> NDArray[np.float64]:
    return np.asarray(array).astype(np.float64)


def _run_numpy(backend: Backend, plan: BlockSparsePlan, inputs: Inputs, dtype: str, options: Options) -> Arrays:
    """NumPy has no autograd: gradients come from the hand-written backward, in float64."""
    import ml_dtypes

    to = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    q, k, v = (x.astype(to) for x in (inputs.q, inputs.k, inputs.v))
    row_weight = inputs.row_weight if options.override_weight else None
    result = block_sparse_attention(q, k, v, plan, row_weight=row_weight, **_keywords(backend, options))
    out, lse = result if options.lse else (result, None)
    assert out.dtype == q.dtype
    grads = attention_backward(
        q,
        k,
        v,
        plan,
        inputs.grad_out,
        inputs.grad_lse if options.lse else None,
        scale=options.scale,
        row_weight=row_weight,
        activation=options.activation,  # type: ignore[arg-type]
        dropout_p=options.dropout_p,
        seed=options.seed,
    )
    arrays = {"out": _float64(out), "dq": grads.q, "dk": grads.k, "dv": grads.v}
    if options.lse:
        arrays["lse"] = _float64(lse)
    if options.override_weight:
        arrays["drow_weight"] = grads.row_weight
    return arrays


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that torch leaves uninitialised is NaN (integers: their largest value)."""
    import torch

    torch.use_deterministic_algorithms(True)  # which includes torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _run_torch(backend: Backend, plan: BlockSparsePlan, inputs: Inputs, dtype: str, options: Options) -> Arrays:
    import torch

    to = torch_dtype(dtype)
    accumulate = torch.float64 if to == torch.float64 else torch.float32

    def tensor(array: NDArray[np.float64], kind: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(array).to(device=backend.device, dtype=kind)

    leaves = [tensor(x, to).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    if options.override_weight:
        leaves.append(tensor(inputs.row_weight, accumulate).requires_grad_())
    row_weight = leaves[3] if options.override_weight else None
    q, k, v = leaves[:3]
    result = block_sparse_attention(q, k, v, plan, row_weight=row_weight, **_keywords(backend, options))
    outputs = list(result) if options.lse else [result]
    assert outputs[0].dtype == to
    assert outputs[-1].dtype == (accumulate if options.lse else to)
    cotangents = [tensor(inputs.grad_out, to), tensor(inputs.grad_lse, accumulate)][: len(outputs)]
    grads = torch.autograd.grad(outputs, leaves, cotangents)
    arrays = {"out": outputs[0], **dict(zip(("dq", "dk", "dv", "drow_weight"), grads, strict=False))}
    if options.lse:
        arrays["lse"] = outputs[1]
    return {name: _float64(array.detach().double().cpu()) for name, array in arrays.items()}


def _run_jax(backend: Backend, plan: BlockSparsePlan, inputs: Inputs, dtype: str, options: Options) -> Arrays:
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(dtype == "float64"):
        accumulate = "float64" if dtype == "float64" else "float32"
        operands = [jnp.asarray(x, dtype) for x in (inputs.q, inputs.k, inputs.v)]
        if options.override_weight:
            operands.append(jnp.asarray(inputs.row_weight, accumulate))

        def call(q: Any, k: Any, v: Any, row_weight: Any = None) -> Any:
            return block_sparse_attention(q, k, v, plan, row_weight=row_weight, **_keywords(backend, options))

        # Code quality of the test program does not matter, and compiling it takes longer than running it.
        quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

        @jax.jit(compiler_options=quick if jax.default_backend() == "cpu" else None)
        def forward_and_backward(operands: list[Any], cotangents: Any) -> Any:
            result, pull_back = jax.vjp(call, *operands)
            return result, pull_back(cotangents)

        cotangents: Any = jnp.asarray(inputs.grad_out, dtype)
        if options.lse:
            cotangents = (cotangents, jnp.asarray(inputs.grad_lse, accumulate))
        result, grads = forward_and_backward(operands, cotangents)
        out, lse = result if options.lse else (result, None)
        assert out.dtype == dtype
        arrays = {"out": out, **dict(zip(("dq", "dk", "dv", "drow_weight"), grads, strict=False))}
        if options.lse:
            assert lse is not None
            assert lse.dtype == accumulate
            arrays["lse"] = lse
        return {name: _float64(array) for name, array in arrays.items()}


REFERENCE = Backend("reference", "numpy")
PORTABLE_TORCH = Backend("portable", "torch")
PORTABLE_JAX = Backend("portable", "jax")
#: In TPU interpret mode off TPUs, where every grid step costs milliseconds: the fewest tiles that TPUs allow.
PALLAS = Backend("pallas", "jax", dtypes=("bfloat16", "float32"), block_q=128, block_kv=128)
TRITON_DTYPES = ("float16", "bfloat16", "float32")


def _no_triton_kernel(plan: BlockSparsePlan, inputs: Inputs, dtype: str, options: Options) -> bool:
    return not 8 <= inputs.q.shape[3] <= 256


#: By Triton's interpreter on the CPU, in a process of its own: see ``test_triton_interpreted.py``.
TRITON_INTERPRETED = Backend("triton", "torch", dtypes=TRITON_DTYPES, refuses=_no_triton_kernel, poisoned=True)
TRITON_GPU = replace(TRITON_INTERPRETED, device="cuda")
BACKENDS = (
    REFERENCE,
    PORTABLE_TORCH,
    PORTABLE_JAX,
    PALLAS,
    pytest.param(TRITON_INTERPRETED, marks=pytest.mark.interpreted),
    pytest.param(TRITON_GPU, marks=pytest.mark.gpu),
)
