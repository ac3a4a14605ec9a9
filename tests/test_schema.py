"""Schema files: nothing is lost, files of 0.5.0 load, and a wrong field is named with its place."""

from __future__ import annotations

import copy
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from canvas_strategies import layouts, topologies
from hypothesis import given, strategies as st

from canvas_engineering._files import OutputPathError, atomic_write
from canvas_engineering.canvas import CanvasLayout, RegionSpec
from canvas_engineering.connectivity import CanvasTopology, Connection, TemporalFill
from canvas_engineering.errors import CanvasError, SchemaError
from canvas_engineering.masks import MaskSpec
from canvas_engineering.schema import CanvasSchema

OLD_FILE = Path(__file__).parent / "data" / "program_0_5_0.json"  # written by CanvasProgram.to_json of 0.5.0


def small_schema() -> CanvasSchema:
    layout = CanvasLayout(
        T=4,
        H=4,
        W=4,
        d_model=8,
        t_current=2,
        regions={"cam": (0, 4, 0, 3, 0, 4), "arm": RegionSpec((0, 2, 3, 4, 0, 2), period=2)},
    )
    mask = np.arange(4).reshape(1, 4) % 3 == np.arange(48).reshape(48, 1) % 3
    topology = CanvasTopology(
        [
            Connection("cam", "cam", mask=MaskSpec("window", window_shape=(3, 3, 3), tile_shape=(1, 2, 2))),
            Connection("cam", "arm", mask=MaskSpec("sparse", mask=mask)),
            Connection("cam", "arm", mask=MaskSpec("tile", tile_h=2)),
            Connection(
                "arm",
                "cam",
                weight=0.5,
                t_src=0,
                t_dst=-1,
                fn="gated",
                operator="observe",
                write_mode="gate",
                temporal_fill=TemporalFill.INTERPOLATE,
                interpolation_order=3,
            ),
        ]
    )
    return CanvasSchema(layout, topology, metadata={"project": "demo", "nested": {"a": [1, None, "ü"]}})


