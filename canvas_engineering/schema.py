"""A canvas declaration as one value: layout and topology, written to and read from JSON.

The file format is that of earlier releases plus the fields they dropped (``temporal_fill``,
``interpolation_order``, ``mask``). Fields at their default are left out.
"""

from __future__ import annotations

import base64
import binascii
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from canvas_engineering._checks import check_bool, check_choice, check_int, check_number, check_shape, check_str
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
from canvas_engineering.canvas import CanvasLayout, RegionSpec, check_bounds, transfer_distance
from canvas_engineering.connectivity import WRITE_MODES, CanvasTopology, Connection, TemporalFill
from canvas_engineering.errors import CanvasError, SchemaError
from canvas_engineering.masks import MASK_KINDS, MaskSpec

PROGRAM_FIELDS = ("program_version", "region_programs", "connection_programs")
"""What a ``CanvasProgram`` adds to the fields of a schema; a schema may be read from a program's file."""

_positive = partial(check_int, minimum=1)


@dataclass
class CanvasSchema:
    """Layout and topology of a canvas, the portable description of a model's input and output.

    Args:
        layout: Geometry and regions.
        topology: Edges between regions, if declared.
        version: Version of the format, kept as it was read.
        metadata: Anything else that JSON can hold.

    Raises:
        CanvasError: ``layout`` or ``topology`` is of another type.

    Example:
        >>> layout = CanvasLayout(T=2, H=4, W=4, d_model=8, regions={"camera": (0, 2, 0, 4, 0, 4)})
        >>> schema = CanvasSchema(layout, CanvasTopology.isolated(["camera"]))
        >>> CanvasSchema.from_dict(schema.to_dict()) == schema
        True
    """

    layout: CanvasLayout
    topology: CanvasTopology | None = None
    version: str = "0.2.0"
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.layout, CanvasLayout):
            raise CanvasError(f"layout: expected a CanvasLayout, got {self.layout!r}")
        if self.topology is not None and not isinstance(self.topology, CanvasTopology):
            raise CanvasError(f"topology: expected a CanvasTopology or None, got {self.topology!r}")

    def to_dict(self) -> dict[str, Any]:
        """The schema as plain dicts, lists, strings and numbers."""
        layout = self.layout
        result: dict[str, Any] = {
            "schema_version": self.version,
            "layout": {
                "T": layout.T,
                "spatial_shape": list(layout.spatial_shape),
                "d_model": layout.d_model,
                "t_current": layout.t_current,
            },
            "regions": {name: spec_to_dict(layout.region_spec(name)) for name in layout.regions},
        }
        if self.topology is not None:
            result["topology"] = [_connection_to_dict(edge) for edge in self.topology.connections]
        if self.metadata:
            result["metadata"] = self.metadata
        return result

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> CanvasSchema:
        """Read what :meth:`to_dict` wrote; also files that give ``H`` and ``W`` for ``spatial_shape``.

        Raises:
            SchemaError: a field is missing, unknown or wrong; the message starts with its place, such as
                ``topology[3].weight``.
        """
        top: dict[str, Reader] = {
            "schema_version": check_str,
            "layout": _read_grid,
            "regions": read_object,
            "topology": optional(_read_topology),
            "metadata": optional(read_object),
            **dict.fromkeys(PROGRAM_FIELDS, _unread),
        }
        values = read_fields(d, "", top, required=("layout", "regions"))
        grid = values["layout"]
        shape = (grid["T"], *grid["spatial_shape"])
        regions = {
            name: _read_region(region, join("regions", name), shape) for name, region in values["regions"].items()
        }
        return cls(
            layout=CanvasLayout(**grid, regions=regions),
            topology=values.get("topology"),
            version=values.get("schema_version", "0.2.0"),
            metadata=values.get("metadata") or {},
        )

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the schema to a JSON file; a failure leaves an existing file as it was.

        Raises:
            OutputPathError: ``path`` cannot be written (an ``OSError`` and a ``CanvasError``).
            SchemaError: ``metadata`` holds something that JSON cannot.
        """
        write_json(path, self.to_dict())

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> CanvasSchema:
        """Read a schema from a JSON file.

        Raises:
            OSError: the file cannot be read.
            SchemaError: it is not JSON or not a schema; the message names the file and the place in it.
        """
        document = read_json(path)
        try:
            return cls.from_dict(document)
        except SchemaError as error:
            raise SchemaError(f"{os.fspath(path)!r}: {error}") from None

    def compatible_regions(self, other: CanvasSchema, threshold: float = 0.3) -> list[tuple[str, str, float]]:
        """Pairs of regions of two schemas whose semantic embeddings are close.

        Args:
            other: The other schema.
            threshold: Largest ``transfer_distance`` that counts as close.

        Returns:
            ``(own region, other's region, distance)``, nearest first. Regions without an embedding, or with
            embeddings of different models, are not compared.
        """
        pairs = []
        for own_name, own in _embedded(self.layout):
            for other_name, their in _embedded(other.layout):
                if own.embedding_model == their.embedding_model:
                    distance = transfer_distance(own, their)
                    if distance <= threshold:
                        pairs.append((own_name, other_name, distance))
        return sorted(pairs, key=lambda pair: pair[2])


def _embedded(layout: CanvasLayout) -> list[tuple[str, RegionSpec]]:
    specs = [(name, layout.region_spec(name)) for name in layout.regions]
    return [(name, spec) for name, spec in specs if spec.semantic_embedding is not None]


def mask_spec_to_dict(spec: MaskSpec) -> dict[str, Any]:
    """A mask as plain data; an explicit mask as its shape and its bits in base64, first cell highest bit."""
    result = spec_to_dict(spec, skip=("mask",))
    if spec.mask is not None:
        bits = base64.b64encode(np.packbits(spec.mask).tobytes()).decode("ascii")
        result["mask"] = {"shape": list(spec.mask.shape), "bits": bits}
    return result


def read_mask_spec(value: Any, where: str) -> MaskSpec:
    """Read what :func:`mask_spec_to_dict` wrote; ``mask`` may also be nested lists of booleans.

    Raises:
        SchemaError: a field is unknown or wrong.
    """
    readers: dict[str, Reader] = {
        "kind": partial(check_choice, choices=MASK_KINDS),
        "tile_h": _positive,
        "tile_w": _positive,
        "tile_shape": optional(check_shape),
        "mask": optional(_read_bits),
        "window_shape": optional(check_shape),
    }
    spec: MaskSpec = read_spec(MaskSpec, value, where, readers)
    return spec


def _read_bits(value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        return value  # nested lists; MaskSpec checks them
    part = read_fields(value, where, {"shape": _read_sizes, "bits": check_str}, required=("shape", "bits"))
    size = math.prod(part["shape"])
    try:
        packed = np.frombuffer(base64.b64decode(part["bits"], validate=True), dtype=np.uint8)
    except (binascii.Error, ValueError) as error:
        raise SchemaError(f"{where}.bits: expected base64, got {error}") from None
    if len(packed) != -(-size // 8):
        raise SchemaError(f"{where}.bits: expected {-(-size // 8)} bytes for shape {part['shape']}, got {len(packed)}")
    return np.unpackbits(packed, count=size).astype(np.bool_).reshape(part["shape"])


def _read_sizes(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise SchemaError(f"{where}: expected a list of sizes, got {value!r:.80}")
    return tuple(check_int(size, f"{where}[{index}]", minimum=0) for index, size in enumerate(value))


def _connection_to_dict(edge: Connection) -> dict[str, Any]:
    result = spec_to_dict(edge, skip=("mask",))
    if edge.mask is not None:
        result["mask"] = mask_spec_to_dict(edge.mask)
    return result


def _read_grid(value: Any, where: str) -> dict[str, Any]:
    readers: dict[str, Reader] = {
        "T": _positive,
        "spatial_shape": check_shape,
        "H": _positive,
        "W": _positive,
        "d_model": _positive,
        "t_current": partial(check_int, minimum=0),
    }
    grid = read_fields(value, where, readers, required=("T", "d_model"))
    sides = tuple(grid.pop(name) for name in ("H", "W") if name in grid)
    if "spatial_shape" not in grid:
        if len(sides) != 2:
            raise SchemaError(f"{where}: missing field 'spatial_shape' (or 'H' and 'W')")
        grid["spatial_shape"] = sides
    elif sides and grid["spatial_shape"][: len(sides)] != sides:
        raise SchemaError(
            f"{where}: 'H' and 'W' {list(sides)} contradict 'spatial_shape' {list(grid['spatial_shape'])}"
        )
    return grid


def _read_region(value: Any, where: str, shape: tuple[int, ...]) -> tuple[int, ...] | RegionSpec:
    readers: dict[str, Reader] = {
        "bounds": lambda bounds, place: check_bounds(bounds, shape, place),
        "period": _positive,
        "is_output": check_bool,
        "loss_weight": partial(check_number, minimum=0),
        "semantic_type": optional(check_str),
        "semantic_embedding": optional(_read_numbers),
        "embedding_model": check_str,
        "default_attn": check_str,
        "carrier": check_str,
    }
    fields = read_fields(value, where, readers, required=("bounds",))
    return RegionSpec(**fields) if len(fields) > 1 else tuple(fields["bounds"])


def _read_numbers(value: Any, where: str) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise SchemaError(f"{where}: expected a list of numbers, got {value!r:.80}")
    return tuple(check_number(number, f"{where}[{index}]") for index, number in enumerate(value))


def _read_fill(value: Any, where: str) -> TemporalFill:
    return TemporalFill(check_choice(value, where, [fill.value for fill in TemporalFill]))


def _read_topology(value: Any, where: str) -> CanvasTopology:
    if not isinstance(value, list):
        raise SchemaError(f"{where}: expected a list of connections, got {value!r:.80}")
    readers: dict[str, Reader] = {
        "src": check_str,
        "dst": check_str,
        "weight": partial(check_number, minimum=0),
        "t_src": optional(check_int),
        "t_dst": optional(check_int),
        "fn": optional(check_str),
        "operator": check_str,
        "write_mode": partial(check_choice, choices=sorted(WRITE_MODES)),
        "temporal_fill": _read_fill,
        "interpolation_order": _positive,
        "mask": optional(read_mask_spec),
    }
    return CanvasTopology(
        [
            read_spec(Connection, edge, f"{where}[{index}]", readers, required=("src", "dst"))
            for index, edge in enumerate(value)
        ]
    )


def _unread(value: Any, where: str) -> None:
    """A field of a program file that a schema does not look at."""
