"""Shared by all tests: markers that need hardware, and a Hypothesis profile that is the same everywhere."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    deadline=None,  # a shared machine stalls; slowness is what the benchmarks are for
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def _gpu_reason() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch finds no NVIDIA or AMD GPU"


def _tpu_reason() -> str | None:
    import jax

    return None if jax.default_backend() == "tpu" else f"jax runs on {jax.default_backend()}, not on a TPU"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, find_reason in (("gpu", _gpu_reason), ("tpu", _tpu_reason)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = find_reason() if marked else None
        if reason is not None:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))
