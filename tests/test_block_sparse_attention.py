"""The call itself: its arguments and their errors, the choice of a backend, and what every backend promises."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from equivalence.cases import BY_NAME

from canvas_engineering import Availability, available_backends, block_sparse_attention
from canvas_engineering.attention import api
from canvas_engineering.attention.api import Choice, choose_backend
from canvas_engineering.errors import BackendError, CanvasError, PlanError
from canvas_engineering.kernels.triton import backend as triton_backend
from canvas_engineering.plan import BlockSparsePlan

PLAN = BY_NAME["several_sets"].plan()
SINGLE = BY_NAME["window"].plan()


def arrays(plan: BlockSparsePlan = PLAN, heads_kv: int = 2, dtype: str = "float32") -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 2, plan.num_q, 8)).astype(dtype)
    k, v = rng.standard_normal((2, 2, heads_kv, plan.num_kv, 8)).astype(dtype)
    return q, k, v


def tensors(plan: BlockSparsePlan = PLAN, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(x).to(dtype) for x in arrays(plan))


def attend(operands: Iterable[Any], plan: Any = PLAN, **options: Any) -> Any:
    q, k, v = operands
    return block_sparse_attention(q, k, v, plan, **options)


def choose(operands: Iterable[Any], plan: BlockSparsePlan = PLAN) -> Choice:
    q, k, v = operands
    return choose_backend(q, k, v, plan)


# -- bad arguments ------------------------------------------------------------------------------------------


def replaced(index: int, change: Any) -> tuple[Any, ...]:
    operands = list(tensors())
    operands[index] = change(operands[index])
    return tuple(operands)


@pytest.mark.parametrize(
    ("operands", "error", "message"),
    [
        (replaced(0, lambda q: q.tolist()), CanvasError, r"q must be a NumPy array, .* or JAX array, got list"),
        (replaced(1, lambda k: k.numpy()), CanvasError, r"arrays of one framework, got q torch, k numpy, v torch"),
        (replaced(2, lambda v: v[0]), CanvasError, r"v must have shape \(batch, heads, .*\), got \(2, 57, 8\)"),
        (replaced(1, lambda k: k.double()), CanvasError, r"one floating-point dtype, .* k float64, v float32"),
        (tuple(x.long() for x in tensors()), CanvasError, r"one floating-point dtype, got q int64, k int64, v int64"),
        (replaced(2, lambda v: v.to("meta")), CanvasError, r"on one device, got q cpu, k cpu, v meta"),
        (replaced(1, lambda k: k[:1]), CanvasError, r"one batch size, got q 2, k 1, v 2"),
        (replaced(2, lambda v: v[..., :4]), CanvasError, r"one head_dim >= 1, got q 8, k 8, v 4"),
        (tuple(x[..., :0] for x in tensors()), CanvasError, r"one head_dim >= 1, got q 0, k 0, v 0"),
        (replaced(2, lambda v: v[:, :1]), CanvasError, r"same heads and tokens, got k \(2, 57\), v \(1, 57\)"),
        (replaced(0, lambda q: q[:, :1]), CanvasError, r"heads of q must be a multiple of .*, got 1 and 2"),
        (replaced(0, lambda q: q[:, :, 1:]), PlanError, r"the 57 tokens of the plan and k and v its 57, got 56"),
    ],
)  # fmt: skip
def test_operands_that_cannot_be_right(operands: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attend(operands, PLAN)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "cuda"}, CanvasError, r"backend must be 'auto' or one of 'triton', 'pallas', .*'cuda'"),
        ({"activation": "relu"}, CanvasError, r"activation must be one of 'softmax', 'sigmoid', got 'relu'"),
        ({"return_lse": True, "activation": "sigmoid"}, CanvasError, r"return_lse needs activation='softmax', got '"),
        ({"return_lse": True}, PlanError, r"return_lse needs a plan with one softmax set per row, .* up to 3"),
        ({"dropout_p": 1.0}, CanvasError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, CanvasError, r"dropout_p must be in \[0, 1\), got -0.1"),
        ({"dropout_p": "half"}, CanvasError, r"dropout_p must be a finite number, got 'half'"),
        ({"dropout_p": 0.5}, CanvasError, r"seed must be an int in \[0, 2\*\*64\) when dropout_p > 0, got None"),
        ({"dropout_p": 0.5, "seed": -1}, CanvasError, r"seed must be an int in .*, got -1"),
        ({"dropout_p": 0.5, "seed": 2**64}, CanvasError, r"seed must be an int in .*, got 18446744073709551616"),
        ({"dropout_p": 0.5, "seed": torch.ones(2)}, CanvasError, r"int64 with one element, got float32 of shape"),
        ({"scale": float("nan")}, CanvasError, r"scale must be a finite number, got nan"),
        ({"scale": torch.ones(())}, CanvasError, r"scale must be a finite number, got tensor"),
        ({"row_weight": np.ones(PLAN.row_weight.shape)}, CanvasError, r"row_weight must be .* \(torch\), got nd"),
        ({"row_weight": torch.ones(3, 16)}, PlanError, r"shape of plan.row_weight, \(9, 16\), got \(3, 16\)"),
        ({"row_weight": torch.ones(9, 16).long()}, CanvasError, r"row_weight must have a floating.* got int64"),
        ({"row_weight": torch.ones(9, 16, device="meta")}, CanvasError, r"on q's device cpu, got meta"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_right(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attend(tensors(), PLAN, **options)


def test_a_plan_is_needed() -> None:
    with pytest.raises(CanvasError, match="plan must be a BlockSparsePlan, got ndarray"):
        attend(tensors(), np.ones((57, 57), bool))


def test_a_seed_array_of_the_wrong_type_is_named() -> None:
    q, k, v = (jnp.asarray(x) for x in arrays())
    with pytest.raises(CanvasError, match=r"uint32 of shape \(2,\), got int32 of shape \(2,\)"):
        block_sparse_attention(q, k, v, PLAN, dropout_p=0.1, seed=jnp.ones(2, jnp.int32))


# -- the choice ---------------------------------------------------------------------------------------------


def test_auto_takes_portable_for_torch_and_jax_and_the_reference_for_numpy() -> None:
    assert choose(tensors()) == Choice("portable")
    assert choose(map(jnp.asarray, arrays())).name == "portable"
    assert choose(arrays()) == Choice("reference")


def test_auto_passes_over_a_backend_on_a_stated_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where triton stands first."""
    monkeypatch.setattr(api, "_preference", lambda q: ("triton", "portable"))
    monkeypatch.setattr(api, "_availability", lambda name: Availability(name != "triton", "no such device"))
    monkeypatch.setattr(triton_backend, "reasons", lambda *_, **__: ["a head_dim of its own"])
    choice = choose(tensors())
    assert choice == Choice("portable", {"triton": ["no such device", "a head_dim of its own"]})
    assert str(choice) == "portable; not triton: no such device, a head_dim of its own"


