"""Edges: connections with function, write mode and trigger settled."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from canvas_engineering.errors import CanvasError
from canvas_engineering.program import ConnectionProgram, resolve_operator_defaults
from canvas_engineering.triggers import Summaries, Trigger, parse_trigger

if TYPE_CHECKING:
    from canvas_engineering.canvas import CanvasLayout
    from canvas_engineering.connectivity import CanvasTopology, Connection
    from canvas_engineering.cortex import CortexRegistry
    from canvas_engineering.program import CanvasProgram

#: A region's ``default_attn`` that leaves the choice to the operator.
BARE_DEFAULT = "cross_attention"


@dataclass(frozen=True)
class Edge:
    """One connection as a dispatcher runs it.

    Attributes:
        index: Place in ``topology.connections``.
        src, dst: Query and key region.
        fn: Name of the attention function.
        write_mode: ``"add"``, ``"gate"`` or ``"replace"``.
        trigger: Fires the edge; None always does.
        temporal: Whether time offsets apply.
        residual: Whether its error feeds the residual accumulator (see ``needs_own_output``).
        slots: Whether keys and values are dst's slot bank.
        reason: Why it has this function.
    """

    index: int
    src: str
    dst: str
    fn: str
    write_mode: str
    trigger: Trigger | None
    temporal: bool
    residual: bool
    slots: bool
    reason: str

    @property
    def needs_own_output(self) -> bool:
        """Whether it must be computed on its own rather than inside a plan."""
        return self.residual or self.slots


def resolve_edges(
    topology: CanvasTopology,
    layout: CanvasLayout,
    *,
    program: CanvasProgram | None = None,
    cortex_registry: CortexRegistry | None = None,
    skip_temporal: bool = False,
    residual_regions: Collection[str] = (),
) -> list[Edge]:
    """The edges between known regions, in order of their connections.

    Args:
        topology, layout: The declaration; connections with unknown regions are left out (``resolve_groups`` warns).
        program: Operators, write modes, triggers and slot banks.
        cortex_registry: Inside one cortex its ``local_backend`` is the function.
        skip_temporal: Ignore time offsets.
        residual_regions: Regions whose errors are accumulated; only those with carrier "residual" matter.

    Raises:
        CanvasError: A trigger that cannot be parsed; the message names the connection.
    """
    edges = []
    for index, connection in enumerate(topology.connections):
        if connection.src not in layout.regions or connection.dst not in layout.regions:
            continue
        declared = _declared_program(connection, program)
        fn, reason = _effective_function(connection, layout, declared, cortex_registry)
        _, write_mode, trigger = resolve_operator_defaults(declared, fn)
        temporal = not skip_temporal and (connection.t_src is not None or connection.t_dst is not None)
        identity = None if program is None else getattr(program.regions.get(connection.dst), "identity", None)
        edges.append(
            Edge(
                index=index,
                src=connection.src,
                dst=connection.dst,
                fn=fn,
                write_mode=write_mode,
                trigger=_parsed(trigger, index, connection),
                temporal=temporal,
                residual=not temporal
                and connection.dst in residual_regions
                and layout.region_spec(connection.dst).carrier == "residual",
                slots=identity is not None,
                reason=reason,
            )
        )
    return edges


def _declared_program(connection: Connection, program: CanvasProgram | None) -> ConnectionProgram:
    """The program of (src, dst), or one made of the connection's own operator and write mode."""
    if program is not None and (connection.src, connection.dst) in program.connections:
        return program.connections[connection.src, connection.dst]
    return ConnectionProgram(operator=connection.operator, write_mode=connection.write_mode)


def _effective_function(
    connection: Connection, layout: CanvasLayout, declared: ConnectionProgram, registry: CortexRegistry | None
) -> tuple[str, str]:
    """(function, why): cortex, then the connection, then the region, then the operator, then cross attention."""
    if registry is not None and registry.same_cortex(connection.src, connection.dst):
        cortex = registry.cortex_for(connection.src)
        if cortex is not None:
            return cortex.local_backend, f"inside cortex {cortex.name!r}"
    if connection.fn is not None:
        return connection.fn, "the connection's fn"
    default = layout.region_spec(connection.src).default_attn
    if default != BARE_DEFAULT:
        return default, f"default_attn of {connection.src!r}"
    fn = resolve_operator_defaults(declared, BARE_DEFAULT)[0]
    return fn, "the default" if fn == BARE_DEFAULT else f"operator {declared.operator!r}"


def _parsed(trigger: str | None, index: int, connection: Connection) -> Trigger | None:
    if trigger is None:
        return None
    try:
        return parse_trigger(trigger)
    except CanvasError as error:
        raise CanvasError(f"connection {index} ({connection.src!r} -> {connection.dst!r}): {error}") from error


def active_edges(
    edges: list[Edge], layout: CanvasLayout, active_regions: Collection[str] | None, summaries: Summaries | None
) -> tuple[bool, ...]:
    """Which edges run: their src is active and their trigger, if any, fires.

    Raises:
        CanvasError: ``active_regions`` holds a name the layout lacks.
    """
    if active_regions is not None:
        unknown = sorted(set(active_regions) - set(layout.regions))
        if unknown:
            raise CanvasError(f"active_regions must be region names {sorted(layout.regions)}, got {unknown[0]!r}")
    return tuple(
        (active_regions is None or edge.src in active_regions)
        and (edge.trigger is None or edge.trigger.fires(summaries))
        for edge in edges
    )
