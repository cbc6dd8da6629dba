"""The runs that are open in this process, by URI: tasks take a URI, and share one engine. While one is open, this
process holds a lease of it."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prefect import task

from schemas.config import Config
from tasks.options import OPTIONS

if TYPE_CHECKING:
    from npo_core.artifacts import RunArtifacts
    from npo_core.workspace import Workspace

_OPEN: dict[str, Workspace] = {}
_LEASED: set[str] = set()


def workspace(run: str) -> Workspace:
    """The run at this URI, with the configuration that it was last opened with."""
    if run not in _OPEN:
        from npo_core.artifacts import open_run
        from npo_core.workspace import Workspace

        _OPEN[run] = Workspace.of(open_run(run))
        _lease(_OPEN[run])
    return _OPEN[run]


@task(name="begin run", **OPTIONS)
def begin_run(config: Config) -> str:
    """Creates the run, or finds it and checks that it has the same recipe. Returns its URI."""
    from npo_core.begin import begin

    opened = begin(config)
    _OPEN[opened.run.uri] = opened
    _lease(opened)
    return opened.run.uri


@contextmanager
def standing_in(run: str, artifacts: RunArtifacts) -> Iterator[None]:
    """Within the block, whoever asks for the run at this URI gets these artifacts."""
    real = workspace(run)
    _OPEN[run] = real.over(artifacts)
    try:
        yield
    finally:
        _OPEN[run] = real
        real.trained()


def _lease(opened: Workspace) -> None:
    """Says, until this process ends, that it may write the run."""
    from npo_core.leases import hold

    if opened.run.uri not in _LEASED:
        _LEASED.add(opened.run.uri)
        held = hold(opened.run)
        if held is not None:
            atexit.register(held.release)