def test_auto_prefers_the_kernels_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device = torch.device("cuda")

    monkeypatch.setattr(api, "is_torch", lambda value: isinstance(value, OnGpu))
    assert api._preference(OnGpu()) == ("triton", "portable")
    monkeypatch.setattr(api, "jax_platform", lambda array: "tpu")
    assert api._preference(jnp.ones(1)) == ("pallas", "portable")
    assert api._preference(np.ones(1)) == ("reference",)


def test_tracers_lie_on_the_default_backend() -> None:
    seen: list[str] = []

    @jax.jit
    def look(x: jax.Array) -> jax.Array:
        seen.append(api.jax_platform(x))
        return x

    look(jnp.ones(2))
    assert seen == [jax.default_backend()] == [api.jax_platform(jnp.ones(2))]


@pytest.mark.parametrize(
    ("backend", "make", "message"),
    [
        ("portable", arrays, r"'portable' cannot run this call: needs torch tensors or JAX arrays, got NumPy"),
        ("triton", arrays, r"backend 'triton' cannot run this call: needs torch tensors, got NumPy arrays"),
        ("pallas", tensors, r"backend 'pallas' cannot run this call: needs JAX arrays, got torch tensors"),
    ],
)  # fmt: skip
def test_an_explicit_backend_refuses_foreign_arrays(backend: str, make: Any, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        attend(make(), PLAN, backend=backend)


def test_an_explicit_backend_never_falls_back_and_says_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_availability", lambda name: Availability(False, "no such device"))
    with pytest.raises(BackendError, match="needs torch tensors, got NumPy arrays; no such device"):
        attend(arrays(), PLAN, backend="triton")


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_unsupported_dtypes_are_refused(backend: str) -> None:
    operands = tensors(dtype=torch.float8_e4m3fn)
    with pytest.raises(
        BackendError, match="dtype must be one of float16, bfloat16, float32, float64, got float8_e4m3fn"
    ):
        attend(operands, PLAN, backend=backend)


def test_available_backends_lists_all_with_reasons() -> None:
    found = available_backends()
    assert list(found) == ["triton", "pallas", "portable", "reference"]
    assert found["portable"]
    assert found["reference"].ok
    assert all(one.reason for one in found.values())
    assert not Availability(False, "why")


def test_a_missing_framework_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "installed", lambda module: False)
    found = available_backends()
    assert found["triton"] == (False, "the package 'torch' is not installed: pip install 'canvas-engineering[triton]'")
    assert found["pallas"] == (False, "the package 'jax' is not installed: pip install 'canvas-engineering[jax]'")


