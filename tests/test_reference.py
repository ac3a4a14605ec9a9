"""The reference: the decode loop written once more, dense softmax, gradients by torch's gradcheck, the dropout hash."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from equivalence.cases import BY_NAME, CASES, Case, Inputs, Options
from equivalence.tolerance import assert_close, dense, expected
from numpy.typing import NDArray

from canvas_engineering.attention.api import block_sparse_attention
from canvas_engineering.kernels.reference.attention import attention_backward, attention_forward
from canvas_engineering.kernels.reference.dropout import dropout_bits, fmix, keep_mask, threshold
from canvas_engineering.plan import BlockSparsePlan

Float64 = NDArray[np.float64]


def decode_loop(q: Float64, k: Float64, v: Float64, plan: BlockSparsePlan) -> Float64:
    """The loop of the plan's docstring for one head; a last row stands for padding."""
    q, k, v = (np.concatenate([x, np.zeros_like(x[:1])]) for x in (q, k, v))
    out = np.zeros_like(q)
    for tile in range(plan.num_q_tiles):
        rows = plan.q_tokens[tile]
        for s in range(plan.set_ptr[tile], plan.set_ptr[tile + 1]):
            keys, allowed = [], []
            for e in range(plan.entry_ptr[s], plan.entry_ptr[s + 1]):
                keys.append(plan.kv_tokens[plan.entry_kv[e]])
                allowed.append(plan.tile_mask(plan.entry_mask[e]) & (keys[-1] >= 0))
            out[rows] += plan.row_weight[s][:, None] * softmax_attention(q[rows], k[keys], v[keys], allowed)
    return out[:-1]


