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

from canvas_engineering.kernels.pallas.lowering import Field, ListFormat

#: What the compiler grants a kernel by default on the smallest TPU; more is asked for where a kernel needs it.
DEFAULT_VMEM_BYTES = 16 * 2**20

Interpret = bool | pltpu.InterpretParams


class Step:
    """One grid step, in an index map or in a kernel: the head, the entry, and what the list says of it."""

    def __init__(self, form: ListFormat, words: Sequence[Any], head: Any, entry: Any, sub: Any = 0) -> None:
        self.head = head  # index of the outer grid dimension
        self.sub = sub  # index of the innermost one, for query heads that share a kv head
        self._entry = entry
        self._form = form
        self._words = words

    @property
    def tile(self) -> Any:
        return self._read("tile")

    @property
    def other(self) -> Any:
        return self._read("other")

    @property
    def flags(self) -> Any:
        return self._read("flags")

    @property
    def mask(self) -> Any:
        return self._read("mask")

    def kv_head(self, group: int) -> Any:
        """The kv head that this query head reads, ``group`` query heads to one."""
        # Not `//`: rounding towards minus infinity costs instructions, and heads are not negative.
        return self.head if group == 1 else lax.div(self.head, jnp.int32(group))

    def softmax_set(self, q_tile: Any) -> Any:
        """The set of this entry; without a field for it, every q tile has the set of its own number."""
        return q_tile if self._form.field("softmax_set") is None else self._read("softmax_set")

    def _read(self, name: str) -> Any:
        field = self._form.field(name)
        return jnp.int32(0) if field is None else read_field(field, self._words[field.word][self._entry])


def read_field(field: Field, word: Any) -> Any:
    """A field out of its word (a scalar, or an array of words)."""
    if field.shift:
        word = lax.shift_right_logical(word, jnp.int32(field.shift))
    return word if field.shift + field.bits == 32 else word & jnp.int32((1 << field.bits) - 1)


def write_field(field: Field, word: Array, value: Array) -> Array:
    """The words with the field replaced."""
    ones = (1 << field.bits) - 1
    cleared = word & ~lax.shift_left(jnp.int32(ones if ones < 2**31 else -1), jnp.int32(field.shift))
    return cleared | lax.shift_left(value, jnp.int32(field.shift))


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
    form: ListFormat,
    words: Sequence[Array],
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
        words: The list in format ``form``: ``(chunks, length)`` int32 per word.
        scratch: Shape and dtype of each buffer that the kernel keeps in vector memory between steps.
        vmem_bytes: Estimated need of vector memory.
        sub_heads: Size of the innermost grid dimension.
    """
    chained = form.chunks > 1
    varying = varying_axes([*words, *(o.array for o in operands)])
    grid = (heads, form.length) if sub_heads == 1 else (heads, form.length, sub_heads)

    def body(*refs: Any) -> None:
        listed, rest = refs[: form.words], refs[form.words :]
        inputs, rest = rest[: len(operands)], rest[len(operands) + (len(results) if chained else 0) :]
        outputs, buffers = rest[: len(results)], rest[len(results) :]
        space = SimpleNamespace(
            **dict(zip([o.name for o in operands], inputs, strict=True)),
            **dict(zip([r.name for r in results], outputs, strict=True)),
            **dict(zip(scratch, buffers, strict=True)),
        )
        kernel(space, Step(form, listed, *(pl.program_id(axis) for axis in range(len(grid)))))

    def block_spec(block: tuple[int | None, ...], index: Callable[[Step], tuple[Any, ...]]) -> pl.BlockSpec:
        def index_map(*arguments: Any) -> tuple[Any, ...]:
            place, listed = arguments[: len(grid)], arguments[len(grid) :]
            return tuple(jnp.int32(i) if isinstance(i, int) else i for i in index(Step(form, listed, *place)))

        return pl.BlockSpec(block, index_map)

    in_specs = [block_spec(o.block, o.index) for o in operands]
    aliases = {}
    if chained:
        first = form.words + len(operands)
        in_specs += [pl.BlockSpec(memory_space=pl.ANY) for _ in results]
        aliases = {first + i: i for i in range(len(results))}
    steps = heads * form.length * sub_heads
    call = pl.pallas_call(
        body,
        out_shape=[_shape_dtype(r, varying) for r in results],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=form.words,
            grid=grid,
            in_specs=in_specs,
            out_specs=[block_spec(r.block, r.index) for r in results],
            scratch_shapes=[pltpu.VMEM(size, dtype) for size, dtype in scratch.values()],
        ),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=_semantics(len(grid), interpret),
            vmem_limit_bytes=max(DEFAULT_VMEM_BYTES, 2 * vmem_bytes),
            # Every index comes from a plan that was checked on the host. Checking it again before each copy
            # costs 15 bundles per operand and step: a tenth of a tile of 128 x 128.
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=cost.flops * steps,
            transcendentals=cost.transcendentals * steps,
            bytes_accessed=cost.bytes_accessed * steps,
        ),
        interpret=interpret,
        name=name,
        metadata={"xprof_metadata": json.dumps({"grid": grid, "chunks": form.chunks})},
    )

    def run(chunk: Sequence[Array], carried: Sequence[Array]) -> list[Array]:
        return list(call(*chunk, *(o.array for o in operands), *carried))

    if not chained:
        return run([word[0] for word in words], [])
    start = vary([jnp.zeros(r.shape, r.dtype) for r in results], varying)
    carried, _ = lax.scan(lambda carry, chunk: (run(chunk, carry), None), start, list(words))
    return list(carried)


def _semantics(dimensions: int, interpret: Interpret) -> tuple[Any, ...] | None:
    """Heads are independent: cores may share them.

    Interpret mode with one core gets none, because it does not take the grid that ``vmap`` makes with them.
    """
    if isinstance(interpret, pltpu.InterpretParams) and interpret.num_cores_or_threads == 1:
        return None
    return ("parallel", *["arbitrary"] * (dimensions - 1))


def _shape_dtype(result: Result, varying: frozenset[Any]) -> jax.ShapeDtypeStruct:
    """Inside ``shard_map`` the type of an output must say over which mesh axes it varies: those of the inputs."""
    if not varying:
        return jax.ShapeDtypeStruct(result.shape, result.dtype)
    kind = jax.sharding.ManualAxisType(varying=varying)
    return jax.ShapeDtypeStruct(result.shape, result.dtype, manual_axis_type=kind)


def varying_axes(tree: Any) -> frozenset[Any]:
    """The mesh axes over which any of the arrays varies, inside ``shard_map``."""
    return frozenset[Any]().union(*(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(tree)))


def vary(tree: Any, axes: frozenset[Any]) -> Any:
    """The arrays, marked as varying over ``axes``; the gradient of one that did not is then a sum over them."""

    def mark(leaf: Array) -> Array:
        missing = axes - varying_axes(leaf)
        return lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(mark, tree)