def test_the_reference_needs_numpy_only() -> None:
    program = """
import sys
import numpy as np
from canvas_engineering.attention.api import block_sparse_attention
from canvas_engineering.plan import BlockSparsePlan
plan = BlockSparsePlan.from_mask(np.ones((4, 6), bool))
q, k = np.ones((1, 1, 4, 2)), np.ones((1, 1, 6, 2))
block_sparse_attention(q, k, k, plan)
print([name for name in ("torch", "jax", "triton") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


# -- behaviour under the frameworks' transformations --------------------------------------------------------


def test_numpy_results_keep_dtype() -> None:
    for dtype in ("float16", "float32", "float64"):
        out, lse = attend(arrays(SINGLE, dtype=dtype), SINGLE, return_lse=True)
        assert out.dtype == dtype
        assert lse.dtype == ("float64" if dtype == "float64" else "float32")


def test_jitted_functions_take_the_seed_as_data() -> None:
    """A new seed is a new mask but no new compilation, and int seeds mean the same masks."""
    q, k, v = (jnp.asarray(x) for x in arrays())
    traces = []

    @jax.jit
    def call(seed: jax.Array) -> jax.Array:
        traces.append(1)
        return block_sparse_attention(q, k, v, PLAN, dropout_p=0.5, seed=seed)

    first, second = call(jnp.array([5, 0], jnp.uint32)), call(jnp.array([5, 7], jnp.uint32))
    assert len(traces) == 1
    for seed, out in ((5, first), (5 + (7 << 32), second)):
        want = attend(arrays(), PLAN, dropout_p=0.5, seed=seed)
        np.testing.assert_allclose(out, want, atol=1e-5)


def test_torch_tensors_as_seeds() -> None:
    want = attend(tensors(), PLAN, dropout_p=0.5, seed=2**64 - 3)
    for backend in ("portable", "reference"):
        got = attend(tensors(), PLAN, dropout_p=0.5, seed=torch.tensor(-3), backend=backend)
        torch.testing.assert_close(got, want)


def test_jax_vmap() -> None:
    q, k, v = (jnp.asarray(x) for x in arrays())
    want = attend(arrays())
    got = jax.jit(jax.vmap(lambda q, k, v: block_sparse_attention(q[None], k[None], v[None], PLAN)[0]))(q, k, v)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_autocast_leaves_the_operands_as_they_come() -> None:
    operands = tuple(x.requires_grad_() for x in tensors())
    want = attend(operands, PLAN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attend(operands, PLAN)
        grads = torch.autograd.grad(got.sum(), operands)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, torch.autograd.grad(want.sum(), operands))


def test_torch_results_lie_like_other_results() -> None:
    """Strided operands (B, N, H, D), operands expanded along the batch, and gradients of no memory of their own."""
    q, k, v = tensors()
    want = block_sparse_attention(q, k, v, PLAN)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    out = attend(strided, PLAN)
    torch.testing.assert_close(out, want)
    one = [x[:1].requires_grad_() for x in (q, k, v)]
    expanded = attend(x.expand(2, -1, -1, -1) for x in one)
    torch.testing.assert_close(expanded[1], expanded[0])
    grads = torch.autograd.grad(expanded.sum(), one)  # the gradient of a sum is an expanded scalar
    plain = torch.autograd.grad(2 * attend(one, PLAN).sum(), one)
    torch.testing.assert_close(grads, plain)
    reversed_features = [x.flip(-1).transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    flipped = attend(reversed_features, PLAN)
    torch.testing.assert_close(flipped, want.flip(-1))


# torch looks at .grad of the operator's output and hides the warning in a way that does not hide errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_torch_compile() -> None:
    """The checks and the choice are traced; a backend that is an operator can be part of one graph."""
    q, k, v = (x.requires_grad_() for x in tensors())
    compiled = torch.compile(lambda *x: attend(x) + 1, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), attend((q, k, v)) + 1)


def test_torch_compile_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from canvas_engineering.kernels.portable import backend

    monkeypatch.setattr(backend, "attention", lambda q, k, v, plan, **options: q * options["scale"])
    q, k, v = tensors()
    compiled = torch.compile(lambda *x: attend(x, row_weight=torch.ones(9, 16)), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), q * 8**-0.5)
