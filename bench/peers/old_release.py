"""canvas-engineering 0.5.0, in an interpreter of its own; both releases import as ``canvas_engineering``."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.canvases import Declared
from bench.roofline import Phase
from bench.variant import WARM_UP, Absent, Arrays, Variant, calls_within
from canvas_engineering.dispatch import AttentionDispatcher

OLD = "canvas-engineering 0.5.0"
VERSION = "0.5.0"
ENVIRONMENT = "CANVAS_ENGINEERING_050_PYTHON"
#: Where ``make bench-peers`` puts the old release; it runs with this interpreter and this torch.
FOLDER = Path(sys.prefix) / "peers" / "canvas-engineering-0.5.0"
_PAUSE = 0.005  # until the other process' threads have stopped spinning


class WorkerError(RuntimeError):
    """What the old release raised in its process, or that the process ended."""


class _Process:
    """The worker process, shared by all cases of a run."""

    def __init__(self) -> None:
        interpreter, environment = _interpreter()
        self._folder = tempfile.TemporaryDirectory(prefix="canvas-bench-")
        self.folder = Path(self._folder.name)
        try:
            self._process = subprocess.Popen(
                [interpreter, str(Path(__file__).with_name("old_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                cwd=self.folder,
                env=environment,
            )
        except OSError as error:
            self._folder.cleanup()
            raise Absent(f"${ENVIRONMENT} cannot be run: {error.strerror}") from None
        try:
            found = self.ask("hello")
            if found["version"] != VERSION:
                raise Absent(f"the interpreter given for it holds canvas-engineering {found['version']}")
        except (Absent, WorkerError):
            self.close()
            raise
        self.torch_version = found["torch"]

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        if self._process.stdin is None or self._process.stdout is None:
            raise WorkerError("its process has no pipes")
        try:
            self._process.stdin.write(json.dumps({"op": op, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._folder.cleanup()
            _process.cache_clear()
            status = self._process.wait()
            raise WorkerError(f"its process ended with status {status}{' (out of memory?)' if status else ''}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process.wait()
        self._folder.cleanup()


def _interpreter() -> tuple[str, dict[str, str]]:
    """What runs the old release, and in which environment."""
    given = os.environ.get(ENVIRONMENT)
    if given:
        return given, dict(os.environ)
    if not FOLDER.is_dir():
        raise Absent(f"not installed: `make bench-peers` installs it, or ${ENVIRONMENT} names an interpreter with it")
    # Ahead of the new release, which the same interpreter has.
    return sys.executable, {**os.environ, "PYTHONPATH": str(FOLDER)}


@cache
def _process() -> _Process:
    return _Process()


def stop() -> None:
    """End the process, if there is one."""
    if _process.cache_info().currsize:
        _process().close()
        _process.cache_clear()


class OldRelease(Variant):
    """The old ``AttentionDispatcher`` with the parameters of ours, timed inside its own process."""

    def __init__(
        self, declared: Declared, module: AttentionDispatcher, x: Tensor, grad_out: Tensor, phase: Phase
    ) -> None:
        self.name = OLD
        if any(connection.mask is not None for connection in declared.topology.connections):
            raise Absent("its dispatcher has no masks")
        self._process = _process()
        self._calls = 1  # in one sample
        self._samples_several = x.device.type != "cpu" and phase != "backward"
        arrays = self._process.folder / "arrays.npz"
        # float32 holds what half precision holds; NumPy has no bfloat16.
        named = {"x": x, "grad_out": grad_out} | {f"p:{name}": value for name, value in module.state_dict().items()}
        np.savez(arrays, **{name: value.detach().float().cpu().numpy() for name, value in named.items()})
        layout = declared.layout
        built = self._process.ask(
            "build",
            arrays=str(arrays),
            threads=torch.get_num_threads(),
            device=str(x.device),
            dtype=str(x.dtype).removeprefix("torch."),
            phase=phase,
            heads=module.n_heads,
            d_model=layout.d_model,
            frames=layout.T,
            spatial_shape=list(layout.spatial_shape),
            regions={
                name: {"bounds": list(layout.bounds(name)), "period": layout.region_spec(name).period}
                for name in layout.regions
            },
            connections=[
                {
                    "src": edge.src,
                    "dst": edge.dst,
                    "weight": edge.weight,
                    "t_src": edge.t_src,
                    "t_dst": edge.t_dst,
                    "fn": edge.fn,
                    "temporal_fill": edge.temporal_fill.value,
                    "interpolation_order": edge.interpolation_order,
                }
                for edge in declared.topology.connections
            ],
        )
        self.setup = {"build": built["seconds"]}

    def sample(self) -> float:
        return self._sample(0.0)

    def warm_sample(self) -> float:
        return self._sample(WARM_UP)

    def _sample(self, warm_up: float) -> float:
        time.sleep(_PAUSE)
        seconds: float = self._process.ask("sample", calls=self._calls, warm_up=warm_up)["seconds"]
        time.sleep(_PAUSE)
        return seconds

    def probe(self) -> tuple[float, int | None]:
        found = self._process.ask("probe")
        seconds: float = found["seconds"]
        if self._samples_several:
            seconds = self.sample()
            self._calls = calls_within(seconds)
        return seconds * self._calls, found["bytes"]

    def outputs(self, cotangent: NDArray[Any] | None) -> Arrays:
        given, to = "", self._process.folder / "outputs.npz"
        if cotangent is not None:
            given = str(self._process.folder / "cotangent.npz")
            np.savez(given, cotangent=cotangent)
        self._process.ask("outputs", cotangent=given, to=str(to))
        with np.load(to) as found:
            return {name: found[name] for name in found.files}

    def close(self) -> None:
        with contextlib.suppress(WorkerError):  # the process is gone, and with it what it held
            self._process.ask("release")
