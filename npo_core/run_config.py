"""The configuration that a run was last opened with. What opens a run by its URI takes from it what the recipe leaves
out: how many steps, what is evaluated, who acts on a warning."""

from __future__ import annotations

from pydantic import ValidationError

from npo_core.artifacts import RunArtifacts
from npo_core.interfaces import NearFutureError
from schemas import layout
from schemas.config import Config
from schemas.records import ConfigRecord, RunRecord


def configure(run: RunArtifacts) -> Config:
    """The configuration that `begin` was last given for this run; its word on single writers is passed to the store.

    Raises:
        NearFutureError: there is no such run, or it holds no configuration of this version.
    """
    newest = run.store.read(layout.CONFIG, ConfigRecord)
    try:
        config = Config.model_validate(run.record().config if newest is None else newest.config)
    except ValidationError as error:
        fault = error.errors()[0]
        raise NearFutureError(
            f"{run.uri}/{layout.RUN if newest is None else layout.CONFIG} holds no configuration that this version "
            f"reads ({'.'.join(map(str, fault['loc']))}: {fault['msg']}); restore it from a copy, or use the version "
            "that wrote it"
        ) from error
    if config.run.single_writer:
        run.store.declare_single_writer()
    return config


def keep_config(run: RunArtifacts, record: RunRecord, config: Config) -> None:
    """Stores the configuration if it is another one than the run was opened with before. Of two who open it at one
    moment with different ones, one is kept."""
    newest = run.store.read(layout.CONFIG, ConfigRecord)
    wanted = ConfigRecord(config=config.model_dump(mode="json"))
    if wanted.config != (record.config if newest is None else newest.config):
        run.store.swap(layout.CONFIG, newest, wanted)
