"""Writes large made-up runs by the calls that training makes. Called again it goes on where it ended."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from npo_core import lineage
from npo_core.artifacts import RunArtifacts
from npo_core.monitor import MONITOR_FILE, observe
from npo_core.prompts import PromptTable, to_arrow
from npo_core.store import open_store
from npo_core.workspace import new_leg, now
from schemas import tables
from schemas.config import Config
from schemas.decisions import MonitorState
from schemas.records import (
    CheckpointManifest,
    CheckpointRef,
    GuideManifest,
    GuideSpec,
    LegKind,
    LegRecord,
    RunRecord,
    SegmentRows,
)
from tests.bench.scale_data import (
    GROUP,
    LONGEST,
    VERIFIER,
    Pool,
    Rollouts,
    Vocabulary,
    make_guide_rows,
    make_pool,
    make_rollouts,
)
from tests.made_up import ENVIRONMENT, made_up_record, write_checkpoint

HELD_OUT = 8
PASSES = 10
"""Steps that go once through a run's pool."""
GUIDE_BATCH = 40
"""Prompts a step of a run that is made for its guide: a replay looks up so many for each step, however large it is."""


@dataclass(frozen=True)
class Shape:
    """How large a run is."""

    name: str
    pool: int
    prompts_per_step: int
    steps: int
    segment_steps: int
    tokens: int
    seed: int

    @classmethod
    def of_rows(cls, name: str, rows: int, steps: int, segment_steps: int, tokens: int, seed: int) -> Shape:
        """A run of about so many trajectories, whose prompts recur every `PASSES` steps."""
        batch = max(1, round(rows / steps / GROUP))
        return cls(name, PASSES * batch, batch, steps, segment_steps, tokens, seed)

    @classmethod
    def of_guide(cls, name: str, prompts: int, tokens: int, seed: int) -> Shape:
        """A run whose guide has an answer to each of about so many prompts. It trains no step."""
        batch = min(GUIDE_BATCH, prompts)
        steps = prompts // batch
        return cls(name, steps * batch, batch, steps, 10, tokens, seed)


def write_run(store: str, shape: Shape) -> RunArtifacts:
    """A run with one leg of `shape.steps` steps, and a guide for its first pass through the pool."""
    writer = _Writer(store, shape)
    leg, parent = writer.begin()
    last = writer.train(leg, parent)
    writer.guide(last)
    return writer.run


def write_guide(store: str, shape: Shape) -> RunArtifacts:
    """A run of no step, and a guide with an answer to every prompt."""
    writer = _Writer(store, shape)
    _, parent = writer.begin()
    writer.guide(parent)
    return writer.run


