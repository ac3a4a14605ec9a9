"""Results that other scripts of this folder write, as Markdown.

A result is rendered if it is ``{"title": ..., "tables": [{"title", "columns", "rows", "note"}]}``, or rows of plain
values under ``"rows"``. Anything else is named with its keys, so that no result file goes unseen.
"""

from __future__ import annotations

from typing import Any

from canvas_engineering.cli.output import table


def foreign_section(name: str, data: Any) -> str:
    """One file of ``bench/results/`` that is no result of the suite."""
    if not isinstance(data, dict):
        return f"## bench/results/{name}\n\nNot rendered: a {type(data).__name__}."
    parts = [f"## {data.get('title', name)}\n\n`bench/results/{name}`"]
    parts += [str(data[key]) for key in ("command", "note") if isinstance(data.get(key), str)]
    tables = data.get("tables")
    if isinstance(tables, list):
        parts += [_one_table(one) for one in tables]
    elif isinstance(data.get("rows"), list):
        parts.append(_rows(data["rows"]))
    else:
        parts.append(f"Not rendered; it holds {', '.join(sorted(map(str, data)))}.")
    return "\n\n".join(parts)


def _one_table(data: dict[str, Any]) -> str:
    cells = [[_cell(value) for value in row] for row in data["rows"]]
    title = f"### {data['title']}\n\n" if data.get("title") else ""
    note = f"\n\n{data['note']}" if data.get("note") else ""
    return title + table([str(column) for column in data["columns"]], cells, markdown=True) + note


def _rows(rows: list[dict[str, Any]]) -> str:
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    return table(columns, [[_cell(row.get(column, "")) for column in columns] for row in flat], markdown=True)


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key} ")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str("" if value is None else value).split()).replace("|", "\\|")
