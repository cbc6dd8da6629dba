"""How much memory this process has needed."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_rss_bytes() -> int:
    """Most resident memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not `ru_maxrss` where there is a choice: a child inherits its parent's.
        found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if found:
            return int(found[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
