"""A made-up run in a real store: what a short NPO run leaves behind, without any training.

`python -m tests.synthetic DIRECTORY` writes one, to look at.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from npo_core import lineage
from npo_core.artifacts import RunArtifacts
from npo_core.evaluate import Evaluation
from npo_core.groups import Group, group_rows, mix_groups, step_metrics
from npo_core.guide import GuideTrajectories, GuideTrajectory, by_prompt, read_guide
from npo_core.interfaces import Prompt, Rollouts, Verdict, Verifier
from npo_core.prompts import PromptTable, to_arrow
from npo_core.store import open_store
from schemas import tables
from schemas.config import Config
from schemas.decisions import DecisionRecord
from schemas.records import (
    SCHEMA_VERSION,
    CheckpointManifest,
    GuideManifest,
    GuideSpec,
    LegKind,
    LegRecord,
    SegmentRows,
    TaskScore,
)
from tests.made_up import ENVIRONMENT, made_up_record, write_checkpoint

PROMPTS_A_STEP, GROUP, HELD_OUT = 16, 4, 16
K, MAX_NEW_TOKENS = 4, 8
FAMILIES = {"sum": "s", "reverse": "r", "maximum": "m"}
END = ord("#")


class SyntheticVerifier(Verifier):
    """Wants the whole working, exactly."""

    name = "synthetic/1"

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """See `Verifier.verify`."""
        correct = text == prompt.answer
        return Verdict(float(correct), correct, "exact" if correct else f"expected {prompt.answer}")


def encode(text: str) -> np.ndarray:
    """Token ids are character codes, int32 [L]."""
    return np.array([ord(c) for c in text], np.int32)


def decode(ids: object) -> str:
    """The text of a completion, without its end token."""
    return "".join(chr(i) for i in np.asarray(ids) if i != END)


def build_run(
    path: Path,
    steps: int = 40,
    with_replay: bool = True,
    segment_steps: int = 10,
    name: str = "synthetic",
    seed: int = 0,
) -> RunArtifacts:
    """Writes a run into the store at `path`. With a replay: main [0, s), scout [s, 3s), guide, replay [s, 3s), and main
    from there on, for segments of s steps; else main alone. Evaluated at every segment's end of the main line.
    Called again after a kill it goes on, as a run does."""
    return _Builder(path, steps, with_replay, segment_steps, name, seed).run()


@dataclass(frozen=True)
class _Policy:
    """A checkpoint and how good its policy is, in steps of plain training."""

    checkpoint: CheckpointManifest
    skill: float


class _Builder:
    def __init__(self, path: Path, steps: int, with_replay: bool, segment_steps: int, name: str, seed: int) -> None:
        self.steps, self.stride, self.with_replay = steps, segment_steps, with_replay
        self.artifacts = RunArtifacts(open_store(str(path)), name)
        self.verifier = SyntheticVerifier()
        future = {"interventions": [{"start": segment_steps, "lookahead": 2 * segment_steps}], "k": K}
        self.config = Config.model_validate(
            {
                "run": {"name": name, "store": str(path), "total_steps": steps, "segment_steps": segment_steps},
                "data": {"prompts": 48, "held_out": HELD_OUT},
                "rollout": {"prompts_per_step": PROMPTS_A_STEP, "group_size": GROUP, "max_new_tokens": MAX_NEW_TOKENS},
                "algorithm": {"method": "npo" if with_replay else "grpo"},
                "future": future if with_replay else {},
                "evaluation": {"every": segment_steps, "samples": 2},
            }
        )
        prompts = [_prompt(i, seed) for i in range(48 + HELD_OUT)]
        self.train, self.held_out = prompts[:48], prompts[48:]
        self.prompts = PromptTable(to_arrow(self.train, self.held_out), seed, PROMPTS_A_STEP)
        self.seed = seed

    def run(self) -> RunArtifacts:
        prompts = to_arrow(self.train, self.held_out)
        self.record = self.artifacts.create_run(
            made_up_record(
                self.artifacts.run_id, self.config, prompts, self.verifier.name, self.seed, created_at=_time(0)
            )
        )
        self.artifacts.put_prompts(prompts)
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "config.json").write_text(json.dumps({"model_type": "synthetic"}))
            Path(directory, "tokenizer.json").write_text("{}")
            self.artifacts.put_model(Path(directory), environment=ENVIRONMENT)
        warm = self._open("warm", None, 0)
        policy = _Policy(self._checkpoint(warm, 0), 0.0)
        self._evaluate(policy)
        if not self.with_replay:
            self._train(self._open("main", policy, 0), policy, self.steps)
            return self.artifacts
        start, stop = self.stride, 3 * self.stride
        main = self._open("main", policy, 0)
        policy = self._train(main, policy, start)
        self.artifacts.commit_decision(
            DecisionRecord(
                leg_id=main.leg_id,
                step=start,
                intervene=True,
                reason="the configuration asks for it",
                source="schedule",
                start=start,
                lookahead=stop - start,
                window=stop - start,
                created_at=_time(1),
            )
        )
        future = self._train(self._open("scout", policy, start), policy, stop)
        guide = self._guide(future, start, stop)
        policy = self._train(self._open("replay", policy, start, guide), policy, stop, guide)
        if self.steps > stop:
            self._train(self._open("main", policy, stop), policy, self.steps)
        return self.artifacts

    def _open(self, kind: LegKind, parent: _Policy | None, start: int, guide: GuideManifest | None = None) -> LegRecord:
        origin = parent.checkpoint.ref if parent else None
        guide_id = guide.guide_id if guide else None
        leg = self.artifacts.open_leg(
            LegRecord(
                leg_id=lineage.leg_id(self.record.recipe_digest, origin, kind, start, guide_id),
                kind=kind,
                parent=origin,
                start=start,
                guide_id=guide_id,
                recipe_digest=self.record.recipe_digest,
                created_at=_time(len(self.artifacts.legs()) + 1),
            )
        )
        head = self.artifacts.head()
        line = {stretch.leg.leg_id for stretch in lineage.main_line(self.artifacts.legs(), head)}
        if kind != "scout" and leg.leg_id not in line:
            self.artifacts.move_head(head, leg.leg_id)
        return leg

    def _train(self, leg: LegRecord, policy: _Policy, stop: int, guide: GuideManifest | None = None) -> _Policy:
        trajectories = self._trajectories(guide) if guide else {}
        head = self.artifacts.head()
        assert head is not None
        for first in range(leg.start, stop, self.stride):
            rollouts, metrics, telemetry = [], [], []
            last = min(first + self.stride, stop)
            for step in range(first, last):
                # A replay learns faster than plain training: what the scout's future is for.
                skill = policy.skill + (step - first) * (1.6 if guide else 1.0)
                groups = [self._group(leg, step, p, skill) for p in self.prompts.batch(step)]
                mixed, replacement = mix_groups(step, groups, trajectories, self.config.algorithm)
                digest = policy.checkpoint.weights_digest
                rollouts += group_rows(self.artifacts.run_id, leg.leg_id, step, digest, self.verifier.name, mixed)
                metrics.append(self._metrics(leg, step, {**step_metrics(mixed), **replacement}, bool(trajectories)))
                telemetry.append(self._telemetry(leg, step))
            rows = self.artifacts.put_rows(
                leg,
                first,
                last,
                pa.Table.from_pylist(rollouts, tables.TRAJECTORIES),
                pa.Table.from_pylist(metrics, tables.METRICS),
                pa.Table.from_pylist(telemetry, tables.TELEMETRY),
            )
            checkpoint = self._checkpoint(leg, last, rows)
            epoch = None if leg.kind == "scout" else head.epoch
            self.artifacts.commit_segment(leg, rows, checkpoint, epoch, ENVIRONMENT)
            policy = _Policy(checkpoint, policy.skill + (last - first) * (1.6 if guide else 1.0))
            if leg.kind != "scout":
                self._evaluate(policy)
        return policy

    def _checkpoint(self, leg: LegRecord, step: int, rows: SegmentRows | None = None) -> CheckpointManifest:
        rng = self._rng(leg.kind, step)
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            write_checkpoint(root, step, rng)
            return self.artifacts.commit_checkpoint(leg.leg_id, step, root, ENVIRONMENT, rows)[0]

    def _guide(self, future: _Policy, start: int, stop: int) -> GuideManifest:
        ids = sorted({prompt.prompt_id for step in range(start, stop) for prompt in self.prompts.batch(step)})
        spec = GuideSpec(
            checkpoint=future.checkpoint.ref,
            weights_digest=future.checkpoint.weights_digest,
            start=start,
            stop=stop,
            prompt_ids=tuple(ids),
            k=K,
            temperature=1.0,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=self.seed,
            tokenizer_digest=self.record.tokenizer_digest,
            verifier=self.verifier.name,
        )
        guide_id = lineage.guide_id(spec)
        rows, tokens = [], 0
        for prompt_id in ids:
            prompt = self.prompts.get(prompt_id)
            sampled = self._sample(prompt, K, future.skill, self._rng("guide", stop, prompt_id))
            tokens += sum(map(len, sampled.completion_ids))
            texts = [decode(completion_ids) for completion_ids in sampled.completion_ids]
            slot = next((k for k, text in enumerate(texts) if text == prompt.answer), None)
            if slot is None:
                continue
            trajectory = GuideTrajectory(
                prompt_id,
                sampled.completion_ids[slot],
                sampled.logprobs[slot],
                1.0,
                "exact",
                float(sampled.entropies[slot].mean(dtype=np.float64)),
                texts[slot],
                stop,
                stop,
                spec.weights_digest,
            )
            own = {"leg_id": guide_id, "step": stop, "prompt_id": prompt_id, "slot": slot, "task": prompt.task}
            rows.append({**trajectory.row(), **own, **self._shared(prompt)})
        table = pa.Table.from_pylist(rows, tables.TRAJECTORIES)
        return self.artifacts.commit_guide(spec, table, tokens, ENVIRONMENT)

    def _trajectories(self, guide: GuideManifest) -> GuideTrajectories:
        return by_prompt(
            read_guide(
                [self.artifacts.table(guide, "trajectories")],
                lambda answers: self.verifier.judge([(self.prompts.get(name), decode(ids)) for name, ids in answers]),
                lambda prompt_id: encode(self.prompts.get(prompt_id).messages[0]["content"]),
            )
        )

    def _evaluate(self, policy: _Policy) -> None:
        ref, samples = policy.checkpoint.ref, self.config.evaluation.samples
        rows, tasks, entropies = [], {}, []
        for prompt in self.held_out:
            sampled = self._sample(prompt, samples, policy.skill, self._rng("eval", ref.step, prompt.prompt_id))
            for slot in range(samples):
                text = decode(sampled.completion_ids[slot])
                verdict = self.verifier.verify(prompt, text)
                entropies.append(sampled.entropies[slot])
                score = tasks.get(prompt.task, TaskScore(prompts=0, samples=0, correct=0))
                tasks[prompt.task] = TaskScore(
                    prompts=score.prompts + (slot == 0),
                    samples=score.samples + 1,
                    correct=score.correct + verdict.correct,
                )
                rows.append(
                    {
                        "leg_id": ref.leg_id,
                        "step": ref.step,
                        "prompt_id": prompt.prompt_id,
                        "slot": slot,
                        "source": "policy",
                        "task": prompt.task,
                        "behavior_step": ref.step,
                        "behavior_digest": policy.checkpoint.weights_digest,
                        "completion_ids": sampled.completion_ids[slot],
                        "behavior_logprobs": sampled.logprobs[slot],
                        "reward": verdict.reward,
                        "correct": verdict.correct,
                        "verdict": verdict.reason,
                        "finish_reason": sampled.finish_reasons[slot],
                        "displaced": False,
                        "entropy": float(sampled.entropies[slot].mean(dtype=np.float64)),
                        "text": text,
                        **self._shared(prompt),
                    }
                )
        evaluation = Evaluation(
            samples=pa.Table.from_pylist(rows, tables.TRAJECTORIES),
            tasks=tasks,
            accuracy=sum(score.correct for score in tasks.values()) / len(rows),
            entropy=float(np.concatenate(entropies).mean(dtype=np.float64)),
            tokens=sum(map(len, entropies)),
        )
        eval_id = lineage.eval_id(ref, samples, self.record)
        self.artifacts.commit_evaluation(eval_id, ref, samples, evaluation, ENVIRONMENT)

    def _shared(self, prompt: Prompt) -> dict[str, object]:
        return {
            "run_id": self.artifacts.run_id,
            "prompt_ids": encode(prompt.messages[0]["content"]),
            "verifier": self.verifier.name,
            "image_refs": [],
            "schema_version": SCHEMA_VERSION,
        }

    def _group(self, leg: LegRecord, step: int, prompt: Prompt, skill: float) -> Group:
        rollouts = self._sample(prompt, GROUP, skill, self._rng(leg.kind, step, prompt.prompt_id))
        group = Group.sampled(prompt, encode(prompt.messages[0]["content"]), rollouts, slice(0, GROUP))
        texts = [decode(ids) for ids in rollouts.completion_ids]
        return group.judged(texts, [self.verifier.verify(prompt, text) for text in texts])

    def _sample(self, prompt: Prompt, n: int, skill: float, rng: np.random.Generator) -> Rollouts:
        """Completions of a policy that slips on a symbol the more rarely the more skill it has."""
        rollouts = Rollouts([], [], [], [])
        slip = 0.45 * np.exp(-skill / 30)
        for _ in range(n):
            text = [str(rng.integers(10)) if rng.random() < slip else symbol for symbol in prompt.answer]
            truncated = rng.random() < 0.05
            ids = encode("".join(text) + ("0" * MAX_NEW_TOKENS if truncated else "#"))[:MAX_NEW_TOKENS]
            rollouts.completion_ids.append(ids)
            rollouts.logprobs.append(-rng.gamma(1.0, slip + 0.02, len(ids)).astype(np.float32))
            rollouts.entropies.append(rng.gamma(2.0, slip / 2 + 0.02, len(ids)).astype(np.float32))
            rollouts.finish_reasons.append("length" if truncated else "stop")
        return rollouts

    def _metrics(self, leg: LegRecord, step: int, own: dict[str, float], guided: bool) -> dict[str, object]:
        rng = self._rng("metrics", step, leg.kind)
        learner = {
            "loss": float(rng.normal(0, 0.02)),
            "grad_norm": float(rng.gamma(4.0, 0.1)),
            "learning_rate": self.config.learner.learning_rate,
            "clip_ratio/low_mean": 0.0,
            "clip_ratio/high_mean": 0.0,
            "clip_ratio/region_mean": 0.0,
            "tokens/trained": own["tokens/policy"],
        }
        if guided:
            learner |= {"npo/guide_ratio_mean": float(rng.uniform(0.5, 1)), "npo/guide_kl": float(rng.uniform(0, 0.5))}
        return {"run_id": self.artifacts.run_id, "leg_id": leg.leg_id, "step": step, **own, **learner}

    def _telemetry(self, leg: LegRecord, step: int) -> dict[str, object]:
        return {
            "run_id": self.artifacts.run_id,
            "leg_id": leg.leg_id,
            "step": step,
            "step_time": 0.4,
            "generate_time": 0.25,
            "verify_time": 0.01,
            "update_time": 0.14,
            "peak_rss_bytes": 300_000_000,
            "host": "synthetic",
            "finished_at": _time(step),
        }

    def _rng(self, *key: object) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(repr(key).encode())])


def _prompt(index: int, seed: int) -> Prompt:
    rng = np.random.default_rng([seed, index])
    digits = rng.integers(0, 10, int(rng.integers(3, 7)))
    task = list(FAMILIES)[index % len(FAMILIES)]
    working = {
        "sum": np.cumsum(digits) % 10,
        "reverse": digits[::-1],
        "maximum": np.maximum.accumulate(digits),
    }[task]
    content = f"{FAMILIES[task]}{''.join(map(str, digits))}="
    answer = "".join(map(str, working))
    return Prompt(f"p{index:03d}", task, ({"role": "user", "content": content},), answer)


def _time(minute: int) -> str:
    return f"2026-01-01T{minute // 60:02d}:{minute % 60:02d}:00+00:00"


if __name__ == "__main__":
    print(build_run(Path(sys.argv[1])).uri)
