"""What the regions and connections of a schema do: families, carriers, clocks, operators, triggers."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from canvas_engineering._checks import (
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_str,
    check_strings,
)
from canvas_engineering._fields import (
    Reader,
    join,
    optional,
    read_fields,
    read_object,
    read_spec,
    spec_to_dict,
)
from canvas_engineering._files import read_json, write_json
from canvas_engineering.connectivity import WRITE_MODES as WRITE_MODES
from canvas_engineering.errors import CanvasError, SchemaError
from canvas_engineering.identity import IDENTITY_MODES, IdentitySpec as IdentitySpec
from canvas_engineering.masks import MaskSpec
from canvas_engineering.schema import PROGRAM_FIELDS, CanvasSchema, mask_spec_to_dict, read_mask_spec
from canvas_engineering.specs import (
    CONSTRAINT_VALUES,
    ClockSpec as ClockSpec,
    ConstraintSpec as ConstraintSpec,
    LearningSpec as LearningSpec,
)
from canvas_engineering.triggers import evaluate_trigger as evaluate_trigger

REGION_FAMILIES: set[str] = {"observation", "state", "memory", "residual", "action"}
"""Families of regions with a meaning of their own; others are allowed."""

CARRIERS: set[str] = {"deterministic", "diffusive", "filter", "memory", "residual"}
"""Dynamics of regions with a meaning of their own; others are allowed."""

COMPILE_MODES: set[str] = {"runtime", "freeze", "constant", "export"}
"""What may become of a region at deployment."""

OPERATOR_DEFAULTS: dict[str, tuple[str | None, str, str | None]] = {
    **dict.fromkeys(
        ("attend", "observe", "predict", "correct", "bind", "integrate", "emit_residual"), (None, "add", None)
    ),
    "retrieve": ("cross_attention", "add", None),
    "write": ("copy", "replace", None),
    "act": ("copy", "replace", None),
    "compress": ("pooling", "add", None),
    "intervene": (None, "replace", None),
}
"""``(attention function, write mode, trigger)`` of each operator; None leaves the choice to others."""

OPERATORS: set[str] = set(OPERATOR_DEFAULTS)
"""Operators with defaults of their own; others are treated as ``attend``."""

DEFAULT_FUNCTION = "cross_attention"
"""The attention function where nothing else is asked for."""


@dataclass(frozen=True)
class RegionProgram:
    """What a region is and how it lives.

    Args:
        family: Kind of state: one of :data:`REGION_FAMILIES`, or a word of your own.
        tags: Finer distinctions within the family.
        carrier: Dynamics: one of :data:`CARRIERS`, or a word of your own.
        clock: When it updates; None: always.
        learning: How it learns; None: the family's way.
        compile_mode: One of :data:`COMPILE_MODES`.
        constraints: What its dynamics should respect.
        identity: Slot bank for objects; None: no slots.
    """

    family: str = "state"
    tags: tuple[str, ...] = ()
    carrier: str = "deterministic"
    clock: ClockSpec | None = None
    learning: LearningSpec | None = None
    compile_mode: str = "runtime"
    constraints: ConstraintSpec | None = None
    identity: IdentitySpec | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tags", check_strings(self.tags, "RegionProgram.tags"))


@dataclass(frozen=True)
class ConnectionProgram:
    """What a connection means and when it acts.

    Args:
        operator: One of :data:`OPERATORS`; others are treated as ``attend``.
        trigger: Condition for acting, see :mod:`canvas_engineering.triggers`; None: always. Parsed where it
            is used.
        write_mode: ``add``, ``replace`` or ``gate``.
        mask_spec: Which keys each query may read; takes the place of the connection's own mask.

    Raises:
        CanvasError: an unknown write mode, or a field of the wrong type.
    """

    operator: str = "attend"
    trigger: str | None = None
    write_mode: str = "add"
    mask_spec: MaskSpec | None = None

    def __post_init__(self) -> None:
        check_str(self.operator, "ConnectionProgram.operator")
        if self.trigger is not None:
            check_str(self.trigger, "ConnectionProgram.trigger")
        check_choice(self.write_mode, "ConnectionProgram.write_mode", sorted(WRITE_MODES))
        if self.mask_spec is not None and not isinstance(self.mask_spec, MaskSpec):
            raise CanvasError(f"ConnectionProgram.mask_spec: expected a MaskSpec, got {self.mask_spec!r}")


def resolve_operator_defaults(
    connection_program: ConnectionProgram | None, base_fn: str | None = None
) -> tuple[str, str, str | None]:
    """Function, write mode and trigger of a connection, the operator's defaults filled in.

    Args:
        connection_program: The connection's program; None counts as all defaults.
        base_fn: What the declaration asks for without regard to the operator. None or the bare default
            ``cross_attention`` yields to the operator's function. A ``Connection.fn`` that was set explicitly
            wins over every operator, so do not ask here for such a connection's function.

    Returns:
        ``(function, write mode, trigger)``.
    """
    program = connection_program or ConnectionProgram()
    function, write_mode, trigger = OPERATOR_DEFAULTS.get(program.operator, OPERATOR_DEFAULTS["attend"])
    if function is None or base_fn not in (None, DEFAULT_FUNCTION):
        function = base_fn or DEFAULT_FUNCTION
    if program.write_mode != "add":
        write_mode = program.write_mode
    if program.trigger is not None:
        trigger = program.trigger
    return function, write_mode, trigger


@dataclass
class CanvasProgram:
    """A schema together with what its regions and connections do.

    Args:
        schema: Layout and topology.
        regions: Program per region; regions without one have all defaults.
        connections: Program per ``(src, dst)``; it holds for all connections between the two.
        version: Version of the format, kept as it was read.

    Raises:
        CanvasError: a part is of another type.
    """

    schema: CanvasSchema
    regions: dict[str, RegionProgram] = field(default_factory=dict)
    connections: dict[tuple[str, str], ConnectionProgram] = field(default_factory=dict)
    version: str = "2.0.0"

    def __post_init__(self) -> None:
        if not isinstance(self.schema, CanvasSchema):
            raise CanvasError(f"schema: expected a CanvasSchema, got {self.schema!r}")
        for name, region in self.regions.items():
            if not isinstance(region, RegionProgram):
                raise CanvasError(f"regions[{name!r}]: expected a RegionProgram, got {region!r}")
        for edge, connection in self.connections.items():
            if not (isinstance(edge, tuple) and len(edge) == 2 and all(isinstance(s, str) for s in edge)):
                raise CanvasError(f"connections: expected keys (src, dst), got {edge!r}")
            if not isinstance(connection, ConnectionProgram):
                raise CanvasError(f"connections[{edge!r}]: expected a ConnectionProgram, got {connection!r}")

    def to_dict(self) -> dict[str, Any]:
        """The schema's dict with the fields ``program_version``, ``region_programs``, ``connection_programs``."""
        result = self.schema.to_dict()
        result["program_version"] = self.version
        if self.regions:
            result["region_programs"] = {name: spec_to_dict(spec) for name, spec in self.regions.items()}
        if self.connections:
            result["connection_programs"] = {
                _edge_key(src, dst): _connection_program_to_dict(spec) for (src, dst), spec in self.connections.items()
            }
        return result

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> CanvasProgram:
        """Read what :meth:`to_dict` wrote. A schema without programs is a program with all defaults.

        Raises:
            SchemaError: a field is missing, unknown or wrong; the message starts with its place, such as
                ``region_programs.camera.clock.period``.
        """
        schema = CanvasSchema.from_dict(d)
        readers: dict[str, Reader] = {
            "program_version": check_str,
            "region_programs": _read_region_programs,
            "connection_programs": _read_connection_programs,
        }
        values = read_fields({name: d[name] for name in PROGRAM_FIELDS if name in d}, "", readers)
        return cls(
            schema=schema,
            regions=values.get("region_programs", {}),
            connections=values.get("connection_programs", {}),
            version=values.get("program_version", "2.0.0"),
        )

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the program to a JSON file; a failure leaves an existing file as it was.

        Raises:
            OutputPathError: ``path`` cannot be written (an ``OSError`` and a ``CanvasError``).
            SchemaError: the schema's ``metadata`` holds something that JSON cannot.
        """
        write_json(path, self.to_dict())

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> CanvasProgram:
        """Read a program from a JSON file.

        Raises:
            OSError: the file cannot be read.
            SchemaError: it is not JSON or not a program; the message names the file and the place in it.
        """
        document = read_json(path)
        try:
            return cls.from_dict(document)
        except SchemaError as error:
            raise SchemaError(f"{os.fspath(path)!r}: {error}") from None

    def summary(self) -> str:
        """Counts of families, carriers, compile modes and operators."""
        regions = self.regions.values()
        lines = [f"CanvasProgram (v{self.version}, {len(self.regions)} regions programmed):"]
        for title, counts in (
            ("families", Counter(spec.family for spec in regions)),
            ("non-default carriers", Counter(s.carrier for s in regions if s.carrier != "deterministic")),
            ("compile modes", Counter(s.compile_mode for s in regions if s.compile_mode != "runtime")),
            ("operators", Counter(s.operator for s in self.connections.values() if s.operator != "attend")),
        ):
            if counts:
                lines.append(f"  {title}: {', '.join(f'{key}={n}' for key, n in sorted(counts.items()))}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"CanvasProgram(regions={len(self.regions)}, connections={len(self.connections)}, version={self.version!r})"
        )


def validate_constraints(program: CanvasProgram) -> list[str]:
    """Check the constraints that regions declare against each other and the topology.

    Checked are the values themselves and ``causal_direction``; the other constraints are promises that only
    training can keep.

    Returns:
        A sentence per violation; empty if there is none.
    """
    constrained = [(name, spec.constraints) for name, spec in program.regions.items() if spec.constraints]
    violations = []
    for name, constraints in constrained:
        for attribute, known in CONSTRAINT_VALUES.items():
            value = getattr(constraints, attribute)
            if value is not None and value not in known:
                violations.append(f"{name}: unknown {attribute} {value!r} (valid: {', '.join(known)})")
    if program.schema.topology is None:
        return violations
    successors: dict[str, list[str]] = {}
    for edge in program.schema.topology.connections:
        targets = successors.setdefault(edge.src, [])
        if edge.dst not in targets:
            targets.append(edge.dst)
    layout = program.schema.layout
    for name, constraints in constrained:
        if constraints.causal_direction == "acyclic" and name in _reachable(name, successors):
            violations.append(f"{name}: causal_direction='acyclic' violated: a cycle leads back to it")
        if constraints.causal_direction == "forward_only" and name in layout.regions:
            start = layout.bounds(name)[0]
            violations.extend(
                f"{name}: causal_direction='forward_only' violated: connects to {target}, which starts earlier "
                f"(t0={layout.bounds(target)[0]} < {start})"
                for target in successors.get(name, [])
                if target in layout.regions and layout.bounds(target)[0] < start
            )
    return violations


def _reachable(start: str, successors: Mapping[str, Iterable[str]]) -> set[str]:
    """Regions at the end of a path of one connection or more."""
    seen: set[str] = set()
    stack = list(successors.get(start, ()))
    while stack:
        name = stack.pop()
        if name not in seen:
            seen.add(name)
            stack.extend(successors.get(name, ()))
    return seen


def _edge_key(src: str, dst: str) -> str:
    # "src|dst" as in earlier releases; names that would make it ambiguous are written as a JSON list.
    return json.dumps([src, dst]) if "|" in src or src.startswith("[") else f"{src}|{dst}"


def _edge_of(key: str, where: str) -> tuple[str, str]:
    if key.startswith("["):
        try:
            names = json.loads(key)
        except json.JSONDecodeError:
            names = None
        if isinstance(names, list) and len(names) == 2 and all(isinstance(name, str) for name in names):
            return names[0], names[1]
    src, bar, dst = key.partition("|")
    if not bar:
        raise SchemaError(f"{where}: expected a key 'src|dst', got {key!r}")
    return src, dst


def _connection_program_to_dict(spec: ConnectionProgram) -> dict[str, Any]:
    result = spec_to_dict(spec, skip=("mask_spec",))
    if spec.mask_spec is not None:
        result["mask_spec"] = mask_spec_to_dict(spec.mask_spec)
    return result


_count = partial(check_int, minimum=0)

_CLOCK_READERS: dict[str, Reader] = {
    "domain": check_str,
    "mode": check_str,
    "period": partial(check_int, minimum=1),
    "event_source": optional(check_str),
    "event_threshold": check_number,
    "cooldown": _count,
    "max_silence": optional(_count),
    "max_inner_steps": optional(_count),
}
_LEARNING_READERS: dict[str, Reader] = {
    "mode": check_str,
    "losses": check_strings,
    "compile_mode": check_str,
}
_CONSTRAINT_READERS: dict[str, Reader] = dict.fromkeys(CONSTRAINT_VALUES, optional(check_str))
_IDENTITY_READERS: dict[str, Reader] = {
    "mode": partial(check_choice, choices=IDENTITY_MODES),
    "slot_capacity": partial(check_int, minimum=1),
    "binding_fn": check_str,
    "birth_death": check_bool,
}
_REGION_READERS: dict[str, Reader] = {
    "family": check_str,
    "tags": check_strings,
    "carrier": check_str,
    "clock": optional(lambda value, where: read_spec(ClockSpec, value, where, _CLOCK_READERS)),
    "learning": optional(lambda value, where: read_spec(LearningSpec, value, where, _LEARNING_READERS)),
    "compile_mode": check_str,
    "constraints": optional(lambda value, where: read_spec(ConstraintSpec, value, where, _CONSTRAINT_READERS)),
    "identity": optional(lambda value, where: read_spec(IdentitySpec, value, where, _IDENTITY_READERS)),
}
_CONNECTION_READERS: dict[str, Reader] = {
    "operator": check_str,
    "trigger": optional(check_str),
    "write_mode": partial(check_choice, choices=sorted(WRITE_MODES)),
    "mask_spec": optional(read_mask_spec),
}


def _read_region_programs(value: Any, where: str) -> dict[str, RegionProgram]:
    return {
        name: read_spec(RegionProgram, spec, join(where, name), _REGION_READERS)
        for name, spec in read_object(value, where).items()
    }


def _read_connection_programs(value: Any, where: str) -> dict[tuple[str, str], ConnectionProgram]:
    return {
        _edge_of(key, where): read_spec(ConnectionProgram, spec, join(where, key), _CONNECTION_READERS)
        for key, spec in read_object(value, where).items()
    }
