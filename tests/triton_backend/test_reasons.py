"""Why the backend refuses a call, in words; what an explicit choice raises and what ``auto`` does with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from canvas_engineering import (
    AttentionDispatcher,
    CanvasLayout,
    CanvasTopology,
    Connection,
    available_backends,
    block_sparse_attention,
)
from canvas_engineering.attention import api
from canvas_engineering.attention.api import choose_backend
from canvas_engineering.errors import BackendError
from canvas_engineering.kernels.triton import backend
from triton_backend.operands import one_set, operands, two_sets, weights

PLAN = two_sets()
Q, K, V = operands(PLAN, "cpu")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that could run the kernels; the operands of these tests still lie on the CPU."""
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    monkeypatch.setattr(backend, "availability", lambda: (True, "a GPU"))


# -- the machine --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_gpu")
def test_no_gpu() -> None:
    reason = "needs an NVIDIA or AMD GPU, and torch.cuda.is_available() is False"
    assert backend.availability() == (False, reason)
    assert available_backends()["triton"] == (False, reason)
    assert backend.reasons(Q, K, V, PLAN) == [reason]


def test_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "installed", lambda module: False)
    reason = "triton is not installed: pip install 'canvas-engineering[triton]' (Linux)"
    assert backend.availability() == (False, reason)
    with pytest.raises(BackendError, match=r"backend 'triton' cannot run this call: triton is not installed: pip"):
        block_sparse_attention(Q, K, V, PLAN, backend="triton")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("version", ["3.5.1", "2.3.0", "3.5.0+git1234"])
def test_triton_is_too_old(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("triton.__version__", version)
    assert backend.availability() == (False, f"triton must be at least 3.6, got {version}")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("version", ["3.6.0", "3.9.0+rocm7", "3.10.1", "4.0.0rc1"])
def test_triton_is_new_enough(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("triton.__version__", version)
    assert "GPU" in backend.availability()[1]


def fake_cuda(monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]], hip: str | None = None) -> None:
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def index(device: Any) -> int:
        return device if isinstance(device, int) else getattr(device, "index", None) or 0

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capabilities[index(device)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {index(device)}")


def test_the_gpu_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, [(7, 5)])
    assert backend.availability() == (False, "needs compute capability at least 8.0, got 7.5 (GPU 0)")
    fake_cuda(monkeypatch, [(8, 0)])
    assert backend.availability()[0]
    fake_cuda(monkeypatch, [(1, 0)], hip="7.0")  # AMD: other numbers
    assert backend.availability()[0]


