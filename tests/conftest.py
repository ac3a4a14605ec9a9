"""Shared by all tests: markers that need hardware or an interpreter, and one Hypothesis profile everywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before JAX starts. Eight simulated devices for the tests of sharding; and little optimisation, because these tests
# spend their time in XLA's compiler. What the environment says goes first.
_XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([_given, *(flag for flag in _XLA_FLAGS if flag.split("=")[0] not in _given)]).strip()

settings.register_profile(
    "default",
    deadline=None,  # a shared machine stalls; slowness is what the benchmarks are for
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


#: Whether this process runs Triton kernels on the CPU. It is settled before the first of them is imported.
INTERPRETS_TRITON = os.environ.get("TRITON_INTERPRET") == "1"


_LEFT_OUT = pytest.StashKey[set[Path]]()


@pytest.fixture
def modules_left_out(pytestconfig: pytest.Config) -> set[Path]:
    """The modules whose interpreted tests this process leaves to another."""
    return pytestconfig.stash.get(_LEFT_OUT, set())


def _gpu_reason() -> str | None:
    import torch

    if INTERPRETS_TRITON:
        return "TRITON_INTERPRET=1 runs kernels on the CPU"
    return None if torch.cuda.is_available() else "torch finds no NVIDIA or AMD GPU"


def _tpu_reason() -> str | None:
    import jax

    return None if jax.default_backend() == "tpu" else f"jax runs on {jax.default_backend()}, not on a TPU"


def _libtpu_reason() -> str | None:
    return None if find_spec("libtpu") else "libtpu is not installed: make test-tpu installs it"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreted = [item for item in items if item.get_closest_marker("interpreted")]
    if interpreted and not INTERPRETS_TRITON:
        # Not skipped: test_triton_interpreted.py runs them, in processes of their own.
        config.stash[_LEFT_OUT] = {item.path for item in interpreted}
        config.hook.pytest_deselected(items=interpreted)
        items[:] = [item for item in items if item not in set(interpreted)]
    for marker, find_reason in (("gpu", _gpu_reason), ("tpu", _tpu_reason), ("libtpu", _libtpu_reason)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = find_reason() if marked else None
        if reason is not None:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def kernel_table_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own for tuned kernel tables, and no table remembered from another test."""
    from canvas_engineering.kernels.triton.config import forget_tables

    monkeypatch.setenv("CANVAS_ENGINEERING_CACHE", str(tmp_path / "cache"))
    forget_tables()
    yield tmp_path / "cache"
    forget_tables()
