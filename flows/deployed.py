"""What a flow run of a deployment does beside its work: its log reaches the server, and it ends when nobody could end
it any more.

A worker that was killed leaves its flow runs at work, and no other worker can cancel them; one that lost the server for
some 20 s does not hear of a cancel. A run that the server holds for ended, say after a long silence, would work on
beside the one that takes its place. All of them end here by SIGTERM, which Prefect's engine reports; what they
committed stays, and the next run goes on from there.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx
from prefect.exceptions import PrefectException

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

logger = logging.getLogger("npo")

LOOK_EVERY_S = 1.0
ASK_EVERY_S = 15.0
PATIENCE_S = 5.0
"""With a server that does not answer."""
UNANSWERED = (httpx.HTTPError, PrefectException, RuntimeError)
"""RuntimeError is Prefect's for an API that cannot be reached."""
GRACE_S = 30.0
"""Time to report an end, as Prefect's workers give it."""


def attend(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook of every flow that begins to run; for one that a worker started."""
    if flow_run.deployment_id is None:
        return
    # Prefect gives the logger PREFECT_LOGGING_EXTRA_LOGGERS its handler, but no level.
    logger.setLevel(logging.INFO)
    threading.Thread(target=_watch, args=(flow_run.id, os.getppid()), name="watch of the worker", daemon=True).start()


OPTIONS: dict[str, Any] = {"on_running": [attend]}
"""What every flow has in common."""


def _watch(flow_run: UUID, worker: int) -> None:
    """Ends this process once its parent, the worker, is gone, or the server says that it is over."""
    asked = time.monotonic()
    while os.getppid() == worker:
        if time.monotonic() > asked + ASK_EVERY_S:
            if _is_over(flow_run):
                time.sleep(GRACE_S)  # it may be we who reported it and are about to leave, or the worker may end us
                _conclude(flow_run)
                break
            asked = time.monotonic()
        time.sleep(LOOK_EVERY_S)
    _end(signal.SIGTERM)
    time.sleep(GRACE_S)
    _end(signal.SIGKILL)


def _end(number: signal.Signals) -> None:
    """Sends a signal to this process, and to its children if the group is its own, as one that a worker made."""
    (os.killpg if os.getpgrp() == os.getpid() else os.kill)(os.getpid(), number)


def _is_over(flow_run: UUID) -> bool:
    """Whether the server says so, or does not know it any more; one that does not answer says nothing."""
    from prefect.exceptions import ObjectNotFound

    try:
        with _client() as client:
            state = client.read_flow_run(flow_run).state
    except ObjectNotFound:
        return True
    except UNANSWERED:
        return False
    return state is not None and (state.is_final() or state.is_cancelling())


def _conclude(flow_run: UUID) -> None:
    """Says that a cancel is done, if no worker has."""
    from prefect.states import Cancelled

    with suppress(*UNANSWERED), _client() as client:
        state = client.read_flow_run(flow_run).state
        if state is not None and state.is_cancelling():
            client.set_flow_run_state(flow_run, Cancelled(message="ended by itself: no worker did"), force=True)


@contextmanager
def _client() -> Iterator[SyncPrefectClient]:
    """Without retries: while the server is away, the worker is still looked after."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    hasty = temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: PATIENCE_S})
    with hasty, get_client(sync_client=True) as client:
        yield client
