"""A lease says who writes a run, is renewed, expires, and never stops a run."""

from __future__ import annotations

import logging
import platform
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from npo_core import leases
from npo_core.artifacts import RunArtifacts
from npo_core.leases import HeldLease, hold, is_live, live_leases
from npo_core.store import StoreError
from schemas import layout
from schemas.records import Lease
from tests.synthetic import build_run

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def run(tmp_path: Path) -> RunArtifacts:
    return build_run(tmp_path, steps=1, with_replay=False, segment_steps=1)


def lease(renewed: datetime = MOMENT, writer: str = "a" * 32) -> Lease:
    return Lease(
        writer=writer,
        host="elsewhere",
        pid=7,
        acquired_at=MOMENT.isoformat(),
        renewed_at=renewed.isoformat(),
        ttl_seconds=300,
    )


def until(holds: object, seconds: float = 20) -> None:
    """Waits for something that another thread brings about."""
    end = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_lease_is_live_until_it_was_not_renewed_for_its_time() -> None:
    assert is_live(lease(), MOMENT + timedelta(seconds=299))
    assert not is_live(lease(), MOMENT + timedelta(seconds=300))
    assert is_live(lease(renewed=MOMENT + timedelta(hours=1)), MOMENT + timedelta(hours=1, seconds=299))


def test_a_held_lease_is_seen_and_gone_when_it_is_released(run: RunArtifacts) -> None:
    held = hold(run)
    assert held is not None
    assert live_leases(run) == [held.lease]
    held.release()
    assert live_leases(run) == []
    held.release()


def test_a_thread_renews_a_lease(run: RunArtifacts) -> None:
    held = HeldLease(run, renew_every_s=0.02)
    first = held.lease
    until(lambda: [found.renewed_at for found in live_leases(run)] > [first.renewed_at])
    held.release()
    assert (held.lease.writer, held.lease.acquired_at) == (first.writer, first.acquired_at)
    assert run.store.read(layout.lease(first.writer), Lease) is None


def test_a_lease_that_was_swept_is_made_again_but_not_in_a_run_that_is_gone(run: RunArtifacts, tmp_path: Path) -> None:
    held = HeldLease(run)
    run.store.remove(layout.lease(held.lease.writer))
    held.renew()
    assert live_leases(run) == [held.lease]
    shutil.rmtree(tmp_path / "synthetic")
    held.renew()
    assert not (tmp_path / "synthetic").exists()
    held.release()


def test_a_second_writer_is_told_of_the_first(run: RunArtifacts, caplog: pytest.LogCaptureFixture) -> None:
    now = datetime.now(UTC)
    run.store.create(layout.lease("a" * 32), lease(renewed=now))
    run.store.create(layout.lease("b" * 32), lease(renewed=now - timedelta(hours=1), writer="b" * 32))
    held = hold(run)
    assert held is not None
    (said,) = [record.message for record in caplog.records]
    assert "process 7 on elsewhere since 2026-01-01T00:00 UTC" in said
    assert "whoever commits first wins" in said
    held.release()


def test_who_runs_again_after_a_kill_is_not_warned_of_the_dead(
    run: RunArtifacts, caplog: pytest.LogCaptureFixture
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ours = {"host": platform.node(), "pid": process.pid}
        run.store.create(layout.lease("a" * 32), lease(renewed=datetime.now(UTC)).model_copy(update=ours))
        for warned in (True, False):
            caplog.clear()
            held = hold(run)
            assert held is not None
            held.release()
            assert (f"process {process.pid}" in caplog.text) == warned
            process.kill()
            process.wait()


def test_a_store_that_takes_no_lease_does_not_stop_the_run(
    run: RunArtifacts, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(key: str, record: Lease) -> Lease:
        raise StoreError(f"{key}: no space left; free some space")

    with monkeypatch.context() as broken:
        broken.setattr(run.store, "create", full)
        assert hold(run) is None
    assert "no lease of" in caplog.text
    held = HeldLease(run, renew_every_s=0.02)
    monkeypatch.setattr(run.store, "swap", lambda *arguments: full("leases", *arguments[1:2]))
    with caplog.at_level(logging.WARNING):
        until(lambda: "was not renewed" in caplog.text)
    monkeypatch.setattr(run.store, "remove", lambda key: full(key, held.lease))
    held.release()
    assert leases.live_leases(run) == [held.lease]  # and it expires
