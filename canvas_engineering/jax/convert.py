"""Parameters between the torch dispatcher and the JAX one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from canvas_engineering._optional import require
from canvas_engineering.errors import CanvasError
from canvas_engineering.jax.base import AttentionFunction
from canvas_engineering.jax.dense import CosineAttention, CrossAttention, GatedAttention, SigmoidAttention
from canvas_engineering.jax.hyena import HyenaAttention
from canvas_engineering.jax.linear import (
    CopyAttention,
    LinearAttention,
    NoneAttention,
    PerceiverAttention,
    PoolingAttention,
)
from canvas_engineering.jax.params import Params, flatten
from canvas_engineering.jax.patterned import LocalAttention, MixtureAttention, RandomFixedAttention, SparseAttention
from canvas_engineering.jax.recurrent import MambaAttention, RWKVAttention
from canvas_engineering.jax.registry import ATTENTION_REGISTRY, create_attention
from canvas_engineering.jax.residuals import ResidualState
from canvas_engineering.jax.tiles import tiles_of
from canvas_engineering.jax.traits import function_traits
from canvas_engineering.plan.auto import AUTO_TILES
from canvas_engineering.routing.schedule import build_schedule

if TYPE_CHECKING:
    from canvas_engineering.dispatch import AttentionDispatcher as TorchDispatcher
    from canvas_engineering.jax.dispatcher import AttentionDispatcher

#: Entries of a state_dict that are not parameters here: residual summaries are state, and the seed of a random
#: pattern decides what is computed.
_NOT_PARAMETERS = ("residual_accumulator.",)
_SEED = "pattern_seed"

#: Torch class to the JAX function and the options that are attributes of the torch module.
_FUNCTIONS: dict[str, tuple[Callable[..., AttentionFunction], tuple[str, ...]]] = {
    "CrossAttention": (CrossAttention, ()),
    "CogVideoXAttention": (CrossAttention, ()),
    "CosineAttention": (CosineAttention, ()),
    "SigmoidAttention": (SigmoidAttention, ()),
    "GatedAttention": (GatedAttention, ()),
    "LinearAttention": (LinearAttention, ()),
    "PerceiverAttention": (PerceiverAttention, ()),
    "PoolingAttention": (PoolingAttention, ()),
    "CopyAttention": (CopyAttention, ()),
    "NoneAttention": (NoneAttention, ()),
    "LocalAttention": (LocalAttention, ("window_size",)),
    "RandomFixedAttention": (RandomFixedAttention, ("n_random",)),
    "SparseAttention": (SparseAttention, ("top_k",)),
    "MixtureAttention": (MixtureAttention, ("n_experts", "top_k_experts")),
    "MambaAttention": (MambaAttention, ("state_size", "dt_rank")),
    "RWKVAttention": (RWKVAttention, ()),
    "HyenaAttention": (HyenaAttention, ("order", "max_len")),
}


def from_torch(module: TorchDispatcher) -> Params:
    """The parameters of a torch dispatcher as JAX arrays, copied.

    Dtypes are kept (float64 needs ``jax_enable_x64``). For the dispatcher itself see
    ``AttentionDispatcher.from_torch``.

    Raises:
        CanvasError: ``module`` is not a ``canvas_engineering.AttentionDispatcher``.
    """
    return params_of(_checked(module), None)


def params_of(module: TorchDispatcher, dtype: Any) -> Params:
    """The same, in ``dtype`` (None keeps each one's own)."""
    params: Params = {"fn_modules": {name: {} for name in module.fn_modules}}
    for path, tensor in _entries(module):
        *parents, name = path.split(".")
        branch = params
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = jnp.array(as_numpy(tensor), dtype or str(tensor.dtype).removeprefix("torch."))
    return params


def to_torch(params: Params, module: TorchDispatcher) -> None:
    """Write parameters into a torch dispatcher, in place; its dtypes and device stay as they are.

    Raises:
        CanvasError: Paths or shapes are not those of ``module`` (which is then left as it was), or ``module`` is
            not a ``canvas_engineering.AttentionDispatcher``.
    """
    torch = require("torch", "torch", "to_torch")
    targets = dict(_entries(_checked(module)))
    found = dict(flatten(params))
    missing, unknown = [p for p in targets if p not in found], [p for p in found if p not in targets]
    if missing or unknown:
        kind, path = ("lack", missing[0]) if missing else ("have the unknown", unknown[0])
        raise CanvasError(f"params must have the entries of the torch dispatcher, but {kind} {path!r}")
    for path, target in targets.items():
        if tuple(found[path].shape) != tuple(target.shape):
            raise CanvasError(
                f"params entry {path!r} must have shape {tuple(target.shape)}, got {tuple(found[path].shape)}"
            )
    with torch.no_grad():
        for path, target in targets.items():
            leaf = jnp.asarray(found[path])
            if leaf.dtype not in (jnp.float32, jnp.float64):
                leaf = leaf.astype(jnp.float32)  # NumPy and torch share no bfloat16; float32 holds it exactly
            target.copy_(torch.from_numpy(np.array(leaf)))


def residual_state_from_torch(accumulator: Any) -> ResidualState:
    """The summaries of a torch ``ResidualAccumulator``, copied."""
    state = accumulator.state_dict()
    return ResidualState(
        jnp.array(state["_summaries"].cpu().numpy(), jnp.float32),
        jnp.array(state["_step_counts"].cpu().numpy(), jnp.int32),
    )


def dispatcher_from_torch(cls: type[AttentionDispatcher], module: TorchDispatcher) -> AttentionDispatcher:
    """See ``AttentionDispatcher.from_torch``; plans are shared with the torch module unless a TPU needs others."""
    from canvas_engineering.jax.dispatcher import as_accumulator, check_backend

    _checked(module)
    check_backend(module.backend)
    functions = {name: _function(name, fn, module) for name, fn in module.fn_modules.items()}
    schedule, tiles = module.schedule, tiles_of(module.backend)
    if tiles is not AUTO_TILES:
        schedule = build_schedule(
            module.topology,
            module.layout,
            module.edges,
            {name: function_traits(function) for name, function in functions.items()},
            program=module.program,
            skip_temporal=module.skip_temporal,
            block_q=module.block_q,
            block_kv=module.block_kv,
            tiles=tiles,
        )
    dispatcher = cls.__new__(cls)
    dispatcher._assemble(
        module.layout,
        module.d_model,
        module.n_heads,
        as_accumulator(module.residual_accumulator),
        module.program,
        module.backend,
        functions,
        schedule,
    )
    return dispatcher


def _function(name: str, module: Any, owner: TorchDispatcher) -> AttentionFunction:
    """The JAX form of a torch attention module."""
    kind = type(module)
    dropout = getattr(getattr(module, "dropout", None), "p", 0.0)
    if kind.__module__.startswith("canvas_engineering.attention.") and kind.__name__ in _FUNCTIONS:
        make, attributes = _FUNCTIONS[kind.__name__]
        options = {attribute: getattr(module, attribute) for attribute in attributes}
        if kind.__name__ == "RandomFixedAttention":
            options[_SEED] = module.seed
        if kind.__name__ == "PerceiverAttention":
            options["n_latents"] = module.latents.shape[1]
        return make(module.d_model, module.n_heads, dropout, **options)
    if name in ATTENTION_REGISTRY and not isinstance(ATTENTION_REGISTRY[name], type):
        return create_attention(name, owner.d_model, owner.n_heads, dropout)
    raise CanvasError(
        f"function {name!r} ({kind.__name__}) has no JAX form: give it one by "
        f"canvas_engineering.jax.register_attention({name!r}, init, apply)"
    )


def _checked(module: Any) -> Any:
    require("torch", "torch", "from_torch")
    from canvas_engineering.dispatch import AttentionDispatcher as TorchDispatcher

    if not isinstance(module, TorchDispatcher):
        raise CanvasError(
            f"module must be a canvas_engineering.AttentionDispatcher (torch), got {type(module).__name__}"
        )
    return module


def _entries(module: TorchDispatcher) -> list[tuple[str, Any]]:
    """(path, tensor) of everything that is a parameter here."""
    return [
        (path, tensor)
        for path, tensor in module.state_dict().items()
        if not path.startswith(_NOT_PARAMETERS) and path.rpartition(".")[2] != _SEED
    ]


def as_numpy(tensor: Any) -> np.ndarray[Any, Any]:
    """A tensor as a NumPy array; half precision, which NumPy may lack, in float32."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point() and tensor.element_size() < 4:
        tensor = tensor.float()
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array
