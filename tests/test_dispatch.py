"""The dispatcher against a plain loop over groups, and everything a declaration can ask of it."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from canvas_strategies import layouts, topologies
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from canvas_engineering.attention import ATTENTION_REGISTRY, register_attention
from canvas_engineering.attention.base import split_heads
from canvas_engineering.attention.patterned import LocalAttention, RandomFixedAttention
from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.connectivity import CanvasTopology, Connection
from canvas_engineering.cortex import CortexRegistry, CortexSpec
from canvas_engineering.dispatch import AttentionDispatcher
from canvas_engineering.errors import BackendError, CanvasError, PlanError
from canvas_engineering.groups import resolve_groups
from canvas_engineering.identity import IdentitySpec
from canvas_engineering.masks import MaskSpec
from canvas_engineering.nn.residuals import ResidualAccumulator
from canvas_engineering.program import CanvasProgram, ConnectionProgram, RegionProgram
from canvas_engineering.residuals import ResidualSpec
from canvas_engineering.schema import CanvasSchema

WIDTH = 8
FUNCTIONS = sorted(set(ATTENTION_REGISTRY) - {"cogvideox", "self_attention"})
Summaries = Mapping[str, Mapping[str, float]]


def randomize(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def canvas(layout: CanvasLayout, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, layout.num_positions, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attend(module: nn.Module, queries: Tensor, keys: Tensor, number: int) -> Tensor:
    """One group by one function; a random pattern depends on the group's number."""
    if not isinstance(module, RandomFixedAttention):
        return module(queries, keys, keys)
    index = torch.from_numpy(module.key_pattern(queries.shape[1], keys.shape[1], number).index)
    allowed = torch.zeros(queries.shape[1], keys.shape[1], dtype=torch.bool).scatter(1, index, True)
    q = split_heads(module.q_proj(queries), module.n_heads)
    k, v = (split_heads(project(keys), module.n_heads) for project in (module.k_proj, module.v_proj))
    scores = (q @ k.transpose(-2, -1) * module.scale).masked_fill(~allowed, -torch.inf)
    return module.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def by_hand(
    dispatcher: AttentionDispatcher,
    x: Tensor,
    active: Collection[str] | None = None,
    summaries: Summaries | None = None,
) -> Tensor:
    """SEMANTICS written as a loop over groups."""
    total, added = torch.zeros_like(x), torch.zeros(x.shape[1], dtype=x.dtype)
    gated, was_gated = torch.zeros_like(x), torch.zeros(x.shape[1], dtype=torch.bool)
    replaced: dict[int, Tensor] = {}
    edges = {edge.index: (i, edge) for i, edge in enumerate(dispatcher.edges)}
    numbers: dict[str, int] = {}
    groups = resolve_groups(
        dispatcher.topology,
        dispatcher.layout,
        program=dispatcher.program,
        skip_temporal=dispatcher.skip_temporal,
        split_masks=True,
    )
    for group in groups:
        place, edge = edges[group.connection]
        number = numbers.setdefault(edge.fn, 0)
        if not edge.needs_own_output:
            numbers[edge.fn] += 1
        if active is not None and edge.src not in active:
            continue
        if edge.trigger is not None and not edge.trigger.fires(summaries):
            continue
        keys = x[:, group.cols]
        if edge.slots:
            keys = dispatcher.slot_modules[dispatcher._slot_names[edge.dst]](keys)
        contribution = group.weight * attend(dispatcher.fn_modules[edge.fn], x[:, group.rows], keys, number)
        if edge.write_mode == "add":
            total[:, group.rows] = total[:, group.rows] + contribution
            added[group.rows] += group.weight
        elif edge.write_mode == "gate":
            gate = torch.sigmoid(dispatcher.gates[dispatcher._gate_names[place]])
            gated[:, group.rows] = gated[:, group.rows] + gate * contribution
            was_gated[group.rows] = True
        else:
            layer = replaced.setdefault(place, torch.full_like(x, torch.nan))
            layer[:, group.rows] = torch.nan_to_num(layer[:, group.rows]) + contribution
    out = torch.where(added[:, None] > 0, total / added.clamp(min=1e-30)[:, None], torch.zeros_like(x)) + gated
    out = torch.where(((added > 0) | was_gated)[:, None], out, x)
    for layer in replaced.values():
        out = torch.where(torch.isnan(layer), out, layer)
    return out


