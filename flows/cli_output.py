"""How the command speaks: people on stdout, scripts by one JSON object as stdout's last line, logs on stderr."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]

console = Console()


def emit(json: bool, result: dict[str, Any], text: Any) -> None:
    """Prints `result` as JSON, or `text` (a string or a rich renderable) for people."""
    if json:
        print(json_module.dumps(result, ensure_ascii=False, default=str))
    else:
        console.print(Text(text) if isinstance(text, str) else text, soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Iterable[Any]], title: str) -> Table:
    """A table for people."""
    made = Table(title=title, title_justify="left")
    for column in columns:
        made.add_column(column.replace("_", " "), overflow="fold", no_wrap=column == "run")
    for row in rows:
        made.add_row(*(Text(cell(value)) for value in row))
    return made


def cell(value: Any) -> str:
    """A value in a table: floats with three decimals, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else visible(str(value))


def visible(text: str) -> str:
    """Text with its control characters written out: what a model says must not steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
