"""Leases: who has a run open to write. `npo gc` is careful while one is live, and a second writer is told of it. A
lease is a hint and no lock: losing one costs nothing but that care."""

from __future__ import annotations

import logging
import os
import platform
import secrets
import threading
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from npo_core.artifacts import RunArtifacts
from npo_core.interfaces import NearFutureError
from schemas import layout
from schemas.records import Lease

logger = logging.getLogger("npo")

TTL_S = 300
"""A lease that was not renewed for so long has expired."""
RENEW_EVERY_S = 60.0
CLOSE_WITHIN_S = 5.0
"""How long the end of a process waits for the lease to be given back."""


def since(lease: Lease) -> datetime:
    """When the writer began."""
    return datetime.fromisoformat(lease.acquired_at)


def is_live(lease: Lease, now: datetime) -> bool:
    """Whether its writer renewed it lately."""
    return now < datetime.fromisoformat(lease.renewed_at) + timedelta(seconds=lease.ttl_seconds)


def live_leases(run: RunArtifacts, now: datetime | None = None) -> list[Lease]:
    """The live leases of a run, the oldest first.

    Raises:
        StoreError: one cannot be read.
    """
    now = now or datetime.now(UTC)
    names = [name for name in run.store.list(layout.LEASES) if name.endswith(".json")]
    found = (run.store.read(f"{layout.LEASES}/{name}", Lease) for name in names)
    return sorted((lease for lease in found if lease is not None and is_live(lease, now)), key=since)


def in_words(leases: Iterable[Lease]) -> str:
    """Who the writers are."""
    return ", ".join(f"process {lease.pid} on {lease.host} since {lease.acquired_at[:16]} UTC" for lease in leases)


class HeldLease:
    """A lease of this process, renewed by a thread until it is released. Nothing that happens to it stops a run.

    Args:
        run: the run that is written.
        renew_every_s: seconds between renewals.
    """

    def __init__(self, run: RunArtifacts, renew_every_s: float = RENEW_EVERY_S) -> None:
        now = datetime.now(UTC).isoformat()
        self.run = run
        self.lease = Lease(
            writer=secrets.token_hex(16),
            host=platform.node(),
            pid=os.getpid(),
            acquired_at=now,
            renewed_at=now,
            ttl_seconds=TTL_S,
        )
        self._every = renew_every_s
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease of {run.uri}", daemon=True)
        run.store.create(self._key, self.lease)
        self._thread.start()

    def renew(self) -> None:
        """Says that the writer lives. A lease that is gone, as after a long suspension, is made again, but not in a
        run that is gone.

        Raises:
            NearFutureError: the store cannot be written.
        """
        new = self.lease.model_copy(update={"renewed_at": datetime.now(UTC).isoformat()})
        store = self.run.store
        present = store.read(self._key, Lease)
        if present is None and store.read_bytes(layout.RUN) is None:
            return
        if store.swap(self._key, present, new):
            self.lease = new

    def release(self) -> None:
        """Removes the lease; if that fails, or takes long, it expires."""
        self._released.set()
        self._thread.join(CLOSE_WITHIN_S)

    def _keep(self) -> None:
        while not self._released.wait(self._every):
            try:
                self.renew()
            except Exception as error:  # whatever it is, the run's own writes will say it better
                logger.warning("the lease of %s was not renewed (%s); `npo gc` may not know of us", self.run.uri, error)
        try:
            self.run.store.remove(self._key)
        except Exception as error:  # at the end of a process, client libraries raise whatever they raise
            logger.debug("the lease of %s was not removed (%s); it expires", self.run.uri, error)

    @property
    def _key(self) -> str:
        return layout.lease(self.lease.writer)


def hold(run: RunArtifacts) -> HeldLease | None:
    """Takes a lease, and warns of other writers. None, with a warning, where that fails: the run's own writes will
    fail too, and say it better."""
    try:
        others = [lease for lease in live_leases(run) if not _was_killed_here(lease)]
        held = HeldLease(run)
    except NearFutureError as error:
        logger.warning("no lease of %s could be taken (%s); `npo gc` may not know of us", run.uri, error)
        return None
    if others:
        logger.warning(
            "%s is open elsewhere too (%s): whoever commits first wins, the other adopts its work",
            run.uri,
            in_words(others),
        )
    return held


def _was_killed_here(lease: Lease) -> bool:
    """Whether its writer was a process of this machine that is no more: the usual reason to run again. Only good for
    not alarming people; machines may share a name."""
    if lease.host != platform.node():
        return False
    try:
        os.kill(lease.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is somebody else's
        return False
    return False
