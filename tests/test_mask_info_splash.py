"""JAX's own Splash kernel, in interpret mode, driven by the arrays of ``mask_info``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from jax.experimental.pallas.ops.tpu.splash_attention import (  # noqa: E402
    splash_attention_kernel as splash,
    splash_attention_mask as masks,
)

from canvas_engineering.canvas import CanvasLayout  # noqa: E402
from canvas_engineering.connectivity import CanvasTopology  # noqa: E402
from canvas_engineering.kernels.pallas.mask_info import (  # noqa: E402
    MaskInfo,
    mask_info_from_blocks,
    process_mask,
)
from canvas_engineering.kernels.reference.attention import attention_backward, attention_forward  # noqa: E402
from canvas_engineering.plan import BlockSparsePlan  # noqa: E402

BLOCK, ROWS, COLUMNS, HEADS, HEAD_DIM = 128, 4, 3, 2, 128


def attention_and_gradients(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, dense: np.ndarray, d_out: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Masked attention without scale, ``(H, N, D)``, by its definition: out, dq, dk, dv."""
    scores = np.where(dense, q @ k.swapaxes(1, 2), -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    d_weights = d_out @ v.swapaxes(1, 2)
    d_scores = weights * (d_weights - (weights * d_weights).sum(axis=2, keepdims=True))
    return weights @ v, d_scores @ k, d_scores.swapaxes(1, 2) @ q, weights.swapaxes(1, 2) @ d_out


def shard_of(info: MaskInfo, shard: int, q_seq_shards: int) -> MaskInfo:
    """What one device of a mesh along the queries gets, as ``shard_map`` would cut it."""

    def cut(array: Any) -> Any:
        rows = array.shape[1] // q_seq_shards
        return jnp.asarray(array[:, shard * rows : (shard + 1) * rows])

    return info._replace(
        data_next=cut(info.data_next),
        mask_next=cut(info.mask_next),
        block_mask=cut(info.block_mask),
        partial_mask_blocks=jnp.asarray(info.partial_mask_blocks),
    )


def block_mask(rng: np.random.Generator) -> np.ndarray:
    """``(ROWS * BLOCK, COLUMNS * BLOCK)``: empty and full blocks, and two partial patterns, one of them twice."""
    patterns = rng.random((2, BLOCK, BLOCK)) < 0.4
    kinds = np.array([[3, 0, 2], [0, 1, 0], [2, 3, 1], [0, 0, 3]])
    tiles = np.stack([np.zeros_like(patterns[0]), *patterns, np.ones_like(patterns[0])])[kinds]
    dense = tiles.swapaxes(1, 2).reshape(ROWS * BLOCK, COLUMNS * BLOCK)
    dense[:, 130] = True  # a key for every query: Splash leaves queries without keys undefined
    return dense


def info_from(source: str, dense: np.ndarray, is_dkv: bool, q_seq_shards: int) -> MaskInfo:
    if source == "masks":
        heads = masks.MultiHeadMask([masks.NumpyMask(dense)] * HEADS)
        return process_mask(heads, (BLOCK, BLOCK), is_dkv=is_dkv, q_seq_shards=q_seq_shards)[0]
    tiles = dense.reshape(ROWS, BLOCK, COLUMNS, BLOCK).swapaxes(1, 2)
    row, column = np.nonzero(tiles.any(axis=(2, 3)))
    return mask_info_from_blocks(
        ROWS,
        COLUMNS,
        BLOCK,
        BLOCK,
        row_ptr=np.searchsorted(row, np.arange(ROWS + 1)),
        kv_index=column,
        mask_index=np.where(tiles[row, column].all(axis=(1, 2)), -1, np.arange(len(row))),
        partial_mask_blocks=tiles[row, column],
        is_dkv=is_dkv,
        q_seq_shards=q_seq_shards,
    )


@jax.jit
def splash_attention_and_gradients(fwd: Any, dkv: Any, q: Any, k: Any, v: Any, d_out: Any) -> Any:
    kernel = splash.SplashAttentionKernel(
        fwd,
        fwd,
        dkv,
        block_sizes=splash.BlockSizes(
            block_q=BLOCK,
            block_kv=BLOCK,
            block_kv_compute=BLOCK,
            block_q_dkv=BLOCK,
            block_kv_dkv=BLOCK,
            block_kv_dkv_compute=BLOCK,
            block_q_dq=BLOCK,
            block_kv_dq=BLOCK,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=None,
        interpret=True,
    )
    out, backward = jax.vjp(kernel, q, k, v)
    return out, *backward(d_out)


@pytest.mark.parametrize("source", ["blocks", "masks"])
@pytest.mark.parametrize("q_seq_shards", [1, 2])
def test_splash_kernel_computes_the_masked_attention(source: str, q_seq_shards: int) -> None:
    rng = np.random.default_rng(7)
    dense = block_mask(rng)
    fwd, dkv = (info_from(source, dense, is_dkv, q_seq_shards) for is_dkv in (False, True))
    q, d_out = (rng.standard_normal((HEADS, ROWS * BLOCK, HEAD_DIM)) for _ in range(2))
    k, v = (rng.standard_normal((HEADS, COLUMNS * BLOCK, HEAD_DIM)) for _ in range(2))
    q /= np.sqrt(HEAD_DIM)
    q32, k32, v32, d_out32 = (array.astype(np.float32) for array in (q, k, v, d_out))

    results = []
    shard_len = ROWS * BLOCK // q_seq_shards
    for shard in range(q_seq_shards):
        part = slice(shard * shard_len, (shard + 1) * shard_len)
        results.append(
            splash_attention_and_gradients(
                shard_of(fwd, shard, q_seq_shards),
                shard_of(dkv, shard, q_seq_shards),
                *(q32[:, part], k32, v32, d_out32[:, part]),
            )
        )
    out, dq, dk, dv = (np.stack(shards) for shards in zip(*results, strict=True))
    actual = (np.concatenate(out, axis=1), np.concatenate(dq, axis=1), dk.sum(axis=0), dv.sum(axis=0))

    exact = attention_and_gradients(q, k, v, dense, d_out)
    single = attention_and_gradients(q32, k32, v32, dense, d_out32)
    for name, ours, truth, same in zip(("out", "dq", "dk", "dv"), actual, exact, single, strict=True):
        # As accurate as NumPy is in float32, up to the order of summation.
        bound = 4 * np.abs(same - truth).max()
        assert np.abs(ours - truth).max() <= bound, name


def test_splash_kernel_computes_a_plan() -> None:
    """A topology's plan, its tokens permuted, through ``to_mask_info``: the reference's numbers and gradients."""
    layout = CanvasLayout(T=3, H=10, W=16, d_model=8, regions={"a": (0, 3, 0, 6, 0, 16), "b": (0, 3, 6, 10, 0, 16)})
    topology = CanvasTopology.causal_temporal(["a", "b"])
    plan = BlockSparsePlan.from_topology(topology, layout, softmax="joint", block_q=BLOCK, block_kv=BLOCK)
    assert plan.num_masks
    assert (plan.row_weight[plan.q_tokens >= 0] > 0).all()  # a key for every query
    rng = np.random.default_rng(3)
    q, k, v, d_out = (rng.standard_normal((1, HEADS, plan.num_q, HEAD_DIM)).astype(np.float32) for _ in range(4))
    q /= np.sqrt(HEAD_DIM)

    def to_tiles(x: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return np.where(tokens.ravel()[:, None] >= 0, x[0][:, tokens.ravel()], 0)

    def from_tiles(x: Any, tokens: np.ndarray) -> np.ndarray:
        found = np.zeros(q.shape[1:], np.float32)
        real = tokens.ravel() >= 0
        found[:, tokens.ravel()[real]] = np.asarray(x)[:, real]
        return found

    infos = (jax.tree.map(jnp.asarray, plan.to_mask_info(is_dkv=is_dkv)) for is_dkv in (False, True))
    results = splash_attention_and_gradients(
        *infos,
        *(to_tiles(x, t) for x, t in ((q, plan.q_tokens), (k, plan.kv_tokens), (v, plan.kv_tokens))),
        to_tiles(d_out, plan.q_tokens),
    )
    tokens = (plan.q_tokens, plan.q_tokens, plan.kv_tokens, plan.kv_tokens)
    out, dq, dk, dv = (from_tiles(x, t) for x, t in zip(results, tokens, strict=True))
    grads = attention_backward(q, k, v, plan, d_out, None, scale=1.0)
    truth, _ = attention_forward(q, k, v, plan, scale=1.0)
    dense = np.logical_or.reduce(plan.to_dense()[0], axis=0)
    single = attention_and_gradients(q[0], k[0], v[0], dense, d_out[0])
    exact = (truth[0], grads.q[0], grads.k[0], grads.v[0])
    for name, ours, wanted, same in zip(("out", "dq", "dk", "dv"), (out, dq, dk, dv), exact, single, strict=True):
        # As accurate as NumPy is in float32, up to the order of summation.
        assert np.abs(ours - wanted).max() <= 4 * np.abs(same - wanted).max(), name
