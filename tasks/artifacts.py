"""What people see of a run in Prefect's UI: summary, metric tables, progress. Each kind has one key a run, under which
the UI keeps the history."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast
from uuid import UUID

import httpx
from prefect import task
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from npo_core.progress import Bar, in_words, progress_bar
from schemas.records import LegRecord
from tasks.options import OPTIONS
from tasks.workspaces import workspace

logger = logging.getLogger("npo")

SEGMENTS = 20
"""Segments in a metric table, the last ones."""
SECONDS_BETWEEN_UPDATES = 10.0
"""Of a progress artifact, which takes some 50 ms. Work that is done earlier has none."""
PATIENCE_S = 5.0
"""With a server that does not answer."""
SECONDS_AFTER_A_FAILURE = 60.0


def key(*parts: object) -> str:
    """An artifact's key: Prefect takes lower-case letters, digits and dashes."""
    return "".join(c if c.isalnum() else "-" for c in "-".join(map(str, parts)).lower())


@task(name="publish summary", **OPTIONS)
def publish_summary(run: str, curves: str | None) -> None:
    """What the run has come to, with the addresses of its newest report and of the picture of its curves if there are
    any."""
    from npo_core import views
    from npo_core.markdown import summary

    opened = workspace(run)
    run_id = opened.run.run_id
    words = summary(
        views.show(opened.run),
        views.main_evaluations(opened.run),
        opened.run.decisions(),
        views.newest_report(opened.run),
        curves,
        opened.config.run.public_url,
    )
    create_markdown_artifact(words, key=key("summary", run_id), description=f"Run {run_id}")


@task(name="publish metrics", **OPTIONS)
def publish_metrics(run: str, leg: LegRecord) -> None:
    """A table of the leg's last segments."""
    from npo_core.views import recent_segments

    opened = workspace(run)
    rows = recent_segments(opened.run, leg.leg_id, SEGMENTS).to_dicts()
    create_table_artifact(
        [{name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()} for row in rows],
        key=key("metrics", opened.run.run_id),
        description=f"Run {opened.run.run_id}: the last segments of leg {leg.leg_id} ({leg.kind})",
    )


class StageProgress:
    """The progress artifact of one stage, made when the stage has lasted long enough for somebody to look. That the API
    cannot be reached is no reason for the work to wait, or to stop."""

    def __init__(self, run: str, title: str, total: int) -> None:
        self._run_id, self._title, self._total = run.rpartition("/")[2], title, total
        self._artifact: UUID | None = None
        self._told, self._latest = time.monotonic(), ""
        self._done = 0

    def __call__(self, done: int, numbers: Mapping[str, float]) -> None:
        """See `Bar`."""
        self._done, self._latest = done, in_words(numbers)
        if time.monotonic() - self._told >= SECONDS_BETWEEN_UPDATES:
            self._publish()

    def end(self) -> None:
        """Says that the stage is over, if it was ever shown."""
        if self._artifact is not None:
            self._publish(", ended")

    def _publish(self, suffix: str = "") -> None:
        share = 100.0 * self._done / self._total
        words = "; ".join(
            filter(None, (f"{self._run_id}: {self._title}, {self._done} of {self._total}{suffix}", self._latest))
        )
        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: PATIENCE_S}):
                if self._artifact is None:
                    made = create_progress_artifact(share, key("progress", self._run_id), words)
                    self._artifact = cast(UUID, made)  # typed for async code too
                else:
                    update_progress_artifact(self._artifact, share, words)
        except (httpx.HTTPError, PrefectException) as error:
            logger.debug("progress could not be shown: %s", error)
            self._artifact = None  # somebody may have deleted it
            self._told = time.monotonic() + SECONDS_AFTER_A_FAILURE
            return
        self._told = time.monotonic()


_stage: ContextVar[StageProgress | None] = ContextVar("stage", default=None)


@contextmanager
def stage_progress(run: str, title: str, total: int) -> Iterator[Bar]:
    """`progress_bar`, and a progress artifact unless this is a part of work that has one."""
    with progress_bar(title, total) as bar:
        if _stage.get() is not None:
            yield bar
            return
        stage = StageProgress(run, title, total)

        def both(done: int, numbers: Mapping[str, float]) -> None:
            bar(done, numbers)
            stage(done, numbers)

        token = _stage.set(stage)
        try:
            yield both
            stage.end()
        finally:
            _stage.reset(token)


def advance(done: int, numbers: Mapping[str, float]) -> None:
    """Says how far the stage has come, from within a part of it."""
    stage = _stage.get()
    if stage is not None:
        stage(done, numbers)
