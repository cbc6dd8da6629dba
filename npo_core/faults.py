"""Named moments at which a test kills the process, to show that nothing half done is ever visible."""

from __future__ import annotations

import os
import signal
from collections import Counter

from npo_core.interfaces import ConfigurationError

VARIABLE = "NPO_FAULT"

FAULT_POINTS = (
    "segment-step",  # mid-segment: an optimizer step is done, nothing of it is written
    "checkpoint-data",  # a checkpoint's files are written, its manifest is not
    "checkpoint-manifest",  # a checkpoint is committed, its segment is not
    "segment-data",  # a segment's files are written, its manifest is not
    "segment-manifest",  # a segment is committed, nothing after it
    "guide-sampling",  # mid-guide: some prompts are answered
    "guide-data",  # a guide's file is written, its manifest is not
    "probe-sampled",  # AutoNPO's probe is answered, nothing is decided
    "decision-record",  # a decision is committed, nothing has acted on it
    "leg-record",  # a leg is opened, the head is not moved to it
    "head-moved",  # the head is moved, nothing after it
    "evaluation-data",  # an evaluation's file is written, its manifest is not
)

_hits: Counter[str] = Counter()


def fault_point(name: str) -> None:
    """Kills its own process (SIGKILL) if the environment's NPO_FAULT is `name`, or `name:n` at the n-th hit from 1.

    Raises:
        ConfigurationError: NPO_FAULT names no fault point.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    target, _, count = wanted.partition(":")
    if target not in FAULT_POINTS or not (count or "1").isdigit():
        raise ConfigurationError(f"{VARIABLE} {wanted!r} is no fault point; use NAME or NAME:N of {FAULT_POINTS}")
    _hits[name] += 1
    if name == target and _hits[name] == int(count or "1"):
        os.kill(os.getpid(), signal.SIGKILL)
