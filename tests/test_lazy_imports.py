"""Importing the package loads NumPy at most; every public name resolves; the three lists of names agree."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import canvas_engineering

HEAVY = ("torch", "triton", "jax", "jaxlib", "matplotlib", "scipy", "tqdm", "PIL")
NUMPY_ONLY_MODULES = (
    "canvas_engineering.canvas",
    "canvas_engineering.connectivity",
    "canvas_engineering.masks",
    "canvas_engineering.schema",
    "canvas_engineering.program",
    "canvas_engineering.triggers",
    "canvas_engineering.cortex",
    "canvas_engineering.identity",
    "canvas_engineering.residuals",
    "canvas_engineering.semantic",
    "canvas_engineering.plan",
    "canvas_engineering.attention.api",
    "canvas_engineering.kernels.reference",
    "canvas_engineering.cli.main",
)


def modules_after(statement: str) -> set[str]:
    """Names in ``sys.modules`` of a fresh interpreter after ``statement``."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def tree_of_package() -> ast.Module:
    return ast.parse(Path(canvas_engineering.__file__).read_text(encoding="utf-8"))


def test_importing_the_package_loads_no_framework() -> None:
    before = modules_after("pass")
    loaded = modules_after("import canvas_engineering") - before
    assert not {name.partition(".")[0] for name in loaded} & set(HEAVY)
    ours = {name for name in loaded if name.startswith("canvas_engineering")}
    assert ours == {"canvas_engineering"}
    # Nothing but a handful of standard-library modules: 0.3 s on any machine, without measuring time.
    assert len(loaded) < 60


@pytest.mark.parametrize("module", NUMPY_ONLY_MODULES)
def test_numpy_only_modules_load_no_framework(module: str) -> None:
    loaded = modules_after(f"import {module}")
    assert not {name.partition(".")[0] for name in loaded} & set(HEAVY)


def test_numpy_only_names_work_without_any_framework() -> None:
    blocked = "\n".join(f"sys.modules[{name!r}] = None" for name in HEAVY)
    loaded = modules_after(
        f"import sys\n{blocked}\n"
        "from canvas_engineering import BlockSparsePlan, CanvasLayout, CanvasTopology\n"
        "layout = CanvasLayout(T=2, H=4, W=4, d_model=8, regions={'a': (0, 2, 0, 4, 0, 4)})\n"
        "plan = BlockSparsePlan.from_topology(CanvasTopology.isolated(['a']), layout)\n"
        "assert plan.stats().true_pairs == 32 * 32"
    )
    assert "canvas_engineering.plan" in loaded


@pytest.mark.parametrize("name", canvas_engineering.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(canvas_engineering, name) is not None
    assert name in dir(canvas_engineering)


def test_declared_names_are_the_same_for_type_checkers_and_at_run_time() -> None:
    for_type_checkers = {}
    for node in ast.walk(tree_of_package()):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("canvas_engineering."):
            for alias in node.names:
                assert alias.asname == alias.name, f"{alias.name} is not marked as re-exported"
                for_type_checkers[alias.name] = node.module
    assert for_type_checkers == canvas_engineering._MODULE_OF
    assert set(canvas_engineering.__all__) == {"__version__", *for_type_checkers}


def test_public_names_stay_where_type_checkers_look_for_them() -> None:
    for name, module in canvas_engineering._MODULE_OF.items():
        assert getattr(importlib.import_module(module), name) is getattr(canvas_engineering, name)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'canvas_engineering' has no attribute 'Canvass'"):
        canvas_engineering.Canvass  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Canvass'"):
        from canvas_engineering import Canvass  # noqa: F401


def test_submodules_are_attributes() -> None:
    loaded = modules_after("import canvas_engineering as ce\nassert ce.masks.rect_cover is ce.rect_cover")
    assert "torch" not in loaded


def test_star_import_brings_exactly_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from canvas_engineering import *", namespace)
    assert set(canvas_engineering.__all__) <= set(namespace)


def test_missing_extra_is_named() -> None:
    code = (
        "import sys, importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        "from canvas_engineering import MissingDependencyError\n"
        "try:\n"
        "    from canvas_engineering.canvas import SpatiotemporalCanvas\n"
        "except MissingDependencyError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "pip install 'canvas-engineering[torch]'" in done.stdout
