"""Progress of long work: bars in a terminal, plain lines elsewhere.

Work nests: a leg shows its segments and evaluations below itself while they last.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

logger = logging.getLogger("npo")

SECONDS_BETWEEN_LINES = 10.0


class Bar(Protocol):
    """One piece of work under way."""

    def __call__(self, done: int, numbers: Mapping[str, float]) -> None:
        """Shows that `done` units are done, and the numbers worth watching."""


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Bar]:
    """A bar on stderr where that is a terminal; else a line at most every ten seconds, and one when the outermost work
    is done."""
    with _bars(title, total) if sys.stderr.isatty() else _lines(title, total) as bar:
        yield bar


_live: Progress | None = None


@contextmanager
def _bars(title: str, total: int) -> Iterator[Bar]:
    global _live
    outermost = _live is None
    progress = _live or Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[numbers]}"),
        console=Console(stderr=True),
    )
    task = progress.add_task(title, total=total, numbers="")
    try:
        if outermost:
            _live = progress
            progress.start()
        yield lambda done, numbers: progress.update(task, completed=done, numbers=in_words(numbers))
    finally:
        if outermost:
            progress.stop()
            _live = None
        else:
            progress.remove_task(task)


_depth = 0
_last_line = 0.0


@contextmanager
def _lines(title: str, total: int) -> Iterator[Bar]:
    global _depth
    _depth += 1
    outermost = _depth == 1

    def line(done: int, numbers: Mapping[str, float]) -> None:
        global _last_line
        now = time.monotonic()
        if (done == total and outermost) or now - _last_line >= SECONDS_BETWEEN_LINES:
            _last_line = now
            logger.info("%s %d/%d %s", title, done, total, in_words(numbers))

    try:
        yield line
    finally:
        _depth -= 1


def in_words(numbers: Mapping[str, float]) -> str:
    """Numbers with their names, on one line."""
    return " ".join(f"{name} {value:.3g}" for name, value in numbers.items())
