"""Cortices: named zones of a canvas whose regions share an attention function."""

from __future__ import annotations

from dataclasses import dataclass

from canvas_engineering._checks import check_bool, check_str
from canvas_engineering.errors import CanvasError


class UnknownCortexError(CanvasError, KeyError):
    """A cortex or an assignment that the registry does not hold; a ``ValueError`` and a ``KeyError``."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


@dataclass(frozen=True)
class CortexSpec:
    """One zone of a canvas.

    Args:
        name: Unique name.
        bounds: Half-open box ``(t0, t1, lo, hi, ...)``.
        tile: Preferred tile size per spatial axis.
        local_backend: Attention function of connections inside the cortex.
        shared_cache: Whether its regions share a key-value cache at inference.
    """

    name: str
    bounds: tuple[int, ...] = (0, 1, 0, 1, 0, 1)
    tile: tuple[int, ...] = (4, 4)
    local_backend: str = "local_attention"
    shared_cache: bool = True

    def __post_init__(self) -> None:
        check_str(self.name, "CortexSpec.name")
        check_str(self.local_backend, "CortexSpec.local_backend")
        check_bool(self.shared_cache, "CortexSpec.shared_cache")
        object.__setattr__(self, "bounds", tuple(self.bounds))
        object.__setattr__(self, "tile", tuple(self.tile))


class CortexRegistry:
    """Cortices and the regions assigned to them, at most one per region."""

    def __init__(self) -> None:
        self._cortices: dict[str, CortexSpec] = {}
        self._cortex_of: dict[str, str] = {}

    def register(self, spec: CortexSpec) -> None:
        """Add a cortex.

        Raises:
            CanvasError: its name is taken.
        """
        if spec.name in self._cortices:
            raise CanvasError(f"cortex {spec.name!r} is already registered")
        self._cortices[spec.name] = spec

    def unregister(self, name: str) -> None:
        """Remove a cortex and its assignments.

        Raises:
            UnknownCortexError: there is none of this name.
        """
        self._require(name)
        del self._cortices[name]
        self._cortex_of = {region: cortex for region, cortex in self._cortex_of.items() if cortex != name}

    def assign(self, region: str, cortex_name: str) -> None:
        """Put a region into a cortex.

        Raises:
            UnknownCortexError: there is no such cortex.
            CanvasError: the region is in another one.
        """
        self._require(cortex_name)
        current = self._cortex_of.setdefault(region, cortex_name)
        if current != cortex_name:
            raise CanvasError(
                f"region {region!r} is already assigned to cortex {current!r}, got {cortex_name!r}: unassign it first"
            )

    def unassign(self, region: str) -> None:
        """Take a region out of its cortex.

        Raises:
            UnknownCortexError: it is in none.
        """
        if region not in self._cortex_of:
            raise UnknownCortexError(f"region {region!r} has no cortex assignment")
        del self._cortex_of[region]

    def cortex_for(self, region: str) -> CortexSpec | None:
        """The region's cortex, or None."""
        name = self._cortex_of.get(region)
        return None if name is None else self._cortices[name]

    def regions_in(self, cortex_name: str) -> list[str]:
        """Regions of a cortex, sorted by name."""
        return sorted(region for region, cortex in self._cortex_of.items() if cortex == cortex_name)

    def same_cortex(self, a: str, b: str) -> bool:
        """Whether both regions are in one and the same cortex."""
        return a in self._cortex_of and self._cortex_of[a] == self._cortex_of.get(b)

    @property
    def cortex_names(self) -> list[str]:
        """Names of all cortices, sorted."""
        return sorted(self._cortices)

    @property
    def n_cortices(self) -> int:
        """Number of cortices."""
        return len(self._cortices)

    @property
    def n_assigned(self) -> int:
        """Number of regions in a cortex."""
        return len(self._cortex_of)

    def summary(self) -> str:
        """One line per cortex: tile, attention function, cache, regions."""
        lines = [f"CortexRegistry({self.n_cortices} cortices, {self.n_assigned} assignments):"]
        for name in self.cortex_names:
            spec, regions = self._cortices[name], self.regions_in(name)
            members = f" [{', '.join(regions)}]" if regions else ""
            lines.append(
                f"  {name} (tile={spec.tile}, backend={spec.local_backend}, cache={spec.shared_cache}): "
                f"{len(regions)} regions{members}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"CortexRegistry(cortices={self.n_cortices}, assigned={self.n_assigned})"

    def _require(self, name: str) -> None:
        if name not in self._cortices:
            known = ", ".join(map(repr, self.cortex_names)) or "none"
            raise UnknownCortexError(f"cortex {name!r} is not registered; known: {known}")
