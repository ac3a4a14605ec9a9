"""What a torch ``AttentionDispatcher`` does with a JAX array: the same computation in JAX, with its parameters."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array

from canvas_engineering.errors import CanvasError
from canvas_engineering.jax.convert import params_of
from canvas_engineering.jax.dispatcher import AttentionDispatcher, check_backend
from canvas_engineering.jax.params import Params
from canvas_engineering.jax.weights import RowWeights, work_of_known, work_of_traced
from canvas_engineering.routing.edges import active_edges

if TYPE_CHECKING:
    from canvas_engineering.dispatch import AttentionDispatcher as TorchDispatcher

Errors = list[tuple[int, str, Array]]


class _Bridge:
    """The JAX form of one torch module, and its parameters as they were when last used."""

    def __init__(self, module: TorchDispatcher) -> None:
        self.schedule = module.schedule
        self.form = _form(module)
        self.dispatcher = AttentionDispatcher.from_torch(module)
        self._versions: list[tuple[Any, ...]] | None = None
        self._params: dict[str, Params] = {}
        self._with_all_active = jax.jit(self._run_all_active)
        self._with_weights = jax.jit(self._run_weights)

    def params(self, module: TorchDispatcher, dtype: Any) -> Params:
        """The module's parameters in ``dtype``, converted again only after a change."""
        versions = _versions(module)
        if versions is None or versions != self._versions:
            self._params = {}
            self._versions = versions
        if str(dtype) not in self._params:
            with jax.ensure_compile_time_eval():  # kept, so they must not belong to a trace
                self._params[str(dtype)] = params_of(module, dtype)
        return self._params[str(dtype)]

    def run(self, params: Params, x: Array, active: tuple[bool, ...], rng: Array | None) -> tuple[Array, Errors]:
        """At most two compilations per shape: with everything active, and with weights as data."""
        if all(active):
            out, errors = self._with_all_active(params, x, rng)
        else:
            out, errors = self._with_weights(params, x, self.dispatcher._weights_of(active), rng)
        regions = self._residual_edges()
        return out, [(edge, regions[edge], error) for edge, error in errors.items() if active[edge]]

    def _residual_edges(self) -> dict[int, str]:
        return {i: edge.dst for i, edge in enumerate(self.dispatcher.edges) if edge.residual}

    def _run_all_active(self, params: Params, x: Array, rng: Array | None) -> tuple[Array, dict[int, Array]]:
        active = (True,) * len(self.dispatcher.edges)
        work = work_of_known(self.dispatcher.schedule, self.dispatcher._weights_of(active), active)
        out, errors = self.dispatcher._run(params, x, work, rng)
        return out, {edge: error for edge, _, error in errors}

    def _run_weights(
        self, params: Params, x: Array, weights: RowWeights, rng: Array | None
    ) -> tuple[Array, dict[int, Array]]:
        out, errors = self.dispatcher._run(params, x, work_of_traced(self.dispatcher.schedule, weights), rng)
        return out, {edge: error for edge, _, error in errors}


#: By module; weak, so that a module takes its JAX form with it, and neither is copied or pickled with the other.
_bridges: weakref.WeakKeyDictionary[TorchDispatcher, _Bridge] = weakref.WeakKeyDictionary()


def run_torch_dispatcher(
    module: TorchDispatcher,
    x: Array,
    active_regions: Collection[str] | None,
    summaries: Mapping[str, Mapping[str, float]] | None,
) -> Array:
    """``module(x, active_regions, summaries)`` for a JAX array.

    The parameters are constants here, converted to x's dtype once and again after they changed (by way of
    their version counters, which writing through ``.data`` evades). Gradients reach x, not the torch
    parameters: to train in JAX use ``canvas_engineering.jax``. In training mode dropout is seeded from torch's
    CPU generator.

    Raises:
        BackendError: The module's ``backend`` is one that has no use for JAX arrays.
        CanvasError: ``x`` or ``active_regions`` is not as in ``AttentionDispatcher.forward``, or residual
            summaries would have to be accumulated under a JAX transformation.
    """
    check_backend(module.backend)
    expected = (module.layout.num_positions, module.d_model)
    if x.ndim != 3 or tuple(x.shape[1:]) != expected:
        raise CanvasError(f"x must have shape (B, {expected[0]}, {expected[1]}), got {tuple(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise CanvasError(f"x must have a floating-point dtype, got {x.dtype}")
    bridge = _bridges.get(module)
    if bridge is None or bridge.schedule is not module.schedule or bridge.form != _form(module):
        bridge = _bridges[module] = _Bridge(module)
    if summaries is None and any(edge.trigger is not None for edge in module.edges):
        summaries = module.summaries
    active = active_edges(module.edges, module.layout, active_regions, summaries)
    if not any(active):
        return x
    rng = None
    if module.training and any(function.dropout for function in bridge.dispatcher.functions.values()):
        rng = jax.random.key(int(torch.randint(0, 2**31 - 1, ())))
    out, errors = bridge.run(bridge.params(module, x.dtype), x, active, rng)
    if module.residual_accumulator is not None:
        for _, region, error in errors:
            if isinstance(error, jax.core.Tracer):
                raise CanvasError(
                    "residual summaries cannot be accumulated under a JAX transformation: "
                    "canvas_engineering.jax.AttentionDispatcher returns them instead"
                )
            module.residual_accumulator.update(region, torch.from_numpy(np.array(error.astype(_torch_like(error)))))
    return out


def _torch_like(error: Array) -> Any:
    return error.dtype if error.dtype in (jnp.float16, jnp.float32, jnp.float64) else jnp.float32


def _versions(module: TorchDispatcher) -> list[tuple[Any, ...]] | None:
    """What changes when a parameter does; the tensors themselves too, so that an address is not met again.

    None where it cannot be known, for inference tensors.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return [(_Same(tensor), tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device) for tensor in tensors]


class _Same:
    """Equal to itself by identity, unlike a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.tensor is other.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


def _form(module: TorchDispatcher) -> tuple[Any, ...]:
    """What a JAX form depends on besides the schedule: the modules, their dropout, the backend."""
    return (
        module.backend,
        *((name, fn, getattr(getattr(fn, "dropout", None), "p", 0.0)) for name, fn in module.fn_modules.items()),
    )
