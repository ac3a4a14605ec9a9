"""Where the kernels run: by the interpreter, or compiled on a GPU."""

from __future__ import annotations

import pytest


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpreted),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """The device of the operands."""
    return str(request.param)
