"""A run's legs, their segments, and the head that names the main line."""

from __future__ import annotations

import logging
import re

import pyarrow as pa
import pyarrow.compute as pc

from npo_core import parquet
from npo_core.faults import fault_point
from npo_core.interfaces import NearFutureError
from npo_core.run_files import Environment, RunFiles, origin
from schemas import layout
from schemas.digest import digest_json
from schemas.records import (
    MAIN_LINE_KINDS,
    CheckpointManifest,
    CheckpointRef,
    Head,
    LegRecord,
    SegmentManifest,
    SegmentRows,
)

logger = logging.getLogger("npo")

_SEGMENT = re.compile(r"(\d{6,})-(\d{6,})")


class Legs(RunFiles):
    """The legs of one run."""

    def legs(self) -> list[LegRecord]:
        """All legs, by creation."""
        found = self.store.read_all([layout.leg(name) for name in self.store.list(layout.LEGS)], LegRecord)
        return sorted((leg for leg in found if leg is not None), key=lambda leg: (leg.created_at, leg.leg_id))

    def leg(self, leg_id: str) -> LegRecord:
        """One leg.

        Raises:
            NearFutureError: there is none; names those that there are.
        """
        leg = self.store.read(layout.leg(leg_id), LegRecord)
        if leg is None:
            present = ", ".join(leg.leg_id for leg in self.legs()) or "none"
            raise NearFutureError(f"run {self.run_id} has no leg {leg_id!r}; its legs: {present}; choose one")
        return leg

    def open_leg(self, leg: LegRecord) -> LegRecord:
        """Creates the leg, or returns the one of that identity."""
        present = self.store.create(layout.leg(leg.leg_id), leg)
        fault_point("leg-record")
        return present

    def head(self) -> Head | None:
        """Where the main line is; None before its first leg."""
        return self.store.read(layout.HEAD, Head)

    def move_head(self, expected: Head | None, leg_id: str) -> Head:
        """Moves the head to a leg. Asked for twice it is done once.

        Raises:
            NearFutureError: the head is not the expected one, nor already where it should go.
        """
        new = Head(leg_id=leg_id, epoch=0 if expected is None else expected.epoch + 1)
        if not self.store.swap(layout.HEAD, expected, new) and (present := self.head()) != new:
            raise NearFutureError(
                f"the head of {self.run_id} was moved by another writer (it is {_text(present)}, not "
                f"{_text(expected)}); let one process train a run at a time, then run again"
            )
        fault_point("head-moved")
        return new

    def segments(self, leg_id: str) -> list[SegmentManifest]:
        """A leg's committed segments from its start, up to the first gap."""
        found = self.all_segments(leg_id)
        chain: list[SegmentManifest] = []
        step = self.leg(leg_id).start if found else 0
        for segment in found:
            if segment.start == step:
                chain.append(segment)
                step = segment.stop
        return chain

    def all_segments(self, leg_id: str) -> list[SegmentManifest]:
        """A leg's committed segments by (start, stop), also those after a gap."""
        bounds = [match for name in self.store.list(layout.segments(leg_id)) if (match := _SEGMENT.fullmatch(name))]
        folders = [layout.segment(leg_id, *map(int, match.groups())) for match in bounds]
        found = self.store.read_all([layout.manifest(folder) for folder in folders], SegmentManifest)
        return sorted((m for m in found if m is not None), key=lambda m: (m.start, m.stop))

    def put_rows(
        self, leg: LegRecord, start: int, stop: int, rollouts: pa.Table, metrics: pa.Table, telemetry: pa.Table
    ) -> SegmentRows:
        """Writes the rows of steps [start, stop) of a leg. They count when a segment is committed from them.

        Raises:
            ValueError: rows of another leg or step.
        """
        for table in (rollouts, metrics, telemetry):
            _require_rows_of(table, leg.leg_id, start, stop)
        folder = layout.segment(leg.leg_id, start, stop)
        own = rollouts["completion_ids"].filter(pc.equal(rollouts["source"], "policy"))
        rows = SegmentRows(
            start=start,
            stop=stop,
            files=tuple(
                self.put_table(folder, role, table)
                for role, table in (("rollouts", rollouts), ("metrics", metrics), ("telemetry", telemetry))
            ),
            logical_digest=segment_digest(rollouts, metrics),
            tokens_policy=pc.sum(pc.list_value_length(own)).as_py() or 0,
        )
        fault_point("segment-data")
        return rows

    def rows_behind(self, checkpoint: CheckpointManifest, start: int) -> SegmentRows | None:
        """The rows from `start` on that led to a checkpoint; None if it names none, or if they are no longer whole."""
        rows = checkpoint.segment
        if rows is None or rows.start != start:
            return None
        try:
            for entry in rows.files:
                self.store.check(entry)
        except NearFutureError as error:
            logger.warning("%s; the steps are trained again", error)
            return None
        return rows

    def commit_segment(
        self,
        leg: LegRecord,
        rows: SegmentRows,
        checkpoint: CheckpointManifest,
        epoch: int | None,
        environment: Environment,
    ) -> SegmentManifest:
        """Commits a segment, whose checkpoint is committed already, or adopts the one that another writer committed.

        Args:
            epoch: the head's epoch in which the segment began; None for a scout.

        Raises:
            NearFutureError: the head was moved since, or steps of the segment are committed under other bounds.
            ValueError: a main-line leg without an epoch.
        """
        if (epoch is None) == (leg.kind in MAIN_LINE_KINDS):
            raise ValueError(f"a {leg.kind} leg cannot commit under epoch {epoch}")
        folder = layout.segment(leg.leg_id, rows.start, rows.stop)
        for other in self.all_segments(leg.leg_id):
            if (other.start, other.stop) == (rows.start, rows.stop):
                return other
            if other.start < rows.stop and rows.start < other.stop:
                raise NearFutureError(
                    f"steps {other.start}-{other.stop} of leg {leg.leg_id} are committed already, {rows.start}-"
                    f"{rows.stop} overlap them; let one process train a run at a time, then run again"
                )
        if epoch is not None:
            self._require_head(leg.leg_id, epoch)
        manifest = SegmentManifest(
            files=rows.files,
            leg_id=leg.leg_id,
            start=rows.start,
            stop=rows.stop,
            checkpoint=checkpoint.ref,
            logical_digest=rows.logical_digest,
            tokens_policy=rows.tokens_policy,
            **origin(environment),
        )
        committed = self.store.commit(folder, manifest)
        fault_point("segment-manifest")
        return committed

    def require_tip(self, leg_id: str) -> Head:
        """The head, which must be at this leg.

        Raises:
            NearFutureError: the main line goes on elsewhere.
        """
        head = self.head()
        if head is None or head.leg_id != leg_id:
            raise NearFutureError(
                f"leg {leg_id} of {self.run_id} is no longer the tip of the main line ({_text(head)}); see `npo show`, "
                "and go on from there"
            )
        return head

    def require_reached(self, ref: CheckpointRef) -> None:
        """Raises unless the steps up to a checkpoint are committed: one may be saved and its segment not.

        Raises:
            NearFutureError: they are not.
        """
        leg = self.leg(ref.leg_id)
        if leg.kind != "warm" and ref.step not in {segment.stop for segment in self.segments(ref.leg_id)}:
            raise NearFutureError(
                f"leg {ref.leg_id} of {self.run_id} has a checkpoint at step {ref.step}, but the segment that ends "
                "there is not committed; run the leg's stage again first"
            )

    def _require_head(self, leg_id: str, epoch: int) -> None:
        head = self.head()
        if head is None or (head.leg_id, head.epoch) != (leg_id, epoch):
            raise NearFutureError(
                f"the head of {self.run_id} was moved by another writer (it is {_text(head)}, not leg {leg_id} epoch "
                f"{epoch}); this segment is not committed; let one process train a run at a time, then run again"
            )


def segment_digest(rollouts: pa.Table, metrics: pa.Table) -> str:
    """`SegmentManifest.logical_digest`."""
    parts = (("rollouts", rollouts), ("metrics", metrics))
    return digest_json({role: parquet.logical_digest(table, parquet.SCHEMAS[role]) for role, table in parts})


def _require_rows_of(table: pa.Table, leg_id: str, start: int, stop: int) -> None:
    legs, steps = set(table["leg_id"].unique().to_pylist()), table["step"].unique().to_pylist()
    if legs != {leg_id} or not all(start <= step < stop for step in steps):
        raise ValueError(f"rows of legs {sorted(legs)}, steps {sorted(steps)} are not of leg {leg_id}, {start}-{stop}")


def _text(head: Head | None) -> str:
    return "absent" if head is None else f"leg {head.leg_id} epoch {head.epoch}"
