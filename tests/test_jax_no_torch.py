"""The JAX front end works where torch cannot be imported, and says what is missing where jax cannot."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""

EVERY_FUNCTION = """
import jax, jax.numpy as jnp
import canvas_engineering.jax as front
from canvas_engineering import CanvasLayout, CanvasProgram, CanvasSchema, CanvasTopology, Connection
from canvas_engineering import IdentitySpec, RegionProgram
from canvas_engineering.errors import MissingDependencyError

names = list(front.ATTENTION_REGISTRY)
regions = {f"r{i}": (0, 2, 3 * i, 3 * i + 3) for i in range(len(names))}
layout = CanvasLayout(T=2, spatial_shape=(3 * len(names),), d_model=8, regions=regions)
topology = CanvasTopology([Connection(f"r{i}", f"r{i}", fn=fn) for i, fn in enumerate(names)])
slots = RegionProgram(identity=IdentitySpec(slot_capacity=2))
program = CanvasProgram(CanvasSchema(layout=layout), regions={"r0": slots})
accumulator = front.ResidualAccumulator(["r0"])
d = front.AttentionDispatcher(topology, layout, 8, 2, program=program, residual_accumulator=accumulator, dropout=0.1)
quick = {"xla_backend_optimization_level": 0}
params = d.init(jax.random.key(0))
x = jax.random.normal(jax.random.key(1), (1, layout.num_positions, 8))

def run(params, x):
    return d.apply(params, x, residual_state=d.init_residuals(), train=True, rng=jax.random.key(2))

y, state = jax.jit(run, compiler_options=quick)(params, x)
assert y.shape == x.shape and bool(jnp.isfinite(y).all())
for i, fn in enumerate(names):
    rows = jnp.asarray(layout.region_indices(f"r{i}"))
    assert (fn == "copy") == bool((y[:, rows] == x[:, rows]).all()), fn
    assert (fn == "none") == (not y[:, rows].any()), fn
print(d.summaries(state), front.AttentionDispatcher(topology, layout, 8).row_weights(["r1"]).written.sum())
try:
    front.from_torch(d)
except MissingDependencyError as error:
    print(error)
assert "torch" not in sys.modules
"""


def run(blocked: str, code: str) -> str:
    program = BLOCKED.format(package=blocked) + code
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_function_runs_without_torch() -> None:
    printed = run("torch", EVERY_FUNCTION)
    assert "from_torch needs the package 'torch'" in printed
    assert "pip install 'canvas-engineering[torch]'" in printed


def test_missing_jax_is_named_with_its_extra() -> None:
    code = """
from canvas_engineering.errors import MissingDependencyError
try:
    import canvas_engineering.jax
except MissingDependencyError as error:
    print(error)
"""
    printed = run("jax", code)
    assert printed.startswith("canvas_engineering.jax needs the package 'jax', which is not installed: pip install ")
    assert "'canvas-engineering[jax]'" in printed
