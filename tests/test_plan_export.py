"""Pictures and exports of plans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from canvas_engineering.canvas import CanvasLayout
from canvas_engineering.connectivity import CanvasTopology
from canvas_engineering.errors import PlanError
from canvas_engineering.plan import BlockSparsePlan
from canvas_engineering.plan.export import padded_masks
from canvas_engineering.plan.plot import region_runs, tile_image


def ragged_plan(softmax: str = "joint") -> BlockSparsePlan:
    layout = CanvasLayout(T=3, H=5, W=5, d_model=8, regions={"a": (0, 3, 0, 4, 0, 5), "b": (0, 3, 3, 5, 0, 2)})
    topology = CanvasTopology.causal_temporal(["a", "b"])
    return BlockSparsePlan.from_topology(topology, layout, softmax=softmax, block_q=16, block_kv=16)  # type: ignore[arg-type]


def dense_in_plan_order(plan: BlockSparsePlan) -> np.ndarray:
    """The joint mask over padded tokens in plan order."""
    masks, _ = plan.to_dense()
    rows, cols = plan.q_tokens.ravel(), plan.kv_tokens.ravel()
    dense = np.logical_or.reduce(masks, axis=0)[np.ix_(np.maximum(rows, 0), np.maximum(cols, 0))]
    return dense & (rows >= 0)[:, None] & (cols >= 0)


def test_padded_masks_rule_out_padding() -> None:
    plan = BlockSparsePlan.from_mask(np.ones((20, 20), bool), block_q=16, block_kv=16)
    entry_mask, masks = padded_masks(plan)
    assert (entry_mask[1:] >= 0).all()
    assert entry_mask[0] == -1
    assert np.bitwise_count(masks).sum() == 20 * 20 - 16 * 16


def test_block_mask_is_the_plan() -> None:
    torch = pytest.importorskip("torch")
    plan = ragged_plan()
    block_mask = plan.to_block_mask("cpu")
    dense = dense_in_plan_order(plan)
    index = torch.arange
    got = block_mask.mask_mod(0, 0, index(dense.shape[0])[:, None], index(dense.shape[1])[None]).numpy()
    np.testing.assert_array_equal(got, dense)


def test_block_masks_print_and_densify() -> None:
    torch = pytest.importorskip("torch")
    plan = ragged_plan()
    block_mask = plan.to_block_mask("cpu")
    visited = np.zeros((plan.num_q_tiles, plan.num_kv_tiles), int)
    visited[plan.set_tile[plan.entry_set], plan.entry_kv] = 1
    np.testing.assert_array_equal(block_mask.to_dense()[0, 0].numpy() != 0, visited != 0)
    assert "BlockMask" in str(block_mask)
    assert int(block_mask.q_num_blocks.sum() + block_mask.full_q_num_blocks.sum()) == plan.num_entries
    assert block_mask.q_indices.dtype == torch.int32


@pytest.mark.filterwarnings("ignore")  # FlexAttention itself warns when it runs uncompiled
def test_flex_attention_runs_the_block_mask() -> None:
    torch = pytest.importorskip("torch")
    from torch.nn.attention.flex_attention import flex_attention

    plan = ragged_plan()
    torch.manual_seed(0)
    rows, cols = plan.q_tokens.size, plan.kv_tokens.size
    q, k, v = (torch.randn(1, 2, n, 16, dtype=torch.float64) for n in (rows, cols, cols))
    out = flex_attention(q, k, v, block_mask=plan.to_block_mask("cpu"))
    allowed = torch.from_numpy(dense_in_plan_order(plan))
    scores = (q @ k.transpose(-2, -1) / 4).masked_fill(~allowed, -torch.inf)
    expected = (scores.softmax(-1).nan_to_num(0.0)) @ v
    real = torch.from_numpy(allowed.any(dim=1).numpy())
    torch.testing.assert_close(out[:, :, real], expected[:, :, real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("export", [lambda plan: plan.to_block_mask("cpu"), lambda plan: plan.to_mask_info()])
def test_exports_need_one_softmax_per_row(export: object) -> None:
    with pytest.raises(
        PlanError, match=r'at most 1 softmax set per q tile, got [2-9]; compile it with softmax="joint"'
    ):
        export(ragged_plan("connection"))  # type: ignore[operator]


@pytest.mark.parametrize("is_dkv", [False, True])
@pytest.mark.parametrize("q_seq_shards", [1, 2])
def test_mask_info_is_that_of_the_dense_mask(is_dkv: bool, q_seq_shards: int) -> None:
    masks = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask")
    from canvas_engineering.kernels.pallas.mask_info import process_mask

    layout = CanvasLayout(T=2, H=16, W=16, d_model=8, regions={"a": (0, 2, 0, 8, 0, 16), "b": (0, 2, 8, 16, 0, 16)})
    plan = BlockSparsePlan.from_topology(
        CanvasTopology.causal_temporal(["a", "b"]), layout, softmax="joint", block_q=128, block_kv=128
    )
    got = plan.to_mask_info(q_seq_shards=q_seq_shards, is_dkv=is_dkv)
    expected, _ = process_mask(
        masks.MultiHeadMask([masks.NumpyMask(dense_in_plan_order(plan))]),
        (128, 128),
        head_shards=1,
        q_seq_shards=q_seq_shards,
        is_dkv=is_dkv,
    )
    for name in ("data_next", "mask_next", "block_mask", "partial_mask_blocks"):
        left, right = getattr(got, name), getattr(expected, name)
        assert (left is None) == (right is None), name
        if left is not None:
            np.testing.assert_array_equal(left, right, err_msg=name)


def test_mask_info_of_a_million_positions_and_of_shards_that_do_not_divide() -> None:
    layout = CanvasLayout(T=64, H=128, W=128, d_model=8, regions={"all": (0, 64, 0, 128, 0, 128)})
    plan = BlockSparsePlan.from_topology(
        CanvasTopology.causal_temporal(["all"]), layout, softmax="joint", block_q=512, block_kv=512
    )
    assert plan.num_q == 2**20
    for is_dkv in (False, True):
        info = plan.to_mask_info(q_seq_shards=8, is_dkv=is_dkv)
        assert np.count_nonzero(info.block_mask) == plan.num_entries
        assert (info.data_next.nbytes + info.block_mask.nbytes) / 8 < 2**20  # what scalar memory holds, per shard
    with pytest.raises(ValueError, match=r"q_seq_shards must divide .*, got 3 and 2048"):
        plan.to_mask_info(q_seq_shards=3)


def test_the_picture_tells_full_from_partial_and_empty() -> None:
    plan = BlockSparsePlan.from_mask(np.tri(64, 64, dtype=bool), block_q=16, block_kv=16)
    image = tile_image(plan)
    assert image.shape == (4, 4, 3)
    colours = {tuple(c) for c in image.reshape(-1, 3).round(6)}
    assert len(colours) == 3
    assert (image[0, 1:] == image[0, 1]).all()
    assert (image[1, 0] == image[3, 2]).all()


def test_large_plans_are_averaged_down() -> None:
    layout = CanvasLayout(T=64, spatial_shape=(512,), d_model=8, regions={"a": (0, 64, 0, 512)})
    topology = CanvasTopology.causal_temporal(["a"])
    plan = BlockSparsePlan.from_topology(topology, layout, block_q=16, block_kv=16)
    assert tile_image(plan).shape == (1024, 1024, 3)


def test_regions_are_named_along_the_axes() -> None:
    plan = ragged_plan()
    names = {name for name, _, _ in region_runs(plan, plan.q_tokens)}
    assert names == {"a", "b", "a+b", "unused"}
    runs = region_runs(plan, plan.q_tokens)
    assert runs[0][1] == 0
    assert all(start < stop for _, start, stop in runs)


def test_plot_writes_a_picture_or_says_why_not(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan = ragged_plan("connection")
    figure = plan.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"full tile", "partial tile (masked)", "a", "b", "a+b"} <= labels
    with pytest.raises(PlanError, match=r"path must end in one of .*png.*, got '.*plan\.xyz'"):
        plan.plot(tmp_path / "plan.xyz")
    BlockSparsePlan.from_mask(np.zeros((0, 0), bool)).plot(tmp_path / "empty.svg")