def assert_like_by_hand(
    dispatcher: AttentionDispatcher,
    x: Tensor,
    active: Collection[str] | None = None,
    summaries: Summaries | None = None,
) -> None:
    """Outputs, and gradients of the input and every parameter."""
    results = []
    for run in (dispatcher, lambda *args: by_hand(dispatcher, *args)):
        leaf = x.clone().requires_grad_()
        dispatcher.zero_grad()
        y = run(leaf, active, summaries)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        (y * weights).sum().backward()
        results.append((y.detach(), leaf.grad, {n: p.grad for n, p in dispatcher.named_parameters()}))
    (y, dx, dp), (want_y, want_dx, want_dp) = results
    # Row weights are float32, whatever the dtype of the canvas.
    torch.testing.assert_close(y, want_y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx, want_dx, rtol=1e-6, atol=1e-6)
    for name, parameter in dispatcher.named_parameters():
        got, want = (torch.zeros_like(parameter) if g is None else g for g in (dp[name], want_dp[name]))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=f"gradient of {name}")


REGIONS: dict[str, tuple[int, ...] | RegionSpec] = {
    "a": RegionSpec((0, 3, 0, 3)),
    "b": RegionSpec((0, 3, 2, 5)),  # overlaps a
    "slow": RegionSpec((0, 2, 5, 6), period=2),
}
LAYOUT = CanvasLayout(T=3, spatial_shape=(7,), d_model=WIDTH, regions=REGIONS)


def make(connections: list[Connection], **options: Any) -> AttentionDispatcher:
    dispatcher = AttentionDispatcher(CanvasTopology(connections), LAYOUT, WIDTH, n_heads=2, **options).double()
    randomize(dispatcher)
    return dispatcher


def program(**options: Any) -> CanvasProgram:
    return CanvasProgram(schema=CanvasSchema(layout=LAYOUT), **options)


# -- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("fn", FUNCTIONS)
def test_every_function_over_every_kind_of_edge(fn: str, backend: str) -> None:
    tile = MaskSpec(kind="tile", tile_shape=(2,))
    dispatcher = make(
        [
            Connection("a", "a", fn=fn, t_src=0, t_dst=0),
            Connection("a", "a", fn=fn, t_src=0, t_dst=-1, weight=0.5),
            Connection("a", "b", fn=fn, mask=tile),
            Connection("b", "slow", fn=fn, t_src=0, t_dst=0, temporal_fill="interpolate"),  # type: ignore[arg-type]
            Connection("slow", "b", fn=fn, weight=2.0),
            Connection("b", "a", t_src=0, t_dst=0),
        ],
        backend=backend,
    )
    assert_like_by_hand(dispatcher, canvas(LAYOUT))


@settings(max_examples=25)
@given(st.data())
def test_random_canvases(data: st.DataObject) -> None:
    layout = data.draw(layouts(max_size=3))
    topology = data.draw(topologies(layout))
    names = st.sampled_from(
        ["cross_attention", "sigmoid_attention", "local_attention", "random_fixed", "mixture", "pooling"]
    )
    modes = st.sampled_from(["add", "add", "gate", "replace"])
    edges = [
        Connection(**{**vars(c), "fn": data.draw(names), "write_mode": data.draw(modes)}) for c in topology.connections
    ]
    dispatcher = AttentionDispatcher(CanvasTopology(edges), layout, WIDTH, n_heads=2).double()
    randomize(dispatcher)
    active = data.draw(st.none() | st.sets(st.sampled_from(sorted(layout.regions))))
    assert_like_by_hand(dispatcher, canvas(layout), active)


