"""Optional sinks of the metrics: TensorBoard and Weights & Biases. The Parquet files stay the source.

Export is at least once a committed segment. A marker file is written after the sink has closed its files; a run that
was killed between the two exports the segment again, and the points fall on those that are there.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import polars as pl

from npo_core.interfaces import ConfigurationError
from npo_core.views import averages
from schemas.config import RunSection
from schemas.records import MAIN_LINE_KINDS, LegRecord
from schemas.tables import METRIC_COLUMNS, MONITOR_COLUMNS

if TYPE_CHECKING:
    from npo_core.artifacts import RunArtifacts

Row = Mapping[str, Any]


logger = logging.getLogger("npo")


class Tracker(Protocol):
    """A sink of metrics."""

    name: str
    """What the configuration calls it."""

    def log_segment(self, run_id: str, leg: LegRecord, rows: Sequence[Row], trained: int) -> None:
        """Takes a committed segment: one row of `schemas.tables.METRICS` a step, with AutoNPO's averages, in the order
        of the steps. `trained` is how many steps of the run, all legs together, were committed before it."""

    def close(self) -> None:
        """Returns when everything that was taken is with the sink. More may be taken after it."""


class TensorBoardTracker:
    """One run directory a run, in it one folder a leg: TensorBoard draws legs that share steps as separate curves."""

    name = "tensorboard"

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._open: Callable[[str], Any] = SummaryWriter
        self._directory = directory
        self._writers: dict[Path, Any] = {}

    def log_segment(self, run_id: str, leg: LegRecord, rows: Sequence[Row], trained: int) -> None:
        folder = self._directory / run_id / f"{leg.kind}-{leg.leg_id}"
        writer = self._writers.get(folder)
        if writer is None:
            writer = self._writers[folder] = self._open(str(folder))
        for row in rows:
            for tag, value in _values(row).items():
                writer.add_scalar(tag, value, row["step"])

    def close(self) -> None:
        while self._writers:
            self._writers.popitem()[1].close()


class WandbTracker:
    """One wandb run a run, under the run's name. `WANDB_MODE=offline` needs no network; upload what it wrote with
    `wandb sync --append`.

    Curves of the main line carry the metrics' own names against `step`; a scout's are prefixed with `scout/`, since
    it trains the same steps. `leg` names the leg of each point.
    """

    name = "wandb"

    def __init__(self, directory: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        self._wandb = wandb
        self._directory = directory
        self._run: Any = None

    def log_segment(self, run_id: str, leg: LegRecord, rows: Sequence[Row], trained: int) -> None:
        if self._run is None or self._run.id != run_id:
            self.close()
            self._run = self._start(run_id)
        prefix = "" if leg.kind in MAIN_LINE_KINDS else f"{leg.kind}/"
        for at, row in enumerate(rows, trained):
            values = {f"{prefix}{tag}": value for tag, value in _values(row).items()}
            # wandb's own step only grows; the clock of trained steps does so too, across restarts.
            self._run.log({"step": row["step"], "leg": leg.leg_id, **values}, step=at)

    def _start(self, run_id: str) -> Any:
        self._directory.mkdir(parents=True, exist_ok=True)
        # wandb names an offline run's folder by the second: of two that begin in one second, the later one's rows go
        # lost.
        while any(self._directory.glob(f"wandb/*-{time.strftime('%Y%m%d_%H%M%S')}-*")):
            time.sleep(0.05)
        settings = self._wandb.Settings(silent=True, console="off", x_disable_stats=True)
        try:
            run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "near-future"),
                id=run_id,
                name=run_id,
                resume="allow",
                dir=str(self._directory),
                settings=settings,
            )
        except (self._wandb.errors.Error, OSError) as error:
            raise ConfigurationError(
                f"run.trackers: wandb could not start ({str(error).splitlines()[0]}); log in with `wandb login`, set "
                "WANDB_MODE=offline, or take wandb out of run.trackers"
            ) from error
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        return run

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


TRACKERS: dict[str, type[TensorBoardTracker] | type[WandbTracker]] = {
    TensorBoardTracker.name: TensorBoardTracker,
    WandbTracker.name: WandbTracker,
}


def open_trackers(names: Iterable[str], directory: str | Path) -> list[Tracker]:
    """The sinks of `run.trackers`, each writing below `directory/NAME`.

    Raises:
        ConfigurationError: a package is missing, or there is no such sink; names the remedy.
    """
    trackers: list[Tracker] = []
    for name in names:
        if name not in TRACKERS:
            raise ConfigurationError(
                f"run.trackers names {name!r}, which is no tracker; choose from {sorted(TRACKERS)}"
            )
        trackers.append(TRACKERS[name](Path(directory) / name))
    return trackers


def track(section: RunSection, run: RunArtifacts) -> int:
    """Hands every committed segment to the sinks of `run.trackers` that have not seen it. Safe to repeat; call it after
    a segment, and once more when a run ends.

    Returns:
        How many segments were handed over, counted once a sink.

    Raises:
        ConfigurationError: see `open_trackers`.
    """
    exported = 0
    for tracker in open_trackers(section.trackers, section.tracker_dir):
        try:
            exported += export(run, tracker, Path(section.tracker_dir) / tracker.name / "exported")
        except Exception as error:
            # Training does not stop for a sink: what it has not seen is handed over at the next call.
            logger.warning("tracker %s failed (%s); the metrics are in the run", tracker.name, error)
    return exported


def export(run: RunArtifacts, tracker: Tracker, markers: Path) -> int:
    """`track` for one sink. What it was given is marked by files `markers/RUN/LEG-START-STOP.json`."""
    legs = {leg.leg_id: leg for leg in run.legs()}
    segments = sorted((s for leg_id in legs for s in run.segments(leg_id)), key=lambda s: (s.created_at, s.start))
    pending, trained = [], 0
    for segment in segments:
        marker = markers / run.run_id / f"{segment.leg_id}-{segment.start:06d}-{segment.stop:06d}.json"
        if not marker.exists():
            table = pl.DataFrame(run.table(segment, "metrics"))
            known = averages(run, [segment])
            rows = table.join(known, on=["leg_id", "step"], how="left").sort("step").to_dicts()
            tracker.log_segment(run.run_id, legs[segment.leg_id], rows, trained)
            pending.append((marker, segment))
        trained += segment.stop - segment.start
    tracker.close()
    for marker, segment in pending:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps({"logical_digest": segment.logical_digest}))
    return len(pending)


def _values(row: Row) -> dict[str, float]:
    return {tag: row[tag] for tag in (*METRIC_COLUMNS, *MONITOR_COLUMNS) if row.get(tag) is not None}


def _missing(package: str) -> ConfigurationError:
    return ConfigurationError(
        f"run.trackers names {package}, but the package {package} is not installed; "
        "install it with: pip install 'near-future[trackers]'"
    )
