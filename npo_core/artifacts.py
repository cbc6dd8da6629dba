"""One run's artifacts over a store: what is committed, read back and checked. Readers believe manifests only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from npo_core import lineage, parquet
from npo_core.checkpoints import Checkpoints, Environment, origin
from npo_core.faults import fault_point
from npo_core.interfaces import ConfigurationError, ManifestT, NearFutureError, Store
from npo_core.store import StoreError, open_store
from schemas import layout
from schemas.digest import digest_json
from schemas.records import (
    MAIN_LINE_KINDS,
    CheckpointManifest,
    CheckpointRef,
    DecisionRecord,
    EvalManifest,
    FileEntry,
    GuideManifest,
    GuideSpec,
    Head,
    LegRecord,
    Manifest,
    RunRecord,
    SegmentManifest,
)

if TYPE_CHECKING:  # it loads torch, which readers of a store do not need
    from npo_core.evaluate import Evaluation

_SEGMENT = re.compile(r"(\d{6,})-(\d{6,})")


def runs(store: Store) -> list[str]:
    """Names of the runs in a store, sorted."""
    return [name for name in store.list("") if store.within(name).read_bytes(layout.RUN) is not None]


def open_run(uri: str) -> RunArtifacts:
    """The run at `STORE/RUN`.

    Raises:
        ConfigurationError: the URI names no run, or its protocol is not supported.
    """
    root, _, run_id = uri.rstrip("/").rpartition("/")
    if not root or not run_id:
        raise ConfigurationError(f"{uri!r} names no run; give STORE/RUN, say ./runs/{run_id or 'my-run'}")
    return RunArtifacts(open_store(root), run_id)


def main_line_checkpoint(run: RunArtifacts, step: int | None = None) -> CheckpointRef:
    """The main line's checkpoint at a step, or its last one.

    Raises:
        NearFutureError: there is none; names the steps that there are.
    """
    found: dict[int, CheckpointRef] = {}
    for stretch in lineage.main_line(run.legs(), run.head()):
        for checkpoint in run.checkpoints(stretch.leg.leg_id):
            if stretch.stop is None or checkpoint.step <= stretch.stop:
                found[checkpoint.step] = checkpoint.ref
    if not found or (step is not None and step not in found):
        wanted = "checkpoint" if step is None else f"checkpoint at step {step}"
        present = ", ".join(map(str, sorted(found))) or "none"
        raise NearFutureError(f"the main line of {run.uri} has no {wanted}; its steps: {present}")
    return found[max(found) if step is None else step]


class RunArtifacts(Checkpoints):
    """The artifacts of one run. Every commit is create-if-absent: what somebody committed first is returned instead.

    Args:
        store: holds the run under the folder `run_id`.
        run_id: the run's name.

    All methods raise `StoreError` where the store cannot be read or written.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        super().__init__(store, run_id)
        self._parent = store

    # ---- the run

    def find_record(self) -> RunRecord | None:
        """The run's record, or None if there is no such run."""
        return self.store.read(layout.RUN, RunRecord)

    def record(self) -> RunRecord:
        """The run's record.

        Raises:
            NearFutureError: there is no such run; names those that there are.
        """
        record = self.find_record()
        if record is None:
            present = ", ".join(runs(self._parent)) or "none"
            raise NearFutureError(f"there is no run {self.run_id!r} in {self._parent.root}; runs there: {present}")
        return record

    def create_run(self, record: RunRecord) -> RunRecord:
        """Creates the run, or returns the record of the one that has the name; its recipe may be another one."""
        return self.store.create(layout.RUN, record)

    def put_prompts(self, table: pa.Table) -> None:
        """Stores the run's prompts, rows by `schemas.tables.PROMPTS`, in the order that batches draw from.

        Raises:
            NearFutureError: other prompts are stored.
        """
        self.store.create_bytes(layout.PROMPTS, parquet.encode(table, parquet.SCHEMAS["prompts"]))
        if prompts_digest(self._read_prompts()) != prompts_digest(table):
            raise NearFutureError(f"{self.uri} holds other prompts; choose another run.name")

    def prompts(self) -> pa.Table:
        """The run's prompts, checked against its record."""
        table = self._read_prompts()
        if prompts_digest(table) != self.record().prompts_digest:
            raise StoreError(f"{self.uri}/{layout.PROMPTS} was altered; restore it from a copy")
        return table

    def is_frozen(self) -> bool:
        """Whether the prompts and the model files are stored: a run killed while it began has its record alone."""
        return self.model() is not None and self.store.read_bytes(layout.PROMPTS) is not None

    def put_report(self, name: str, data: bytes) -> str:
        """Stores a report under its content's hash and returns its URI."""
        return f"{self.uri}/{self.store.put_data(layout.REPORTS, name, 'report', data).key}"

    # ---- legs and the head

    def legs(self) -> list[LegRecord]:
        """All legs, by creation."""
        found = (self.store.read(layout.leg(name), LegRecord) for name in self.store.list(layout.LEGS))
        return sorted((leg for leg in found if leg is not None), key=lambda leg: (leg.created_at, leg.leg_id))

    def leg(self, leg_id: str) -> LegRecord:
        """One leg.

        Raises:
            NearFutureError: there is none; names those that there are.
        """
        leg = self.store.read(layout.leg(leg_id), LegRecord)
        if leg is None:
            present = ", ".join(leg.leg_id for leg in self.legs()) or "none"
            raise NearFutureError(f"run {self.run_id} has no leg {leg_id!r}; its legs: {present}")
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

    # ---- segments

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
        found = (self.store.read(layout.manifest(folder), SegmentManifest) for folder in folders)
        return sorted((m for m in found if m is not None), key=lambda m: (m.start, m.stop))

    def commit_segment(
        self,
        leg: LegRecord,
        start: int,
        stop: int,
        rollouts: pa.Table,
        metrics: pa.Table,
        telemetry: pa.Table,
        checkpoint: CheckpointManifest,
        epoch: int | None,
        environment: Environment,
    ) -> SegmentManifest:
        """Commits steps [start, stop) of a leg, whose checkpoint at `stop` is committed already.

        Args:
            epoch: the head's epoch in which the segment began; None for a scout.

        Raises:
            NearFutureError: the head was moved since, or steps of the segment are committed under other bounds.
            ValueError: rows of another leg or step; a main-line leg without an epoch.
        """
        if (epoch is None) == (leg.kind in MAIN_LINE_KINDS):
            raise ValueError(f"a {leg.kind} leg cannot commit under epoch {epoch}")
        for table in (rollouts, metrics, telemetry):
            _require_rows_of(table, leg.leg_id, start, stop)
        folder = layout.segment(leg.leg_id, start, stop)
        files = tuple(
            self._put_table(folder, role, table)
            for role, table in (("rollouts", rollouts), ("metrics", metrics), ("telemetry", telemetry))
        )
        own = pc.equal(rollouts["source"], "policy")
        manifest = SegmentManifest(
            files=files,
            leg_id=leg.leg_id,
            start=start,
            stop=stop,
            checkpoint=checkpoint.ref,
            logical_digest=segment_digest(rollouts, metrics),
            tokens_policy=pc.sum(pc.list_value_length(rollouts.filter(own)["completion_ids"])).as_py() or 0,
            **origin(environment),
        )
        fault_point("segment-data")
        if epoch is not None:
            self._require_head(leg.leg_id, epoch)
        for other in self.all_segments(leg.leg_id):
            if other.start < stop and start < other.stop and (other.start, other.stop) != (start, stop):
                raise NearFutureError(
                    f"steps {other.start}-{other.stop} of leg {leg.leg_id} are committed already, {start}-{stop} "
                    "overlap them; let one process train a run at a time, then run again"
                )
        committed = self.store.commit(folder, manifest)
        fault_point("segment-manifest")
        return committed

    # ---- guides, evaluations, decisions

    def guide(self, guide_id: str) -> GuideManifest | None:
        """One guide."""
        return self.store.read(layout.manifest(layout.guide(guide_id)), GuideManifest)

    def guides(self) -> list[GuideManifest]:
        """All guides, by creation."""
        return self._manifests(layout.GUIDES, GuideManifest)

    def commit_guide(
        self, spec: GuideSpec, trajectories: pa.Table, tokens_guide: int, environment: Environment
    ) -> GuideManifest:
        """Commits the trajectories of a guide, at most one a prompt."""
        guide_id = lineage.guide_id(spec)
        folder = layout.guide(guide_id)
        manifest = GuideManifest(
            files=(self._put_table(folder, "trajectories", trajectories),),
            guide_id=guide_id,
            spec=spec,
            solved=trajectories.num_rows,
            tokens_guide=tokens_guide,
            **origin(environment),
        )
        fault_point("guide-data")
        return self.store.commit(folder, manifest)

    def evaluation(self, eval_id: str) -> EvalManifest | None:
        """One evaluation (`lineage.eval_id`)."""
        return self.store.read(layout.manifest(layout.evaluation(eval_id)), EvalManifest)

    def evaluations(self) -> list[EvalManifest]:
        """All evaluations, by creation."""
        return self._manifests(layout.EVALS, EvalManifest)

    def commit_evaluation(
        self,
        eval_id: str,
        checkpoint: CheckpointRef,
        samples_per_prompt: int,
        evaluation: Evaluation,
        environment: Environment,
    ) -> EvalManifest:
        """Commits the held-out answers of a checkpoint and their scores."""
        folder = layout.evaluation(eval_id)
        manifest = EvalManifest(
            files=(self._put_table(folder, "samples", evaluation.samples),),
            eval_id=eval_id,
            checkpoint=checkpoint,
            samples_per_prompt=samples_per_prompt,
            accuracy=evaluation.accuracy,
            tasks=evaluation.tasks,
            entropy=evaluation.entropy,
            tokens=evaluation.tokens,
            **origin(environment),
        )
        fault_point("evaluation-data")
        return self.store.commit(folder, manifest)

    def decisions(self) -> list[DecisionRecord]:
        """All decisions, by creation."""
        found = (self.store.read(f"{layout.DECISIONS}/{name}", DecisionRecord) for name in self._decision_files())
        return sorted((d for d in found if d is not None), key=lambda d: (d.created_at, d.step))

    def commit_decision(self, decision: DecisionRecord) -> DecisionRecord:
        """Commits a decision, or returns the one about the same leg and step."""
        return self.store.create(layout.decision(decision.leg_id, decision.step), decision)

    # ---- tables

    def table(
        self, manifest: Manifest, role: str, columns: Sequence[str] | None = None, filters: Any = None
    ) -> pa.Table:
        """A table of an artifact, its file's hash checked; by default all columns and rows.

        Args:
            filters: rows to read, as `pyarrow.parquet.read_table` takes it.
        """
        entry = manifest.file(role)
        data = self.store.read_data(entry)
        return parquet.decode(data, parquet.SCHEMAS[role], f"{self.uri}/{entry.key}", columns, filters)

    def _put_table(self, folder: str, role: str, table: pa.Table) -> FileEntry:
        data = parquet.encode(table, parquet.SCHEMAS[role])
        return self.store.put_data(folder, f"{role}.parquet", role, data, rows=table.num_rows)

    def _read_prompts(self) -> pa.Table:
        data = self.store.read_bytes(layout.PROMPTS)
        if data is None:
            raise StoreError(f"{self.uri}/{layout.PROMPTS} is missing; restore it from a copy")
        return parquet.decode(data, parquet.SCHEMAS["prompts"], f"{self.uri}/{layout.PROMPTS}")

    def _manifests(self, folder: str, kind: type[ManifestT]) -> list[ManifestT]:
        found = (self.store.read(layout.manifest(f"{folder}/{name}"), kind) for name in self.store.list(folder))
        return sorted((m for m in found if m is not None), key=lambda m: m.created_at)

    def _decision_files(self) -> list[str]:
        return [name for name in self.store.list(layout.DECISIONS) if name.endswith(".json")]

    def _require_head(self, leg_id: str, epoch: int) -> None:
        head = self.head()
        if head is None or (head.leg_id, head.epoch) != (leg_id, epoch):
            raise NearFutureError(
                f"the head of {self.run_id} was moved by another writer (it is {_text(head)}, not leg {leg_id} epoch "
                f"{epoch}); this segment is not committed; let one process train a run at a time, then run again"
            )


def prompts_digest(table: pa.Table) -> str:
    """`RunRecord.prompts_digest` of prompts by `schemas.tables.PROMPTS`."""
    return digest_json(table.to_pylist())


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
