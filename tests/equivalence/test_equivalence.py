"""Every backend computes what the reference computes, or refuses."""

from __future__ import annotations

from typing import Any

import pytest

from canvas_engineering.errors import BackendError
from equivalence.backends import ALL_DTYPES, BACKENDS, Backend
from equivalence.cases import BY_NAME, CASES, Case
from equivalence.tolerance import Options, assert_close, round_inputs

WEIGHT = Options(override_weight=True)
SIGMOID = Options(activation="sigmoid", override_weight=True)
DROPOUT = Options(dropout_p=0.25, seed=0x1234_5678_9ABC_DEF0, override_weight=True)
LSE = Options(lse=True)
#: Every case once; every option on the cases with the most to go wrong.
COMBINATIONS = (
    *((case, WEIGHT) for case in CASES),
    *((BY_NAME[name], Options()) for name in ("several_sets", "topology", "in_plan_order")),
    *((BY_NAME[name], SIGMOID) for name in ("several_sets", "empty_rows", "joint")),
    *((BY_NAME[name], DROPOUT) for name in ("several_sets", "permuted", "window")),
    (BY_NAME["permuted"], Options(activation="sigmoid", dropout_p=0.5, seed=7)),
    *((BY_NAME[name], LSE) for name in ("dense", "window", "empty_rows", "empty", "joint")),
    (BY_NAME["random"], Options(lse=True, dropout_p=0.1, seed=1, scale=0.7)),
)


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest) -> Backend:
    one: Backend = request.param
    if one.unavailable:
        pytest.skip(one.unavailable)
    return one


def check(backend: Backend, case: Case, dtype: str, options: Options) -> None:
    """Compare with the reference, or see that a declared gap is refused."""
    plan = case.plan(backend.block_q, backend.block_kv)
    inputs = round_inputs(case.inputs(plan), dtype)
    if dtype not in backend.dtypes or backend.refuses(plan, inputs, dtype, options):
        with pytest.raises(BackendError):
            backend.run(plan, inputs, dtype, options)
        return
    assert_close(backend.run(plan, inputs, dtype, options), plan, inputs, options, dtype)


@pytest.mark.parametrize(("case", "options"), COMBINATIONS, ids=str)
def test_values_and_gradients(backend: Backend, case: Case, options: Options) -> None:
    check(backend, case, "float32", options)


@pytest.mark.parametrize("dtype", [dtype for dtype in ALL_DTYPES if dtype != "float32"])
@pytest.mark.parametrize("name", ["several_sets", "window"])
def test_dtypes(backend: Backend, name: str, dtype: str) -> None:
    check(backend, BY_NAME[name], dtype, Options(override_weight=True))


@pytest.mark.parametrize("head_dim", [1, 8, 24, 128])
def test_head_dims(backend: Backend, head_dim: int) -> None:
    case = Case("head_dim", BY_NAME["several_sets"].build, heads_q=1, heads_kv=1, head_dim=head_dim)
    check(backend, case, "float32", Options())


@pytest.mark.parametrize("heads", [(4, 1), (6, 2)], ids=str)
def test_grouped_heads(backend: Backend, heads: tuple[int, int]) -> None:
    case = Case("grouped", BY_NAME["window"].build, batch=2, heads_q=heads[0], heads_kv=heads[1])
    check(backend, case, "float32", Options(lse=True, override_weight=True, dropout_p=0.2, seed=3))


def test_empty_batch(backend: Backend) -> None:
    case = Case("empty_batch", BY_NAME["several_sets"].build, batch=0)
    plan = case.plan(backend.block_q, backend.block_kv)
    inputs = round_inputs(case.inputs(plan), "float32")
    arrays: Any = backend.run(plan, inputs, "float32", Options(override_weight=True))
    assert {name: array.shape for name, array in arrays.items()} == {
        "out": inputs.q.shape,
        "dq": inputs.q.shape,
        "dk": inputs.k.shape,
        "dv": inputs.v.shape,
        "drow_weight": plan.row_weight.shape,
    }
    assert not arrays["drow_weight"].any()


def test_large_scores_do_not_overflow(backend: Backend) -> None:
    """Scores far beyond exp's range: the maximum is subtracted first."""
    check(backend, BY_NAME["several_sets"], "float32", Options(scale=40.0))
    check(backend, BY_NAME["window"], "float32", Options(lse=True, scale=-40.0))
