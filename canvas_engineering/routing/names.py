"""Names of a dispatcher's own parameters, the same in every framework."""

from __future__ import annotations

from collections.abc import Sequence

from canvas_engineering.routing.edges import Edge


def parameter_name(name: str) -> str:
    """A region's name as part of a parameter's name, which may hold no dot."""
    return name.replace("~", "~0").replace(".", "~1")


def gate_names(edges: Sequence[Edge]) -> dict[int, str]:
    """Index of each gating edge to the name of its gate, one per (src, dst, function)."""
    return {
        i: parameter_name(f"{edge.src}->{edge.dst}:{edge.fn}")
        for i, edge in enumerate(edges)
        if edge.write_mode == "gate"
    }


def slot_names(edges: Sequence[Edge]) -> dict[str, str]:
    """Region with a slot bank that some edge reads, to the name of its module."""
    return {edge.dst: parameter_name(edge.dst) for edge in edges if edge.slots}
