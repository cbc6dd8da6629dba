"""One run's artifacts over a store: what is committed, read back and checked. Readers believe manifests only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from npo_core import lineage, parquet
from npo_core.checkpoints import Checkpoints
from npo_core.faults import fault_point
from npo_core.guide_files import GuideFiles
from npo_core.interfaces import ConfigurationError, NearFutureError, RecordT, Store
from npo_core.legs import Legs
from npo_core.picture_files import PictureFiles
from npo_core.run_files import Environment, origin
from npo_core.store import StoreError, open_store, safe_url
from npo_core.tombstones import removals
from schemas import layout
from schemas.decisions import DecisionRecord, Request
from schemas.digest import canonical_json
from schemas.records import (
    BenchmarkSpec,
    CheckpointManifest,
    CheckpointRef,
    EvalManifest,
    RunRecord,
    SegmentManifest,
    SignalManifest,
    SignalSpec,
)

if TYPE_CHECKING:  # it loads torch, which readers of a store do not need
    from npo_core.evaluate import Evaluation


PROMPTS_AT_ONCE = 4096
"""Prompts that are Python objects at one time."""


def runs(store: Store) -> list[str]:
    """Names of the runs in a store, sorted."""
    return [name for name in store.list("") if store.within(name).read_bytes(layout.RUN) is not None]


def open_run(uri: str) -> RunArtifacts:
    """The run at `STORE/RUN`.

    Raises:
        ConfigurationError: the URI names no run, or its protocol is not supported.
    """
    root, _, run_id = safe_url(uri).rstrip("/").rpartition("/")
    if not root or not run_id or root.endswith(":/"):
        raise ConfigurationError(f"{uri!r} names no run; give STORE/RUN, say ./runs/{run_id or 'my-run'}")
    return RunArtifacts(open_store(root), run_id)


def line_checkpoints(
    line: Sequence[lineage.Stretch],
    segments: Mapping[str, Sequence[SegmentManifest]],
    checkpoints: Iterable[CheckpointManifest],
) -> dict[int, CheckpointManifest]:
    """The checkpoints that lie on a main line, by step; removed ones too. The last one is its tip.

    Args:
        line: the main line.
        segments: segments of its legs, by leg.
        checkpoints: of these legs, and others.
    """
    found: dict[int, CheckpointManifest] = {}
    stretches = {stretch.leg.leg_id: stretch for stretch in line}
    for checkpoint in checkpoints:
        stretch = stretches.get(checkpoint.leg_id)
        if stretch is None or not stretch.saves(checkpoint.step):
            continue
        # A checkpoint of a kill between it and its segment is not the main line's yet; the warm leg has no segments.
        committed = {segment.stop for segment in segments.get(checkpoint.leg_id, ())}
        if checkpoint.step in committed or (stretch.leg.parent is None and checkpoint.step == stretch.start):
            found[checkpoint.step] = checkpoint
    return dict(sorted(found.items()))


def main_line_checkpoints(run: RunArtifacts) -> dict[int, CheckpointRef]:
    """The main line's checkpoints by step, without those that `npo gc` removed."""
    removed = removals(run.tombstones())
    return {step: manifest.ref for step, manifest in _saved(run).items() if manifest.ref not in removed}


def main_line_checkpoint(run: RunArtifacts, step: int | None = None) -> CheckpointRef:
    """The main line's checkpoint at a step, or its last one.

    Raises:
        NearFutureError: there is none, or it was removed; names the steps that there are.
    """
    found = main_line_checkpoints(run)
    if not found or (step is not None and step not in found):
        if step is not None and (removed := _saved(run).get(step)) is not None:
            run.require_present(removed)
        wanted = "checkpoint" if step is None else f"checkpoint at step {step}"
        present = ", ".join(map(str, sorted(found))) or "none"
        raise NearFutureError(f"the main line of {run.uri} has no {wanted}; its steps: {present}")
    return found[max(found) if step is None else step]


def _saved(run: RunArtifacts) -> dict[int, CheckpointManifest]:
    """The main line's checkpoints by step, removed ones too."""
    line = lineage.main_line(run.legs(), run.head())
    names = [stretch.leg.leg_id for stretch in line]
    segments = {name: run.segments(name) for name in names}
    return line_checkpoints(line, segments, [found for name in names for found in run.checkpoints(name)])


