"""One way to start every kernel here: a grid over heads and list entries, lists prefetched into scalar memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from canvas_engineering.kernels.pallas.lowering import EntryList, ListShape

#: What the compiler grants a kernel by default on the smallest TPU; more is asked for where a kernel needs it.
DEFAULT_VMEM_BYTES = 16 * 2**20

Interpret = bool | pltpu.InterpretParams


class Step:
    """One grid step, in an index map or in a kernel: the head, the entry, and what the list says of it."""

    def __init__(self, head: Any, entry: Any, lists: EntryList, sub: Any = 0) -> None:
        self.head = head  # index of the outer grid dimension
        self.sub = sub  # index of the innermost one, for query heads that share a kv head
        self._entry = entry
        self._lists = lists

    @property
    def tile(self) -> Any:
        return self._read(self._lists.tile)

    @property
    def other(self) -> Any:
        return self._read(self._lists.other)

    @property
    def flags(self) -> Any:
        return self._read(self._lists.flags)

    @property
    def mask(self) -> Any:
        return self._read(self._lists.mask)

    def kv_head(self, group: int) -> Any:
        """The kv head that this query head reads, ``group`` query heads to one."""
        # Not `//`: rounding towards minus infinity costs instructions, and heads are not negative.
        return self.head if group == 1 else lax.div(self.head, jnp.int32(group))

    def softmax_set(self, q_tile: Any) -> Any:
        """The set of this entry; without a list of sets, every q tile has the set of its own number."""
        return q_tile if self._lists.softmax_set is None else self._read(self._lists.softmax_set)

    def _read(self, ref: Any) -> Any:
        # Scalar memory may hold 8- and 16-bit integers; scalar arithmetic is 32-bit.
        return ref[self._entry].astype(jnp.int32)


@dataclass(frozen=True)
class Operand:
    """An array in HBM, cut into blocks; ``index`` says which block a grid step sees."""

    name: str
    array: Array
    block: tuple[int | None, ...]
    index: Callable[[Step], tuple[Any, ...]]


@dataclass(frozen=True)
class Result:
    """An output, cut into blocks; each is written once, by consecutive steps."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    block: tuple[int | None, ...]
    index: Callable[[Step], tuple[Any, ...]]


@dataclass(frozen=True)
class Cost:
    """What one entry costs for one head: for XLA's scheduler."""

    flops: int
    transcendentals: int
    bytes_accessed: int


def launch(
    kernel: Callable[[Any, Step], None],
    *,
    name: str,
    heads: int,
    lists: EntryList,
    shape: ListShape,
    operands: Sequence[Operand],
    results: Sequence[Result],
    scratch: dict[str, tuple[tuple[int, ...], Any]],
    cost: Cost,
    vmem_bytes: int,
    interpret: Interpret,
    sub_heads: int = 1,
) -> list[Array]:
    """Run ``kernel(refs, step)`` at every entry of the list for every head, and return its results.

    A list of one chunk is one ``pallas_call``. Several chunks are a ``lax.scan`` over one compiled kernel, which
    passes the results from chunk to chunk in place.

    Args:
        heads: Size of the outer grid dimension, whose steps are independent.
        scratch: Shape and dtype of each buffer that the kernel keeps in vector memory between steps.
        vmem_bytes: Estimated need of vector memory.
        sub_heads: Size of the innermost grid dimension.
    """
    present = [field for field in EntryList._fields if getattr(lists, field) is not None]
    names = [o.name for o in operands]
    chained = shape.chunks > 1
    varying = frozenset[Any]().union(*(jax.typeof(x).mat.varying for x in _arrays(lists, operands)))

    def body(*refs: Any) -> None:
        by_name = dict(zip(present, refs, strict=False))
        rest = refs[len(present) :]
        inputs, rest = rest[: len(operands)], rest[len(operands) + (len(results) if chained else 0) :]
        outputs, buffers = rest[: len(results)], rest[len(results) :]
        space = SimpleNamespace(
            **dict(zip(names, inputs, strict=True)),
            **dict(zip([r.name for r in results], outputs, strict=True)),
            **dict(zip(scratch, buffers, strict=True)),
        )
        kernel(space, Step(pl.program_id(0), pl.program_id(1), _lists(by_name), pl.program_id(2)))

    def block_spec(block: tuple[int | None, ...], index: Callable[[Step], tuple[Any, ...]]) -> pl.BlockSpec:
        def index_map(head: Any, entry: Any, sub: Any, *refs: Any) -> tuple[Any, ...]:
            at = index(Step(head, entry, _lists(dict(zip(present, refs, strict=True))), sub))
            return tuple(jnp.int32(i) if isinstance(i, int) else i for i in at)

        return pl.BlockSpec(block, index_map)

    in_specs = [block_spec(o.block, o.index) for o in operands]
    aliases = {}
    if chained:
        first = len(present) + len(operands)
        in_specs += [pl.BlockSpec(memory_space=pl.ANY) for _ in results]
        aliases = {first + i: i for i in range(len(results))}
    steps = heads * shape.length * sub_heads
    call = pl.pallas_call(
        body,
        out_shape=[_shape_dtype(r, varying) for r in results],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(present),
            grid=(heads, shape.length, sub_heads),
            in_specs=in_specs,
            out_specs=[block_spec(r.block, r.index) for r in results],
            scratch_shapes=[pltpu.VMEM(size, dtype) for size, dtype in scratch.values()],
        ),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=max(DEFAULT_VMEM_BYTES, 2 * vmem_bytes),
        ),
        cost_estimate=pl.CostEstimate(
            flops=cost.flops * steps,
            transcendentals=cost.transcendentals * steps,
            bytes_accessed=cost.bytes_accessed * steps,
        ),
        interpret=interpret,
        name=name,
        metadata={"xprof_metadata": json.dumps({"grid": [heads, shape.length, sub_heads], "chunks": shape.chunks})},
    )

    def run(chunk: Sequence[Array], carried: Sequence[Array]) -> list[Array]:
        return list(call(*chunk, *(o.array for o in operands), *carried))

    columns = [jnp.asarray(getattr(lists, field)) for field in present]
    if not chained:
        return run([column[0] for column in columns], [])
    start = [_vary(jnp.zeros(r.shape, r.dtype), varying) for r in results]
    carried, _ = lax.scan(lambda carry, chunk: (run(chunk, carry), None), start, columns)
    return list(carried)


def _lists(by_name: dict[str, Any]) -> EntryList:
    return EntryList(**{field: by_name.get(field) for field in EntryList._fields})  # type: ignore[arg-type]


def _arrays(lists: EntryList, operands: Sequence[Operand]) -> list[Array]:
    return [*(jnp.asarray(column) for column in lists if column is not None), *(o.array for o in operands)]


def _shape_dtype(result: Result, varying: frozenset[Any]) -> jax.ShapeDtypeStruct:
    """Inside ``shard_map`` the type of an output must say over which mesh axes it varies: those of the inputs."""
    if not varying:
        return jax.ShapeDtypeStruct(result.shape, result.dtype)
    kind = jax.sharding.ManualAxisType(varying=varying)
    return jax.ShapeDtypeStruct(result.shape, result.dtype, manual_axis_type=kind)


def _vary(x: Array, varying: frozenset[Any]) -> Array:
    return lax.pcast(x, tuple(varying), to="varying") if varying else x
