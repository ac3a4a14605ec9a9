"""``AttentionDispatcher`` for JAX: a canvas topology as pure functions on a tree of parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from canvas_engineering._arrays import is_jax
from canvas_engineering.attention.api import BACKENDS
from canvas_engineering.errors import BackendError, CanvasError
from canvas_engineering.jax.base import AttentionFunction
from canvas_engineering.jax.params import Params, check_tree, flatten
from canvas_engineering.jax.registry import create_attention
from canvas_engineering.jax.residuals import ResidualAccumulator, ResidualState
from canvas_engineering.jax.run import Layout, Runner
from canvas_engineering.jax.slots import SlotBinding
from canvas_engineering.jax.tiles import tiles_of
from canvas_engineering.jax.traits import function_traits
from canvas_engineering.jax.weights import (
    ActiveWork,
    RowWeights,
    compute_row_weights,
    work_of_known,
    work_of_traced,
)
from canvas_engineering.routing.edges import active_edges, resolve_edges
from canvas_engineering.routing.explain import Explanation, explain
from canvas_engineering.routing.names import gate_names, slot_names
from canvas_engineering.routing.schedule import Schedule, build_schedule

if TYPE_CHECKING:
    from canvas_engineering.canvas import CanvasLayout
    from canvas_engineering.connectivity import CanvasTopology
    from canvas_engineering.cortex import CortexRegistry
    from canvas_engineering.plan import BlockSize
    from canvas_engineering.program import CanvasProgram
    from canvas_engineering.routing.edges import Edge

#: Sets of active edges whose weights are kept.
_KEPT_WEIGHTS = 32
#: Leaves that no optimiser may change.
_CONSTANTS = ("A_log",)


class AttentionDispatcher:
    """Attention over all connections of a topology, for JAX.

    Semantics, function names and parameter names are those of ``canvas_engineering.AttentionDispatcher``. The
    object itself is static: it holds the compiled plans and no arrays that are learned. Close over it, or pass
    it as a static argument::

        d = AttentionDispatcher(topology, layout, d_model=256)
        params = d.init(jax.random.key(0))
        y = jax.jit(d.apply)(params, x)

    Reverse-mode differentiation, ``jit``, ``vmap`` and ``shard_map`` over the batch work; forward mode does not.

    Args:
        topology: The connections.
        layout: The regions.
        d_model: Width of the canvas.
        n_heads: Attention heads; divides ``d_model``.
        dropout: Dropout of attention probabilities in training, in ``[0, 1)``.
        skip_temporal: Ignore ``t_src`` and ``t_dst``.
        residual_accumulator: Regions and ``ResidualSpec`` of the residual summaries: a
            ``canvas_engineering.jax.ResidualAccumulator``, or a torch one, whose numbers are not used. It counts
            ``attended - queries`` of each non-temporal connection whose dst has carrier ``"residual"``.
        program: Operators, write modes, triggers, masks and slot banks of its connections and regions.
        cortex_registry: Inside one cortex its ``local_backend`` is the function.
        backend: ``"auto"``, or one of ``"pallas"``, ``"portable"``, ``"reference"``, which is then never replaced
            by another.
        block_q, block_kv: Tile sizes of the plans, or ``"auto"``: on a TPU, from those that a TPU takes.
        function_options: By function name, options of that function, for example
            ``{"local_attention": {"window_size": 16}, "random_fixed": {"pattern_seed": 7}}``.

    Raises:
        CanvasError: A malformed trigger, an unknown function, option or backend, ``n_heads`` that does not divide.
        BackendError: ``backend="triton"``, which has no use for JAX arrays.
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
        residual_accumulator: Any = None,
        program: CanvasProgram | None = None,
        cortex_registry: CortexRegistry | None = None,
        *,
        backend: str = "auto",
        block_q: BlockSize = "auto",
        block_kv: BlockSize = "auto",
        function_options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        check_backend(backend)
        accumulator = as_accumulator(residual_accumulator)
        edges = resolve_edges(
            topology,
            layout,
            program=program,
            cortex_registry=cortex_registry,
            skip_temporal=skip_temporal,
            residual_regions=() if accumulator is None else accumulator.region_names,
        )
        options = {} if function_options is None else function_options
        names = list(dict.fromkeys(edge.fn for edge in edges))
        for name in options:
            if name not in names:
                raise CanvasError(f"function_options must name functions of the connections, {names}, got {name!r}")
        functions = {
            name: create_attention(name, d_model, n_heads, **{"dropout": dropout, **options.get(name, {})})
            for name in names
        }
        schedule = build_schedule(
            topology,
            layout,
            edges,
            {name: function_traits(function) for name, function in functions.items()},
            program=program,
            skip_temporal=skip_temporal,
            block_q=block_q,
            block_kv=block_kv,
            tiles=tiles_of(backend),
        )
        self._assemble(layout, d_model, n_heads, accumulator, program, backend, functions, schedule)

    def _assemble(
        self,
        layout: CanvasLayout,
        d_model: int,
        n_heads: int,
        accumulator: ResidualAccumulator | None,
        program: CanvasProgram | None,
        backend: str,
        functions: Mapping[str, AttentionFunction],
        schedule: Schedule,
    ) -> None:
        """Everything that follows from functions and schedule."""
        self.layout = layout
        self.d_model = d_model
        self.n_heads = n_heads
        self.residual_accumulator = accumulator
        self.backend = backend
        self.functions = dict(functions)
        self.schedule = schedule
        self.edges: list[Edge] = schedule.edges
        self._gate_names = gate_names(self.edges)
        self._slots = {
            region: (name, slot_binding(program, region, d_model, n_heads))
            for region, name in slot_names(self.edges).items()
        }
        self._layout = Layout(schedule)
        self._weights: dict[tuple[bool, ...], RowWeights] = {}
        self._expected: Params = jax.eval_shape(lambda: self.init(jax.random.key(0)))

    @classmethod
    def from_torch(cls, module: Any) -> AttentionDispatcher:
        """The JAX dispatcher of a torch one: same declaration, options and plans, random patterns included.

        Parameters come separately, from :func:`canvas_engineering.jax.from_torch`.

        Raises:
            CanvasError: ``module`` is no ``canvas_engineering.AttentionDispatcher``, or a function of it has no
                JAX form (``register_attention`` gives it one).
        """
        from canvas_engineering.jax.convert import dispatcher_from_torch

        return dispatcher_from_torch(cls, module)

    # -- parameters -----------------------------------------------------------------------------------------

    def init(self, key: Array, dtype: Any = jnp.float32) -> Params:
        """New parameters, distributed as torch's are.

        Args:
            key: A ``jax.random`` key.
            dtype: Of all parameters.

        Returns:
            Nested dictionaries: the torch ``state_dict`` with its keys split at the dots. Linear weights are
            ``(out, in)``.
        """
        keys = iter(jax.random.split(key, len(self.functions) + len(self._slots) or 1))
        params: Params = {
            "fn_modules": {name: function.init(next(keys), dtype) for name, function in self.functions.items()}
        }
        if self._gate_names:
            params["gates"] = {name: jnp.zeros((), dtype) for name in dict.fromkeys(self._gate_names.values())}
        if self._slots:
            params["slot_modules"] = {name: binding.init(next(keys), dtype) for name, binding in self._slots.values()}
        return params

    def trainable(self, params: Mapping[str, Any]) -> Params:
        """A tree of bools like ``params``: False for constants, whose gradient is 0 (``A_log`` of mamba).

        For optimisers that would change them all the same, by weight decay.
        """
        return {
            name: self.trainable(value) if isinstance(value, Mapping) else name not in _CONSTANTS
            for name, value in params.items()
        }

    # -- running --------------------------------------------------------------------------------------------

    def apply(
        self,
        params: Params,
        x: ArrayLike,
        active_regions: Collection[str] | None = None,
        summaries: Mapping[str, Mapping[str, float]] | None = None,
        *,
        weights: RowWeights | None = None,
        residual_state: ResidualState | None = None,
        train: bool = False,
        rng: Array | None = None,
    ) -> Any:
        """Attend over all connections; a pure function.

        Args:
            params: As ``init`` or ``from_torch`` makes them.
            x: ``(B, N, d_model)`` JAX or NumPy array, N the canvas positions, of the parameters' dtype.
            active_regions: Regions that update; None for all. Others pass through. Static.
            summaries: Region to kind to value, for triggers, as ``self.summaries(state)`` gives it. Static;
                without it, no trigger fires.
            weights: Instead of these two, ``self.row_weights(active_regions, summaries)``: may be traced, so
                that one compiled function serves all sets of active connections.
            residual_state: Turns the residual summaries on: then the result is a pair.
            train: Apply dropout.
            rng: A ``jax.random`` key, needed for dropout.

        Returns:
            ``(B, N, d_model)`` of x's dtype, or with ``residual_state`` a pair of it and the state after this call.

        Raises:
            CanvasError: An argument is not as above.
            BackendError: The backend asked for cannot run.
        """
        x = self._checked_input(params, x)
        if residual_state is not None and self.residual_accumulator is None:
            raise CanvasError("residual_state must be None for a dispatcher without residual_accumulator")
        if train and rng is None and any(function.dropout for function in self.functions.values()):
            raise CanvasError("rng must be a jax.random key when train=True and dropout > 0, got None")
        work = self._work(active_regions, summaries, weights)
        out, errors = self._run(params, x, work, rng if train else None)
        if residual_state is None or self.residual_accumulator is None:
            return out
        for edge, region, error in errors:
            residual_state = self.residual_accumulator.update(residual_state, region, error, work.active[edge])
        return out, residual_state

    def _run(
        self, params: Params, x: Array, work: ActiveWork, rng: Array | None
    ) -> tuple[Array, list[tuple[int, str, Array]]]:
        """The new canvas, and (edge, region, error) of the residual edges that ran."""
        if not (any(work.plan_runs) or any(work.direct_runs)):
            return x, []
        return Runner(
            self.schedule,
            self._layout,
            self.functions,
            self._slots,
            self._gate_names,
            params,
            x,
            work,
            self.backend,
            rng,
        ).run()

    def row_weights(
        self,
        active_regions: Collection[str] | None = None,
        summaries: Mapping[str, Mapping[str, float]] | None = None,
    ) -> RowWeights:
        """The weights of one set of active connections, for ``apply(..., weights=...)``.

        Computed on the host, kept, and returned as read-only NumPy arrays; ``jax.device_put`` places them.

        Raises:
            CanvasError: ``active_regions`` holds a name the layout lacks.
        """
        return self._weights_of(active_edges(self.edges, self.layout, active_regions, summaries))

    def _weights_of(self, active: tuple[bool, ...]) -> RowWeights:
        if active not in self._weights:
            if len(self._weights) >= _KEPT_WEIGHTS:
                del self._weights[next(iter(self._weights))]
            self._weights[active] = compute_row_weights(self.schedule, active)
        return self._weights[active]

    def _work(
        self,
        active_regions: Collection[str] | None,
        summaries: Mapping[str, Mapping[str, float]] | None,
        weights: RowWeights | None,
    ) -> ActiveWork:
        if weights is not None:
            if active_regions is not None or summaries is not None:
                raise CanvasError("weights must be given instead of active_regions and summaries, got both")
            return work_of_traced(self.schedule, weights)
        active = active_edges(self.edges, self.layout, active_regions, summaries)
        return work_of_known(self.schedule, self._weights_of(active), active)

    def _checked_input(self, params: Params, x: Any) -> Array:
        if isinstance(x, np.ndarray):
            x = jnp.asarray(x)
        if not is_jax(x):
            raise CanvasError(f"x must be a JAX array, got {type(x).__name__}")
        expected = (self.layout.num_positions, self.d_model)
        if x.ndim != 3 or tuple(x.shape[1:]) != expected:
            raise CanvasError(f"x must have shape (B, {expected[0]}, {expected[1]}), got {tuple(x.shape)}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise CanvasError(f"x must have a floating-point dtype, got {x.dtype}")
        check_tree(params, self._expected)
        leaf = next((leaf for _, leaf in flatten(params)), None)
        if leaf is not None and leaf.dtype != x.dtype:
            raise CanvasError(f"x must have the parameters' dtype {leaf.dtype}, got {x.dtype}: cast one of them")
        return x

    # -- residuals ------------------------------------------------------------------------------------------

    def init_residuals(self) -> ResidualState:
        """The state before the first step.

        Raises:
            CanvasError: The dispatcher has no ``residual_accumulator``.
        """
        if self.residual_accumulator is None:
            raise CanvasError("init_residuals needs a dispatcher with residual_accumulator")
        return self.residual_accumulator.init()

    def summaries(self, state: ResidualState) -> dict[str, dict[str, float]]:
        """``{region: {kind: value}}`` of a state as plain numbers, for triggers; not under ``jit``.

        Raises:
            CanvasError: The dispatcher has no ``residual_accumulator``.
        """
        if self.residual_accumulator is None:
            raise CanvasError("summaries needs a dispatcher with residual_accumulator")
        return self.residual_accumulator.summaries(state)

    # -- looking --------------------------------------------------------------------------------------------

    def explain(self, x: Array | None = None) -> Explanation:
        """Which connection runs where, and why.

        Args:
            x: An input to explain for; without one, float32 on JAX's default device.

        Returns:
            A table that prints itself; ``rows`` and ``as_dict()`` for programs.
        """
        probe = jnp.zeros(1, jnp.float32) if x is None else x
        return explain(self.schedule, self.functions, probe, self.d_model // self.n_heads, self.n_heads, self.backend)

    def __repr__(self) -> str:
        functions = ", ".join(sorted(self.functions))
        return (
            f"{type(self).__name__}({len(self.edges)} connections ({functions}), d_model={self.d_model}, "
            f"n_heads={self.n_heads}, backend={self.backend!r})"
        )


def check_backend(backend: str) -> None:
    """Raise unless a JAX array can run on ``backend`` at all."""
    if backend != "auto" and backend not in BACKENDS:
        raise CanvasError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "triton":
        raise BackendError("backend 'triton' cannot run this call: needs torch tensors, got JAX arrays")


def as_accumulator(accumulator: Any) -> ResidualAccumulator | None:
    """What a residual accumulator of either framework declares."""
    if accumulator is None or isinstance(accumulator, ResidualAccumulator):
        return accumulator
    if not (hasattr(accumulator, "region_names") and hasattr(accumulator, "spec")):
        raise CanvasError(f"residual_accumulator must be a ResidualAccumulator, got {type(accumulator).__name__}")
    return ResidualAccumulator(accumulator.region_names, accumulator.spec)


def slot_binding(program: CanvasProgram | None, region: str, d_model: int, n_heads: int) -> SlotBinding:
    """The slot bank that a program declares for a region."""
    identity = None if program is None else program.regions[region].identity
    if identity is None:
        raise CanvasError(f"program.regions[{region!r}].identity must be an IdentitySpec, got None")
    lives = identity.mode == "tracklet" and identity.birth_death
    return SlotBinding(d_model, identity.slot_capacity, n_heads, birth_death=lives)
