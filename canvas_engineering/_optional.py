"""Loading of optional dependencies: torch, triton, jax and matplotlib are extras, imported on first use."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from canvas_engineering.errors import MissingDependencyError


def installed(module: str) -> bool:
    """Whether ``module`` can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name is missing
        return False


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module``, or say which extra to install.

    Raises:
        MissingDependencyError: ``module`` is not installed; the message names ``purpose`` and ``extra``.
    """
    if not installed(module.partition(".")[0]):
        raise MissingDependencyError(
            f"{purpose} needs the package {module.partition('.')[0]!r}, which is not installed: "
            f"pip install 'canvas-engineering[{extra}]'"
        )
    return importlib.import_module(module)