class RunArtifacts(Checkpoints, Legs, GuideFiles, PictureFiles):
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

    # ---- evaluations, signals, decisions

    def evaluation(self, eval_id: str) -> EvalManifest | None:
        """One evaluation (`lineage.eval_id`)."""
        return self.store.read(layout.manifest(layout.evaluation(eval_id)), EvalManifest)

    def evaluations(self) -> list[EvalManifest]:
        """All evaluations on the run's held-out prompts, by creation."""
        return [made for made in self.all_evaluations() if made.benchmark is None]

    def all_evaluations(self) -> list[EvalManifest]:
        """All evaluations, benchmarks' too, by creation."""
        return self.manifests(layout.EVALS, EvalManifest)

    def commit_evaluation(
        self,
        eval_id: str,
        checkpoint: CheckpointRef,
        samples_per_prompt: int,
        evaluation: Evaluation,
        environment: Environment,
        benchmark: tuple[BenchmarkSpec, pa.Table] | None = None,
    ) -> EvalManifest:
        """Commits the answers of a checkpoint and their scores.

        Args:
            benchmark: with its prompts by `schemas.tables.PROMPTS`; None: the run's held-out prompts were asked.
        """
        folder = layout.evaluation(eval_id)
        parts = {"samples": evaluation.samples, "greedy": evaluation.greedy}
        if benchmark is not None:
            parts["prompts"] = benchmark[1]
        manifest = EvalManifest(
            files=tuple(self.put_table(folder, role, table) for role, table in parts.items() if table is not None),
            eval_id=eval_id,
            checkpoint=checkpoint,
            samples_per_prompt=samples_per_prompt,
            accuracy=evaluation.accuracy,
            tasks=evaluation.tasks,
            entropy=evaluation.entropy,
            tokens=evaluation.tokens,
            failures=evaluation.failures,
            benchmark=None if benchmark is None else benchmark[0],
            **origin(environment),
        )
        fault_point("evaluation-data")
        return self.store.commit(folder, manifest)

    def signal(self, signal_id: str) -> SignalManifest | None:
        """One study of Q, V and S."""
        return self.store.read(layout.manifest(layout.signal(signal_id)), SignalManifest)

    def signals(self) -> list[SignalManifest]:
        """All studies of Q, V and S, by creation."""
        return self.manifests(layout.SIGNALS, SignalManifest)

    def commit_signal(self, spec: SignalSpec, table: pa.Table, tokens: int, environment: Environment) -> SignalManifest:
        """Commits a study, rows by `schemas.tables.SIGNAL`."""
        signal_id = lineage.signal_id(spec)
        folder = layout.signal(signal_id)
        files = (self.put_table(folder, "signal", table),)
        manifest = SignalManifest(files=files, signal_id=signal_id, spec=spec, tokens=tokens, **origin(environment))
        return self.store.commit(folder, manifest)

    def decision(self, leg_id: str, step: int) -> DecisionRecord | None:
        """AutoNPO's decision about a leg at a step."""
        return self.store.read(layout.decision(leg_id, step, None), DecisionRecord)

    def decisions(self) -> list[DecisionRecord]:
        """All decisions, by creation."""
        return sorted(self._records(layout.DECISIONS, DecisionRecord), key=lambda d: (d.created_at, d.step))

    def commit_decision(self, decision: DecisionRecord) -> DecisionRecord:
        """Commits a decision, or returns the one about the same leg and step."""
        committed = self.store.create(layout.decision(decision.leg_id, decision.step, decision.guide_id), decision)
        fault_point("decision-record")
        return committed

    def requests(self) -> list[Request]:
        """All requests for an intervention, by creation."""
        return sorted(self._records(layout.REQUESTS, Request), key=lambda r: (r.created_at, r.step))

    def file_request(self, request: Request) -> Request:
        """Files a request, or returns the one that the same asker filed about the same leg and step."""
        return self.store.create(layout.request(request.leg_id, request.step, request.by), request)

    def _read_prompts(self) -> pa.Table:
        data = self.store.read_bytes(layout.PROMPTS)
        if data is None:
            raise StoreError(f"{self.uri}/{layout.PROMPTS} is missing; restore it from a copy")
        return parquet.decode(data, parquet.SCHEMAS["prompts"], f"{self.uri}/{layout.PROMPTS}")

    def _records(self, folder: str, kind: type[RecordT]) -> list[RecordT]:
        names = [name for name in self.store.list(folder) if name.endswith(".json")]
        found = (self.store.read(f"{folder}/{name}", kind) for name in names)
        return [record for record in found if record is not None]


def prompts_digest(table: pa.Table) -> str:
    """`RunRecord.prompts_digest` of prompts by `schemas.tables.PROMPTS`."""
    digest, before = hashlib.sha256(), b"["
    # The canonical JSON of all rows, which at once would take many times the table's memory.
    for batch in table.to_batches(max_chunksize=PROMPTS_AT_ONCE):
        for row in batch.to_pylist():
            digest.update(before + canonical_json(row))
            before = b","
    digest.update(b"]" if before == b"," else b"[]")
    return digest.hexdigest()