def softmax_attention(q: Float64, k: Float64, v: Float64, allowed: list[NDArray[np.bool_]]) -> Float64:
    """``k``, ``v`` ``(entries, block_kv, D)``; one row after the other, on its allowed keys."""
    out = np.zeros_like(q)
    mask = np.concatenate(allowed, axis=1)
    for i, row in enumerate(mask):
        if row.any():
            scores = k.reshape(-1, q.shape[1])[row] @ q[i] / np.sqrt(q.shape[1])
            weights = np.exp(scores - scores.max())
            out[i] = weights @ v.reshape(-1, q.shape[1])[row] / weights.sum()
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_the_decode_loop(case: Case) -> None:
    plan = case.plan()
    inputs = case.inputs(plan)
    out, _ = attention_forward(inputs.q, inputs.k, inputs.v, plan)
    for head in range(case.heads_q):
        kv_head = head // (case.heads_q // case.heads_kv)
        loop = decode_loop(inputs.q[0, head], inputs.k[0, kv_head], inputs.v[0, kv_head], plan)
        np.testing.assert_allclose(out[0, head], loop, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "options",
    [
        Options(override_weight=True),
        Options(activation="sigmoid", override_weight=True),
        Options(dropout_p=0.3, seed=5, scale=0.9),
        Options(lse=True, dropout_p=0.3, seed=5, override_weight=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_dense_attention(case: Case, options: Options) -> None:
    """Dense masks, torch's softmax and torch's autograd in float64: nothing in common with the decode loop."""
    plan = case.plan()
    if options.lse and plan.max_sets > 1:
        options = Options(activation="sigmoid", dropout_p=0.3, seed=2**63)
    inputs = case.inputs(plan)
    right, plain = expected(plan, inputs, options), dense(plan, inputs, options, "float64")
    assert right.keys() == plain.keys()
    for name in right:
        np.testing.assert_allclose(plain[name], right[name], rtol=1e-9, atol=1e-11, err_msg=name)


def tensors(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    arrays = (inputs.q, inputs.k, inputs.v, inputs.row_weight)
    return tuple(torch.from_numpy(x).requires_grad_() for x in arrays)


@pytest.mark.parametrize(("activation", "lse"), [("softmax", True), ("sigmoid", False)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_hand_written_gradients_against_finite_differences(activation: str, lse: bool, dropout_p: float) -> None:
    case = Case("gradcheck", BY_NAME["empty_rows"].build, heads_q=4, heads_kv=2, head_dim=3)
    plan = case.plan(8, 8)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row_weight: torch.Tensor) -> Any:
        result = block_sparse_attention(
            q,
            k,
            v,
            plan,
            backend="reference",
            row_weight=row_weight,
            activation=activation,
            return_lse=lse,
            dropout_p=dropout_p,
            seed=11,
        )
        # Infinite outputs have no finite differences.
        return (result[0], torch.where(result[1].isfinite(), result[1], 0.0)) if lse else result

    assert torch.autograd.gradcheck(call, tensors(case.inputs(plan)), fast_mode=True)


def test_several_sets_against_finite_differences() -> None:
    case = Case("gradcheck", BY_NAME["several_sets"].build, heads_q=2, heads_kv=1, head_dim=2)
    plan = case.plan(8, 8)
    assert torch.autograd.gradcheck(
        lambda q, k, v, w: block_sparse_attention(q, k, v, plan, backend="reference", row_weight=w),
        tensors(case.inputs(plan)),
        fast_mode=True,
    )


def test_tiles_restrict_rows_and_contributions() -> None:
    plan = BY_NAME["permuted"].plan()
    inputs = BY_NAME["permuted"].inputs(plan)
    out, lse = attention_forward(inputs.q, inputs.k, inputs.v, plan)
    some, some_lse = attention_forward(inputs.q, inputs.k, inputs.v, plan, tiles=[2])
    rows = plan.q_tokens[2][plan.q_tokens[2] >= 0]
    np.testing.assert_array_equal(some[:, :, rows], out[:, :, rows])
    np.testing.assert_array_equal(some_lse[:, :, rows], lse[:, :, rows])
    assert not np.delete(some, rows, axis=2).any()
    parts = [
        attention_backward(inputs.q, inputs.k, inputs.v, plan, inputs.grad_out, tiles=[tile])
        for tile in range(plan.num_q_tiles)
    ]
    whole = attention_backward(inputs.q, inputs.k, inputs.v, plan, inputs.grad_out)
    for one, *others in zip(whole, *parts, strict=True):
        np.testing.assert_allclose(sum(others), one, rtol=1e-12, atol=1e-14)


def test_renumbered_plans_drop_by_their_own_numbers() -> None:
    """The tokens of the hash are those of the plan that the caller passed."""
    plan = BY_NAME["permuted"].plan()
    inputs = BY_NAME["permuted"].inputs(plan)
    q_order, kv_order = plan.q_order, plan.kv_order
    q, k, v = inputs.q[:, :, q_order], inputs.k[:, :, kv_order], inputs.v[:, :, kv_order]
    plain, _ = attention_forward(inputs.q, inputs.k, inputs.v, plan)
    same, _ = attention_forward(q, k, v, plan.in_plan_order)
    np.testing.assert_allclose(same, plain[:, :, q_order], rtol=1e-12)
    dropped, _ = attention_forward(inputs.q, inputs.k, inputs.v, plan, dropout_p=0.5, seed=1)
    other, _ = attention_forward(q, k, v, plan.in_plan_order, dropout_p=0.5, seed=1)
    assert np.abs(other - dropped[:, :, q_order]).max() > 0.1


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_torch_and_jax_arrays(framework: str) -> None:
    """The other frameworks get the same numbers in their own types, forward and backward."""
    from equivalence.backends import Backend

    plan = BY_NAME["several_sets"].plan()
    inputs = BY_NAME["several_sets"].inputs(plan)
    backend = Backend("reference", framework)  # type: ignore[arg-type]
    options = Options(override_weight=True, dropout_p=0.2, seed=2**40 + 1)
    assert_close(backend.run(plan, inputs, "float64", options), plan, inputs, options, "float64")
    plan = BY_NAME["window"].plan()
    inputs = BY_NAME["window"].inputs(plan)
    assert_close(backend.run(plan, inputs, "float64", Options(lse=True)), plan, inputs, Options(lse=True), "float64")


# -- dropout ------------------------------------------------------------------------------------------------


def test_the_finaliser_is_murmur3s() -> None:
    """Known answers: fmix32 as in MurmurHash3_x86_32; an empty input with seed 1 hashes to fmix32(1)."""
    assert fmix(np.array([0, 1, 0xFFFFFFFF], np.uint32)).tolist() == [0, 0x514E28B7, 0x81F16F39]


def test_dropout_bits_are_fixed() -> None:
    """Written out with Python integers; other backends and saved checkpoints of a run depend on these bits."""

    def mix(h: int) -> int:
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    seed, bh, q, k = 0x0123456789ABCDEF, 5, 70_000, 3_000_000_000
    row = mix(mix(0x89ABCDEF ^ bh * 0x9E3779B1 % 2**32) ^ q * 0x85EBCA77 % 2**32 ^ 0x01234567 * 0x27D4EB2F % 2**32)
    assert int(dropout_bits(seed, bh, q, k)) == mix(row ^ k * 0xC2B2AE3D % 2**32)
    assert dropout_bits(0, 0, np.arange(3), 0).tolist() == [0, 3101407162, 3966133510]


def test_dropout_keeps_the_wanted_share() -> None:
    index = np.arange(500)
    for p in (0.1, 0.5, 0.9):
        keep = keep_mask(3, p, 0, index[:, None], index)
        # Five standard deviations of a binomial distribution.
        assert abs(keep.mean() - (1 - p)) < 5 * np.sqrt(p * (1 - p) / keep.size)
        rows, columns = keep.mean(axis=1), keep.mean(axis=0)
        for share in (rows, columns):
            assert abs(share.std() / np.sqrt(p * (1 - p) / index.size) - 1) < 0.2


def test_dropout_differs_between_seeds_heads_rows_and_keys() -> None:
    index = np.arange(64)

    def keep(seed: int, bh: int, shift_q: int = 0, shift_k: int = 0) -> NDArray[np.bool_]:
        return keep_mask(seed, 0.5, bh, index[:, None] + shift_q, index + shift_k)

    base = keep(1, 0)
    for other in (keep(2, 0), keep(1 + 2**32, 0), keep(1, 1), keep(1, 0, shift_q=1), keep(1, 0, shift_k=1)):
        assert abs((base == other).mean() - 0.5) < 0.05


def test_threshold() -> None:
    assert threshold(0.0) == 0
    assert threshold(0.5) == 2**31
    assert threshold(1 - 2**-40) == 2**32 - 1
