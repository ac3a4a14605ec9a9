"""What it costs to turn a declaration into something a kernel can run, against ``create_block_mask`` and JAX Splash.

All build the same mask, the computer-use canvas at growing sizes, from the same token classes. FlexAttention and
Splash look at every block of the N x N mask, in blocks of 128; a plan follows the tiles it visits. What a peer
makes is compared with an independent count of the visited blocks, a plan with a count of the true pairs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.canvases import BUILD_LENGTHS, CANVASES, length_name
from bench.cases import Scale
from bench.machine import synchronize
from bench.memory import Counter
from bench.pairs import Classes, Pairs
from bench.peers import flex
from bench.timing import Spread
from bench.variant import FAILURES, Absent, told
from canvas_engineering.plan import BlockSparsePlan

OURS_JOINT = "plan, joint"
OURS_CONNECTION = "plan, connection"
OURS_MASK_INFO = "plan.to_mask_info"
BLOCK_MASK = "create_block_mask"
PROCESS_MASK = "process_mask"
BUILDERS = (OURS_JOINT, OURS_CONNECTION, OURS_MASK_INFO, BLOCK_MASK, PROCESS_MASK)
BLOCK = 128
#: Seconds that a builder may be expected to take.
PATIENCE: dict[Scale, float] = {"quick": 15.0, "full": 120.0}
#: A build that is expected to take longer than this is not repeated.
LONG = 2.0


@dataclass
class Built:
    """One builder at one size; ``seconds`` are median and quartiles."""

    builder: str
    canvas: str
    num_tokens: int
    status: str
    reason: str = ""
    seconds: list[float] | None = None
    peak_bytes: int | None = None
    result_bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def canvases(scale: Scale) -> list[str]:
    """From 2,048 to 1,048,576 positions."""
    lengths = BUILD_LENGTHS if scale == "full" else [size for size in BUILD_LENGTHS if size != (64, 64)]
    return [length_name(*size) for size in lengths]


def build(
    canvas: str,
    builder: str,
    earlier: Built | None,
    patience: float,
    pedantic: Callable[..., Any],
    seconds_of: Callable[[], list[float]],
    device: str = "cpu",
) -> Built:
    """Build a few times (once, if it takes long) under clock and memory counter, and check the first result.

    Args:
        canvas: Name in ``CANVASES``.
        builder: One of ``BUILDERS``.
        earlier: The same builder at a smaller size; what goes through all blocks takes quadratically longer.
        patience: Seconds it may be expected to take.
        pedantic, seconds_of: As in ``bench.measure.measure``.
        device: Where ``create_block_mask`` works; everyone else works on the host.
    """
    tokens = CANVASES[canvas].declare().layout.num_positions
    row = Built(builder, canvas, tokens, "measured")
    try:
        if builder == BLOCK_MASK:
            flex.check_block_mask(tokens, device)
        expected = 0.0 if earlier is None else _expected_seconds(earlier, tokens, patience)
        call, check = _builder(canvas, builder, device)
    except Absent as reason:
        row.status, row.reason = "absent", str(reason)
        return row
    counter = Counter(device if builder == BLOCK_MASK else "cpu")
    found: list[Any] = []
    peaks: list[int | None] = []

    def once() -> None:
        found[:] = [call()]

    def before() -> None:
        found.clear()
        counter.start()

    def after() -> None:
        peaks.append(counter.stop())
        if not row.reason:
            problem, row.result_bytes = check(found[0])
            row.reason = problem

    try:
        pedantic(once, setup=before, teardown=after, rounds=5 if expected < LONG else 1)
    except FAILURES as error:
        if builder.startswith("plan"):
            raise
        row.status, row.reason = "failed", told(error)
        return row
    if row.reason:
        row.status = "wrong"
    else:
        taken = seconds_of()
        # The first one imports what it needs.
        row.seconds = Spread.of(taken[1:] or taken).as_list() if taken else None
        row.peak_bytes = peaks[0]
    return row


def _expected_seconds(earlier: Built, tokens: int, patience: float) -> float:
    """How long it may take, going by a smaller size; for whoever looks at all blocks, raises if that is too long."""
    all_blocks = earlier.builder in (BLOCK_MASK, PROCESS_MASK)
    if earlier.seconds is None:
        if all_blocks:
            raise Absent(earlier.reason)
        return LONG
    expected = earlier.seconds[0] * (tokens / earlier.num_tokens) ** (2 if all_blocks else 1)
    if all_blocks and expected > patience:
        raise Absent(
            f"not tried from {tokens:,} positions on: {expected:,.0f} s expected, "
            f"{earlier.seconds[0]:.2g} s at {earlier.num_tokens:,}"
        )
    return expected


Check = Callable[[Any], tuple[str, int | None]]


def _builder(canvas: str, name: str, device: str) -> tuple[Callable[[], Any], Check]:
    """What builds, and what compares the result with an independent count (in words; "" when right) and weighs it."""
    given = CANVASES[canvas].declare()
    match name:
        case "plan, joint" | "plan, connection":
            softmax = "joint" if name == OURS_JOINT else "connection"

            def plan() -> BlockSparsePlan:
                return BlockSparsePlan.from_topology(given.topology, given.layout, softmax=softmax)  # type: ignore[arg-type]

            def check_plan(made: BlockSparsePlan) -> tuple[str, int | None]:
                stats, pairs = made.stats(), Pairs(given)
                wanted = _connection_pairs(pairs) if name == OURS_CONNECTION else _classes(pairs).true_pairs()
                return _differ("true pairs", stats.true_pairs, wanted), stats.metadata_bytes

            return plan, check_plan
        case "plan.to_mask_info":
            # In blocks of 128, so that it is the same table as process_mask makes.
            def mask_info() -> Any:
                made = BlockSparsePlan.from_topology(
                    given.topology, given.layout, softmax="joint", block_q=BLOCK, block_kv=BLOCK
                )
                return made, made.to_mask_info()

            def check_info(made: Any) -> tuple[str, int | None]:
                entries = int(np.count_nonzero(made[1].block_mask))
                return _differ("visited blocks", entries, made[0].num_entries), _bytes_of(made[1])

            return mask_info, check_info
        case "create_block_mask":
            pairs = Pairs(given)
            _classes(pairs)  # the peers' classes are given, like the plan's declaration

            def check_block_mask(made: Any) -> tuple[str, int | None]:
                visited = int(made.kv_num_blocks.sum()) + int(made.full_kv_num_blocks.sum())
                size = sum(getattr(made, part).nbytes for part in _BLOCK_MASK_PARTS if getattr(made, part) is not None)
                return _differ("visited blocks", visited, _classes(pairs).visited_blocks(BLOCK)), size

            def block_mask() -> Any:
                made = flex.block_mask(pairs, device)
                synchronize(device)
                return made

            return block_mask, check_block_mask
        case "process_mask":
            return _process_mask(Pairs(given))
    raise ValueError(f"no builder {name!r}")


_LISTS = ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")
_BLOCK_MASK_PARTS = (*_LISTS, *(f"full_{name}" for name in _LISTS))


def _process_mask(pairs: Pairs) -> tuple[Callable[[], Any], Check]:
    """JAX's own, on a mask that is made block by block: never N x N at once."""
    if importlib.util.find_spec("jax") is None:
        raise Absent("jax is not installed")
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask, splash_attention_mask_info

    classes = _classes(pairs)
    size = pairs.num_tokens

    class ClassMask(splash_attention_mask.Mask):
        """A slice of the mask is two gathers from the table of token classes."""

        @property
        def shape(self) -> tuple[int, int]:
            return size, size

        def __getitem__(self, index: Any) -> NDArray[np.bool_]:
            rows, cols = (np.atleast_1d(np.arange(size)[part]) for part in index)
            found: NDArray[np.bool_] = classes.table[np.ix_(classes.row_class[rows], classes.col_class[cols])]
            return found

    def call() -> Any:
        # A new mask each time: JAX keeps results by mask.
        heads = splash_attention_mask.MultiHeadMask([ClassMask()])
        return splash_attention_mask_info.process_mask(heads, (BLOCK, BLOCK))[0]

    def check(made: Any) -> tuple[str, int | None]:
        visited = int(np.count_nonzero(np.asarray(made.block_mask)))
        return _differ("visited blocks", visited, classes.visited_blocks(BLOCK)), _bytes_of(made)

    return call, check


def _classes(pairs: Pairs) -> Classes:
    if pairs.classes is None:
        raise ValueError("canvases for building must have no patterns")
    return pairs.classes


def _connection_pairs(pairs: Pairs) -> int:
    """Pairs counted once per softmax."""
    return sum(group.rows.size * group.cols.size for group in pairs.groups)


def _bytes_of(info: Any) -> int:
    return sum(int(np.asarray(part).nbytes) for part in info if part is not None)


def _differ(what: str, got: int, wanted: int) -> str:
    return "" if got == wanted else f"{what}: {got:,}, expected {wanted:,}"
