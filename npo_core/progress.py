"""Progress of long work: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger("npo")

SECONDS_BETWEEN_LINES = 10.0


class Bar(Protocol):
    """One piece of work under way."""

    def __call__(self, done: int, numbers: Mapping[str, float]) -> None:
        """Shows that `done` units are done, and the numbers worth watching."""


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Bar]:
    """A bar on stderr where that is a terminal, else a log line at most every ten seconds and one at the end."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(title, total=total, numbers="")
            yield lambda done, numbers: progress.update(task, completed=done, numbers=_text(numbers))
        return
    last = time.monotonic()

    def line(done: int, numbers: Mapping[str, float]) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            logger.info("%s %d/%d %s", title, done, total, _text(numbers))

    yield line


def _text(numbers: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.3g}" for name, value in numbers.items())
