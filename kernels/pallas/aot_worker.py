"""Compiles for a TPU on a machine without one; a process of its own, because libtpu takes its options at load.

``aot`` starts it with a request (JSON) on standard input and reads the answer (JSON) from standard output. The
functions here also serve benchmarks that want to compile other kernels the same way.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from canvas_engineering.kernels.pallas.schedule import Schedule, read_schedule


@dataclass(frozen=True)
class Target:
    """A kind of TPU: the topology that libtpu compiles for, and the memory of one device."""

    topology: str
    hbm_bytes: int


TARGETS = {
    "v5e": Target("v5e:1x1", 16 * 2**30),
    "v5p": Target("v5p:1x1x1", 95 * 2**30),
    "v6e": Target("v6e:1x1", 32 * 2**30),
    "tpu7x": Target("tpu7x:1x1x1", 96 * 2**30),
}


@dataclass(frozen=True)
class Compiled:
    """One compiled function: its memory, and the schedules of the kernels asked for."""

    schedules: dict[str, Schedule]
    argument_bytes: int
    output_bytes: int
    temp_bytes: int


class Compiler:
    """Compiles functions for one target; must be made before anything loads libtpu in this process."""

    def __init__(self, target: str, dump: Path) -> None:
        self._dump = dump
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no TPU host to ask
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no TPU is opened, so processes need not take turns
        os.environ["JAX_PLATFORMS"] = "cpu"

        import numpy as np
        from jax.experimental import topologies
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=TARGETS[target].topology, chips_per_host_bounds=[1, 1, 1]
        )
        self.sharding = NamedSharding(Mesh(np.array(topology.devices[:1]), ("device",)), PartitionSpec())

    def array(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """A placeholder for an argument."""
        import jax

        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding)

    def placeholders(self, tree: Any) -> Any:
        """Placeholders for a pytree of arrays."""
        import jax

        return jax.tree.map(lambda leaf: self.array(leaf.shape, leaf.dtype), tree)

    def compile(self, function: Callable[..., Any], arguments: tuple[Any, ...], kernels: list[str]) -> Compiled:
        """Compile, and read the schedules of the kernels whose names start with those given.

        Raises:
            jax.errors.JaxRuntimeError: libtpu refuses; its message says what does not fit or is not implemented.
        """
        import jax

        for path in self._dump.iterdir():
            path.unlink()
        compiled = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
        memory = compiled.memory_analysis()
        return Compiled(
            {name: read_schedule(self._dump, name) for name in kernels},
            int(memory.argument_size_in_bytes),
            int(memory.output_size_in_bytes),
            int(memory.temp_size_in_bytes),
        )


def compile_kernels(compiler: Compiler, plan: Any, head_dim: int, dtype: str, heads: int = 1) -> list[dict[str, Any]]:
    """The three kernels of a plan: what ``aot.compile_report`` returns under ``"kernels"``.

    A kernel that does not compile has an ``"error"`` instead of numbers.
    """
    import jax
    import jax.numpy as jnp

    from canvas_engineering.kernels.pallas.attention import kernel_config, plan_arrays
    from canvas_engineering.kernels.pallas.backward import SetRows, backward_cols, backward_rows
    from canvas_engineering.kernels.pallas.forward import forward
    from canvas_engineering.kernels.pallas.lowering import lower_plan
    from canvas_engineering.kernels.pallas.tiles import padded_head_dim

    lowered = lower_plan(plan)
    config = kernel_config(
        plan,
        lowered,
        scale=head_dim**-0.5,
        activation="softmax",
        dropout_p=0.0,
        weighted=not lowered.unit_weight,
        interpret=False,
    )
    arrays = compiler.placeholders(plan_arrays(lowered, None, None))
    width = padded_head_dim(head_dim)
    q = compiler.array((heads, plan.num_q_tiles * plan.block_q, width), dtype)
    kv = compiler.array((heads, plan.num_kv_tiles * plan.block_kv, width), dtype)
    weight = compiler.array((lowered.num_sets, 1, plan.block_q), jnp.float32)
    rows = compiler.array((heads, lowered.num_sets, 1, plan.block_q), jnp.float32)

    def backward(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(arrays: Any, q: Any, k: Any, v: Any, grad: Any, lse: Any, delta: Any, weight: Any) -> Any:
            set_rows = SetRows(lse=lse, delta=delta, weight=weight if config.weighted else None)
            return function(config, arrays, q, k, v, grad, set_rows)

        return run

    saved = (arrays, q, kv, kv, q, rows, rows, rows)
    calls: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        ("forward", lambda *x: forward(config, *x, by_set=False), (arrays, q, kv, kv, weight)),
        ("dq", backward(backward_rows), saved),
        ("dkv", backward(backward_cols), saved),
    ]
    reports = []
    for name, function, arguments in calls:
        report: dict[str, Any] = {"name": name, "block_q": plan.block_q, "block_kv": plan.block_kv}
        try:
            compiled = compiler.compile(function, arguments, [f"canvas_attention_{name}"])
        except jax.errors.JaxRuntimeError as error:
            report["error"] = str(error).strip()
        else:
            report |= asdict(compiled.schedules[f"canvas_attention_{name}"])
            report |= {
                "argument_bytes": compiled.argument_bytes,
                "output_bytes": compiled.output_bytes,
                "temp_bytes": compiled.temp_bytes,
            }
        reports.append(report)
    return reports


def main() -> None:
    """Answer one request: ``{"target", "head_dim", "dtype", "plan": path or null}``."""
    request = json.load(sys.stdin)
    # libtpu and XLA write to standard output as well: keep the answer apart from their words.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    from canvas_engineering.plan import BlockSparsePlan

    with tempfile.TemporaryDirectory(prefix="canvas-tpu-") as folder:
        compiler = Compiler(request["target"], Path(folder))
        plan = BlockSparsePlan.load(request["plan"])
        kernels = compile_kernels(compiler, plan, request["head_dim"], request["dtype"])
    with answer:
        json.dump({"kernels": kernels}, answer)


if __name__ == "__main__":
    main()
