"""The torch modules around the attention: embeddings, the canvas tensor, slots, residuals, conditioning."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from canvas_engineering.canvas import CanvasLayout, RegionSpec, UnknownRegionError
from canvas_engineering.errors import CanvasError
from canvas_engineering.nn import (
    FamilyCarrierEmbedding,
    PeriodEmbedding,
    ResidualAccumulator,
    SemanticConditioner,
    SinusoidalPositionalEncoding3D,
    SinusoidalPositionalEncodingND,
    SlotBindingModule,
    SpatiotemporalCanvas,
)
from canvas_engineering.program import CanvasProgram, RegionProgram
from canvas_engineering.residuals import ResidualSpec
from canvas_engineering.schema import CanvasSchema

# Positional encoding


@pytest.mark.parametrize("d_model", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (2, 3, 2, 5)])
def test_positional_encoding_is_sinusoids_per_axis(shape: tuple[int, ...], d_model: int) -> None:
    module = SinusoidalPositionalEncodingND(d_model, max_T=shape[0], max_spatial=shape[1:])
    assert set(module.state_dict()) == {"pe"}
    assert module.pe.shape == (*shape, d_model)
    share = d_model // len(shape)
    expected = np.zeros((*shape, d_model))
    for axis in range(len(shape)):
        channels = share if axis < len(shape) - 1 else d_model - share * (len(shape) - 1)
        for channel in range(channels):
            wave = math.sin if channel % 2 == 0 else math.cos
            rate = 10000.0 ** (-(channel - channel % 2) / channels)
            values = np.array([wave(position * rate) for position in range(shape[axis])])
            expected[..., axis * share + channel] = np.expand_dims(values, [a for a in range(len(shape)) if a != axis])
    np.testing.assert_allclose(module.pe, expected, rtol=0, atol=4 * torch.finfo(torch.float32).eps * max(shape))
    part = module(1, [2] * (len(shape) - 1))
    np.testing.assert_array_equal(part, module.pe[(slice(1), *[slice(2)] * (len(shape) - 1))])


def test_3d_encoding_takes_height_and_width() -> None:
    module = SinusoidalPositionalEncoding3D(12, max_T=3, max_H=4, max_W=5)
    torch.testing.assert_close(module(2, 3, 4), module.pe[:2, :3, :4])
    torch.testing.assert_close(module(2, spatial_shape=(3, 4)), module.pe[:2, :3, :4])


def test_a_grid_larger_than_the_encoding_is_refused() -> None:
    module = SinusoidalPositionalEncodingND(8, max_T=4, max_spatial=(3, 3))
    with pytest.raises(CanvasError, match=r"must fit into \(4, 3, 3\), got \(5, 3, 3\)"):
        module(5, (3, 3))
    with pytest.raises(CanvasError, match=r"must fit into \(4, 3, 3\), got \(4, 3\)"):
        module(4, (3,))
    with pytest.raises(CanvasError, match="max_T=0"):
        SinusoidalPositionalEncodingND(8, max_T=0)


# Periods


@pytest.mark.parametrize(
    ("period", "bucket", "legacy"), [(1, 0, 0), (4, 2, 3), (16, 4, 5), (576, 10, 11), (4608, 13, 14), (10**9, 15, 15)]
)
def test_period_buckets_are_those_of_the_table(period: int, bucket: int, legacy: int) -> None:
    assert PeriodEmbedding(4).bucket(period) == bucket
    assert PeriodEmbedding(4, legacy_buckets=True).bucket(period) == legacy


@given(root=st.integers(2, 12), steps=st.integers(1, 12), power=st.integers(0, 12), offset=st.sampled_from([-1, 0, 1]))
def test_period_buckets_are_exact_around_powers(root: int, steps: int, power: int, offset: int) -> None:
    # With max_period = root ** steps and steps + 1 buckets, bucket b begins exactly at root ** b.
    power = min(power, steps)
    period = max(1, root**power + offset)
    module = PeriodEmbedding(2, n_buckets=steps + 1, max_period=root**steps)
    assert module.bucket(period) == max(b for b in range(steps + 1) if root**b <= period)
    assert module.bucket(int(np.int64(period))) == module.bucket(period)


def test_period_embedding_looks_its_bucket_up() -> None:
    module = PeriodEmbedding(4)
    torch.testing.assert_close(module(16), module.embedding.weight[4])
    assert set(module.state_dict()) == {"embedding.weight"}
    assert PeriodEmbedding(4, n_buckets=1).bucket(77) == 0
    assert module.bucket(0) == 0
    assert module.bucket(np.int64(10_000)) == 15  # type: ignore[arg-type]  # whose powers would overflow
    with pytest.raises(CanvasError, match="n_buckets must be at least 1, got n_buckets=0"):
        PeriodEmbedding(4, n_buckets=0)


def test_unknown_families_and_carriers_share_the_last_row() -> None:
    module = FamilyCarrierEmbedding(4)
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert shapes == {"family_embedding.weight": (6, 4), "carrier_embedding.weight": (6, 4)}
    family, carrier = module.family_embedding.weight, module.carrier_embedding.weight
    torch.testing.assert_close(module("observation", "residual"), family[0] + carrier[4])
    torch.testing.assert_close(module("action", "deterministic"), family[4] + carrier[0])
    torch.testing.assert_close(module("mine", "own"), family[5] + carrier[5])


# The canvas tensor

LAYOUTS = {
    "1d": CanvasLayout(T=3, d_model=6, spatial_shape=(5,), regions={"a": (0, 3, 0, 2), "b": (1, 3, 2, 5)}),
    "2d": CanvasLayout(
        T=3,
        d_model=6,
        H=4,
        W=4,
        regions={
            "cam.front[0]": RegionSpec(bounds=(0, 3, 0, 3, 0, 3), period=4),
            "overlap": RegionSpec(bounds=(1, 3, 2, 4, 1, 4), period=576),
            "keys": (2, 3, 3, 4, 0, 1),
            "nothing": (1, 1, 0, 4, 0, 4),
        },
    ),
    "3d": CanvasLayout(T=2, d_model=6, spatial_shape=(2, 3, 2), regions={"a": (0, 2, 0, 1, 0, 3, 0, 2)}),
    "bare": CanvasLayout(T=2, d_model=6, spatial_shape=(3,)),
}


def program_for(layout: CanvasLayout) -> CanvasProgram:
    described = list(layout.regions)[:2]
    regions = {name: RegionProgram(family="observation", carrier="filter") for name in described}
    return CanvasProgram(CanvasSchema(layout), regions=regions)


def conditioner_for(layout: CanvasLayout) -> SemanticConditioner:
    generator = torch.Generator().manual_seed(0)
    names = [*list(layout.regions)[1:], "elsewhere"]
    module = SemanticConditioner(6, 5, {name: torch.randn(5, generator=generator) for name in names})
    assert module.residuals is not None
    torch.nn.init.normal_(module.residuals)
    return module


def region_vector(module: SpatiotemporalCanvas, name: str) -> Tensor:
    """What lying in a region adds, by the definition."""
    layout = module.layout
    vector = module.period_embedding(layout.region_spec(name).period)
    if module.semantic_conditioner is not None and name in module.semantic_conditioner.region_names:
        vector = vector + module.semantic_conditioner.get_conditioning(name)
    if module.family_carrier_embedding is not None and name in list(layout.regions)[:2]:
        vector = vector + module.family_carrier_embedding("observation", "filter")
    return vector


@pytest.mark.parametrize("semantic", [False, True])
@pytest.mark.parametrize("programmed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_canvas_holds_the_sums_that_define_it(layout: CanvasLayout, programmed: bool, semantic: bool) -> None:
    torch.manual_seed(0)
    module = SpatiotemporalCanvas(
        layout,
        semantic_conditioner=conditioner_for(layout) if semantic else None,
        program=program_for(layout) if programmed else None,
    ).double()
    expected = module.empty_token + module.pos_enc.pe.reshape(layout.num_positions, 6)
    for name in layout.regions:
        index = torch.tensor(layout.region_indices(name), dtype=torch.long)
        expected = expected.index_add(0, index, region_vector(module, name).expand(index.numel(), -1))
    empty = module.create_empty(3)
    torch.testing.assert_close(empty, expected.expand(3, -1, -1))
    parameters = tuple(module.parameters())
    weight = torch.randn(expected.shape, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad((empty[1] * weight).sum(), parameters, allow_unused=True, materialize_grads=True),
        torch.autograd.grad((expected * weight).sum(), parameters, allow_unused=True, materialize_grads=True),
    )

    for name in layout.regions:
        data = torch.randn(3, layout.region_numel(name), 6, dtype=torch.float64)
        before = empty.detach().clone()
        canvas = module.place(empty, data, name)
        torch.testing.assert_close(empty.detach(), before, rtol=0, atol=0)
        identity = region_vector(module, name)
        if module.modality_embeddings is not None:
            key = name.replace(".", "__").replace("[", "_").replace("]", "_")
            identity = identity + module.modality_embeddings[key if key != "keys" else "keys_"]
        placed = module.extract(canvas, name)
        torch.testing.assert_close(placed, data + identity)
        others = [i for i in range(layout.num_positions) if i not in set(layout.region_indices(name))]
        torch.testing.assert_close(canvas[:, others], empty[:, others], rtol=0, atol=0)
        torch.testing.assert_close(placed, canvas[:, layout.region_indices(name)], rtol=0, atol=0)


def test_canvas_state_is_that_of_0_5_0() -> None:
    layout = LAYOUTS["2d"]
    module = SpatiotemporalCanvas(layout, program=program_for(layout))
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert shapes == {
        "empty_token": (6,),
        "pos_enc.pe": (3, 4, 4, 6),
        "period_embedding.embedding.weight": (16, 6),
        "modality_embeddings.cam__front_0_": (6,),
        "modality_embeddings.overlap": (6,),
        "modality_embeddings.keys_": (6,),  # 0.5.0 could not hold a region of this name
        "modality_embeddings.nothing": (6,),
        "family_carrier_embedding.family_embedding.weight": (6, 6),
        "family_carrier_embedding.carrier_embedding.weight": (6, 6),
    }
    semantic = SpatiotemporalCanvas(layout, semantic_conditioner=conditioner_for(layout))
    assert set(semantic.state_dict()) == {
        "empty_token",
        "pos_enc.pe",
        "period_embedding.embedding.weight",
        "semantic_conditioner.projector.weight",
        "semantic_conditioner._embeddings",
        "semantic_conditioner.residuals",
    }


def test_place_pads_cuts_and_broadcasts() -> None:
    module = SpatiotemporalCanvas(LAYOUTS["1d"])
    canvas = module.create_empty(2)
    data = torch.randn(1, 8, 6)
    whole = module.extract(module.place(canvas, data[:, :6], "a"), "a")
    torch.testing.assert_close(module.extract(module.place(canvas, data, "a"), "a"), whole, rtol=0, atol=0)
    torch.testing.assert_close(whole[0], whole[1], rtol=0, atol=0)
    short = module.extract(module.place(canvas, data[:, :4], "a"), "a")
    torch.testing.assert_close(short[:, :4], whole[:, :4], rtol=0, atol=0)
    torch.testing.assert_close(short[:, 4:], (whole - data[:, :6])[:, 4:])
    half = module.place(canvas, data[:, :6].bfloat16(), "a")
    assert half.dtype == canvas.dtype


def test_legacy_period_buckets_reach_the_embedding() -> None:
    layout = LAYOUTS["2d"]
    torch.manual_seed(0)
    module = SpatiotemporalCanvas(layout, legacy_period_buckets=True)
    table = module.period_embedding.embedding.weight
    position = layout.flat_index(0, 0, 0)  # in cam.front[0] only, whose period is 4
    pe = module.pos_enc.pe.reshape(-1, 6)[position]
    torch.testing.assert_close(module.create_empty(1)[0, position], module.empty_token + pe + table[3])
    placed = module.place(module.create_empty(1), torch.zeros(1, 0, 6), "cam.front[0]")
    assert module.modality_embeddings is not None
    torch.testing.assert_close(placed[0, position], table[3] + module.modality_embeddings["cam__front_0_"])


def test_an_empty_canvas_is_the_callers_to_write() -> None:
    module = SpatiotemporalCanvas(LAYOUTS["1d"])
    for batch in (1, 2):
        before = module.create_empty(batch).detach()
        module.create_empty(batch).detach().zero_()
        torch.testing.assert_close(module.create_empty(batch).detach(), before, rtol=0, atol=0)
    canvas = module.create_empty(2).detach()
    canvas[0] = 0.0
    assert canvas[1].any()


def test_canvas_moves_with_its_module() -> None:
    module = SpatiotemporalCanvas(LAYOUTS["1d"]).to("meta")
    canvas = module.create_empty(2)
    assert canvas.device.type == "meta"
    assert module.extract(module.place(canvas, canvas[:, :1], "a"), "a").shape == (2, 6, 6)


def test_canvas_errors_name_region_and_shapes() -> None:
    module = SpatiotemporalCanvas(LAYOUTS["1d"])
    canvas = module.create_empty(2)
    with pytest.raises(UnknownRegionError, match="unknown region 'c'; the layout has 'a', 'b'"):
        module.extract(canvas, "c")
    with pytest.raises(KeyError):
        module.place(canvas, canvas, "c")
    with pytest.raises(CanvasError, match=r"canvas must have shape .* = \(B, 15, 6\), got \(2, 14, 6\)"):
        module.extract(canvas[:, 1:], "a")
    with pytest.raises(CanvasError, match=r"embeddings must have shape .* = \(2, n, 6\), got \(3, 1, 6\)"):
        module.place(canvas, torch.zeros(3, 1, 6), "a")
    with pytest.raises(CanvasError, match=r"embeddings must have shape .* = \(2, n, 6\), got \(2, 1, 5\)"):
        module.place(canvas, torch.zeros(2, 1, 5), "a")
    with pytest.raises(CanvasError, match="batch_size must be at least 0, got batch_size=-1"):
        module.create_empty(-1)


def test_the_same_seed_gives_the_initial_canvas_weights_of_0_5_0() -> None:
    torch.manual_seed(0)
    layout = CanvasLayout(T=2, H=3, W=3, d_model=8, regions={"a": (0, 2, 0, 1, 0, 3), "b": (0, 2, 1, 3, 0, 3)})
    module = SpatiotemporalCanvas(layout, program=program_for(layout))
    found = [float(p.detach().double().abs().sum()) for _, p in sorted(module.named_parameters())]
    np.testing.assert_allclose(
        found,
        [0.086018592003, 0.868768910907, 0.842512852905, 0.154991273885, 0.136754611623, 1.723068160587],
        rtol=1e-9,
    )


# Slots


@pytest.mark.parametrize("birth_death", [False, True])
@pytest.mark.parametrize("n_observations", [0, 1, 7])
def test_slots_read_the_observations(n_observations: int, birth_death: bool) -> None:
    torch.manual_seed(0)
    module = SlotBindingModule(8, n_slots=3, n_heads=2, birth_death=birth_death).double()
    observations = torch.randn(2, n_observations, 8, dtype=torch.float64)
    slots = module.slots.expand(2, -1, -1)
    expected = module.layer_norm(module.binding_attn(slots, observations, observations) + slots)
    if module.life_gate is not None:
        gate = module.life_gate(expected)
        torch.testing.assert_close(module.alive_mask(observations), gate.squeeze(-1) > 0.5)
        expected = expected * gate
    else:
        assert module.alive_mask(observations).all()
    assert module.alive_mask(observations).shape == (2, 3)
    torch.testing.assert_close(module(observations), expected)
    gradient = torch.autograd.grad(module(observations).sum(), module.slots)[0]
    assert gradient.isfinite().all()


def test_slot_state_is_that_of_0_5_0() -> None:
    shapes = {k: tuple(v.shape) for k, v in SlotBindingModule(8, 3, birth_death=True).state_dict().items()}
    projections = {f"binding_attn.{p}_proj" for p in ("q", "k", "v", "out")}
    assert shapes == {
        "slots": (3, 8),
        **{f"{p}.weight": (8, 8) for p in projections},
        **{f"{p}.bias": (8,) for p in projections},
        "layer_norm.weight": (8,),
        "layer_norm.bias": (8,),
        "life_gate.0.weight": (4, 8),
        "life_gate.0.bias": (4,),
        "life_gate.2.weight": (1, 4),
        "life_gate.2.bias": (1,),
    }
    assert not any("life_gate" in key for key in SlotBindingModule(8, 3).state_dict())


def test_slot_errors() -> None:
    with pytest.raises(CanvasError, match="n_slots must be at least 1, got n_slots=0"):
        SlotBindingModule(8, 0)
    with pytest.raises(CanvasError, match="d_model must be divisible by n_heads, got d_model=10, n_heads=4"):
        SlotBindingModule(10, 2)
    with pytest.raises(CanvasError, match=r"observations must have shape .* = \(B, n, 8\), got \(2, 8\)"):
        SlotBindingModule(8, 2)(torch.zeros(2, 8))


# Residuals


@pytest.mark.parametrize(
    ("reduce", "kinds", "expected"),
    [
        ("mean", ("a", "b"), ["mean", "mean"]),
        ("max", ("a",), ["max"]),
        ("l2", ("a", "b"), ["l2", "l2"]),
        ("max_mean", ("a",), ["mean"]),
        ("max_mean", ("a", "b"), ["max", "mean"]),
        ("max_mean", ("a", "b", "c"), ["max", "mean", "max"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64])
def test_residuals_are_moving_averages(
    reduce: str, kinds: tuple[str, ...], expected: list[str], dtype: torch.dtype
) -> None:
    module = ResidualAccumulator(["y", "x"], ResidualSpec(kinds=kinds, reduce=reduce, decay=0.75))
    errors = [torch.tensor(numbers, dtype=torch.float64).to(dtype) for numbers in ([[1, -3], [2, 4]], [5, 0], -2)]
    running = np.zeros(len(kinds))
    for error in errors:
        module.update("x", error.requires_grad_(dtype.is_floating_point))
        numbers = error.detach().double()
        statistic = {"mean": numbers.mean(), "max": numbers.max(), "l2": numbers.norm()}
        running = 0.75 * running + 0.25 * np.array([float(statistic[name]) for name in expected])
    assert module.region_names == ["x", "y"]
    found = module.summaries()
    assert list(found["x"]) == list(kinds)
    np.testing.assert_allclose(list(found["x"].values()), running, rtol=1e-6)
    assert not any(found["y"].values())
    assert module.summary_tensor() is module._summaries
    assert module._step_counts.tolist() == [3, 0]
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == {
        "_summaries": (2, len(kinds)),
        "_step_counts": (2,),
    }
    module.reset()
    assert not module.summary_tensor().any()
    assert module._step_counts.tolist() == [0, 0]


def test_residual_update_does_not_read_the_device() -> None:
    # The meta device has no values, so anything that reads one fails there.
    module = ResidualAccumulator(["x"], ResidualSpec(kinds=("a", "b"))).to("meta")
    module.update("x", torch.randn(2, 3, device="meta"))


def test_residual_errors() -> None:
    module = ResidualAccumulator(["x", "y.err"])
    with pytest.raises(UnknownRegionError, match=r"unknown region 'z'; this accumulator tracks 'x', 'y.err'"):
        module.update("z", torch.zeros(1))
    with pytest.raises(CanvasError, match=r"error of region 'x' must have elements, got shape \(0, 3\)"):
        module.update("x", torch.zeros(0, 3))
    with pytest.raises(CanvasError, match="median"):
        ResidualAccumulator(["x"], ResidualSpec(reduce="median"))


# Semantic conditioning


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_conditioner_projects_and_corrects(freeze: bool, corrected: bool, bias: bool) -> None:
    vectors = {"b": [1.0, 2.0, 3.0], "a": (0.5, -1.0, 0.0)}
    module = SemanticConditioner(4, 3, vectors, freeze, corrected, bias)
    expected_state = {"_embeddings", "projector.weight"}
    expected_state |= ({"residuals"} if corrected else set()) | ({"projector.bias"} if bias else set())
    assert set(module.state_dict()) == expected_state
    assert ("_embeddings" in dict(module.named_parameters())) is not freeze
    assert module.region_names == ["a", "b"]
    assert module.n_regions == 2
    if module.residuals is not None:
        assert not module.residuals.any()
        torch.nn.init.normal_(module.residuals)
    both = module.get_all_conditioning()
    for row, name in enumerate(("a", "b")):
        expected = module.projector(torch.tensor(vectors[name]))
        if module.residuals is not None:
            expected = expected + module.residuals[row]
        torch.testing.assert_close(module.get_conditioning(name), expected)
        torch.testing.assert_close(both[row], expected)


def test_conditioner_adds_to_the_positions_of_its_regions() -> None:
    layout = LAYOUTS["2d"]
    module = conditioner_for(layout)
    canvas = torch.randn(2, layout.num_positions, 6)
    before = canvas.clone()
    expected = canvas.clone()
    for name in ("overlap", "keys"):
        expected[:, layout.region_indices(name)] += module.get_conditioning(name).detach()
    torch.testing.assert_close(module.condition_canvas(canvas, layout), expected)
    torch.testing.assert_close(canvas, before, rtol=0, atol=0)


def test_conditioner_errors() -> None:
    with pytest.raises(CanvasError, match=r"region_embeddings\['a'\] must have embed_dim=3 numbers, got shape \(2,\)"):
        SemanticConditioner(4, 3, {"a": (1.0, 2.0)})
    with pytest.raises(UnknownRegionError, match="unknown region 'b'; this conditioner has 'a'"):
        SemanticConditioner(4, 2, {"a": (1.0, 2.0)}).get_conditioning("b")


def test_reprs_name_the_arguments() -> None:
    assert "d_model=4" in repr(FamilyCarrierEmbedding(4))
    assert "n_slots=3, birth_death=True" in repr(SlotBindingModule(8, 3, birth_death=True))
    assert "regions=1, kinds=('prediction',), decay=0.95" in repr(ResidualAccumulator(["x"]))
    assert "n_regions=1, frozen=True, residuals=True" in repr(SemanticConditioner(4, 2, {"a": (1.0, 2.0)}))
