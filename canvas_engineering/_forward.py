"""Forwarding of torch classes from the NumPy-only modules that 0.5.0 had them in."""

from __future__ import annotations

import importlib

from canvas_engineering._optional import require


def torch_attribute(module: str, homes: dict[str, str], name: str) -> object:
    """Look up ``name`` of ``module`` in the torch module that defines it, for a module ``__getattr__``.

    Raises:
        AttributeError: ``homes`` has no such name.
        MissingDependencyError: torch is not installed.
    """
    if name not in homes:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    require("torch", "torch", f"{module}.{name}")
    return getattr(importlib.import_module(homes[name]), name)
