"""Checkpoints of 0.5.0 give the same outputs and gradients here, for every function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data import make_dispatch_fixtures as old

from canvas_engineering.dispatch import AttentionDispatcher

DATA = np.load(Path(__file__).parent / "data" / "dispatch_0_5_0.npz")
#: How much worse than 0.5.0's own float32 run ours may be: both round differently, neither is exact.
SLACK = 4.0


def dispatcher(fn: str, backend: str = "auto") -> AttentionDispatcher:
    module = AttentionDispatcher(old.topology(fn), old.layout(), old.D_MODEL, old.N_HEADS, backend=backend)
    old.fill(module)
    return module


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("fn", old.FUNCTIONS)
def test_outputs_and_gradients_are_those_of_0_5_0(fn: str, backend: str) -> None:
    got = old.results(dispatcher(fn, backend), torch.float64)
    for name in ("y", "dx", "dp"):
        expected = DATA[f"{fn}/{name}"]
        scale = np.abs(expected).max(initial=1.0)
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=1e-6 * scale, err_msg=name)


@pytest.mark.parametrize("fn", old.FUNCTIONS)
def test_float32_is_as_exact_as_0_5_0(fn: str) -> None:
    got = old.results(dispatcher(fn), torch.float32)
    for name, error in zip(("y", "dx", "dp"), DATA[f"{fn}/error"], strict=True):
        expected = DATA[f"{fn}/{name}"]
        floor = np.finfo(np.float32).eps * np.abs(expected).max(initial=1.0)
        assert np.abs(got[name] - expected).max(initial=0.0) <= SLACK * error + 4 * floor, name
