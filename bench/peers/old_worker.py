"""Runs canvas-engineering 0.5.0 in a process of its own, driven over pipes by ``old_release.py``.

Reads one JSON object per line from standard input, answers with one on standard output. Arrays travel as ``.npz``
files in a folder that the driver makes. Imports nothing of this repository: it runs where only 0.5.0 is installed.
"""

import importlib.util
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Worker:
    """One dispatcher with its input, on one device."""

    device = "cpu"

    def hello(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"version": version("canvas-engineering"), "torch": torch.__version__}

    def build(self, request: dict[str, Any]) -> dict[str, Any]:
        from canvas_engineering.canvas import CanvasLayout, RegionSpec
        from canvas_engineering.connectivity import CanvasTopology, Connection, TemporalFill
        from canvas_engineering.dispatch import AttentionDispatcher

        torch.set_num_threads(request["threads"])
        self.device = request["device"]
        arrays = dict(np.load(request["arrays"]))
        start = time.perf_counter()
        layout = CanvasLayout(
            T=request["frames"],
            spatial_shape=tuple(request["spatial_shape"]),
            d_model=request["d_model"],
            regions={
                name: RegionSpec(bounds=tuple(region["bounds"]), period=region["period"])
                for name, region in request["regions"].items()
            },
        )
        connections = [
            Connection(**{**edge, "temporal_fill": TemporalFill(edge["temporal_fill"])})
            for edge in request["connections"]
        ]
        self.module = AttentionDispatcher(
            CanvasTopology(connections=connections), layout, request["d_model"], n_heads=request["heads"]
        )
        seconds = time.perf_counter() - start
        # No strict=False: a missing or additional parameter would mean that another function is timed.
        self.module.load_state_dict(
            {name[2:]: torch.from_numpy(array) for name, array in arrays.items() if name.startswith("p:")}
        )
        self.module = self.module.to(self.device, getattr(torch, request["dtype"]))
        self.phase = request["phase"]
        training = self.phase != "forward"
        for parameter in self.module.parameters():
            parameter.requires_grad_(training)
        self.x = self._tensor(arrays["x"]).requires_grad_(training)
        self.grad_out = self._tensor(arrays["grad_out"])
        return {"seconds": seconds}

    def _tensor(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(array).to(next(self.module.parameters()))

    def _leaves(self) -> dict[str, torch.Tensor]:
        return {"x": self.x, **dict(self.module.named_parameters())}

    def outputs(self, request: dict[str, Any]) -> dict[str, Any]:
        cotangent = np.load(request["cotangent"])["cotangent"] if request["cotangent"] else None
        if cotangent is None or self.phase == "forward":
            with torch.no_grad():
                found = {"out": self.module(self.x)}
        else:
            out = self.module(self.x)
            grads = torch.autograd.grad(out, list(self._leaves().values()), self._tensor(cotangent))
            found = {"out": out, **{f"d{name}": grad for name, grad in zip(self._leaves(), grads)}}  # noqa: B905
        np.savez(request["to"], **{name: tensor.detach().double().cpu().numpy() for name, tensor in found.items()})
        return {}

    def sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds of one call: by the wall on a CPU, between two events around several calls on a GPU.

        It comes right after untimed calls that take ``warm_up`` seconds.
        """
        stop = time.perf_counter() + request.get("warm_up", 0.0)
        while time.perf_counter() < stop:
            self._call()
        if self.device == "cpu":
            start = time.perf_counter()
            middle = self._call()
            return {"seconds": time.perf_counter() - (middle if self.phase == "backward" else start)}
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        calls = request.get("calls", 1)
        torch.cuda.synchronize()
        start_event.record()
        for _ in range(calls):
            self._call()
        end_event.record()
        end_event.synchronize()
        return {"seconds": start_event.elapsed_time(end_event) / 1e3 / calls}

    def _call(self) -> float:
        """Run the phase; when its forward part ended."""
        if self.phase == "forward":
            with torch.no_grad():
                self.module(self.x)
            return time.perf_counter()
        out = self.module(self.x)
        middle = time.perf_counter()
        torch.autograd.grad(out, list(self._leaves().values()), self.grad_out)
        return middle

    def probe(self, request: dict[str, Any]) -> dict[str, Any]:
        # memory.py stands beside this folder and imports nothing but the standard library.
        path = Path(__file__).resolve().parents[1] / "memory.py"
        spec = importlib.util.spec_from_file_location("bench_memory", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot load {path.name}")
        memory = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(memory)
        taken: list[float] = []
        peak = memory.peak_bytes(lambda: taken.append(self.sample(request)["seconds"]), self.device)
        return {"seconds": taken[0], "bytes": peak}

    def release(self, request: dict[str, Any]) -> dict[str, Any]:
        self.__dict__.clear()
        return {}


def main() -> None:
    worker = Worker()
    # Whatever the old package prints must not get between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("op"))(request)
        except (RuntimeError, ValueError, TypeError, KeyError, ImportError, AttributeError, MemoryError) as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