@given(st.data())
def test_round_trip_loses_nothing(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    schema = CanvasSchema(layout, data.draw(st.none() | topologies(layout)))
    text = json.dumps(schema.to_dict())
    read = CanvasSchema.from_dict(json.loads(text))
    assert read == schema
    assert json.dumps(read.to_dict()) == text


def test_file_round_trip(tmp_path: Path) -> None:
    schema = small_schema()
    schema.to_json(tmp_path / "schema.json")
    assert CanvasSchema.from_json(str(tmp_path / "schema.json")) == schema
    assert [path.name for path in tmp_path.iterdir()] == ["schema.json"]


def test_defaults_are_left_out() -> None:
    written = small_schema().to_dict()
    assert written["regions"] == {
        "cam": {"bounds": [0, 4, 0, 3, 0, 4]},
        "arm": {"bounds": [0, 2, 3, 4, 0, 2], "period": 2},
    }
    assert written["layout"] == {"T": 4, "spatial_shape": [4, 4], "d_model": 8, "t_current": 2}
    assert written["schema_version"] == "0.2.0"
    assert written["topology"][2] == {"src": "cam", "dst": "arm", "mask": {"kind": "tile", "tile_h": 2}}
    assert written["topology"][3] == {
        "src": "arm",
        "dst": "cam",
        "weight": 0.5,
        "t_src": 0,
        "t_dst": -1,
        "fn": "gated",
        "operator": "observe",
        "write_mode": "gate",
        "temporal_fill": "interpolate",
        "interpolation_order": 3,
    }
    bare = CanvasSchema(small_schema().layout).to_dict()
    assert "topology" not in bare
    assert "metadata" not in bare


def test_mask_bits_are_packed_first_cell_highest() -> None:
    mask = MaskSpec("sparse", mask=[[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    topology = CanvasTopology([Connection("a", "b", mask=mask)])
    layout = CanvasLayout(T=1, spatial_shape=(7,), d_model=1, regions={"a": (0, 1, 0, 3), "b": (0, 1, 3, 7)})
    written = CanvasSchema(layout, topology).to_dict()["topology"][0]["mask"]
    assert written == {"kind": "sparse", "mask": {"shape": [3, 4], "bits": "gIA="}}  # 0x80 0x80
    by_hand: dict[str, Any] = CanvasSchema(layout, topology).to_dict()
    by_hand["topology"][0]["mask"]["mask"] = mask.mask.tolist()
    read = CanvasSchema.from_dict(by_hand)
    assert read.topology is not None
    assert read.topology.connections[0].mask == mask


def test_file_of_0_5_0_loads() -> None:
    schema = CanvasSchema.from_json(OLD_FILE)
    assert schema == CanvasSchema(
        CanvasLayout(
            T=4,
            spatial_shape=(4, 4),
            d_model=64,
            t_current=2,
            regions={
                "camera": RegionSpec(
                    (0, 4, 0, 3, 0, 4),
                    semantic_type="RGB video",
                    semantic_embedding=(0.6, 0.8),
                    embedding_model="test/model",
                    default_attn="gated",
                ),
                "arm.joints": RegionSpec((0, 2, 3, 4, 0, 2), period=2, loss_weight=2.5, carrier="filter"),
                "goal": RegionSpec((0, 1, 3, 4, 2, 4), is_output=False),
                "free": (1, 4, 3, 4, 3, 4),
            },
        ),
        CanvasTopology(
            [
                Connection("camera", "camera"),
                Connection(
                    "arm.joints",
                    "camera",
                    weight=0.5,
                    t_src=0,
                    t_dst=-1,
                    fn="perceiver",
                    operator="observe",
                    write_mode="gate",
                ),
                Connection("camera", "goal", fn="gated"),
            ]
        ),
        metadata={"project": "demo"},
    )


def test_h_and_w_stand_for_the_spatial_shape() -> None:
    written = small_schema().to_dict()
    del written["layout"]["spatial_shape"]
    written["layout"] |= {"H": 4, "W": 4}
    assert CanvasSchema.from_dict(written) == small_schema()
    written["layout"]["spatial_shape"] = [4, 5]
    with pytest.raises(SchemaError, match=r"^layout: 'H' and 'W' \[4, 4\] contradict 'spatial_shape' \[4, 5\]$"):
        CanvasSchema.from_dict(written)
    del written["layout"]["W"], written["layout"]["spatial_shape"]
    with pytest.raises(SchemaError, match=r"^layout: missing field 'spatial_shape' \(or 'H' and 'W'\)$"):
        CanvasSchema.from_dict(written)


REMOVED = object()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["layout"], REMOVED, "^missing field 'layout'$"),
        (["regions"], REMOVED, "^missing field 'regions'$"),
        (["regions"], [], r"^regions: expected an object, got \[\]$"),
        (["layers"], {}, "^unknown field 'layers'; known: schema_version, layout, regions, topology"),
        (["schema_version"], 2, "^schema_version: expected a string, got 2$"),
        (["layout", "T"], 0, "^layout.T: expected a positive integer, got 0$"),
        (["layout", "T"], REMOVED, "^layout: missing field 'T'$"),
        (["layout", "d_model"], "256", "^layout.d_model: expected a positive integer, got '256'$"),
        (["layout", "spatial_shape", 1], 2.5, r"^layout.spatial_shape\[1\]: expected a positive integer, got 2.5$"),
        (["layout", "depth"], 3, "^layout: unknown field 'depth'; known: T, spatial_shape"),
        (["regions", "cam"], 7, "^regions.cam: expected an object, got 7$"),
        (["regions", "cam", "bounds"], REMOVED, "^regions.cam: missing field 'bounds'$"),
        (["regions", "cam", "bounds", 3], 9, r"^regions.cam.bounds\[3\]=9 must be <= spatial_shape\[0\]=4"),
        (["regions", "cam", "bounds", 0], None, r"^regions.cam.bounds\[0\]: expected an integer, got None$"),
        (["regions", "cam", "bounds"], {}, r"^regions.cam.bounds: expected \(t0, t1, lo, hi, ...\), got {}$"),
        (["regions", "arm", "period"], 0, "^regions.arm.period: expected a positive integer, got 0$"),
        (["regions", "arm", "is_output"], 1, "^regions.arm.is_output: expected true or false, got 1$"),
        (
            ["regions", "arm", "loss_weight"],
            math.nan,
            "^regions.arm.loss_weight: expected a finite number >= 0, got nan",
        ),
        (["regions", "arm", "semantic_embedding"], [0, "x"], r"^regions.arm.semantic_embedding\[1\]: .* got 'x'$"),
        (["regions", "arm", "colour"], 1, "^regions.arm: unknown field 'colour'"),
        (["topology"], {}, "^topology: expected a list of connections, got {}$"),
        (["topology", 3, "weight"], "abc", r"^topology\[3\].weight: expected a finite number >= 0, got 'abc'$"),
        (["topology", 3, "weight"], -1, r"^topology\[3\].weight: expected a finite number >= 0, got -1$"),
        (["topology", 3, "wieght"], 1, r"^topology\[3\]: unknown field 'wieght'; known: src, dst, weight"),
        (["topology", 0, "dst"], REMOVED, r"^topology\[0\]: missing field 'dst'$"),
        (["topology", 3, "t_src"], 0.5, r"^topology\[3\].t_src: expected an integer, got 0.5$"),
        (["topology", 3, "temporal_fill"], "keep", r"^topology\[3\].temporal_fill: expected one of drop, hold, interp"),
        (["topology", 3, "write_mode"], "mul", r"^topology\[3\].write_mode: expected one of add, gate, replace, got"),
        (["topology", 0, "mask", "kind"], "round", r"^topology\[0\].mask.kind: expected one of full, tile, sparse"),
        (["topology", 0, "mask", "window_shape"], REMOVED, r"^topology\[0\].mask: .* needs window_shape"),
        (["topology", 2, "mask", "tile_shape"], [2], r"^topology\[2\].mask: .* either tile_shape or tile_h"),
        (["topology", 1, "mask", "mask", "bits"], "AAA", r"^topology\[1\].mask.mask.bits: expected base64"),
        (
            ["topology", 1, "mask", "mask", "bits"],
            "AAAA",
            r"^topology\[1\].mask.mask.bits: expected 24 bytes .* got 3",
        ),
        (["topology", 1, "mask", "mask"], [[2]], r"^topology\[1\].mask: MaskSpec.mask: expected booleans"),
        (["metadata"], "x", "^metadata: expected an object, got 'x'$"),
    ],
)
def test_wrong_fields_are_named_with_their_place(place: list[str | int], value: Any, message: str) -> None:
    document: Any = copy.deepcopy(small_schema().to_dict())
    target = document
    for step in place[:-1]:
        target = target[step]
    if value is REMOVED:
        del target[place[-1]]
    else:
        target[place[-1]] = value
    with pytest.raises(SchemaError, match=message):
        CanvasSchema.from_dict(document)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"layout": ', "schema.json' is not valid JSON: .* line 1 column 12"),
        (b"\xff\xfe", "schema.json' is not a UTF-8 text file"),
        (b"[1]", r"schema.json': the document: expected an object, got \[1\]"),
        (b'{"a": 1, "a": 2}', "schema.json': field 'a' stands twice in one object"),
        (b"[" * 100_000, "schema.json' is nested too deeply"),
    ],
)
def test_files_that_are_no_schema(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "schema.json").write_bytes(content)
    with pytest.raises(SchemaError, match=message):
        CanvasSchema.from_json(tmp_path / "schema.json")


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        CanvasSchema.from_json(tmp_path / "nothing.json")