def test_the_gpu_of_the_tensors_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only that of the current device."""
    fake_cuda(monkeypatch, [(9, 0), (7, 0)])

    class OnGpu:
        def __init__(self, index: int) -> None:
            self.device = torch.device("cuda", index)

    def reasons(*gpus: int) -> list[str]:
        q, k, v = map(OnGpu, gpus)
        return backend._device_reasons(q, k, v, ok=True)  # type: ignore[arg-type]

    assert reasons(1, 1, 1) == ["needs compute capability at least 8.0, got 7.0 (GPU 1)"]
    assert reasons(0, 0, 0) == []
    assert reasons(0, 1, 0) == ["q, k and v must be on one device, got cuda:0, cuda:1, cuda:0"]


def test_tensors_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, [(9, 0)])
    assert backend.reasons(Q, K, V, PLAN) == ["needs tensors on an NVIDIA or AMD GPU, got device cpu"]


@pytest.mark.usefixtures("gpu")
def test_an_interpreter_needs_tensors_on_the_cpu() -> None:
    q, k, v = (x.to("meta") for x in (Q, K, V))
    assert backend.reasons(q, k, v, PLAN) == ["TRITON_INTERPRET=1 runs tensors on the CPU only, got device meta"]


# -- the call -----------------------------------------------------------------------------------------------

ODD = operands(PLAN, "cpu", head_dim=4)
WIDE = operands(PLAN, "cpu", head_dim=257)
TWO_HEADS = (K.repeat(1, 2, 1, 1), V.repeat(1, 2, 1, 1))
ONES = torch.ones(PLAN.row_weight.shape)
DOUBLE = operands(PLAN, "cpu", dtype=torch.float64)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("tensors", "options", "reason"),
    [
        (ODD, {}, "head_dim must be from 8 to 256, got 4"),
        (WIDE, {}, "head_dim must be from 8 to 256, got 257"),
        (DOUBLE, {}, "q, k and v must have one dtype of float32, float16, bfloat16, got float64"),
        ((Q, K.half(), V), {}, "q, k and v must have one dtype of float32, float16, bfloat16, got float16, float32"),
        ((Q, K, V.to("meta")), {}, "q, k and v must be on one device, got cpu, cpu, meta"),
        ((Q, K, V.numpy()), {}, "q, k and v must be torch tensors, got Tensor, Tensor, ndarray"),
        ((Q[0], K, V), {}, "q, k and v must have 4 dimensions, got 3, 4, 4"),
        (
            (Q, K, V[..., :4]),
            {},
            "k and v must have one shape and the batch and head_dim of q, "
            "got q (2, 2, 21, 8), k (2, 1, 27, 8), v (2, 1, 27, 4)",
        ),
        ((Q[:, :1], *TWO_HEADS), {}, "query heads must be a multiple of kv heads, got 1 and 2"),
        ((Q[:, :, 1:], K, V), {}, "the plan has 21 queries and 27 keys, got 20 and 27 tokens"),
        ((Q, K, V), {"activation": "relu"}, "activation must be 'softmax' or 'sigmoid', got 'relu'"),
        ((Q, K, V), {"return_lse": True}, "return_lse needs a plan with one softmax set per row, got 2"),
        ((Q, K, V), {"dropout_p": 1.0}, "dropout_p must be at least 0 and below 1, got 1.0"),
        ((Q, K, V), {"row_weight": [1.0]}, "row_weight must be a torch tensor, got list"),
        ((Q, K, V), {"row_weight": torch.ones(4, 16)}, "row_weight must have shape (3, 16), got (4, 16)"),
        ((Q, K, V), {"row_weight": ONES.int()}, "row_weight must have a floating-point dtype, got int32"),
        ((Q, K, V), {"row_weight": ONES.to("meta")}, "row_weight must be on the device of q, cpu, got meta"),
    ],
)  # fmt: skip
def test_a_call_is_refused(tensors: tuple[Any, Any, Any], options: dict[str, Any], reason: str) -> None:
    q, k, v = tensors
    assert backend.reasons(q, k, v, PLAN, **options) == [reason]


@pytest.mark.usefixtures("gpu")
def test_the_log_sum_exp_needs_softmax() -> None:
    found = backend.reasons(Q, K, V, one_set(), activation="sigmoid", return_lse=True)
    assert found == ["return_lse needs activation='softmax', got 'sigmoid'"]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_call_is_taken(dtype: torch.dtype) -> None:
    assert backend.reasons(*operands(PLAN, "cpu", dtype=dtype), PLAN, row_weight=weights(PLAN, "cpu")) == []


# -- what happens then --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_gpu")
def test_an_explicit_choice_raises_all_reasons() -> None:
    q, k, v = operands(PLAN, "cpu", head_dim=4, dtype=torch.float64)
    with pytest.raises(BackendError) as caught:
        block_sparse_attention(q, k, v, PLAN, backend="triton")
    assert str(caught.value) == (
        "backend 'triton' cannot run this call: "
        "needs an NVIDIA or AMD GPU, and torch.cuda.is_available() is False; "
        "q, k and v must have one dtype of float32, float16, bfloat16, got float64; "
        "head_dim must be from 8 to 256, got 4"
    )


def test_auto_takes_portable_for_tensors_on_the_cpu() -> None:
    choice = choose_backend(Q, K, V, PLAN)
    assert (choice.name, choice.reasons_passed_over) == ("portable", {})


def dispatcher(backend: str = "auto") -> AttentionDispatcher:
    layout = CanvasLayout(T=2, H=2, W=3, d_model=16, regions={"a": (0, 2, 0, 1, 0, 3), "b": (0, 1, 1, 2, 0, 3)})
    topology = CanvasTopology([Connection("a", "a"), Connection("a", "b")])
    return AttentionDispatcher(topology, layout, d_model=16, n_heads=4, backend=backend)


def test_auto_moves_on_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for tensors on a GPU, with heads of a size that the kernels do not have."""
    monkeypatch.setattr(api, "_preference", lambda q: ("triton", "portable"))
    monkeypatch.setattr(backend, "availability", lambda: (True, "a GPU"))
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    reason = "head_dim must be from 8 to 256, got 4"
    choice = choose_backend(*ODD, PLAN)
    assert choice.name == "portable"
    assert choice.reasons_passed_over == {"triton": [reason]}
    assert choose_backend(Q, K, V, PLAN).name == "triton"

    explanation = dispatcher().explain()  # d_model 16 in 4 heads
    assert [row.runs_on for row in explanation.rows] == ["portable", "portable"]
    assert all(row.reason == f"auto for torch.float32 tensors on cpu; not triton: {reason}" for row in explanation.rows)
    assert f"not triton: {reason}" in str(explanation)


def test_an_explicit_choice_that_cannot_run_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "availability", lambda: (False, "no GPU here"))
    forced = dispatcher("triton")
    rows = forced.explain().rows
    assert {row.runs_on for row in rows} == {"nothing"}
    assert "no GPU here" in rows[0].reason
    with pytest.raises(BackendError, match=r"no GPU here.*head_dim must be from 8 to 256, got 4"):
        forced(torch.randn(1, 12, 16))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 4}, "head_dim must be from 8 to 256, got 4"),
        ({"dtype": torch.float64}, "q, k and v must have one dtype of float32, float16, bfloat16, got float64"),
    ],
)
def test_auto_on_a_gpu(change: dict[str, Any], reason: str) -> None:
    choice = choose_backend(*operands(PLAN, "cuda", **change), PLAN)
    assert (choice.name, choice.reasons_passed_over) == ("portable", {"triton": [reason]})
    assert choose_backend(*operands(PLAN, "cuda"), PLAN).name == "triton"


# -- the numbers that a call is made with -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("set_precision", "expected"),
    [
        (lambda: None, False),
        (lambda: torch.set_float32_matmul_precision("high"), True),
        (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), True),
        (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), True),
    ],
)
def test_tf32_follows_every_switch_of_torch(set_precision: Callable[[], None], expected: bool) -> None:
    """``allow_tf32`` itself raises after ``fp32_precision`` was set."""
    try:
        set_precision()
        assert backend.tf32_allowed() is expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