def test_write_modes_meet_on_one_row() -> None:
    edges = [
        Connection("a", "a", weight=3.0),
        Connection("a", "b", weight=1.0),
        Connection("a", "slow", write_mode="gate", weight=2.0),
        Connection("b", "a", write_mode="gate"),
        Connection("a", "b", t_src=2, write_mode="replace", fn="pooling"),
        Connection("a", "a", t_src=2, t_dst=0, write_mode="replace", weight=0.5),
        Connection("slow", "slow", fn="none"),
        Connection("slow", "a"),
    ]
    dispatcher = make(edges)
    assert_like_by_hand(dispatcher, canvas(LAYOUT))
    assert set(dict(dispatcher.gates.named_parameters())) == {"a->slow:cross_attention", "b->a:cross_attention"}


def test_gates_start_at_one_half() -> None:
    topology = CanvasTopology([Connection("a", "b", write_mode="gate")])
    dispatcher = AttentionDispatcher(topology, LAYOUT, WIDTH, n_heads=2)
    assert [gate.item() for gate in dispatcher.gates.parameters()] == [0.0]


def test_rows_that_nothing_wrote_pass_through_bit_identical() -> None:
    dispatcher = make([Connection("a", "b"), Connection("slow", "b", weight=0.0), Connection("b", "a", fn="copy")])
    x = canvas(LAYOUT)
    y = dispatcher(x)
    a, b = LAYOUT.region_indices("a"), LAYOUT.region_indices("b")
    untouched = sorted(set(range(LAYOUT.num_positions)) - set(a) - set(b))
    assert torch.equal(y[:, untouched], x[:, untouched])
    assert not torch.equal(y[:, a], x[:, a])
    inactive = dispatcher(x, active_regions={"b"})
    only_a = sorted(set(a) - set(b))
    assert torch.equal(inactive[:, only_a], x[:, only_a])
    assert torch.equal(dispatcher(x, active_regions=set()), x)


def test_a_row_whose_keys_are_all_out_of_reach_gives_only_the_bias() -> None:
    """Local attention with a window that holds no key: zero before the output projection, never NaN."""
    layout = CanvasLayout(T=1, spatial_shape=(12,), d_model=WIDTH, regions={"q": (0, 1, 0, 10), "k": (0, 1, 10, 12)})
    dispatcher = AttentionDispatcher(CanvasTopology([Connection("q", "k", fn="local_attention")]), layout, WIDTH, 2)
    local = dispatcher.fn_modules["local_attention"]
    assert isinstance(local, LocalAttention)
    local.window_size = 2
    dispatcher = dispatcher.double()
    randomize(dispatcher)
    dispatcher._schedule_seeds = None  # the window was changed after compiling
    y = dispatcher(canvas(layout))
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y[:, 3], local.out_proj.bias.expand(2, -1))


@pytest.mark.parametrize("fn", ["cross_attention", "sigmoid_attention", "mixture", "gated", "random_fixed"])
def test_numpy_input_runs_in_the_reference(fn: str) -> None:
    dispatcher = make([Connection("a", "b", fn=fn), Connection("b", "a", fn=fn, t_src=0, t_dst=-1)]).float()
    x = canvas(LAYOUT, dtype=torch.float32)
    got = dispatcher(x.numpy())
    assert isinstance(got, np.ndarray)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, dispatcher(x).detach().numpy(), atol=1e-5)
    assert dispatcher(x.double().numpy()).dtype == np.float64


def test_dropout_is_reproducible_and_off_in_evaluation() -> None:
    dispatcher = AttentionDispatcher(CanvasTopology.dense(["a", "b"]), LAYOUT, WIDTH, 2, dropout=0.5)
    x = canvas(LAYOUT, dtype=torch.float32)
    torch.manual_seed(3)
    first = dispatcher(x)
    torch.manual_seed(3)
    assert torch.equal(dispatcher(x), first)
    assert not torch.equal(dispatcher(x), first)
    dispatcher.eval()
    assert torch.equal(dispatcher(x), dispatcher(x))


