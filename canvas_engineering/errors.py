"""The exceptions of the package: one base class, one subclass per stage that can refuse its input.

Every message names the argument, the requirement and the value it got.
"""

from __future__ import annotations


class CanvasError(ValueError):
    """Base of all errors raised for bad input; a ``ValueError`` so that existing handlers keep working."""


class SchemaError(CanvasError):
    """A schema or program file with a missing, unknown or ill-typed field; the message says where."""


class PlanError(CanvasError):
    """A plan that cannot be compiled, loaded or used with the given inputs."""


class BackendError(CanvasError):
    """A backend that was asked for by name cannot run the call; the message carries all of its reasons."""


class MissingDependencyError(ImportError):
    """An optional package is not installed; the message names the extra that brings it."""
