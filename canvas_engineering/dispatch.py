"""``AttentionDispatcher``: runs a canvas topology on a canvas, one kernel call per attention function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from canvas_engineering._arrays import is_jax, is_torch
from canvas_engineering._optional import require
from canvas_engineering.errors import BackendError, CanvasError
from canvas_engineering.program import OPERATOR_DEFAULTS, resolve_operator_defaults
from canvas_engineering.triggers import evaluate_trigger

torch = require("torch", "torch", "AttentionDispatcher")
from torch import Tensor, nn  # noqa: E402 - after the check, so that a missing torch is named with its extra

from canvas_engineering.attention import create_attention  # noqa: E402
from canvas_engineering.attention.api import BACKENDS  # noqa: E402
from canvas_engineering.attention.key_pattern import KeyRanges  # noqa: E402
from canvas_engineering.attention.patterned import LocalAttention, MixtureAttention, RandomFixedAttention  # noqa: E402
from canvas_engineering.attention.registry import is_plan_capable  # noqa: E402
from canvas_engineering.nn.identity import SlotBindingModule  # noqa: E402
from canvas_engineering.routing.edges import active_edges, resolve_edges  # noqa: E402
from canvas_engineering.routing.explain import Explanation, explain  # noqa: E402
from canvas_engineering.routing.names import gate_names, slot_names  # noqa: E402
from canvas_engineering.routing.schedule import (  # noqa: E402
    FunctionTraits,
    Schedule,
    build_schedule,
    index_pattern,
    key_pattern,
)
from canvas_engineering.routing.torch_run import DeviceState, run_schedule  # noqa: E402
from canvas_engineering.routing.torch_tiles import tiles_of  # noqa: E402
from canvas_engineering.routing.weights import row_weights  # noqa: E402

if TYPE_CHECKING:
    from canvas_engineering.canvas import CanvasLayout
    from canvas_engineering.connectivity import CanvasTopology
    from canvas_engineering.cortex import CortexRegistry
    from canvas_engineering.groups import Pattern
    from canvas_engineering.nn.residuals import ResidualAccumulator
    from canvas_engineering.plan import BlockSize
    from canvas_engineering.program import CanvasProgram

__all__ = ["OPERATOR_DEFAULTS", "AttentionDispatcher", "evaluate_trigger", "resolve_operator_defaults"]

#: Sets of active edges whose weights are kept on the device.
_KEPT_STATES = 32


class AttentionDispatcher(nn.Module):
    """Attention over all connections of a topology.

    Every connection has an attention function; the connections of one function share one module and run in one
    block-sparse kernel call, each with a softmax of its own. Contributions are combined per row:

    * ``add`` (the default): the mean over the row's connections, weighted by their weights;
    * ``gate``: ``sigmoid(gate) * weight * contribution`` on top of it, ``gate`` a learned scalar per (src, dst,
      function) that starts at 0;
    * ``replace``: ``weight * contribution`` of the last such connection, instead of everything else.

    Rows that nothing wrote, and rows of inactive regions, pass through unchanged.

    Args:
        topology: The connections.
        layout: The regions.
        d_model: Width of the canvas.
        n_heads: Attention heads; divides ``d_model``.
        dropout: Dropout of attention probabilities in training, in ``[0, 1)``.
        skip_temporal: Ignore ``t_src`` and ``t_dst``.
        residual_accumulator: Takes ``attended - queries`` of each non-temporal connection whose dst has carrier
            ``"residual"``.
        program: Operators, write modes, triggers, masks and slot banks of its connections and regions.
        cortex_registry: Inside one cortex its ``local_backend`` is the function.
        backend: ``"auto"``, or one of ``"triton"``, ``"pallas"``, ``"portable"``, ``"reference"``, which is then
            never replaced by another.
        block_q, block_kv: Tile sizes of the plans, or ``"auto"``.

    Raises:
        CanvasError: A malformed trigger, an unknown function or backend, ``n_heads`` that does not divide.
        PlanError: A tile size that is not allowed.

    A connection that names a region the layout lacks is skipped with a ``UserWarning``.
    """

    def __init__(
        self,
        topology: CanvasTopology,
        layout: CanvasLayout,
        d_model: int,
        n_heads: int = 4,
        dropout: float = 0.0,
        skip_temporal: bool = False,
        residual_accumulator: ResidualAccumulator | None = None,
        program: CanvasProgram | None = None,
        cortex_registry: CortexRegistry | None = None,
        *,
        backend: str = "auto",
        block_q: BlockSize = "auto",
        block_kv: BlockSize = "auto",
    ) -> None:
        super().__init__()
        if backend != "auto" and backend not in BACKENDS:
            raise CanvasError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
        self.topology = topology
        self.layout = layout
        self.d_model = d_model
        self.n_heads = n_heads
        self.skip_temporal = skip_temporal
        self.residual_accumulator = residual_accumulator
        self.program = program
        self.cortex_registry = cortex_registry
        self.backend = backend
        self.block_q: BlockSize = block_q
        self.block_kv: BlockSize = block_kv
        self.edges = resolve_edges(
            topology,
            layout,
            program=program,
            cortex_registry=cortex_registry,
            skip_temporal=skip_temporal,
            residual_regions=() if residual_accumulator is None else residual_accumulator.region_names,
        )
        self.fn_modules = nn.ModuleDict(
            {
                fn: create_attention(fn, d_model, n_heads, dropout)
                for fn in dict.fromkeys(edge.fn for edge in self.edges)
            }
        )
        self._gate_names = gate_names(self.edges)
        if self._gate_names:  # only then: checkpoints without gates keep their keys
            self.gates = nn.ParameterDict(
                {name: nn.Parameter(torch.zeros(())) for name in dict.fromkeys(self._gate_names.values())}
            )
        self._slot_names = slot_names(self.edges)
        if self._slot_names and program is not None:
            self.slot_modules = nn.ModuleDict(
                {name: self._slot_module(program, dst) for dst, name in self._slot_names.items()}
            )
        self._schedule_seeds: tuple[int, ...] | None = None
        self._states: dict[Any, DeviceState] = {}
        self.schedule  # compile now, so that a bad declaration fails here  # noqa: B018

    def _slot_module(self, program: CanvasProgram, region: str) -> SlotBindingModule:
        identity = program.regions[region].identity
        if identity is None:
            raise CanvasError(f"program.regions[{region!r}].identity must be an IdentitySpec, got None")
        lives = identity.mode == "tracklet" and identity.birth_death
        return SlotBindingModule(self.d_model, identity.slot_capacity, self.n_heads, birth_death=lives)

    # -- the compiled form ----------------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """Plans and direct calls; compiled at construction, and again if a random pattern's seed was loaded."""
        seeds = tuple(module.seed for module in self.fn_modules.values() if isinstance(module, RandomFixedAttention))
        if seeds != self._schedule_seeds:
            self._schedule = build_schedule(
                self.topology,
                self.layout,
                self.edges,
                {fn: function_traits(module) for fn, module in self.fn_modules.items()},
                program=self.program,
                skip_temporal=self.skip_temporal,
                block_q=self.block_q,
                block_kv=self.block_kv,
                tiles=tiles_of(self.backend, self.d_model // self.n_heads),
            )
            self._schedule_seeds = seeds
            self._states.clear()
        return self._schedule

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_states": {}}

    def _state(self, active: tuple[bool, ...], device: Any) -> DeviceState:
        """The weights under some active edges, as tensors; computed when they first occur."""
        schedule = self.schedule
        key = (active, device)
        if key not in self._states:
            if len(self._states) >= _KEPT_STATES:
                del self._states[next(iter(self._states))]
            self._states[key] = DeviceState.of(schedule, row_weights(schedule, active), active, device)
        return self._states[key]

    # -- running --------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Any,
        active_regions: Collection[str] | None = None,
        summaries: Mapping[str, Mapping[str, float]] | None = None,
    ) -> Any:
        """Attend over all connections.

        Args:
            x: ``(B, N, d_model)``, N the canvas positions: a torch tensor of the parameters' dtype and device;
                a JAX array (runs in JAX with the same parameters); or a NumPy array (runs in the reference,
                without gradients).
            active_regions: Regions that update; None for all. Others pass through.
            summaries: Region to kind to value, for triggers; None takes those of the residual accumulator.

        Returns:
            ``(B, N, d_model)``, of x's kind, dtype and device.

        Raises:
            CanvasError: ``x`` or ``active_regions`` is not as above. BackendError: the backend asked for cannot run.
        """
        if is_jax(x):
            from canvas_engineering.jax.bridge import run_torch_dispatcher

            return run_torch_dispatcher(self, x, active_regions, summaries)
        if isinstance(x, np.ndarray):
            return self._forward_numpy(x, active_regions, summaries)
        return self._forward(x, active_regions, summaries, self.backend)

    def _forward(
        self,
        x: Tensor,
        active_regions: Collection[str] | None,
        summaries: Mapping[str, Mapping[str, float]] | None,
        backend: str,
    ) -> Tensor:
        self._check_input(x)
        if summaries is None and any(edge.trigger is not None for edge in self.edges):
            summaries = self.summaries
        active = active_edges(self.edges, self.layout, active_regions, summaries)
        if not any(active):
            return x.clone()
        state = self._state(active, x.device)
        gates = {i: torch.sigmoid(self.gates[name]) for i, name in self._gate_names.items()}
        slots = {dst: self.slot_modules[name] for dst, name in self._slot_names.items()}
        out, errors = run_schedule(self.schedule, state, x, self.fn_modules, gates, slots, backend)
        if self.residual_accumulator is not None:
            for region, error in errors:
                self.residual_accumulator.update(region, error)
        return out

    def _forward_numpy(
        self,
        x: np.ndarray,
        active_regions: Collection[str] | None,
        summaries: Mapping[str, Mapping[str, float]] | None,
    ) -> np.ndarray:
        """The reference on a NumPy array: parameters are brought to its dtype."""
        if self.backend not in ("auto", "reference"):
            raise BackendError(f"backend {self.backend!r} cannot run this call: needs torch tensors, got a NumPy array")
        if x.dtype.kind != "f":
            raise CanvasError(f"x must have a floating-point dtype, got {x.dtype}")
        tensor = torch.from_numpy(np.array(x))  # a copy: torch wants writable memory, and x stays the caller's
        cast = {
            name: value.detach().to("cpu", tensor.dtype if value.is_floating_point() else value.dtype)
            for name, value in [*self.named_parameters(), *self.named_buffers()]
        }
        with torch.no_grad():
            out = torch.func.functional_call(
                _Reference(self),
                {f"dispatcher.{name}": value for name, value in cast.items()},
                (tensor, active_regions, summaries),
            )
        return out.numpy()

    def _check_input(self, x: Any) -> None:
        if not is_torch(x):
            raise CanvasError(f"x must be a torch tensor, JAX array or NumPy array, got {type(x).__name__}")
        expected = (self.layout.num_positions, self.d_model)
        if x.ndim != 3 or tuple(x.shape[1:]) != expected:
            raise CanvasError(f"x must have shape (B, {expected[0]}, {expected[1]}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise CanvasError(f"x must have a floating-point dtype, got {x.dtype}")
        parameter = next(self.fn_modules.parameters(), None)
        if parameter is None:
            return
        if parameter.device != x.device:
            raise CanvasError(f"x must be on the parameters' device {parameter.device}, got {x.device}")
        if parameter.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise CanvasError(
                f"x must have the parameters' dtype {parameter.dtype} (or run under torch.autocast), got {x.dtype}"
            )

    # -- looking --------------------------------------------------------------------------------------------

    @property
    def summaries(self) -> dict[str, dict[str, float]] | None:
        """Current residual summaries, region to kind to value, or None without an accumulator."""
        return None if self.residual_accumulator is None else self.residual_accumulator.summaries()

    def explain(self, x: Any = None) -> Explanation:
        """Which connection runs where, and why.

        Args:
            x: An input to explain for; without one, a float32 tensor where the parameters are.

        Returns:
            A table that prints itself; ``rows`` and ``as_dict()`` for programs.
        """
        if x is None:
            parameter = next(self.fn_modules.parameters(), None)
            x = torch.empty(1) if parameter is None else parameter
        return explain(self.schedule, self.fn_modules, x, self.d_model // self.n_heads, self.n_heads, self.backend)

    def extra_repr(self) -> str:
        counts = Counter(edge.fn for edge in self.edges)
        functions = ", ".join(f"{fn}={count}" for fn, count in sorted(counts.items()))
        return f"{len(self.edges)} connections ({functions}), backend={self.backend!r}"


class _Reference(nn.Module):
    """Runs a dispatcher's torch path on the reference backend, for ``functional_call``."""

    def __init__(self, dispatcher: AttentionDispatcher) -> None:
        super().__init__()
        self.dispatcher = dispatcher

    def forward(self, x: Tensor, active_regions: Any, summaries: Any) -> Tensor:
        return self.dispatcher._forward(x, active_regions, summaries, "reference")


def function_traits(module: nn.Module) -> FunctionTraits:
    """How an attention module runs in a schedule."""
    if not is_plan_capable(module):
        return FunctionTraits(plan=False)
    if isinstance(module, MixtureAttention):
        return FunctionTraits(plan=True, chunks=module.expert_ranges)
    if isinstance(module, (LocalAttention, RandomFixedAttention)):
        return FunctionTraits(plan=True, pattern=partial(_group_pattern, module))
    return FunctionTraits(plan=True)


def _group_pattern(module: LocalAttention | RandomFixedAttention, rows: int, cols: int, group: int) -> Pattern:
    pattern = module.key_pattern(rows, cols, group)
    if isinstance(pattern, KeyRanges):
        return key_pattern(pattern.lo, pattern.hi, cols)
    return index_pattern(pattern.index, cols)