def test_backends_drop_the_same_pairs() -> None:
    outputs = []
    for backend in ("portable", "reference"):
        dispatcher = AttentionDispatcher(CanvasTopology.dense(["a", "b"]), LAYOUT, WIDTH, 2, 0.4, backend=backend)
        randomize(dispatcher)
        torch.manual_seed(5)
        outputs.append(dispatcher(canvas(LAYOUT, dtype=torch.float32)))
    torch.testing.assert_close(*outputs)


def test_half_precision_and_autocast() -> None:
    dispatcher = AttentionDispatcher(CanvasTopology.causal_temporal(["a", "b"]), LAYOUT, WIDTH, 2)
    x = canvas(LAYOUT, dtype=torch.float32)
    exact = dispatcher(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = dispatcher(x)
    assert (mixed - exact).abs().max() < 0.1
    half = deepcopy(dispatcher).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


# -- which function, which edge ------------------------------------------------------------------------------


def functions(dispatcher: AttentionDispatcher) -> list[str]:
    return [edge.fn for edge in dispatcher.edges]


def test_the_function_of_a_connection() -> None:
    layout = CanvasLayout(
        T=1,
        spatial_shape=(4,),
        d_model=WIDTH,
        regions={"a": (0, 1, 0, 2), "g": RegionSpec((0, 1, 2, 4), default_attn="gated")},
    )
    edges = [
        Connection("a", "g"),
        Connection("a", "g", fn="pooling", operator="write"),
        Connection("g", "a", operator="compress"),
        Connection("a", "a", operator="compress"),
        Connection("a", "g", operator="retrieve"),
        Connection("a", "a", operator="act"),
        Connection("a", "a", operator="something new"),
    ]
    dispatcher = AttentionDispatcher(CanvasTopology(edges), layout, WIDTH, 2)
    expected = ["cross_attention", "pooling", "gated", "pooling", "cross_attention", "copy", "cross_attention"]
    assert functions(dispatcher) == expected
    assert [edge.write_mode for edge in dispatcher.edges] == ["add", "replace", "add", "add", "add", "replace", "add"]


def test_inside_a_cortex_its_backend_wins() -> None:
    registry = CortexRegistry()
    registry.register(CortexSpec("visual", local_backend="linear_attention"))
    registry.assign("a", "visual")
    registry.assign("b", "visual")
    edges = [Connection("a", "b", fn="pooling"), Connection("a", "slow", fn="pooling")]
    dispatcher = make(edges, cortex_registry=registry)
    assert functions(dispatcher) == ["linear_attention", "pooling"]
    assert_like_by_hand(dispatcher, canvas(LAYOUT))


def test_a_program_decides_mode_trigger_and_mask() -> None:
    connections = {
        ("a", "b"): ConnectionProgram(write_mode="gate", trigger="b.err.prediction > 0.25 && a.novelty <= 1"),
        ("b", "a"): ConnectionProgram(operator="act"),
        ("slow", "a"): ConnectionProgram(mask_spec=MaskSpec(kind="tile", tile_shape=(1,))),
    }
    edges = [Connection("a", "b"), Connection("b", "a"), Connection("slow", "a"), Connection("a", "a")]
    dispatcher = make(edges, program=program(connections=connections))
    assert [edge.write_mode for edge in dispatcher.edges] == ["gate", "replace", "add", "add"]
    x = canvas(LAYOUT)
    firing = {"b.err": {"prediction": 0.3}, "a": {"novelty": 1.0}}
    assert_like_by_hand(dispatcher, x, summaries=firing)
    assert_like_by_hand(dispatcher, x, summaries={"b.err": {"prediction": 0.2}, "a": {"novelty": 1.0}})
    assert not torch.equal(dispatcher(x, summaries=firing), dispatcher(x))
    assert torch.equal(dispatcher(x, summaries={"b.err": {}}), dispatcher(x)), "a missing summary does not fire"


def test_slot_banks_stand_in_for_keys() -> None:
    regions = {"b": RegionProgram(identity=IdentitySpec(mode="tracklet", slot_capacity=3, birth_death=True))}
    edges = [Connection("a", "b", t_src=0, t_dst=0), Connection("a", "a"), Connection("slow", "b", fn="pooling")]
    dispatcher = make(edges, program=program(regions=regions))
    assert dispatcher.slot_modules["b"].slots.shape == (3, WIDTH)
    assert_like_by_hand(dispatcher, canvas(LAYOUT))


def test_residuals_are_accumulated_for_residual_carriers() -> None:
    regions: dict[str, tuple[int, ...] | RegionSpec] = {**REGIONS, "err": RegionSpec((0, 3, 6, 7), carrier="residual")}
    layout = CanvasLayout(T=3, spatial_shape=(7,), d_model=WIDTH, regions=regions)
    accumulator = ResidualAccumulator(["err", "b"], ResidualSpec(kinds=("prediction",), reduce="mean", decay=0.5))
    edges = [Connection("a", "err"), Connection("a", "b"), Connection("b", "err", t_src=0, t_dst=0)]
    topology = CanvasTopology(edges)
    dispatcher = AttentionDispatcher(topology, layout, WIDTH, 2, residual_accumulator=accumulator).double()
    randomize(dispatcher)
    x = canvas(layout)
    dispatcher(x)
    rows, cols = layout.region_indices("a"), layout.region_indices("err")
    attended = dispatcher.fn_modules["cross_attention"](x[:, rows], x[:, cols], x[:, cols])
    expected = 0.5 * (attended - x[:, rows]).mean().item()
    summaries = dispatcher.summaries or {}
    assert summaries["err"]["prediction"] == pytest.approx(expected, rel=1e-5)
    assert summaries["b"]["prediction"] == 0.0, "b is no residual carrier"
    assert_like_by_hand(dispatcher, x)
    assert AttentionDispatcher(topology, layout, WIDTH, 2).summaries is None


def test_triggers_read_the_accumulator_when_no_summaries_are_given() -> None:
    accumulator = ResidualAccumulator(["b"], ResidualSpec(kinds=("prediction",)))
    connections = {("a", "b"): ConnectionProgram(trigger="b.prediction > 0.1")}
    dispatcher = make(
        [Connection("a", "b")], program=program(connections=connections), residual_accumulator=accumulator
    )
    x = canvas(LAYOUT)
    assert torch.equal(dispatcher(x), x)
    accumulator.update("b", torch.full((4,), 100.0))
    assert not torch.equal(dispatcher(x), x)


def test_a_user_s_own_function() -> None:
    class Shift(nn.Module):
        def __init__(self, d_model: int, n_heads: int = 4, dropout: float = 0.0) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(d_model))

        def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return queries + self.shift * values.mean(dim=1, keepdim=True)

    register_attention("shift_for_test", Shift)
    try:
        edges = [Connection("a", "b", fn="shift_for_test"), Connection("b", "a", fn="shift_for_test", t_src=0, t_dst=0)]
        assert_like_by_hand(make(edges), canvas(LAYOUT))
    finally:
        del ATTENTION_REGISTRY["shift_for_test"]


