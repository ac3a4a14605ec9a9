"""Every attention function computes what canvas-engineering 0.5.0 computed, outputs and gradients, from its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data.make_attention_fixtures import D_MODEL, FUNCTIONS, N_HEADS, SHAPES, fill, results

from canvas_engineering.attention import ATTENTION_REGISTRY, create_attention

FIXTURES = Path(__file__).parent / "data" / "attention_0_5_0.npz"
#: How often we may exceed the rounding error that 0.5.0 itself made in float32, or the spacing of the numbers.
SLACK = 4.0

PROJECTIONS = {f"{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")} | {"out_proj.weight", "out_proj.bias"}
#: state_dict keys and shapes of 0.5.0 at d_model=32, n_heads=4, beyond the four projections.
EXTRA_STATE: dict[str, dict[str, tuple[int, ...]]] = {
    "cosine_attention": {"temperature": ()},
    "gated": {"gate": (1,)},
    "perceiver": {"latents": (1, 8, 32)},
    "mixture": {"router.weight": (4, 32), "router.bias": (4,)},
    "pooling": {"proj.weight": (32, 32), "proj.bias": (32,)},
    "copy": {},
    "none": {},
    "mamba": {
        "A_log": (32, 16),
        "D": (32,),
        "in_proj.weight": (64, 32),
        "in_proj.bias": (64,),
        "dt_proj.weight": (32, 2),
        "dt_proj.bias": (32,),
        "x_proj.weight": (34, 32),
        "x_proj.bias": (34,),
        "out_proj.weight": (32, 32),
        "out_proj.bias": (32,),
        "norm.weight": (32,),
        "norm.bias": (32,),
    },
    "rwkv": {
        "decay": (4, 8),
        "bonus": (4, 8),
        **{f"{p}_proj.weight": (32, 32) for p in ("r", "k", "v", "out")},
        **{f"{p}_proj.bias": (32,) for p in ("r", "k", "v", "out")},
    },
    "hyena": {
        "filter_params.0": (32, 2049, 2),
        "filter_params.1": (32, 2049, 2),
        "in_proj.weight": (96, 32),
        "in_proj.bias": (96,),
        **{f"{p}.weight": (32, 32) for p in ("out_proj", "gates.0", "gates.1")},
        **{f"{p}.bias": (32,) for p in ("out_proj", "gates.0", "gates.1")},
    },
}
#: Where the four projections stand, for the functions that have them.
PREFIXES: dict[str, tuple[str, ...]] = {
    "gated": ("cross_attn.",),
    "perceiver": ("compress.", "readout."),
    "mixture": tuple(f"experts.{e}." for e in range(4)),
    **dict.fromkeys(("pooling", "copy", "none", "mamba", "rwkv", "hyena"), ()),
}


def state_of_0_5_0(name: str) -> dict[str, tuple[int, ...]]:
    shapes = dict(EXTRA_STATE.get(name, {}))
    for prefix in PREFIXES.get(name, ("",)):
        shapes |= {prefix + key: (32, 32) if key.endswith("weight") else (32,) for key in PROJECTIONS}
    return shapes


@pytest.fixture(scope="module")
def fixtures() -> dict[str, np.ndarray]:
    with np.load(FIXTURES) as stored:
        return {name: stored[name] for name in stored}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_outputs_and_gradients_equal_0_5_0(
    name: str, shape: tuple[int, int], dtype: torch.dtype, fixtures: dict[str, np.ndarray]
) -> None:
    module = create_attention(name, D_MODEL, N_HEADS, **FUNCTIONS[name]).double()
    fill(module, list(FUNCTIONS).index(name))
    found = results(module, *shape, dtype)
    expected = fixtures[f"{name}/{shape[0]}x{shape[1]}"]
    assert sum(piece.size for piece in found.values()) == expected.size
    wanted = dict(zip(found, np.split(expected, np.cumsum([piece.size for piece in found.values()])[:-1]), strict=True))
    single_error = dict(zip(found, fixtures[f"{name}/{shape[0]}x{shape[1]}/error"], strict=True))
    kinds = {piece: min(i, 1) + (i > 3) for i, piece in enumerate(found)}  # output, inputs' gradients, parameters'
    for piece, values in found.items():
        # What 0.5.0 lost in float32 in numbers of this kind, carried over to this dtype by the ratio of the spacings.
        # (By kind, because a gradient that cancels to 0, as k_proj.bias does, has the error of its summands.)
        alike = [p for p in found if kinds[p] == kinds[piece]]
        error = max(single_error[p] for p in alike)
        spacing = torch.finfo(torch.float32).eps * max(float(np.abs(wanted[p]).max(initial=0.0)) for p in alike)
        tolerance = SLACK * max(error, spacing) * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        want = wanted[piece].reshape(values.shape)
        np.testing.assert_allclose(values, want, rtol=0, atol=tolerance, err_msg=f"{name} {piece}")


@pytest.mark.parametrize("name", sorted(ATTENTION_REGISTRY))
def test_checkpoints_of_0_5_0_load_strictly(name: str) -> None:
    shapes = state_of_0_5_0(name)
    module = create_attention(name, 32, 4)
    stream = np.random.default_rng(0)
    checkpoint = {key: torch.from_numpy(np.asarray(stream.standard_normal(s))).float() for key, s in shapes.items()}
    module.load_state_dict(checkpoint, strict=True)
    state = module.state_dict()
    assert set(state) - set(shapes) <= {"pattern_seed"}
    for key, value in checkpoint.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["cross_attention", "random_fixed", "perceiver", "hyena"])
def test_a_missing_or_misshapen_weight_is_still_refused(name: str) -> None:
    state = create_attention(name, 32, 4).state_dict()
    key = next(k for k in state if k.endswith("out_proj.bias"))
    with pytest.raises(RuntimeError, match=f"Missing key.*{key}"):
        create_attention(name, 32, 4).load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
        create_attention(name, 32, 4).load_state_dict({**state, key: torch.zeros(3)})


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("gated", 370.0012802569181),
        ("mixture", 1501.5349523312143),
        ("perceiver", 745.5120030938197),
        ("mamba", 471.71732176423393),
        ("rwkv", 529.9262718645841),
        ("hyena", 4743.560821352711),
    ],
)
def test_the_same_seed_gives_the_initial_weights_of_0_5_0(name: str, total: float) -> None:
    torch.manual_seed(0)
    module = create_attention(name, 32, 4)
    found = sum(float(parameter.detach().double().abs().sum()) for parameter in module.parameters())
    assert found == pytest.approx(total, rel=1e-9)