class _Writer:
    def __init__(self, store: str, shape: Shape) -> None:
        self.shape = shape
        self.run = RunArtifacts(open_store(store), shape.name)
        self.vocabulary = Vocabulary()
        self.pool: Pool = make_pool(self.vocabulary, shape.pool + HELD_OUT, shape.tokens, shape.seed)
        train, held_out = self.pool.prompts[: shape.pool], self.pool.prompts[shape.pool :]
        self.prompts = PromptTable(to_arrow(train, held_out), shape.seed, shape.prompts_per_step)
        self.config = Config.model_validate(
            {
                "run": {
                    "name": shape.name,
                    "store": store,
                    "seed": shape.seed,
                    "total_steps": shape.steps,
                    "segment_steps": shape.segment_steps,
                },
                "data": {"prompts": shape.pool, "held_out": HELD_OUT},
                "rollout": {
                    "prompts_per_step": shape.prompts_per_step,
                    "group_size": GROUP,
                    "max_new_tokens": LONGEST * shape.tokens,
                },
            }
        )
        self.record = self._record(to_arrow(train, held_out))

    def begin(self) -> tuple[LegRecord, CheckpointManifest]:
        """The main leg, and the starting policy."""
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "config.json").write_text(json.dumps({"model_type": "qwen3"}))
            self.vocabulary.tokenizer().save_pretrained(directory)
            self.run.put_model(Path(directory), environment=ENVIRONMENT)
        warm = self._open("warm", None)
        start = self._checkpoint(warm, 0, MonitorState())
        main = self._open("main", start.ref)
        for leg in (warm, main):
            head = self.run.head()
            if head is None or head.leg_id == warm.leg_id:
                self.run.move_head(head, leg.leg_id)
        return main, start

    def train(self, leg: LegRecord, parent: CheckpointManifest) -> CheckpointManifest:
        """Commits the segments that are missing, and returns the last checkpoint."""
        head = self.run.head()
        assert head is not None
        done = {(segment.start, segment.stop): segment for segment in self.run.all_segments(leg.leg_id)}
        monitor = MonitorState()
        for start in range(0, self.shape.steps, self.shape.segment_steps):
            stop = min(start + self.shape.segment_steps, self.shape.steps)
            if (start, stop) in done:
                parent = self.run.require_checkpoint(leg.leg_id, stop)
                monitor = self.run.monitor_state(parent.ref)
                continue
            began = time.perf_counter()
            rollouts, metrics, monitor = self._steps(leg, start, stop, parent, monitor)
            telemetry = pa.Table.from_pylist([self._telemetry(leg, n) for n in range(start, stop)], tables.TELEMETRY)
            rows = self.run.put_rows(leg, start, stop, rollouts, metrics, telemetry)
            del rollouts
            parent = self._checkpoint(leg, stop, monitor, rows)
            # A checkpoint of an attempt that was killed after it comes with its own rows.
            self.run.commit_segment(leg, parent.segment or rows, parent, head.epoch, ENVIRONMENT)
            seconds = time.perf_counter() - began
            print(f"{self.run.uri}: steps {start}-{stop} in {seconds:.1f} s", file=sys.stderr, flush=True)
        return parent

    def guide(self, policy: CheckpointManifest) -> GuideManifest:
        """A guide with the right answer to every prompt, for one pass through the pool."""
        names = [prompt.prompt_id for prompt in self.pool.prompts[: self.shape.pool]]
        spec = GuideSpec(
            checkpoint=policy.ref,
            weights_digest=policy.weights_digest,
            start=0,
            stop=self.shape.pool // self.shape.prompts_per_step,
            prompt_ids=tuple(sorted(names)),
            k=GROUP,
            temperature=1.0,
            max_new_tokens=LONGEST * self.shape.tokens,
            seed=self.shape.seed,
            tokenizer_digest=self.record.tokenizer_digest,
            verifier=VERIFIER,
        )
        guide_id = lineage.guide_id(spec)
        if (found := self.run.guide(guide_id)) is not None:
            return found
        origin = (self.run.run_id, guide_id, policy.step, policy.weights_digest)
        rows = make_guide_rows(self.pool, *origin, self.shape.seed).slice(0, self.shape.pool)
        return self.run.commit_guide(spec, rows, GROUP * self.shape.tokens * len(names), ENVIRONMENT)

    def _record(self, prompts: pa.Table) -> RunRecord:
        identity = self.shape.tokens
        record = self.run.create_run(
            made_up_record(self.run.run_id, self.config, prompts, VERIFIER, identity, created_at=now())
        )
        if record.recipe != self.config.recipe():
            raise SystemExit(f"{self.run.uri} is a run of another shape; choose another name")
        self.run.put_prompts(prompts)
        return record

    def _open(self, kind: LegKind, parent: CheckpointRef | None) -> LegRecord:
        return self.run.open_leg(new_leg(self.record, kind, parent, 0))

    def _checkpoint(
        self, leg: LegRecord, step: int, monitor: MonitorState, rows: SegmentRows | None = None
    ) -> CheckpointManifest:
        rng = np.random.default_rng([self.shape.seed, 4, step])
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            write_checkpoint(root, step, rng)
            (root / MONITOR_FILE).write_text(monitor.model_dump_json())
            return self.run.commit_checkpoint(leg.leg_id, step, root, ENVIRONMENT, rows)[0]

    def _steps(
        self, leg: LegRecord, start: int, stop: int, parent: CheckpointManifest, monitor: MonitorState
    ) -> tuple[pa.Table, pa.Table, MonitorState]:
        batches = [self.prompts.batch(step) for step in range(start, stop)]
        progress, digest = start / self.shape.steps, parent.weights_digest
        made = make_rollouts(
            *(self.vocabulary, self.pool, self.run.run_id, leg.leg_id, start, batches, progress, digest),
            *(self.shape.tokens, self.shape.seed),
        )
        metrics = []
        for step, batch in zip(range(start, stop), batches, strict=True):
            own = made.steps == step
            accuracy = made.rewards[own].reshape(-1, GROUP).mean(axis=1)
            row = {"run_id": self.run.run_id, "leg_id": leg.leg_id, "step": step, **_metrics(made, own, accuracy)}
            groups = zip((prompt.prompt_id for prompt in batch), accuracy.tolist(), strict=True)
            monitor = observe(monitor, step, row["reward"], row["entropy"], groups, self.config.autonpo)
            metrics.append(row)
        return made.table, pa.Table.from_pylist(metrics, tables.METRICS), monitor

    def _telemetry(self, leg: LegRecord, step: int) -> dict[str, object]:
        return {
            "run_id": self.run.run_id,
            "leg_id": leg.leg_id,
            "step": step,
            "step_time": 60.0,
            "generate_time": 40.0,
            "verify_time": 1.0,
            "update_time": 19.0,
            "peak_rss_bytes": 2**34,
            "host": "none",
            "finished_at": now(),
        }


def _metrics(made: Rollouts, own: np.ndarray, accuracy: np.ndarray) -> dict[str, float]:
    rewards, lengths = made.rewards[own], made.lengths[own]
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.reshape(-1, GROUP).std(axis=1, ddof=1).mean()),
        "frac_reward_zero_std": float(np.isin(accuracy, (0, 1)).mean()),
        "entropy": float(np.average(made.entropies[own], weights=lengths)),
        "loss": 0.0,
        "grad_norm": 1.0,
        "learning_rate": 1e-6,
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(made.truncated[own].mean()),
        "batch/accuracy": float(rewards.mean()),
        "batch/solve_none": float((accuracy == 0).mean()),
        "batch/solve_all": float((accuracy == 1).mean()),
        "tokens/policy": float(lengths.sum()),
        "tokens/trained": float(lengths.sum()),
    }
