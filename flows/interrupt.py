"""Ctrl-C that cannot get lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN_S = 5.0
"""Time for whoever is interrupted to report its end."""


@contextmanager
def insistent_interrupt() -> Iterator[None]:
    """Within the block, a KeyboardInterrupt is raised again until it leaves the block. For the main thread.

    Prefect drops one that comes while it closes a finished task, and the run would go on.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