def test_random_patterns_follow_their_seed_through_a_checkpoint() -> None:
    edges = [Connection("a", "b", fn="random_fixed"), Connection("b", "a", fn="random_fixed")]

    def build(seed: int) -> AttentionDispatcher:
        torch.manual_seed(seed)
        dispatcher = AttentionDispatcher(CanvasTopology(edges), LAYOUT, WIDTH, 2)
        random = dispatcher.fn_modules["random_fixed"]
        assert isinstance(random, RandomFixedAttention)
        random.n_random = 2
        dispatcher._schedule_seeds = None
        randomize(dispatcher)
        return dispatcher

    first, second = build(1), build(2)
    x = canvas(LAYOUT, dtype=torch.float32)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


# -- state and structure -------------------------------------------------------------------------------------


def test_equal_pairs_keep_their_own_offsets() -> None:
    """0.5.0 used the first one's offsets for both, so causal_temporal never read the previous frame."""
    dispatcher = make(CanvasTopology.causal_temporal(["a"]).connections)
    x = canvas(LAYOUT).requires_grad_()
    frame1 = LAYOUT.region_indices_at_t("a", 1)
    dispatcher(x)[:, frame1].sum().backward()
    frame0 = LAYOUT.region_indices_at_t("a", 0)
    assert x.grad is not None
    assert x.grad[:, frame0].abs().sum() > 0


