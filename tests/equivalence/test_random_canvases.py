"""Random canvases, compiled and computed: whatever the topology, every backend agrees with the reference."""

from __future__ import annotations

from typing import Any

import pytest
from canvas_strategies import layouts, topologies
from hypothesis import given, settings, strategies as st

from canvas_engineering.plan import BlockSparsePlan, Softmax
from equivalence.backends import (
    PORTABLE_JAX,
    PORTABLE_TORCH,
    REFERENCE,
    TRITON_GPU,
    TRITON_INTERPRETED,
    Backend,
)
from equivalence.cases import Options, make_inputs
from equivalence.tolerance import assert_close, round_inputs

BLOCKS: Any = st.sampled_from([8, 16, 32, "auto"])


@st.composite
def plans(draw: st.DrawFn) -> BlockSparsePlan:
    """Plans of 1-D to 3-D canvases: overlaps, periods, every fill mode and mask, both softmax scopes."""
    layout = draw(layouts())
    topology = draw(topologies(layout))
    softmax: Softmax = draw(st.sampled_from(["connection", "joint"]))
    plan = BlockSparsePlan.from_topology(
        topology, layout, softmax=softmax, block_q=draw(BLOCKS), block_kv=draw(BLOCKS), normalize=draw(st.booleans())
    )
    return plan.in_plan_order if draw(st.booleans()) else plan


@st.composite
def options(draw: st.DrawFn, plan: BlockSparsePlan) -> Options:
    activation = draw(st.sampled_from(["softmax", "softmax", "sigmoid"]))
    dropout_p = draw(st.sampled_from([0.0, 0.0, 0.3]))
    return Options(
        activation=activation,
        dropout_p=dropout_p,
        seed=draw(st.integers(0, 2**64 - 1)) if dropout_p else None,
        lse=activation == "softmax" and plan.max_sets <= 1 and draw(st.booleans()),
        override_weight=draw(st.booleans()),
    )


def agree(backend: Backend, data: st.DataObject) -> None:
    plan = data.draw(plans())
    group = data.draw(st.sampled_from([1, 2]))
    inputs = make_inputs(plan, data.draw(st.integers(1, 2)), group, 1, 8, seed=data.draw(st.integers(0, 2**32)))
    dtype = data.draw(st.sampled_from([dtype for dtype in backend.dtypes if dtype != "float16"]))
    inputs, chosen = round_inputs(inputs, dtype), data.draw(options(plan))
    assert_close(backend.run(plan, inputs, dtype, chosen), plan, inputs, chosen, dtype)


@pytest.mark.parametrize("backend", [REFERENCE, PORTABLE_TORCH], ids=str)
@given(data=st.data())
def test_random_canvases(backend: Backend, data: st.DataObject) -> None:
    agree(backend, data)


# Compiling a JAX program for every example takes most of a second each.
@settings(max_examples=8)
@given(data=st.data())
def test_random_canvases_on_jax(data: st.DataObject) -> None:
    agree(PORTABLE_JAX, data)


# Interpreting takes a second an example.
@pytest.mark.interpreted
@settings(max_examples=15)
@given(data=st.data())
def test_random_canvases_interpreted(data: st.DataObject) -> None:
    agree(TRITON_INTERPRETED, data)


@pytest.mark.gpu
@given(data=st.data())
def test_random_canvases_on_the_gpu(data: st.DataObject) -> None:
    agree(TRITON_GPU, data)
