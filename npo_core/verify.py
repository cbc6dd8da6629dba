"""Checks a run from its files up: manifests, bytes, rows, lineage, and that every guide answer is still correct."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from npo_core import lineage
from npo_core.artifacts import RunArtifacts, line_checkpoints, prompts_digest
from npo_core.checkpoints import files_digest, policy_files
from npo_core.findings import Fault, Findings, redo
from npo_core.guide import ROWS_AT_ONCE
from npo_core.interfaces import NearFutureError, Prompt, Verifier
from npo_core.legs import segment_digest
from npo_core.picture_files import picture_refs
from npo_core.prompts import PromptTable
from npo_core.verify_removals import check_removals
from schemas import layout
from schemas.decisions import DecisionRecord, Request
from schemas.records import (
    CheckpointManifest,
    CheckpointRef,
    EvalManifest,
    GuideManifest,
    Head,
    LegRecord,
    SegmentManifest,
    ShardManifest,
    SignalManifest,
)
from schemas.tables import TRAJECTORY_KEY


def verify_run(
    run: RunArtifacts,
    verifier: Verifier,
    decode: Callable[[list[int]], str],
    on_artifact: Callable[[str], None] = lambda folder: None,
) -> list[Fault]:
    """Checks everything that a run's manifests name.

    Args:
        run: the run.
        verifier: judges the guides' answers again.
        decode: completion token ids to the text that the verifier judges.
        on_artifact: called with the folder of each artifact before it is checked.

    Raises:
        NearFutureError: there is no such run.
    """
    verification = _Verification(run, verifier, decode, on_artifact)
    verification.check()
    return verification.findings.faults


class _Verification:
    def __init__(
        self,
        run: RunArtifacts,
        verifier: Verifier,
        decode: Callable[[list[int]], str],
        on_artifact: Callable[[str], None],
    ) -> None:
        self.run, self.verifier, self.decode, self.on_artifact = run, verifier, decode, on_artifact
        self.record = run.record()
        self.findings = Findings(run)
        self.expect = self.findings.expect
        self.prompts: PromptTable | None = None
        self.pictures: frozenset[str] = frozenset()
        """Those that the prompts show."""
        self.legs: dict[str, LegRecord] = {}
        self.checkpoints: dict[tuple[str, int], CheckpointManifest] = {}
        self.answers: dict[str, dict[str, list[list[int]]]] = {}
        """By guide and prompt."""
        self.segments: dict[str, list[SegmentManifest]] = {}
        self.tip: CheckpointRef | None = None

    def check(self) -> None:
        """What others refer to comes first."""
        names = self.findings.names
        self._check_run()
        removals = self.findings.tombstones()
        for name in names(layout.LEGS):
            self._read_leg(name)
            for step in names(layout.checkpoints(name)):
                self._check_checkpoint(name, f"{layout.checkpoints(name)}/{step}")
        for name in names(layout.GUIDES):
            self._check_guide(name)
            for shard in names(layout.shards(name)):
                self._check_shard(name, shard)
        for leg in self.legs.values():
            self._check_leg(leg)
            folders = [f"{layout.segments(leg.leg_id)}/{bounds}" for bounds in names(layout.segments(leg.leg_id))]
            found = [segment for folder in folders if (segment := self._check_segment(leg, folder)) is not None]
            self.segments[leg.leg_id] = sorted(found, key=lambda segment: (segment.start, segment.stop))
            self._check_steps(leg)
        self._check_line()
        check_removals(self.findings, removals, self.checkpoints.values(), self.tip)
        for name in names(layout.EVALS):
            self._check_evaluation(name)
        for name in names(layout.SIGNALS):
            self._check_signal(name)
        about: tuple[tuple[str, type[DecisionRecord | Request]], ...] = (
            (layout.DECISIONS, DecisionRecord),
            (layout.REQUESTS, Request),
        )
        for folder, kind in about:
            for name in names(folder):
                key = f"{folder}/{name}"
                record = self.findings.read(key, kind)
                if record is not None:
                    self.expect(record.leg_id in self.legs, key, f"is about leg {record.leg_id}, which is missing")

    def _check_run(self) -> None:
        problem = f"the run's verifier is {self.record.verifier}, this installation has {self.verifier.name}"
        same = self.verifier.name == self.record.verifier
        self.expect(same, layout.RUN, problem, "verify with the version that began the run")
        with self.findings.about(layout.PROMPTS):
            # Batches are not asked for here, so their size does not matter.
            table = self.run.prompts()
            self.prompts = PromptTable(table, seed=0, prompts_per_step=1)
            self.pictures = frozenset(picture_refs(table))
        self._check_pictures(self.pictures)
        with self.findings.about(layout.manifest(layout.MODEL)):
            model = self.run.model()
            if model is None:
                raise NearFutureError("is missing")
            self.findings.files(model)

    def _check_pictures(self, refs: Collection[str]) -> None:
        for ref in sorted(refs):
            with self.findings.about(layout.picture(ref)):
                self.run.picture(ref)

    # ---- lineage

    def _read_leg(self, name: str) -> None:
        key = layout.leg(name)
        before = len(self.findings.faults)
        leg = self.findings.read(key, LegRecord)
        if leg is None:
            self.expect(len(self.findings.faults) > before, key, "is missing")
            return
        self.legs[name] = leg
        wanted = lineage.leg_id(leg.recipe_digest, leg.parent, leg.kind, leg.start, leg.guide_id)
        self.expect(leg.leg_id == name == wanted, key, f"was altered: it is the record of a leg {wanted}")
        self.expect(leg.recipe_digest == self.record.recipe_digest, key, "was trained under another recipe")

    def _check_leg(self, leg: LegRecord) -> None:
        key = layout.leg(leg.leg_id)
        if leg.parent is not None:
            self._expect_checkpoint(key, "its parent", leg.parent)
            problem = f"starts at step {leg.start}, its parent is of step {leg.parent.step}"
            self.expect(leg.start == leg.parent.step, key, problem)
        if leg.guide_id is not None:
            self.expect(leg.guide_id in self.answers, key, f"its guide {leg.guide_id} is missing or damaged")

    def _check_steps(self, leg: LegRecord) -> None:
        """A leg's committed steps go from its start without gap or overlap."""
        step = leg.start
        for segment in self.segments[leg.leg_id]:
            key = layout.manifest(layout.segment(leg.leg_id, segment.start, segment.stop))
            twice = f"steps {segment.start}-{min(step, segment.stop)} are committed twice"
            self.expect(segment.start >= step, key, twice)
            lost = layout.manifest(layout.segment(leg.leg_id, step, segment.start))
            redone = "restore them from a copy, or run again"
            self.expect(segment.start <= step, lost, f"steps {step}-{segment.start} are missing", redone)
            step = max(step, segment.stop)

    def _check_line(self) -> None:
        """The main line goes from a root to the head, and each leg of it reaches the start of the next one."""
        before = len(self.findings.faults)
        head = self.findings.read(layout.HEAD, Head)
        if head is None:
            started = any(leg.kind != "scout" and self.segments[leg.leg_id] for leg in self.legs.values())
            self.expect(not started or len(self.findings.faults) > before, layout.HEAD, "is missing")
            return
        with self.findings.about(layout.HEAD):
            line = lineage.main_line(self.legs.values(), head)
            saved = line_checkpoints(line, self.segments, self.checkpoints.values())
            self.tip = saved[max(saved)].ref if saved else None
            for stretch in line:
                stops = {stretch.start, *(segment.stop for segment in self.segments[stretch.leg.leg_id])}
                key = layout.segments(stretch.leg.leg_id)
                problem = f"no segment ends at step {stretch.stop}, where the main line leaves the leg"
                self.expect(stretch.stop is None or stretch.stop in stops, key, problem)

    # ---- artifacts

    def _check_checkpoint(self, leg_id: str, folder: str) -> None:
        self.on_artifact(folder)
        manifest = self.findings.manifest(folder, CheckpointManifest)
        if manifest is None:
            return
        key = layout.manifest(folder)
        own = manifest.leg_id == leg_id and layout.checkpoint(leg_id, manifest.step) == folder
        self.expect(own, key, f"was altered: it is of leg {manifest.leg_id}, step {manifest.step}")
        self.checkpoints[leg_id, manifest.step] = manifest
        weights = files_digest(policy_files(manifest.files))
        same = files_digest(manifest.files) == manifest.digest and weights == manifest.weights_digest
        self.expect(same, key, "was altered: its digests are not those of its files")
        self.findings.files(manifest)

    def _check_guide(self, name: str) -> None:
        folder = layout.guide(name)
        self.on_artifact(folder)
        manifest = self.findings.manifest(folder, GuideManifest)
        if manifest is None:
            return
        key, spec = layout.manifest(folder), manifest.spec
        asked = self._asked(manifest, folder)
        if asked is not None:
            wanted = lineage.guide_id(spec.model_copy(update={"prompt_ids": asked}))
            self.expect(manifest.guide_id == name == wanted, key, f"was altered: it is of a guide {wanted}")
        self._expect_checkpoint(key, "its policy", spec.checkpoint)
        self.expect(spec.verifier == self.record.verifier, key, f"was made under the verifier {spec.verifier}")
        self.expect(spec.tokenizer_digest == self.record.tokenizer_digest, key, "was made under another tokenizer")
        table = self.findings.table(manifest, folder, "trajectories")
        if table is None:
            return
        key, rows = manifest.file("trajectories").key, table.to_pylist()
        answers = self.answers[name] = {}
        for row in rows:
            answers.setdefault(row["prompt_id"], []).append(row["completion_ids"])
        most = max(map(len, answers.values()), default=0)
        self.expect(most <= spec.answers, key, f"has {most} answers to a prompt, not {spec.answers}", redo(folder))
        problem = f"answers {len(answers)} prompts, not {manifest.solved}"
        self.expect(len(answers) == manifest.solved, key, problem, redo(folder))
        window = None if asked is None else frozenset(asked)
        with self.findings.about(key):  # a damaged tokenizer cannot decode
            for first in range(0, len(rows), ROWS_AT_ONCE):
                self._check_answers(key, folder, window, rows[first : first + ROWS_AT_ONCE])

    def _check_shard(self, guide_id: str, name: str) -> None:
        folder = layout.shard(guide_id, name)
        self.on_artifact(folder)
        manifest = self.findings.manifest(folder, ShardManifest)
        if manifest is None:
            return
        own = (manifest.guide_id, manifest.shard_id) == (guide_id, name)
        self.expect(own, layout.manifest(folder), f"was altered: it is of guide {manifest.guide_id}", redo(folder))
        self.findings.table(manifest, folder, "trajectories")

    def _asked(self, manifest: GuideManifest, folder: str) -> tuple[str, ...] | None:
        """The prompts of a guide's window; None if the file that holds them is damaged."""
        if manifest.window is None:
            return manifest.spec.prompt_ids
        table = self.findings.table(manifest, folder, "window")
        return None if table is None else tuple(table["prompt_id"].to_pylist())

    def _check_answers(
        self, key: str, folder: str, window: Collection[str] | None, rows: Sequence[dict[str, Any]]
    ) -> None:
        prompts = [self._prompt(row["prompt_id"]) for row in rows]
        known = [(i, prompt) for i, prompt in enumerate(prompts) if prompt is not None]
        judged = self.verifier.judge([(prompt, self.decode(rows[i]["completion_ids"])) for i, prompt in known])
        verdicts = {i: verdict for (i, _), verdict in zip(known, judged, strict=True)}
        for i, row in enumerate(rows):
            prompt_id = row["prompt_id"]
            inside = window is None or prompt_id in window
            self.expect(inside, key, f"prompt {prompt_id} is none of its window", redo(folder))
            if (verdict := verdicts.get(i)) is not None:
                problem = f"the answer to prompt {prompt_id} is not verified-correct ({verdict.reason})"
                self.expect(verdict.correct, key, problem, redo(folder))
            whole = row["finish_reason"] == "stop"
            self.expect(whole, key, f"the answer to prompt {prompt_id} is truncated", redo(folder))

    def _check_segment(self, leg: LegRecord, folder: str) -> SegmentManifest | None:
        self.on_artifact(folder)
        manifest = self.findings.manifest(folder, SegmentManifest)
        if manifest is None:
            return None
        key = layout.manifest(folder)
        own = manifest.leg_id == leg.leg_id and layout.segment(leg.leg_id, manifest.start, manifest.stop) == folder
        self.expect(own, key, "was altered: it is of another leg or of other steps", redo(folder))
        self._expect_checkpoint(key, "its checkpoint", manifest.checkpoint)
        after = self.checkpoints.get((leg.leg_id, manifest.stop))
        led = after.segment if after is not None else None
        ours = led is not None and (led.start, led.stop) == (manifest.start, manifest.stop)
        same = led is None or not ours or files_digest(led.files) == files_digest(manifest.files)
        self.expect(same, key, "its rows are not those that led to its checkpoint", redo(folder))
        rollouts, metrics, _ = (
            self.findings.table(manifest, folder, role) for role in ("rollouts", "metrics", "telemetry")
        )
        if rollouts is not None and metrics is not None:
            same = segment_digest(rollouts, metrics) == manifest.logical_digest
            self.expect(same, key, "its rows are not those that were committed", redo(folder))
            whole = sorted(metrics["step"].to_pylist()) == list(range(manifest.start, manifest.stop))
            problem = "its steps are not those of the segment, once each"
            self.expect(whole, manifest.file("metrics").key, problem, redo(folder))
            self._check_rollouts(leg, manifest, rollouts, folder)
        return manifest

    def _check_rollouts(self, leg: LegRecord, manifest: SegmentManifest, table: pa.Table, folder: str) -> None:
        key, remedy = manifest.file("rollouts").key, redo(folder)
        unique = table.group_by(list(TRAJECTORY_KEY)).aggregate([]).num_rows
        self.expect(unique == table.num_rows, key, f"{table.num_rows - unique} rows are there twice", remedy)
        steps = set(table["step"].unique().to_pylist())
        self.expect(steps == set(range(manifest.start, manifest.stop)), key, "has not the segment's steps", remedy)
        for column, wanted in (("leg_id", leg.leg_id), ("verifier", self.record.verifier), ("run_id", self.run.run_id)):
            values = set(table[column].unique().to_pylist())
            self.expect(values == {wanted}, key, f"{column} is {', '.join(sorted(values))}, not {wanted}", remedy)
        strangers = sorted(set(picture_refs(table)) - self.pictures)
        self.expect(not strangers, key, f"refers to {len(strangers)} pictures that no prompt shows", remedy)
        answers = self.answers.get(leg.guide_id or "", {})
        mixed = table.filter(pc.not_equal(table["source"], "policy"))
        columns = ["step", "prompt_id", "completion_ids"]
        for step, prompt_id, ids in zip(*(mixed[name].to_pylist() for name in columns), strict=True):
            problem = f"step {step}: the guide row of prompt {prompt_id} is not the guide's answer"
            self.expect(ids in answers.get(prompt_id, ()), key, problem, remedy)

    def _check_evaluation(self, name: str) -> None:
        folder = layout.evaluation(name)
        self.on_artifact(folder)
        manifest = self.findings.manifest(folder, EvalManifest)
        if manifest is None:
            return
        key = layout.manifest(folder)
        terms = manifest.greedy, manifest.benchmark
        wanted = lineage.eval_id(manifest.checkpoint, manifest.samples_per_prompt, self.record, *terms)
        self.expect(manifest.eval_id == name == wanted, key, f"was altered: it is evaluation {wanted}", redo(folder))
        self._expect_checkpoint(key, "its checkpoint", manifest.checkpoint)
        table = self.findings.table(manifest, folder, "samples")
        if table is not None and table.num_rows:
            correct = sum(table["correct"].to_pylist())
            same = sum(score.correct for score in manifest.tasks.values()) == correct
            same = same and abs(manifest.accuracy - correct / table.num_rows) < 1e-12
            self.expect(same, key, "its scores are not those of its samples", redo(folder))
        if manifest.greedy:
            self.findings.table(manifest, folder, "greedy")
        if manifest.benchmark is not None:
            prompts = self.findings.table(manifest, folder, "prompts")
            same = prompts is None or prompts_digest(prompts) == manifest.benchmark.prompts_digest
            self.expect(same, key, "its prompts are not those that its identity names", redo(folder))
            self._check_pictures(() if prompts is None else set(picture_refs(prompts)) - self.pictures)

    def _check_signal(self, name: str) -> None:
        folder = layout.signal(name)
        self.on_artifact(folder)
        manifest = self.findings.manifest(folder, SignalManifest)
        if manifest is None:
            return
        key, wanted = layout.manifest(folder), lineage.signal_id(manifest.spec)
        self.expect(manifest.signal_id == name == wanted, key, f"was altered: it is study {wanted}", redo(folder))
        for ref in dict.fromkeys(ref for point in manifest.spec.points for ref in point):
            self._expect_checkpoint(key, "a policy of it", ref)
        table = self.findings.table(manifest, folder, "signal")
        if table is not None:
            points = [(now.step, ahead.step - now.step) for now, ahead in manifest.spec.points]
            rows = list(zip(table["step"].to_pylist(), table["lookahead"].to_pylist(), strict=True))
            problem = "has not one row for each of its points"
            self.expect(sorted(rows) == sorted(points), manifest.file("signal").key, problem, redo(folder))

    def _prompt(self, prompt_id: str) -> Prompt | None:
        """A prompt of the run; None where the prompts are damaged, or one of that name is none of them."""
        try:
            return self.prompts.get(prompt_id) if self.prompts else None
        except KeyError:
            return None

    def _expect_checkpoint(self, key: str, what: str, ref: CheckpointRef) -> None:
        found = self.checkpoints.get((ref.leg_id, ref.step))
        name = f"{what} (leg {ref.leg_id}, step {ref.step})"
        self.expect(found is not None, key, f"{name} is missing")
        self.expect(found is None or found.digest == ref.digest, key, f"{name} is another checkpoint now")
