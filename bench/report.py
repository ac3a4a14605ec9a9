"""``docs/benchmarks.md`` from the results: tables and pictures, never edited by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import build_cost, machine
from bench.cases import DTYPE, HEAD_DIM, HEADS, is_usual
from bench.foreign import foreign_section
from bench.peers.ours import OURS
from bench.plots import draw
from bench.results import FOLDER, Results, is_results, measured, variant
from bench.roofline import floor_seconds
from bench.summary import value_of
from bench.targets import targets
from canvas_engineering._files import atomic_write, read_json
from canvas_engineering.cli.output import seconds as readable, table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"

_HEAD = """# Benchmarks

Generated from `bench/results/` by `canvas-engineering bench report`; edits by hand are lost.

    make bench-peers   # once: canvas-engineering 0.5.0, to compare with
    make bench         # minutes: measures, writes bench/results/, this page, and what became slower
    make bench-full    # everything: hours on a small machine

How to read the tables. Times are medians, with quartiles in brackets. All variants of a row ran in turn, once per
round; a ratio is another variant's time over ours in the same round (above 1: ours is faster), with the quartiles
over the rounds; a peer that takes many seconds is called once. In rounds of less than half a second each timed call
comes right after untimed ones of the same variant, as in a loop. On a GPU a time is that between two CUDA events
around several calls, over their number, after a warm-up. Before anything is timed its output, and its gradients where
they are timed, are compared with the float64 NumPy reference; a result that differs has no time and stands as *wrong*.
*Of floor* is our time over the least that the true FLOPs and bytes need at the ceilings measured on the same machine
in the same run (a matrix product and a copy); *of tiles* counts all pairs of the visited tiles instead. Building
plans and masks and compiling is not in these times; it has tables of its own.
"""

#: Rows of the table of gaps.
LARGEST = 10
_PHASES = {"forward": "forward", "backward": "backward", "step": "training step"}
_SECTIONS = (
    ("attention", "joint", "Attention, one softmax per row"),
    ("attention", "connection", "Attention, a softmax per connection"),
    ("dispatcher", "connection", "AttentionDispatcher, d_model 256, 4 heads"),
)


def write_report(page: Path = PAGE, images: Path = IMAGES, folder: Path = FOLDER) -> list[Path]:
    """Render every result of a folder.

    Returns:
        The files written, the page first.

    Raises:
        SchemaError: A result file cannot be understood. OSError: a file cannot be read or written.
    """
    sections, written = [], []
    for path in sorted(folder.glob("*.json")):
        data = read_json(path)
        if not is_results(data):
            sections.append(foreign_section(path.name, data))
            continue
        results = Results.from_json(data, str(path))
        slug = f"{machine.slug(results.machine)}-{results.scale}"
        pictures = draw(results, images, slug)
        written += pictures
        sections.append(render(results, path.name, [f"images/{picture.name}" for picture in pictures]))
    body = "\n\n".join(sections) if sections else "No results yet."
    page.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(page) as file:
        file.write(f"{_HEAD}\n{body}\n")
    return [page, *written]


def render(results: Results, name: str, pictures: list[str]) -> str:
    """One result as Markdown."""
    parts = [_machine(results, name)]
    promised = targets(results)
    if promised:
        met = {True: "yes", False: "**no**", None: "-"}
        rows = [(one.what, one.wanted, one.measured, met[one.met]) for one in promised]
        parts.append("### Promised figures\n\n" + _table(("", "promised", "measured", "met"), rows))
    parts += [*_gaps(results)]
    parts += [f"![{picture.rsplit('_', 1)[1].removesuffix('.png')}]({picture})" for picture in pictures]
    for level, scope, title in _SECTIONS:
        for phase, words in _PHASES.items():
            rows_here = [row for row in results.cases if _is(row, level, scope, phase)]
            if rows_here:
                parts.append(f"### {title}, {words}\n\n{_times(results, rows_here)}")
    parts += [*_loss(results), *_setup(results), *_memory(results), *_building(results), *_figures(results)]
    parts += _absent(results)
    parts.append(_provenance(results))
    return "\n\n".join(parts)


def _is(row: dict[str, Any], level: str, scope: str, phase: str) -> bool:
    return (row["level"], row["scope"], row["phase"]) == (level, scope, phase)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table(header, [[cell.replace("|", "\\|") for cell in row] for row in rows], markdown=True)


def _machine(results: Results, name: str) -> str:
    told = results.machine
    versions = ", ".join(f"{package} {version}" for package, version in told["versions"].items() if version)
    rates = "; ".join(
        f"{dtype}: {found['matmul'] / 1e9:,.0f} GFLOP/s, {found['copy'] / 1e9:,.0f} GB/s"
        for dtype, found in results.ceilings.items()
    )
    memory = "" if told["memory_gib"] is None else f", {told['memory_gib']:g} GiB"
    return (
        f"## {told['device']}, {results.scale} run\n\n"
        f"`bench/results/{name}`, {results.day}, revision {results.commit or 'unknown'}.\n"
        f"{told['processor']}, {told['cores']} cores, {told['threads']} threads{memory}, {told['system']}; "
        f"Python {told['python']}, {versions}.\n"
        f"Ceilings measured in the run (matrix product, copy): {rates or 'none'}."
        f"{_backends(results)}"
    )


def _backends(results: Results) -> str:
    """Which backend ran ours, most often first, with the reasons against others."""
    count = Counter(row["backend"] for row in results.cases)
    if not count:
        return ""
    told = "; ".join(name if len(count) == 1 else f"{name} ({times} cases)" for name, times in count.most_common())
    return f"\nBackend of {OURS} there: {told}."


def title_of(results: Results, row: dict[str, Any]) -> str:
    """The canvas, and what differs from the usual."""
    heads = "1 head" if row["heads"] == 1 else f"{row['heads']} heads"
    extra = [
        words
        for usual, words in (
            (row["dtype"] == DTYPE[results.kind], row["dtype"]),
            (row["head_dim"] == HEAD_DIM, f"head_dim {row['head_dim']}"),
            (row["heads"] == HEADS, heads),
            (row["batch"] == 1, f"batch {row['batch']}"),
        )
        if not usual
    ]
    return ", ".join([row["title"], *extra])


def _times(results: Results, rows: list[dict[str, Any]]) -> str:
    peers = list(dict.fromkeys(one["name"] for row in rows for one in row["variants"][1:]))
    # A column of its own for everyone who has a number here; the others are told under "Not measured".
    peers = [peer for peer in peers if any((variant(row, peer) or {}).get("seconds") for row in rows)]
    body = []
    for row in rows:
        mine = row["variants"][0]["seconds"]
        if mine is None:
            body.append((title_of(results, row), "*wrong*", "", "", *("" for _ in peers)))
            continue
        floor, tiles = limits(results, row)
        body.append(
            (
                title_of(results, row),
                _spread(mine),
                f"{mine[0] / floor:.2f} ×",
                f"{mine[0] / tiles:.2f} ×",
                *(_peer(variant(row, peer)) for peer in peers),
            )
        )
    return _table(("canvas", OURS, "of floor", "of tiles", *peers), body)


def limits(results: Results, row: dict[str, Any]) -> tuple[float, float]:
    """Least seconds for the true pairs, and for the pairs of the visited tiles."""
    ceilings = results.ceilings[row["dtype"]]
    return (
        floor_seconds(ceilings, row["true_flops"], row["moved_bytes"]),
        floor_seconds(ceilings, row["visited_flops"], row["moved_bytes"]),
    )


def _spread(seconds: list[float]) -> str:
    return f"{readable(seconds[0])} ({readable(seconds[1])} – {readable(seconds[2])})"


def _peer(one: dict[str, Any] | None) -> str:
    if one is None:
        return ""
    if one["seconds"] is None or one["ratio"] is None:
        return f"*{one['status']}*" if one["status"] in ("wrong", "failed") else "-"
    middle, low, high = one["ratio"]
    spread = "one call" if one["rounds"] == 1 else f"{low:.2f} – {high:.2f}"
    return f"{readable(one['seconds'][0])}, {middle:.2f} × ({spread})"


def _loss(results: Results) -> Iterator[str]:
    """What is lost to padding, to partial tiles, and to the kernel."""
    body = []
    for row in results.cases:
        mine = row["variants"][0]["seconds"]
        if row["level"] != "attention" or row["phase"] != "forward" or mine is None:
            continue
        if not is_usual(row, results.kind):
            continue
        floor, tiles = limits(results, row)
        body.append(
            (
                title_of(results, row),
                row["scope"],
                f"{row['plan']['block_q']} × {row['plan']['block_kv']}",
                f"{row['plan']['density']:.1%}",
                f"{row['plan']['computed_per_true']:.2f}",
                f"{row['padding_share']:.1%}",
                f"{row['partial_share']:.1%}",
                readable(floor),
                readable(tiles),
                readable(mine[0]),
            )
        )
    if body:
        header = ("canvas", "softmax", "tiles", "density", "computed / true", "padding", "masked in partial tiles")
        yield "### Where the time goes, forward\n\n" + _table((*header, "floor", "visited tiles", "measured"), body)


def _setup(results: Results) -> Iterator[str]:
    def told(one: dict[str, Any]) -> str:
        return ", ".join(f"{what} {readable(seconds)}" for what, seconds in one["setup"].items())

    rows = [row for row in results.cases if row["phase"] == "forward"]
    yield from _by_variant(results, rows, "### Before the first call", "once per canvas", told)


def _memory(results: Results) -> Iterator[str]:
    rows = [row for row in results.cases if row["phase"] != "backward"]
    note = "MiB: growth of the resident set on a CPU, what torch's allocator handed out on a GPU"
    yield from _by_variant(results, rows, "### Peak memory of a call, on top of its inputs", note, _mib)


def _by_variant(
    results: Results,
    rows: list[dict[str, Any]],
    heading: str,
    note: str,
    cell: Callable[[dict[str, Any]], str],
) -> Iterator[str]:
    """A table with a row per case and a column per variant, if there is anything to tell."""
    told = [
        (row, {one["name"]: cell(one) for one in measured(row) if cell(one)})
        for row in rows
        if is_usual(row, results.kind)
    ]
    told = [(row, cells) for row, cells in told if cells]
    names = list(dict.fromkeys([OURS, *(name for _, cells in told for name in cells)]))
    body = [(title_of(results, row), _kind_of(row), *(cells.get(name, "") for name in names)) for row, cells in told]
    if body:
        yield f"{heading}\n\n{note[0].upper()}{note[1:]}.\n\n" + _table(("canvas", "", *names), body)


def _kind_of(row: dict[str, Any]) -> str:
    return f"{row['level']}, {row['scope']}, {_PHASES[row['phase']]}"


def _gaps(results: Results) -> Iterator[str]:
    """Where someone else is faster, and where the time is furthest above that of the visited tiles."""
    slower = sorted(
        (one["ratio"][0], title_of(results, row), _kind_of(row), one)
        for row in results.cases
        for one in measured(row)
        if one["ratio"] is not None and one["ratio"][2] < 1
    )
    if slower:
        body = [(title, kind, one["name"], _peer(one)) for _, title, kind, one in slower]
        yield "### Where others are faster, beyond the noise\n\n" + _table(("canvas", "", "variant", "its time"), body)
    above = [
        (row["variants"][0]["seconds"][0] / limits(results, row)[1], row)
        for row in results.cases
        if row["variants"][0]["seconds"] is not None
    ]
    above.sort(key=lambda one: -one[0])
    if above:
        body = [
            (title_of(results, row), _kind_of(row), readable(row["variants"][0]["seconds"][0]), f"{factor:.2f} ×")
            for factor, row in above[:LARGEST]
        ]
        header = ("canvas", "", "measured", "of tiles")
        yield "### Furthest above the cost of the visited tiles\n\n" + _table(header, body)


def _mib(one: dict[str, Any]) -> str:
    return "" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 2**20:,.1f}"


def _building(results: Results) -> Iterator[str]:
    if not results.builds:
        return
    sizes = sorted({row["num_tokens"] for row in results.builds})
    body = []
    for tokens in sizes:
        cells = []
        for builder in build_cost.BUILDERS:
            row = next(
                (one for one in results.builds if one["builder"] == builder and one["num_tokens"] == tokens), None
            )
            if row is None or row["seconds"] is None:
                cells.append("*wrong*" if row is not None and row["status"] == "wrong" else "-")
            else:
                memory = "" if row["peak_bytes"] is None else f", {_mib(row)} MiB"
                cells.append(f"{readable(row['seconds'][0])}{memory}")
        body.append((f"{tokens:,}", *cells))
    yield (
        "### Building plans and masks\n\n"
        "Computer use, `causal_temporal`, at growing sizes: median time and peak memory. `create_block_mask` and\n"
        "JAX's `process_mask` make the joint mask in blocks of 128; `plan.to_mask_info` is a joint plan in the same\n"
        "blocks and its export to the tables that `process_mask` makes.\n\n"
        + _table(("positions", *build_cost.BUILDERS), body)
    )


def _figures(results: Results) -> Iterator[str]:
    body = [
        (one["id"], *(value_of(one, place) for place in range(3)))
        for one in results.figures
        if one["status"] == "measured"
    ]
    if body:
        yield "### Single figures\n\n" + _table(("", "median", "lower quartile", "upper quartile"), body)


def _absent(results: Results) -> Iterator[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in results.cases:
        for one in row["variants"]:
            if one["status"] != "measured":
                where = f"{row['level']} {row['scope']} {row['phase']} {row['canvas']}"
                reasons.setdefault((one["name"], f"{one['status']}: {one['reason']}"), []).append(where)
    for row in results.builds:
        if row["status"] != "measured":
            where = f"build {row['num_tokens']:,}"
            reasons.setdefault((row["builder"], f"{row['status']}: {row['reason']}"), []).append(where)
    for failure in results.failures:
        reasons.setdefault((OURS, f"failed: {failure['reason']}"), []).append(failure["id"])
    if reasons:
        body = [(name, reason, "; ".join(where)) for (name, reason), where in sorted(reasons.items())]
        yield "### Not measured, and why\n\n" + _table(("variant", "", "where"), body)


def _provenance(results: Results) -> str:
    told = {row["title"]: row["provenance"] for row in results.cases}
    return "### Canvases\n\n" + _table(("canvas", "provenance"), list(told.items()))
