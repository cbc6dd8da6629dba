"""Publishes a run's report, and the picture of its curves."""

from __future__ import annotations

from prefect import task

from tasks.options import OPTIONS
from tasks.workspaces import workspace


@task(name="publish report", **OPTIONS)
def publish_report(run: str) -> str:
    """Writes the run's report into its store and returns its address."""
    from npo_core.report import write_report

    opened = workspace(run)
    return opened.run.put_report("report.html", write_report(opened.run, opened.token_text).encode())


@task(name="publish curves", **OPTIONS)
def publish_curves(run: str) -> str | None:
    """Writes the picture of the run's curves into its store and returns its address; None if no browser could read it
    there (`run.public_url`), or there is nothing to draw."""
    from npo_core.report.still import draw_curves

    opened = workspace(run)
    picture = None if opened.config.run.public_url is None else draw_curves(opened.run)
    return None if picture is None else opened.run.put_report("curves.png", picture)