def test_active_regions_do_not_recompile() -> None:
    dispatcher = make([*CanvasTopology.dense(["a", "b"]).connections, Connection("slow", "a"), Connection("slow", "b")])
    x = canvas(LAYOUT)
    plans = [call.plan for call in dispatcher.schedule.plan_calls]
    for active in ({"a"}, {"b"}, {"a", "b"}, None):
        dispatcher(x, active)
    assert all(one.plan is other for one, other in zip(dispatcher.schedule.plan_calls, plans, strict=True))
    for number in range(1, 2 ** len(dispatcher.edges)):
        dispatcher._state(tuple(bool(number >> bit & 1) for bit in range(len(dispatcher.edges))), torch.device("cpu"))
    assert len(dispatcher._states) <= 32, "weights of old states are let go"


def test_one_plan_per_function_and_no_call_per_group() -> None:
    dispatcher = make([*CanvasTopology.causal_temporal(["a", "b"]).connections, Connection("slow", "a", fn="pooling")])
    assert len(dispatcher.schedule.plan_calls) == 1
    assert len(dispatcher.schedule.direct_calls) == 1


def test_copies_and_pickles_compute_the_same() -> None:
    dispatcher = make(CanvasTopology.causal_temporal(["a", "b"]).connections)
    x = canvas(LAYOUT)
    expected = dispatcher(x)
    torch.testing.assert_close(deepcopy(dispatcher)(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(dispatcher))(x), expected)


def test_explain_names_backend_and_reason() -> None:
    edges = [Connection("a", "b"), Connection("b", "a", fn="pooling"), Connection("slow", "slow", t_src=9)]
    explanation = make(edges).explain()
    rows = explanation.rows
    assert [(row.fn, row.runs_on) for row in rows][:2] == [("cross_attention", "portable"), ("pooling", "framework")]
    assert "auto for torch.float64 tensors on cpu" in rows[0].reason
    assert "batched by group shape" in rows[1].reason
    assert rows[2].reason == "it has no groups"
    text = str(explanation)
    assert "a -> b" in text
    assert "plan of cross_attention" in text
    assert explanation.as_dict()["connections"][0]["src"] == "a"
    assert str(AttentionDispatcher(CanvasTopology(), LAYOUT, WIDTH).explain()) == "no connections"
    forced = make(edges, backend="triton").explain()
    assert forced.rows[0].runs_on in ("triton", "nothing")


def test_repr_counts_functions() -> None:
    assert "2 connections (cross_attention=1, pooling=1), backend='auto'" in repr(
        make([Connection("a", "b"), Connection("a", "b", fn="pooling")])
    )