def test_unwritable_paths_name_themselves(tmp_path: Path) -> None:
    with pytest.raises(
        OutputPathError, match=r"cannot write '.*none/schema\.json': No such file or directory"
    ) as caught:
        small_schema().to_json(tmp_path / "none" / "schema.json")
    assert isinstance(caught.value, CanvasError)
    assert isinstance(caught.value, OSError)
    with pytest.raises(OutputPathError, match="it is a folder"):
        small_schema().to_json(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    small_schema().to_json(path)
    before = path.read_bytes()
    for metadata in ({"a": math.nan}, {"a": object()}):
        with pytest.raises(SchemaError, match=r"cannot write '.*schema\.json' as JSON"):
            CanvasSchema(small_schema().layout, metadata=metadata).to_json(path)

    def stop_in_the_middle() -> None:
        with atomic_write(path) as file:
            file.write("half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        stop_in_the_middle()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["schema.json"]


def test_atomic_write_keeps_permissions_and_links(tmp_path: Path) -> None:
    target, link = tmp_path / "target.bin", tmp_path / "link.bin"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to(target)
    with atomic_write(link, binary=True) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    mask = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "fresh") as text:
            text.write("ü\n")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o644
    assert (tmp_path / "fresh").read_bytes() == "ü\n".encode()


def test_compatible_regions() -> None:
    def schema(**embeddings: tuple[float, ...] | None) -> CanvasSchema:
        regions: dict[str, tuple[int, ...] | RegionSpec] = {
            name: RegionSpec((0, 1, 0, 1), semantic_embedding=vector, embedding_model="other" if name == "z" else "m")
            for name, vector in embeddings.items()
        }
        return CanvasSchema(CanvasLayout(T=1, spatial_shape=(1,), d_model=1, regions=regions))

    own = schema(a=(1.0, 0.0), b=None, z=(1.0, 0.0))
    their = schema(far=(0.0, 1.0), near=(1.0, 0.1), same=(2.0, 0.0), none=None)
    pairs = own.compatible_regions(their)
    assert [pair[:2] for pair in pairs] == [("a", "same"), ("a", "near")]
    assert pairs[1][2] == pytest.approx(1 - 1 / math.sqrt(1.01))
    assert len(own.compatible_regions(their, threshold=1.0)) == 3


def test_schema_of_other_types() -> None:
    with pytest.raises(CanvasError, match="layout: expected a CanvasLayout, got 3"):
        CanvasSchema(3)  # type: ignore[arg-type]
    with pytest.raises(CanvasError, match="topology: expected a CanvasTopology or None, got "):
        CanvasSchema(small_schema().layout, [])  # type: ignore[arg-type]
