"""Programs: files, operator defaults, constraints; and the small specs that belong to them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.connectivity import CanvasTopology, Connection
from canvas_engineering.cortex import CortexRegistry, CortexSpec
from canvas_engineering.errors import CanvasError, SchemaError
from canvas_engineering.identity import IdentitySpec
from canvas_engineering.masks import MaskSpec
from canvas_engineering.program import (
    CARRIERS,
    COMPILE_MODES,
    OPERATOR_DEFAULTS,
    OPERATORS,
    REGION_FAMILIES,
    WRITE_MODES,
    CanvasProgram,
    ClockSpec,
    ConnectionProgram,
    ConstraintSpec,
    LearningSpec,
    RegionProgram,
    resolve_operator_defaults,
    validate_constraints,
)
from canvas_engineering.residuals import ResidualSpec
from canvas_engineering.schema import CanvasSchema
from canvas_engineering.semantic import auto_semantic_type, compute_semantic_embeddings, program_distance

OLD_FILE = Path(__file__).parent / "data" / "program_0_5_0.json"  # written by CanvasProgram.to_json of 0.5.0


def schema_of(*edges: tuple[str, str], **starts: int) -> CanvasSchema:
    """A line of one-position regions that begin at the given timesteps."""
    regions: dict[str, tuple[int, ...] | RegionSpec] = {
        name: (start, 4, i, i + 1) for i, (name, start) in enumerate(starts.items())
    }
    layout = CanvasLayout(T=4, spatial_shape=(len(starts),), d_model=8, regions=regions)
    return CanvasSchema(layout, CanvasTopology([Connection(src, dst) for src, dst in edges]))


def test_file_of_0_5_0_loads() -> None:
    program = CanvasProgram.from_json(OLD_FILE)
    assert program.version == "2.0.0"
    assert program.schema == CanvasSchema.from_json(OLD_FILE)
    assert program.regions == {
        "camera": RegionProgram(
            family="observation",
            tags=("rgb", "front"),
            clock=ClockSpec(
                mode="on_event",
                event_source="arm.joints.prediction",
                event_threshold=0.2,
                cooldown=3,
                max_silence=9,
                max_inner_steps=2,
            ),
            learning=LearningSpec("ssl_prediction", ("next_step",), "freeze"),
        ),
        "arm.joints": RegionProgram(
            family="action",
            carrier="filter",
            compile_mode="export",
            constraints=ConstraintSpec("permutation", "energy", "acyclic", "non_decreasing"),
            identity=IdentitySpec("tracklet", 8, "cross_attention", True),
        ),
    }
    assert program.connections == {
        ("camera", "goal"): ConnectionProgram("retrieve", "arm.joints.prediction > 0.25", "replace")
    }
    # What 0.5.0 wrote is written again, field for field.
    assert program.to_dict() == json.loads(OLD_FILE.read_text())


names = st.text(st.characters(codec="utf-8"), max_size=4) | st.sampled_from(["a|b", '["a","b"]', "[", "|", "a.b"])
region_programs = st.builds(
    RegionProgram,
    family=st.sampled_from([*REGION_FAMILIES, "mine"]),
    tags=st.lists(st.text(max_size=3), max_size=2).map(tuple),
    clock=st.none() | st.builds(ClockSpec, period=st.integers(1, 9), max_silence=st.none() | st.integers(0, 9)),
    learning=st.none() | st.builds(LearningSpec, losses=st.lists(st.text(max_size=3), max_size=2).map(tuple)),
    constraints=st.none() | st.builds(ConstraintSpec, equivariance=st.none() | st.just("rotation")),
    identity=st.none() | st.builds(IdentitySpec, slot_capacity=st.integers(1, 99), birth_death=st.booleans()),
)
connection_programs = st.builds(
    ConnectionProgram,
    operator=st.sampled_from(sorted(OPERATORS)),
    trigger=st.none() | st.just("a.b > 1"),
    write_mode=st.sampled_from(sorted(WRITE_MODES)),
    mask_spec=st.none()
    | st.just(MaskSpec("window", window_shape=(1, 3)))
    | st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=3).map(
        lambda cells: MaskSpec("sparse", mask=cells)
    ),
)


@given(
    st.dictionaries(names, region_programs, max_size=3),
    st.dictionaries(st.tuples(names, names), connection_programs, max_size=3),
)
def test_round_trip_loses_nothing(
    regions: dict[str, RegionProgram], connections: dict[tuple[str, str], ConnectionProgram]
) -> None:
    program = CanvasProgram(schema_of(("a", "a"), a=0), regions, connections, version="2.1.0")
    assert CanvasProgram.from_dict(json.loads(json.dumps(program.to_dict()))) == program


def test_file_round_trip_and_schema_without_programs(tmp_path: Path) -> None:
    program = CanvasProgram(schema_of(a=0), {"a": RegionProgram()}, {("a", "a"): ConnectionProgram()})
    program.to_json(tmp_path / "program.json")
    assert CanvasProgram.from_json(tmp_path / "program.json") == program
    assert CanvasProgram.from_dict(schema_of(a=0).to_dict()) == CanvasProgram(schema_of(a=0))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["program_version"], 2, "^program_version: expected a string, got 2$"),
        (["layout", "T"], -1, "^layout.T: expected a positive integer, got -1$"),
        (["region_programs"], [], r"^region_programs: expected an object, got \[\]$"),
        (["region_programs", "camera", "familly"], "x", "^region_programs.camera: unknown field 'familly'; known: fam"),
        (["region_programs", "camera", "tags"], "rgb", "^region_programs.camera.tags: expected a list of strings"),
        (
            ["region_programs", "camera", "clock", "period"],
            0,
            "^region_programs.camera.clock.period: expected a positive integer, got 0$",
        ),
        (
            ["region_programs", "arm.joints", "identity", "mode"],
            "x",
            r"^region_programs.arm.joints.identity.mode: ex",
        ),
        (["connection_programs", "camera"], {}, r"^connection_programs: expected a key 'src\|dst', got 'camera'$"),
        (["connection_programs", "camera|goal", "write_mode"], 1, r"^connection_programs.camera\|goal.write_mode: exp"),
        (
            ["connection_programs", "camera|goal", "mask_spec"],
            {"kind": "x"},
            r"camera\|goal.mask_spec.kind: expected",
        ),
    ],
)
def test_wrong_fields_are_named_with_their_place(place: list[str], value: Any, message: str) -> None:
    document: Any = json.loads(OLD_FILE.read_text())
    target = document
    for step in place[:-1]:
        target = target[step]
    target[place[-1]] = value
    with pytest.raises(SchemaError, match=message):
        CanvasProgram.from_dict(document)


def test_file_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "program.json"
    path.write_text("{}")
    with pytest.raises(SchemaError, match=r"program\.json': missing field 'layout'"):
        CanvasProgram.from_json(path)
    with pytest.raises(OSError, match=r"cannot write '.*missing/program\.json'"):
        CanvasProgram(schema_of(a=0)).to_json(tmp_path / "missing" / "program.json")


def test_operator_defaults() -> None:
    plain = (None, "add", None)
    assert {
        "attend": plain,
        "observe": plain,
        "predict": plain,
        "correct": plain,
        "bind": plain,
        "integrate": plain,
        "emit_residual": plain,
        "retrieve": ("cross_attention", "add", None),
        "write": ("copy", "replace", None),
        "act": ("copy", "replace", None),
        "compress": ("pooling", "add", None),
        "intervene": (None, "replace", None),
    } == OPERATOR_DEFAULTS
    assert set(OPERATOR_DEFAULTS) == OPERATORS
    assert {"add", "replace", "gate"} == WRITE_MODES
    assert {"runtime", "freeze", "constant", "export"} == COMPILE_MODES
    assert {"observation", "state", "memory", "residual", "action"} == REGION_FAMILIES
    assert {"deterministic", "diffusive", "filter", "memory", "residual"} == CARRIERS


@pytest.mark.parametrize(
    ("program", "base_fn", "expected"),
    [
        (None, None, ("cross_attention", "add", None)),
        (None, "gated", ("gated", "add", None)),
        (ConnectionProgram("compress"), None, ("pooling", "add", None)),
        (ConnectionProgram("compress"), "cross_attention", ("pooling", "add", None)),
        (ConnectionProgram("compress"), "mamba", ("mamba", "add", None)),
        (ConnectionProgram("write"), None, ("copy", "replace", None)),
        (ConnectionProgram("write", write_mode="gate", trigger="a.b > 1"), None, ("copy", "gate", "a.b > 1")),
        (ConnectionProgram("intervene"), "cross_attention", ("cross_attention", "replace", None)),
        (ConnectionProgram("juggle", write_mode="replace"), "rwkv", ("rwkv", "replace", None)),
    ],
)
def test_resolved_defaults(
    program: ConnectionProgram | None, base_fn: str | None, expected: tuple[str, str, str | None]
) -> None:
    assert resolve_operator_defaults(program, base_fn) == expected


def test_summary() -> None:
    program = CanvasProgram(
        schema_of(a=0),
        {
            "a": RegionProgram(family="memory", carrier="filter", compile_mode="export"),
            "b": RegionProgram(),
        },
        {("a", "b"): ConnectionProgram("predict")},
    )
    assert program.summary() == (
        "CanvasProgram (v2.0.0, 2 regions programmed):\n"
        "  families: memory=1, state=1\n"
        "  non-default carriers: filter=1\n"
        "  compile modes: export=1\n"
        "  operators: predict=1"
    )
    assert repr(program) == "CanvasProgram(regions=2, connections=1, version='2.0.0')"


def constrained(schema: CanvasSchema, **constraints: str) -> list[str]:
    return validate_constraints(CanvasProgram(schema, {"a": RegionProgram(constraints=ConstraintSpec(**constraints))}))


def test_constraints() -> None:
    ring = schema_of(("a", "b"), ("b", "c"), ("c", "b"), a=1, b=2, c=0)
    assert constrained(ring, causal_direction="acyclic") == []
    assert constrained(ring, causal_direction="forward_only") == []
    assert validate_constraints(CanvasProgram(ring, {"b": RegionProgram()})) == []
    closed = schema_of(("a", "b"), ("b", "c"), ("c", "a"), ("a", "c"), ("a", "lost"), a=1, b=2, c=0)
    assert constrained(closed, causal_direction="acyclic") == [
        "a: causal_direction='acyclic' violated: a cycle leads back to it"
    ]
    assert constrained(closed, causal_direction="forward_only") == [
        "a: causal_direction='forward_only' violated: connects to c, which starts earlier (t0=0 < 1)"
    ]
    assert constrained(schema_of(("a", "a"), a=0), causal_direction="acyclic") != []
    assert constrained(schema_of(("a", "a"), a=0), causal_direction="forward_only") == []
    assert constrained(ring, equivariance="scale", conservation="mass", causal_direction="back", monotonicity="up") == [
        "a: unknown equivariance 'scale' (valid: permutation, rotation, translation)",
        "a: unknown conservation 'mass' (valid: capacity, energy)",
        "a: unknown causal_direction 'back' (valid: acyclic, forward_only)",
        "a: unknown monotonicity 'up' (valid: non_decreasing, non_increasing)",
    ]
    assert constrained(CanvasSchema(ring.layout), causal_direction="acyclic") == []


@pytest.mark.parametrize(
    ("spec", "fields", "message"),
    [
        (ConnectionProgram, {"write_mode": "mul"}, "ConnectionProgram.write_mode: expected one of add, gate, replace"),
        (ConnectionProgram, {"operator": None}, "ConnectionProgram.operator: expected a string, got None"),
        (ConnectionProgram, {"trigger": 3}, "ConnectionProgram.trigger: expected a string, got 3"),
        (ConnectionProgram, {"mask_spec": "tile"}, "ConnectionProgram.mask_spec: expected a MaskSpec, got 'tile'"),
        (ClockSpec, {"period": 0}, "ClockSpec.period: expected a positive integer, got 0"),
        (ClockSpec, {"cooldown": -1}, "ClockSpec.cooldown: expected an integer >= 0, got -1"),
        (ClockSpec, {"event_threshold": math.nan}, "ClockSpec.event_threshold: expected a finite number, got nan"),
        (RegionProgram, {"tags": "rgb"}, "RegionProgram.tags: expected a list of strings, got 'rgb'"),
        (LearningSpec, {"losses": (1,)}, r"LearningSpec.losses\[0\]: expected a string, got 1"),
        (IdentitySpec, {"mode": "forever"}, "IdentitySpec.mode: expected one of persistent, ephemeral, tracklet"),
        (IdentitySpec, {"slot_capacity": 0}, "IdentitySpec.slot_capacity: expected a positive integer, got 0"),
        (IdentitySpec, {"birth_death": "no"}, "IdentitySpec.birth_death: expected true or false, got 'no'"),
        (ResidualSpec, {"kinds": ()}, r"ResidualSpec.kinds: expected at least one name, got \(\)"),
        (ResidualSpec, {"reduce": "median"}, "ResidualSpec.reduce: expected one of max_mean, mean, max, l2"),
        (ResidualSpec, {"decay": 1.5}, r"ResidualSpec.decay: expected a number in \[0, 1\], got 1.5"),
        (CanvasProgram, {"schema": None}, "schema: expected a CanvasSchema, got None"),
        (CanvasProgram, {"regions": {"a": 1}}, r"regions\['a'\]: expected a RegionProgram, got 1"),
        (CanvasProgram, {"connections": {"a": None}}, r"connections: expected keys \(src, dst\), got 'a'"),
        (
            CanvasProgram,
            {"connections": {("a", "a"): None}},
            r"connections\[\('a', 'a'\)\]: expected a ConnectionProgram, got None",
        ),
    ],
)
def test_wrong_specs(spec: Any, fields: dict[str, Any], message: str) -> None:
    needed = {"schema": schema_of(a=0)} if spec is CanvasProgram else {}
    with pytest.raises(CanvasError, match=message):
        spec(**{**needed, **fields})


def test_cortex_registry() -> None:
    registry = CortexRegistry()
    visual = CortexSpec("visual", bounds=(0, 4, 0, 8, 0, 8), tile=[2, 2], local_backend="gated")  # type: ignore[arg-type]
    registry.register(visual)
    registry.register(CortexSpec("motor"))
    registry.assign("depth", "visual")
    registry.assign("camera", "visual")
    registry.assign("camera", "visual")  # again is no change
    registry.assign("arm", "motor")
    assert registry.cortex_for("camera") is visual
    assert registry.cortex_for("sound") is None
    assert registry.regions_in("visual") == ["camera", "depth"]
    assert registry.same_cortex("camera", "depth")
    assert not registry.same_cortex("camera", "arm")
    assert not registry.same_cortex("sound", "smell")
    assert (registry.cortex_names, registry.n_cortices, registry.n_assigned) == (["motor", "visual"], 2, 3)
    assert registry.summary().splitlines() == [
        "CortexRegistry(2 cortices, 3 assignments):",
        "  motor (tile=(4, 4), backend=local_attention, cache=True): 1 regions [arm]",
        "  visual (tile=(2, 2), backend=gated, cache=True): 2 regions [camera, depth]",
    ]
    assert repr(registry) == "CortexRegistry(cortices=2, assigned=3)"
    with pytest.raises(ValueError, match="region 'arm' is already assigned to cortex 'motor', got 'visual'"):
        registry.assign("arm", "visual")
    with pytest.raises(ValueError, match="cortex 'motor' is already registered"):
        registry.register(CortexSpec("motor"))
    registry.unregister("visual")
    assert registry.n_assigned == 1
    registry.unassign("arm")
    for wrong, message in (
        (lambda: registry.assign("arm", "visual"), "cortex 'visual' is not registered; known: 'motor'"),
        (lambda: registry.unregister("visual"), "cortex 'visual' is not registered; known: 'motor'"),
        (lambda: registry.unassign("arm"), "region 'arm' has no cortex assignment"),
    ):
        with pytest.raises(KeyError) as caught:
            wrong()
        assert str(caught.value) == message
    assert copy.deepcopy(registry).cortex_names == ["motor"]


def test_semantic_types_and_distances() -> None:
    assert auto_semantic_type("firm_AAPL.financials.revenue") == "firm AAPL / financials / revenue"
    assert auto_semantic_type("a.b_c[3].d") == "a / b c 3 / d"
    calls = []

    def embed(texts: list[str]) -> list[list[float]]:
        calls.append(texts)
        return [[float(len(text))] for text in texts]

    vectors = compute_semantic_embeddings(["x_y", "z"], embed, {"z": "a lidar"})
    assert calls == [["x y", "a lidar"]]
    assert vectors == {"x_y": (3.0,), "z": (7.0,)}
    with pytest.raises(CanvasError, match="embed_fn: expected 1 vectors for 1 texts, got 0"):
        compute_semantic_embeddings(["x"], lambda texts: [])
    spec = RegionSpec((0, 1, 0, 1), semantic_embedding=(1.0,))
    state, memory = RegionProgram(), RegionProgram(family="memory", carrier="memory")
    assert program_distance(spec, state, spec, state) == 0.0
    assert program_distance(spec, state, spec, memory) == pytest.approx(0.5)