def test_an_empty_topology_passes_everything_through() -> None:
    x = canvas(LAYOUT)
    y = AttentionDispatcher(CanvasTopology(), LAYOUT, WIDTH)(x)
    assert torch.equal(y, x)
    assert y is not x


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("connections", "options", "message"),
    [
        ([Connection("a", "b", fn="no such")], {}, r"unknown attention function 'no such'; known: .*cross_attention"),
        ([Connection("a", "b")], {"backend": "cuda"}, "backend must be 'auto' or one of 'triton'.*got 'cuda'"),
        ([Connection("a", "b")], {"n_heads": 3}, "d_model must be divisible by n_heads, got d_model=8, n_heads=3"),
        ([Connection("a", "b")], {"dropout": 1.0}, r"dropout must be in \[0, 1\), got dropout=1.0"),
        ([Connection("a", "b")], {"block_q": 12}, 'block_q must be "auto" or a multiple of 8'),
    ],
)
def test_bad_declarations_are_named(connections: list[Connection], options: dict[str, Any], message: str) -> None:
    with pytest.raises((CanvasError, PlanError), match=message):
        AttentionDispatcher(CanvasTopology(connections), LAYOUT, **{"d_model": WIDTH, "n_heads": 2, **options})


def test_a_malformed_trigger_is_refused_at_construction() -> None:
    connections = {("a", "b"): ConnectionProgram.__new__(ConnectionProgram)}
    for name, value in {"operator": "attend", "trigger": "b.err >> 3", "write_mode": "add", "mask_spec": None}.items():
        object.__setattr__(connections["a", "b"], name, value)
    with pytest.raises(CanvasError, match=r"connection 0 \('a' -> 'b'\): trigger.*b\.err >> 3"):
        make([Connection("a", "b")], program=program(connections=connections))


def test_an_unknown_region_warns_once_and_is_skipped() -> None:
    topology = CanvasTopology([Connection("a", "ghost"), Connection("a", "b", fn="pooling"), Connection("a", "b")])
    with pytest.warns(UserWarning, match="'ghost'") as caught:
        dispatcher = AttentionDispatcher(topology, LAYOUT, WIDTH, 2)
    assert len(caught) == 1
    assert functions(dispatcher) == ["pooling", "cross_attention"]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, WIDTH), r"x must have shape \(B, 21, 8\), got \(2, 3, 8\)"),
        (torch.zeros(21, WIDTH), r"x must have shape \(B, 21, 8\), got \(21, 8\)"),
        (torch.zeros(2, 21, 4), r"x must have shape \(B, 21, 8\), got \(2, 21, 4\)"),
        (torch.zeros(2, 21, WIDTH, dtype=torch.int64), "x must have a floating-point dtype, got torch.int64"),
        (torch.zeros(2, 21, WIDTH, dtype=torch.float16), "x must have the parameters' dtype torch.float32"),
        (torch.zeros(2, 21, WIDTH, device="meta"), "x must be on the parameters' device cpu, got meta"),
        (np.zeros((2, 21, WIDTH), np.int64), "x must have a floating-point dtype, got int64"),
        ([[0.0]], "x must be a torch tensor, JAX array or NumPy array, got list"),
    ],
)
def test_bad_canvases_are_named(x: Any, message: str) -> None:
    dispatcher = AttentionDispatcher(CanvasTopology([Connection("a", "b")]), LAYOUT, WIDTH, 2)
    with pytest.raises(CanvasError, match=message):
        dispatcher(x)


def test_unknown_active_regions_are_named() -> None:
    dispatcher = make([Connection("a", "b")])
    with pytest.raises(CanvasError, match=r"active_regions must be region names \['a', 'b', 'slow'\], got 'z'"):
        dispatcher(canvas(LAYOUT), {"a", "z"})


def test_an_explicit_backend_never_falls_back() -> None:
    dispatcher = make([Connection("a", "b")], backend="pallas")
    with pytest.raises(BackendError, match="backend 'pallas' cannot run this call"):
        dispatcher(canvas(LAYOUT))
    with pytest.raises(BackendError, match="'portable' cannot run this call: needs torch tensors, got a NumPy array"):
        make([Connection("a", "b")], backend="portable")(canvas(LAYOUT).numpy())
