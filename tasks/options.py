"""What every task has in common: no Prefect cache (manifests are the truth), and retries of passing faults only."""

from __future__ import annotations

import errno
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from npo_core.interfaces import NearFutureError


async def is_passing_fault(task: Any, run: Any, state: State[Any]) -> bool:
    """Whether a retry may help: a device or a network may recover; a full disk, bad input and arithmetic do not."""
    error = await state.aresult(raise_on_failure=False)
    reason = error.__cause__ if isinstance(error, NearFutureError) else error
    return isinstance(reason, OSError) and reason.errno in PASSING


PASSING = {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET}


OPTIONS: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": 2,
    "retry_delay_seconds": [2, 10],
    "retry_condition_fn": is_passing_fault,
}
