"""Gradients of the JAX backends against differences, in float64: independent of the reference's own derivation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.test_util import check_grads

from canvas_engineering.attention.api import block_sparse_attention
from equivalence.cases import BY_NAME, make_inputs


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("several_sets", {}),
        ("window", {"return_lse": True}),
        ("empty_rows", {}),
        ("permuted", {"activation": "sigmoid", "scale": -0.4}),
        ("shared_keys", {"dropout_p": 0.3, "seed": 7}),
        ("joint", {"return_lse": True}),
    ],
    ids=str,
)
def test_gradients_agree_with_differences(name: str, options: dict[str, Any]) -> None:
    """Of queries, keys, values and row weights; rows without keys, whose log-sum-exp is -inf, left out."""
    with jax.enable_x64(True):
        case = BY_NAME[name]
        plan = case.plan(16, 16)
        inputs = make_inputs(plan, 1, case.heads_q, case.heads_kv, 4, seed=0)
        operands = [jnp.asarray(x, jnp.float64) for x in (inputs.q, inputs.k, inputs.v, inputs.row_weight)]

        def call(q: Array, k: Array, v: Array, row_weight: Array) -> Any:
            result = block_sparse_attention(q, k, v, plan, backend="portable", row_weight=row_weight, **options)
            if not options.get("return_lse"):
                return result
            out, lse = result
            return out, jnp.where(jnp.isfinite(lse), lse, 0.0)

        found = jax.jit(call)(*operands)
        assert all(np.isfinite(leaf).all() and leaf.dtype == np.float64 for leaf in jax.tree.leaves(found))
        check_grads(jax.jit(call), operands, order=1, modes=["rev"])
