"""One step end to end on rollouts that the real generator made: mixing, rows, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from npo_core.begin import begin, warm_start
from npo_core.groups import mix_groups
from npo_core.guide import GuideTrajectories, by_prompt, read_guide
from npo_core.guide_sources import sample_answers, window_steps
from npo_core.interfaces import NearFutureError
from npo_core.segment import LegContext, judge, run_segment, sample_groups, train_batch
from npo_core.workspace import Workspace
from schemas.config import Config
from schemas.records import CheckpointRef, GuideSpec


def small(store: Path, name: str = "demo", **sections: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "run": {"name": name, "store": f"file://{store}", "total_steps": 4, "segment_steps": 2, "seed": 3},
            "data": {"prompts": 24, "held_out": 8},
            "rollout": {"prompts_per_step": 8},
            "evaluation": {"every": 0},
            **sections,
        }
    )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    opened = begin(small(tmp_path_factory.mktemp("store")))
    opened.holding(warm_start(opened), optimizer=True)
    return opened


def kept(table: pa.Table, workspace: Workspace) -> GuideTrajectories:
    return by_prompt(read_guide([table], workspace.judge, encode_in(workspace)))


@pytest.fixture(scope="module")
def guide(workspace: Workspace) -> GuideTrajectories:
    """Verified answers of the warm-started policy itself, many samples a prompt."""
    return kept(made(workspace)[0], workspace)


def made(workspace: Workspace, k: int = 24, answers: int = 1) -> tuple[pa.Table, int]:
    head = workspace.run.head()
    assert head is not None
    ids = tuple(sorted(window_steps(workspace.prompts, 0, 3)))
    spec = GuideSpec(
        checkpoint=CheckpointRef(leg_id=head.leg_id, step=0, digest="d"),
        weights_digest="w",
        start=0,
        stop=3,
        prompt_ids=ids,
        k=k,
        temperature=1.0,
        max_new_tokens=14,
        seed=3,
        tokenizer_digest=workspace.record.tokenizer_digest,
        verifier=workspace.record.verifier,
        answers=answers,
    )
    engine = workspace.holding(warm_start(workspace), optimizer=False)
    prompts = [workspace.prompts.get(i) for i in ids]
    sampling = context(workspace).sampling
    return sample_answers(
        spec,
        "g" * 12,
        "demo",
        prompts,
        engine.generator,
        sampling,
        workspace.verifier,
        workspace.encode,
        workspace.decode,
        lambda done, solved: None,
    )


def encode_in(workspace: Workspace) -> Any:
    return lambda prompt: workspace.encode(workspace.prompts.get(prompt))


def context(workspace: Workspace, guide: GuideTrajectories | None = None) -> LegContext:
    return LegContext(
        "demo",
        "leg",
        workspace.config,
        workspace.prompts,
        workspace.verifier,
        workspace.encode,
        workspace.decode,
        workspace.stop_ids,
        guide or {},
        "w",
    )


def test_hard_groups_with_a_guide_take_it_in_the_last_slot_and_no_others_do(
    workspace: Workspace, guide: GuideTrajectories
) -> None:
    engine = workspace.holding(warm_start(workspace), optimizer=True)
    groups = judge(context(workspace), sample_groups(context(workspace), engine.generator, 0))
    mixed, metrics = mix_groups(0, groups, guide, workspace.config.algorithm)
    for group in mixed:
        rewards = [v.reward for v in group.group.verdicts]
        assert group.accuracy == np.mean(rewards)
        known = guide.get(group.group.prompt.prompt_id)
        *own, taken = group.guides
        assert own == [None] * 7
        assert (taken is not None) == (group.accuracy <= 0.6 and known is not None)
        if taken is not None:
            modified = np.array([*rewards[:7], taken.reward])
            np.testing.assert_allclose(
                group.advantages_G, (modified - modified.mean()) / (modified.std(ddof=1) + 1e-6), atol=1e-12
            ) if modified.std() else np.testing.assert_array_equal(group.advantages_G, 0)
    assert 0 < metrics["npo/replaced"] <= metrics["npo/eligible"] <= len(mixed)
    assert metrics["npo/guide_missing"] == metrics["npo/eligible"] - metrics["npo/replaced"]

    batch = train_batch(0, mixed)
    assert len(batch.prompt_ids) == 64, "the displaced rollout is not in the update"
    for row in np.flatnonzero(batch.guide_B):
        assert batch.completion_ids[row][-1] in workspace.stop_ids, "the end token is part of the replaced slot"
        assert len(batch.guide_logprobs[row]) == len(batch.completion_ids[row])  # type: ignore[arg-type]


def test_rows_keep_every_rollout_and_mark_the_displaced_one(workspace: Workspace, guide: GuideTrajectories) -> None:
    engine = workspace.holding(warm_start(workspace), optimizer=True)
    workspace.trained()
    tables = run_segment(context(workspace, guide), engine.generator, engine.learner, 0, 2, lambda done, metrics: None)
    rows = tables.rollouts.to_pylist()
    replaced = [row for row in rows if row["source"] == "guide"]
    displaced = [row for row in rows if row["displaced"]]
    key = ("step", "prompt_id", "slot")
    assert replaced
    assert {tuple(r[k] for k in key) for r in replaced} == {tuple(r[k] for k in key) for r in displaced}
    assert len([row for row in rows if row["source"] == "policy"]) == 2 * 64
    assert all(row["advantage"] is None for row in displaced)
    for row in rows:
        assert (
            row["correct"]
            == workspace.verifier.verify(
                workspace.prompts.get(row["prompt_id"]), workspace.decode(row["completion_ids"])
            ).correct
        )
        assert len(row["behavior_logprobs"]) == len(row["completion_ids"])
    metrics = tables.metrics.to_pylist()
    for step in (0, 1):
        own = [row for row in rows if row["source"] == "policy" and row["step"] == step]
        assert metrics[step]["reward"] == pytest.approx(np.mean([row["reward"] for row in own])), "before replacement"
        assert metrics[step]["tokens/policy"] == sum(len(row["completion_ids"]) for row in own)
        assert metrics[step]["npo/replaced"] == sum(row["step"] == step for row in replaced)


def test_an_unguided_replay_repeats_its_leg_exactly(workspace: Workspace) -> None:
    runs = []
    for _ in range(2):
        engine = workspace.holding(warm_start(workspace), optimizer=True)
        workspace.trained()
        runs.append(run_segment(context(workspace), engine.generator, engine.learner, 0, 3, lambda *_: None))
    assert runs[0].rollouts.equals(runs[1].rollouts)
    assert runs[0].metrics.equals(runs[1].metrics)


def test_a_guide_keeps_the_first_correct_answer_that_ended_by_itself(workspace: Workspace) -> None:
    (few, few_tokens), (many, many_tokens) = made(workspace, k=4), made(workspace, k=24)
    first = {row["prompt_id"]: row for row in few.to_pylist()}
    more = {row["prompt_id"]: row for row in many.to_pylist()}
    assert set(first) < set(more), "more samples solve more prompts"
    for prompt, row in first.items():
        assert row["completion_ids"] == more[prompt]["completion_ids"], "the first in sampling order stays"
    for row in more.values():
        assert row["correct"]
        assert row["finish_reason"] == "stop"
    assert many_tokens > few_tokens > sum(len(row["completion_ids"]) for row in first.values())


def test_a_guide_keeps_as_many_correct_answers_as_slots_may_be_taken(workspace: Workspace) -> None:
    (one, tokens), (three, same_tokens) = made(workspace), made(workspace, answers=3)
    assert tokens == same_tokens, "all K are sampled, whatever is kept"
    read = kept(three, workspace)
    assert {len(found) for found in read.values()} == {1, 2, 3}
    first = kept(one, workspace)
    assert {prompt: found[0].completion_ids.tolist() for prompt, found in read.items()} == {
        prompt: found[0].completion_ids.tolist() for prompt, found in first.items()
    }
    for prompt, found in read.items():
        slots = [row["slot"] for row in three.to_pylist() if row["prompt_id"] == prompt]
        assert slots == sorted(set(slots))
        assert len(slots) == len(found)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("completion_ids", [5, 5, 5], "not a verified-correct one"),
        ("finish_reason", "length", "finish_reason length"),
        ("prompt_ids", [5, 6], "another tokenizer or template"),
    ],
)
def test_a_stored_answer_that_does_not_hold_is_refused(
    workspace: Workspace, column: str, value: object, message: str
) -> None:
    table, _ = made(workspace)
    rows = table.to_pylist()
    rows[0][column] = value
    with pytest.raises(NearFutureError, match=message):
        kept(pa.Table.from_pylist(rows, table.schema), workspace)
