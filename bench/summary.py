"""One line about one case, for people who watch."""

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
