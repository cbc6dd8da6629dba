"""How the command speaks: people on stdout, scripts by one JSON object as stdout's last line, logs on stderr."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]

console = Console()


def emit(json: bool, result: dict[str, Any], text: Any) -> None:
    """Prints `result` as JSON, or `text` (a string or a rich renderable) for people."""
    if json:
        print(json_module.dumps(result, ensure_ascii=False, default=str))
    else:
        console.print(Text(text) if isinstance(text, str) else text, soft_wrap=True)
