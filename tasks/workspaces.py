"""The runs that are open in this process, by URI: tasks take a URI, and share one engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect import task

from schemas.config import Config
from tasks.options import OPTIONS

if TYPE_CHECKING:
    from npo_core.workspace import Workspace

_OPEN: dict[str, Workspace] = {}


def workspace(run: str) -> Workspace:
    """The run at this URI, with the configuration that it began with unless `begin_run` opened it with a newer one."""
    if run not in _OPEN:
        from npo_core.artifacts import open_run
        from npo_core.workspace import Workspace

        _OPEN[run] = Workspace.of(open_run(run))
    return _OPEN[run]


@task(name="begin run", **OPTIONS)
def begin_run(config: Config) -> str:
    """Creates the run, or finds it and checks that it has the same recipe. Returns its URI."""
    from npo_core.begin import begin

    opened = begin(config)
    _OPEN[opened.run.uri] = opened
    return opened.run.uri
