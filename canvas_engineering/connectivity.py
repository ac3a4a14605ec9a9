"""Which regions attend to which, at which timesteps, and what stands in for a missing timestep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any

from canvas_engineering._checks import check_choice, check_int, check_number, check_str
from canvas_engineering._optional import require
from canvas_engineering.canvas import CanvasLayout
from canvas_engineering.errors import CanvasError
from canvas_engineering.masks import MaskSpec

WRITE_MODES: set[str] = {"add", "replace", "gate"}
"""How what a connection carries is combined with what others wrote to the same rows."""


class TemporalFill(str, Enum):  # noqa: UP042 - StrEnum would change str() of what users print
    """What a temporal connection reads when dst has nothing at the requested real time.

    Regions with different periods rarely meet at the same real time; the fill mode bridges the gap.
    """

    DROP = "drop"
    """Nothing: the queries of that frame get nothing over this connection."""
    HOLD = "hold"
    """The latest earlier time that dst has (zero-order hold); nothing if there is none."""
    INTERPOLATE = "interpolate"
    """Order 1: the nearest earlier and later times, weighted linearly; where one is missing, the other.
    Order N > 1: the N + 1 nearest times, weighted by ``1 / distance**N`` (inverse-distance weighting)."""


@dataclass(frozen=True)
class Connection:
    """One directed edge: the tokens of ``src`` query the tokens of ``dst``.

    Args:
        src: Region whose tokens are the queries.
        dst: Region whose tokens are the keys and values.
        weight: Share of this edge in the weighted sum of its rows' edges, finite and >= 0.
        t_src: Restricts the queries of reference frame ``ref`` to timestep ``ref + t_src``. None: all.
        t_dst: Restricts the keys of reference frame ``ref`` to timestep ``ref + t_dst``. None: all.
        fn: Attention function; None takes the default of the src region.
        operator: What the edge means, e.g. ``observe``, ``predict``, ``write``.
        write_mode: How the result is combined with that of other edges: ``add``, ``replace`` or ``gate``.
        temporal_fill: What to read when dst has nothing at the requested time; used when ``t_dst`` is set.
        interpolation_order: Order of ``TemporalFill.INTERPOLATE``, >= 1.
        mask: Which keys each query may read; None means all.

    Raises:
        CanvasError: a weight that is negative or not finite, an offset that is not an integer, an unknown
            write mode or fill mode, an order below 1, or a mask that is not a :class:`MaskSpec`.
    """

    src: str
    dst: str
    weight: float = 1.0
    t_src: int | None = None
    t_dst: int | None = None
    fn: str | None = None
    operator: str = "attend"
    write_mode: str = "add"
    temporal_fill: TemporalFill = TemporalFill.HOLD
    interpolation_order: int = 1
    mask: MaskSpec | None = None

    def __post_init__(self) -> None:
        edge = f"connection {self.src!r} -> {self.dst!r}"
        for name in ("src", "dst", "operator"):
            check_str(getattr(self, name), f"{edge}: {name}")
        object.__setattr__(self, "weight", check_number(self.weight, f"{edge}: weight", minimum=0))
        for name in ("t_src", "t_dst"):
            offset = getattr(self, name)
            if offset is not None:
                object.__setattr__(self, name, check_int(offset, f"{edge}: {name}"))
        if self.fn is not None:
            check_str(self.fn, f"{edge}: fn")
        check_choice(self.write_mode, f"{edge}: write_mode", sorted(WRITE_MODES))
        try:
            object.__setattr__(self, "temporal_fill", TemporalFill(self.temporal_fill))
        except ValueError:
            known = ", ".join(fill.value for fill in TemporalFill)
            raise CanvasError(f"{edge}: temporal_fill: expected one of {known}, got {self.temporal_fill!r}") from None
        order = check_int(self.interpolation_order, f"{edge}: interpolation_order", minimum=1)
        object.__setattr__(self, "interpolation_order", order)
        if self.mask is not None and not isinstance(self.mask, MaskSpec):
            raise CanvasError(f"{edge}: mask: expected a MaskSpec, got {self.mask!r}")


@dataclass
class CanvasTopology:
    """The edges of a canvas: which region attends to which.

    A connection without offsets joins all timesteps. With offsets it is read once per reference frame
    ``ref`` in ``0..T-1``: queries at ``ref + t_src``, keys at the real time ``(ref + t_dst) * period(src)``;
    a side without an offset takes part with all its timesteps. Several connections between the same two
    regions are independent of each other.

    Args:
        connections: The edges, in order.

    Raises:
        CanvasError: an entry is not a :class:`Connection`.

    Example:
        >>> topology = CanvasTopology([Connection("action", "camera", t_src=0, t_dst=-1)])
        >>> topology.neighbors_of("action")
        ['camera']
    """

    connections: list[Connection] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.connections, list):
            self.connections = list(self.connections)
        for index, connection in enumerate(self.connections):
            if not isinstance(connection, Connection):
                raise CanvasError(f"connections[{index}]: expected a Connection, got {connection!r}")

    # Constructors

    @staticmethod
    def dense(regions: Sequence[str]) -> CanvasTopology:
        """Every region attends to every region, itself included."""
        return CanvasTopology([Connection(src, dst) for src in regions for dst in regions])

    @staticmethod
    def isolated(regions: Sequence[str]) -> CanvasTopology:
        """Every region attends to itself only."""
        return CanvasTopology([Connection(name, name) for name in regions])

    @staticmethod
    def hub_spoke(hub: str, spokes: Sequence[str], bidirectional: bool = True) -> CanvasTopology:
        """Every region attends to itself, the hub to each spoke, each spoke to the hub if bidirectional."""
        edges = [Connection(name, name) for name in (hub, *spokes)]
        for spoke in spokes:
            edges.append(Connection(hub, spoke))
            if bidirectional:
                edges.append(Connection(spoke, hub))
        return CanvasTopology(edges)

    @staticmethod
    def causal_chain(regions: Sequence[str]) -> CanvasTopology:
        """Every region attends to itself and to the one before it in the list."""
        edges = [Connection(name, name) for name in regions]
        edges += [Connection(later, earlier) for earlier, later in pairwise(regions)]
        return CanvasTopology(edges)

    @staticmethod
    def causal_temporal(
        regions: Sequence[str],
        layout: CanvasLayout | None = None,
        temporal_fill: TemporalFill = TemporalFill.HOLD,
    ) -> CanvasTopology:
        """Every region attends to its own current and previous frame and to the others' previous frame.

        Args:
            regions: Region names.
            layout: Not used; part of the signature for callers of earlier releases.
            temporal_fill: Fill mode of all connections.
        """
        own = [(name, name, t_dst) for name in regions for t_dst in (0, -1)]
        others = [(src, dst, -1) for src in regions for dst in regions if src != dst]
        return CanvasTopology(
            [
                Connection(src, dst, t_src=0, t_dst=t_dst, temporal_fill=temporal_fill)
                for src, dst, t_dst in own + others
            ]
        )

    # Queries

    @property
    def regions(self) -> set[str]:
        """All regions named by a connection."""
        return {name for edge in self.connections for name in (edge.src, edge.dst)}

    @property
    def has_temporal_constraints(self) -> bool:
        """Whether any connection has a temporal offset."""
        return any(_is_temporal(edge) for edge in self.connections)

    def resolve_fn(self, connection: Connection, layout: CanvasLayout | None = None) -> str:
        """The connection's own function, else the default of src in ``layout``, else ``cross_attention``."""
        if connection.fn is not None:
            return connection.fn
        if layout is not None and connection.src in layout.regions:
            return layout.region_spec(connection.src).default_attn
        return "cross_attention"

    def attention_ops(self, layout: CanvasLayout | None = None) -> list[tuple[str, str, float, str]]:
        """``(src, dst, weight, function)`` of every connection, in order."""
        return [(edge.src, edge.dst, edge.weight, self.resolve_fn(edge, layout)) for edge in self.connections]

    def neighbors_of(self, region: str) -> list[str]:
        """Regions that ``region`` queries, one entry per connection."""
        return [edge.dst for edge in self.connections if edge.src == region]

    def attended_by(self, region: str) -> list[str]:
        """Regions that query ``region``, one entry per connection."""
        return [edge.src for edge in self.connections if edge.dst == region]

    def to_block_adjacency(self) -> dict[tuple[str, str], float]:
        """Largest weight of the connections from each src to each dst."""
        adjacency: dict[tuple[str, str], float] = {}
        for edge in self.connections:
            pair = (edge.src, edge.dst)
            adjacency[pair] = max(adjacency.get(pair, 0.0), edge.weight)
        return adjacency

    def summary(self) -> str:
        """The edges between regions, one per line, then counts of fill modes and operators."""
        adjacency = self.to_block_adjacency()
        lines = [f"CanvasTopology ({len(self.connections)} ops, {len(self.regions)} regions):"]
        for (src, dst), weight in sorted(adjacency.items()):
            if src == dst:
                edge = f"{src} ↺ self"
            else:
                edge = f"{src} {'↔' if (dst, src) in adjacency else '→'} {dst}"
            lines.append(f"  {edge}  (w={weight:.2f})")
        fills = Counter(edge.temporal_fill.value for edge in self.connections if _is_temporal(edge))
        if fills:
            lines.append(f"  [{fills.total()} temporal constraints: {_counts(fills)}]")
        operators = Counter(edge.operator for edge in self.connections if edge.operator != "attend")
        if operators:
            lines.append(f"  [operators: {_counts(operators)}]")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"CanvasTopology(connections={len(self.connections)}, regions={sorted(self.regions)})"

    # Dense masks

    def to_attention_mask(self, layout: CanvasLayout, device: Any = "cpu") -> Any:
        """Weight with which each query may read each key: the largest over all connections, 0 for none.

        Args:
            layout: The canvas. Connections that name a region it lacks are skipped with a warning.
            device: Torch device of the result, or ``"numpy"`` for a NumPy array, which needs no torch.

        Returns:
            ``(N, N)`` float32 with ``N = layout.num_positions``, a torch tensor unless ``device="numpy"``.

        Raises:
            MissingDependencyError: torch is not installed and ``device`` is not ``"numpy"``.
        """
        # Imported here because groups are resolved from the types of this module.
        from canvas_engineering._dense_mask import weight_matrix

        torch = _torch_for(device, "CanvasTopology.to_attention_mask")
        mask = weight_matrix(self, layout)
        return mask if torch is None else torch.from_numpy(mask).to(device)

    def to_additive_mask(self, layout: CanvasLayout, device: Any = "cpu") -> Any:
        """Mask to add to attention logits: 0 where a key may be read, -inf elsewhere.

        A row that may read nothing reads itself, so that a softmax over it is finite.

        Args:
            layout: As in :meth:`to_attention_mask`.
            device: As in :meth:`to_attention_mask`.

        Returns:
            ``(N, N)`` float32, a torch tensor unless ``device="numpy"``.

        Raises:
            MissingDependencyError: torch is not installed and ``device`` is not ``"numpy"``.
        """
        from canvas_engineering._dense_mask import to_additive, weight_matrix

        torch = _torch_for(device, "CanvasTopology.to_additive_mask")
        mask = to_additive(weight_matrix(self, layout))
        return mask if torch is None else torch.from_numpy(mask).to(device)


def _is_temporal(edge: Connection) -> bool:
    return edge.t_src is not None or edge.t_dst is not None


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name}={count}" for name, count in sorted(counter.items()))


def _torch_for(device: Any, purpose: str) -> Any:
    """The torch module, or None where the caller asked for NumPy."""
    return None if isinstance(device, str) and device == "numpy" else require("torch", "torch", purpose)
