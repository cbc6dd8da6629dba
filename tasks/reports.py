"""Publishes a run's report."""

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
