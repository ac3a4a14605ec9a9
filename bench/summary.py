"""One line about one case or figure, for people who watch."""

from __future__ import annotations

from typing import Any

from canvas_engineering.cli.output import seconds as readable


def case_line(row: dict[str, Any]) -> str:
    """``attention-joint-forward-...-robot: 1.2 ms; masked SDPA 2.1x; flex_attention absent``."""
    ours, *others = row["variants"]
    if ours["seconds"] is None:
        return f"{row['id']}: {ours['status']} {ours['reason']}".rstrip()
    parts = [f"{row['id']}: {readable(ours['seconds'][0])}"]
    parts += [
        f"{other['name']} " + (f"{other['ratio'][0]:.2f}x" if other["ratio"] else other["status"]) for other in others
    ]
    return "; ".join(parts)


def value_of(figure: dict[str, Any], place: int = 0) -> str:
    """Median (or a quartile) of a single figure with its unit: ``12 ms``, ``1.08 ×``."""
    value = figure["value"][place]
    return readable(value) if figure["unit"] == "s" else f"{value:.2f} ×"


def figure_line(figure: dict[str, Any]) -> str:
    """``import_seconds: 12 ms``, and why it is wrong if it is."""
    return f"{figure['id']}: {value_of(figure)} {figure['reason']}".rstrip()
