"""What was promised, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench import build_cost
from bench.cases import SHIPPED, Case, is_usual
from bench.peers.flex import FLEX
from bench.peers.old_release import OLD
from bench.peers.sdpa import MASKED, PER_GROUP
from bench.results import Results, variant
from canvas_engineering.cli.output import seconds as readable

#: A median ratio below 1 but above this counts as not slower where the upper quartile of the rounds reaches 1.
WITHIN_NOISE = 0.95


@dataclass(frozen=True)
class Target:
    """One promise.

    Attributes:
        what: In words.
        wanted: The bound, in words.
        measured: The value, in words; why there is none otherwise.
        met: None where nothing was measured.
    """

    what: str
    wanted: str
    measured: str
    met: bool | None


def targets(results: Results) -> list[Target]:
    """All promises that the run can check; those about time are about a CPU."""
    if results.kind != "cpu":
        return []
    return [*_old_release(results), *_never_slower(results), *_builds(results), *_figures(results)]


def _old_release(results: Results) -> Iterator[Target]:
    for canvas, phase, least in (
        ("robot", "forward", 3.0),
        ("robot", "step", 3.0),
        ("computer_use_2048_once", "forward", 5.0),
        ("computer_use_2048_once", "step", 5.0),
        ("computer_use_2048_dense", "forward", 5.0),
        ("computer_use_2048_dense", "step", 5.0),
        ("computer_use_16384_dense", "forward", 10.0),
        ("computer_use_16384_dense", "step", 10.0),
    ):
        row = results.case(Case(canvas, "dispatcher", "connection", phase, ()).id)  # type: ignore[arg-type]
        if row is None:
            continue
        old = variant(row, OLD)
        name = {"forward": "forward", "step": "training step"}[phase]
        what = f"AttentionDispatcher against {OLD}: {row['title']}, {name}"
        if old is None or old["ratio"] is None:
            reason = "not measured" if old is None else f"{old['status']}: {old['reason']}"
            yield Target(what, f"≥ {least:g} ×", reason, None)
        else:
            yield Target(what, f"≥ {least:g} ×", f"{old['ratio'][0]:.2f} ×", bool(old["ratio"][0] >= least))


def _never_slower(results: Results) -> Iterator[Target]:
    for scope, peers in (("joint", (MASKED, FLEX)), ("connection", (PER_GROUP,))):
        for peer in peers:
            for phase, name in (("forward", "forward"), ("step", "training step")):
                ratios = [
                    (one["ratio"][0], one["ratio"][2], row["title"])
                    for row in results.cases
                    if row["canvas"] in SHIPPED and row["level"] == "attention"
                    if row["scope"] == scope and row["phase"] == phase
                    if is_usual(row, results.kind)
                    for one in row["variants"]
                    if one["name"] == peer and one["ratio"] is not None
                ]
                if not ratios:
                    continue
                least, high, title = min(ratios)
                what = f"Never slower than {peer} on a shipped canvas: {scope} softmax, {name}"
                met = least >= 1 or (high >= 1 and least >= WITHIN_NOISE)
                yield Target(what, "≥ 1 ×", f"{least:.2f} × ({title})", bool(met))


def _builds(results: Results) -> Iterator[Target]:
    for tokens, most in ((16384, 0.1), (1048576, 10.0)):
        for builder in (build_cost.OURS_CONNECTION, build_cost.OURS_JOINT):
            rows = [row for row in results.builds if row["builder"] == builder and row["num_tokens"] == tokens]
            for row in rows:
                if row["seconds"] is None:
                    continue
                what = f"Plan of {tokens:,} positions ({builder.removeprefix('plan, ')})"
                yield Target(what, f"< {most:g} s", readable(row["seconds"][0]), bool(row["seconds"][0] < most))
                if tokens == 1048576 and row["peak_bytes"] is not None:
                    gib = row["peak_bytes"] / 2**30
                    yield Target(f"{what}, peak memory", "< 1 GiB", f"{gib:.2f} GiB", gib < 1)


def _figures(results: Results) -> Iterator[Target]:
    bounds: dict[str, tuple[str, float, str, Callable[[float], str]]] = {
        "import_seconds": ("import canvas_engineering", 0.3, "s", readable),
        "attention_mask_seconds": ("to_attention_mask, 16,384 positions", 5.0, "s", readable),
    }
    for figure in results.figures:
        if figure["id"] in bounds:
            what, most, unit, show = bounds[figure["id"]]
            value = figure["value"][0]
            yield Target(what, f"< {most:g} {unit}", show(value), bool(value < most))
    ratios = [
        (figure["value"][0], figure["id"]) for figure in results.figures if figure["id"].startswith("process_mask-")
    ]
    if ratios:
        least, name = min(ratios)
        what = "process_mask against JAX's own, 16,384 positions"
        measured = f"{least:.1f} × ({name.removeprefix('process_mask-')})"
        yield Target(what, "≥ 10 ×", measured, bool(least >= 10))
    for scope in ("connection", "joint"):
        found = [figure for figure in results.figures if figure["id"].startswith(f"computed_per_true-{scope}-")]
        if found:
            worst: dict[str, Any] = max(found, key=lambda figure: figure["value"][0])
            name = worst["id"].split("-", 2)[2]
            value = worst["value"][0]
            what = f"Computed pairs per true pair on the shipped canvases ({scope})"
            yield Target(what, "≤ 1.25", f"at most {value:.2f} ({name})", bool(value <= 1.25))
