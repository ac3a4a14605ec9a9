"""The canvases that the package ships, as a dispatcher compiles them (tests of the command line cover their plans)."""

from __future__ import annotations

from pathlib import Path

import pytest

from canvas_engineering.dispatch import AttentionDispatcher
from canvas_engineering.plan import BlockSparsePlan
from canvas_engineering.schema import CanvasSchema

FOLDER = Path(__file__).parents[1] / "examples" / "canvases"


def shipped(name: str) -> CanvasSchema:
    return CanvasSchema.from_json(FOLDER / f"{name}.json")


@pytest.mark.parametrize("name", ["computer_use", "computer_use_small", "multi_frequency", "multi_robot"])
def test_a_dispatcher_with_one_function_visits_the_tiles_of_the_topology(name: str) -> None:
    """It keeps one order for all of its plans, which must not cost the alignment of frames with tiles."""
    schema = shipped(name)
    assert schema.topology is not None
    plan = BlockSparsePlan.from_topology(schema.topology, schema.layout)
    (call,) = AttentionDispatcher(schema.topology, schema.layout, d_model=8, n_heads=1).schedule.plan_calls
    own = call.plan
    assert (own.block_q, own.block_kv, own.num_entries) == (plan.block_q, plan.block_kv, plan.num_entries)
