"""Guides from reused rollouts, from the guide policy, and from both, in small runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from npo_core.artifacts import open_run
from npo_core.lineage import guide_id
from npo_core.verify import verify_run
from schemas.records import GuideManifest, LegRecord
from tasks import legs, workspaces
from tests.test_stages import checkpoint, make_guide, open_leg, schedule, small, train_segment, warm_start

SLOTS = 2
SCOUT_STOP, WINDOW = 6, 4
Row = dict[str, Any]


def begun(store: Path, source: str) -> str:
    """A run whose prompts, short ones, return every other step."""
    config = small(
        store,
        data={"prompts": 8, "held_out": 4, "max_length": 5},
        algorithm={"guide_slots": SLOTS},
        future={"source": source, "k": 4},
    )
    run = workspaces.begin_run.fn(config)
    warm_start(run)
    return run


def trained(run: str, leg: LegRecord, stop: int) -> LegRecord:
    for start in range(leg.start, stop, 2):
        train_segment(run, leg, start, start + 2)
    return leg


def scouted(run: str) -> LegRecord:
    return trained(run, open_leg(run, "scout", checkpoint(run, 0)), SCOUT_STOP)


def guide_of(run: str, scout: LegRecord, stop: int = WINDOW, prompts: tuple[str, ...] | None = None) -> GuideManifest:
    return make_guide(run, legs.leg_checkpoint(run, scout, SCOUT_STOP), 0, stop, prompts)


def stored(run: str, guide: GuideManifest) -> list[Row]:
    rows: list[Row] = open_run(run).table(guide, "trajectories").to_pylist()
    return rows


def rollouts(run: str, *parts: LegRecord) -> list[Row]:
    return [row for leg in parts for row in table_rows(run, leg, "rollouts")]


def table_rows(run: str, leg: LegRecord, role: str) -> list[Row]:
    opened = open_run(run)
    return [row for segment in opened.segments(leg.leg_id) for row in opened.table(segment, role).to_pylist()]


def latest_correct(rows: list[Row], prompt_id: str) -> list[Row]:
    """What is to be reused of a prompt, by its definition."""
    good = [
        row
        for row in rows
        if row["prompt_id"] == prompt_id
        and row["source"] == "policy"
        and row["correct"]
        and row["finish_reason"] == "stop"
    ]
    latest = [row for row in good if row["step"] == max(other["step"] for other in good)]
    return sorted(latest, key=lambda row: row["slot"])[:SLOTS]


def occurrences(run: str, start: int = 0, stop: int = WINDOW) -> dict[str, list[int]]:
    prompts = workspaces.workspace(run).prompts
    steps: dict[str, list[int]] = {}
    for step in range(start, stop):
        for prompt in prompts.batch(step):
            steps.setdefault(prompt.prompt_id, []).append(step)
    return steps


def identity(row: Row) -> tuple[Any, ...]:
    """A rollout's own columns, whatever became of it in a group."""
    tokens = (tuple(row["completion_ids"]), tuple(row["behavior_logprobs"]))
    return row["prompt_id"], row["behavior_step"], row["slot"], row["behavior_digest"], row["entropy"], *tokens


@pytest.fixture(scope="module")
def reused(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, LegRecord, GuideManifest]:
    run = begun(tmp_path_factory.mktemp("leg"), "leg")
    scout = scouted(run)
    return run, scout, guide_of(run, scout)


@pytest.fixture(scope="module")
def replayed(reused: tuple[str, LegRecord, GuideManifest]) -> LegRecord:
    run, _, guide = reused
    return trained(run, open_leg(run, "replay", schedule(run, guide.guide_id).parent, guide.guide_id), WINDOW)


def test_a_guide_from_the_leg_holds_the_latest_correct_rollouts_that_can_serve_at_no_token(
    reused: tuple[str, LegRecord, GuideManifest],
) -> None:
    run, scout, guide = reused
    rows = rollouts(run, scout)
    wanted = [
        identity(row)
        for prompt_id, steps in occurrences(run).items()
        for row in latest_correct(rows, prompt_id)
        if row["step"] > min(steps)
    ]
    assert sorted(identity(row) for row in stored(run, guide)) == sorted(wanted)
    assert guide.tokens_guide == 0
    assert guide.spec.source == "leg"
    assert guide.solved == len({row["prompt_id"] for row in stored(run, guide)}) < len(wanted), "prompts are counted"
    for row in stored(run, guide):
        assert (row["source"], row["step"], row["leg_id"]) == ("guide", SCOUT_STOP, guide.guide_id)
        assert row["behavior_step"] < SCOUT_STOP
        assert (row["advantage"], row["group_accuracy"], row["displaced"]) == (None, None, False)


def test_a_reused_rollout_is_mixed_into_earlier_steps_only(
    reused: tuple[str, LegRecord, GuideManifest], replayed: LegRecord
) -> None:
    run, _, guide = reused
    serving = {(row["prompt_id"], step) for row in stored(run, guide) for step in range(row["behavior_step"])}
    rows = rollouts(run, replayed)
    groups = {(row["prompt_id"], row["step"]): row["group_accuracy"] for row in rows}
    taken = {(row["prompt_id"], row["step"]) for row in rows if row["source"] == "guide"}
    eligible = {group for group, accuracy in groups.items() if accuracy <= 0.6}
    assert taken == eligible & serving
    asked = {row["prompt_id"] for row in stored(run, guide)}
    assert {group for group in eligible - taken if group[0] in asked}, "some stored ones come too early for a step"
    for row in table_rows(run, replayed, "metrics"):
        assert row["npo/replaced"] == sum(step == row["step"] for _, step in taken)
        assert row["npo/guide_missing"] == sum(step == row["step"] for _, step in eligible - taken)


def test_a_group_takes_as_many_slots_as_it_has_stored_trajectories(
    reused: tuple[str, LegRecord, GuideManifest], replayed: LegRecord
) -> None:
    run, _, guide = reused
    answers: dict[str, list[list[int]]] = {}
    for row in stored(run, guide):
        answers.setdefault(row["prompt_id"], []).append(row["completion_ids"])
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rollouts(run, replayed):
        groups.setdefault((row["prompt_id"], row["step"]), []).append(row)
    sizes = set()
    for (prompt_id, _), rows in groups.items():
        guides = sorted((row for row in rows if row["source"] == "guide"), key=lambda row: -row["slot"])
        own = [row for row in rows if row["source"] == "policy"]
        sizes.add(len(guides))
        assert len(own) == 8
        assert [row["slot"] for row in guides] == [7, 6][: len(guides)]
        assert [row["completion_ids"] for row in guides] == answers.get(prompt_id, [])[: len(guides)]
        assert {row["slot"] for row in own if row["displaced"]} == {row["slot"] for row in guides}
        weighed = [row["advantage"] for row in rows if not row["displaced"]]
        assert len(weighed) == 8
        assert sum(weighed) == pytest.approx(0, abs=1e-9), "advantages are over the modified group"
    assert sizes == {0, 1, 2}


def test_verify_accepts_reused_rollouts_and_several_answers(
    reused: tuple[str, LegRecord, GuideManifest], replayed: LegRecord
) -> None:
    run, _, _ = reused
    opened = workspaces.workspace(run)
    assert verify_run(opened.run, opened.verifier, opened.decode) == []


def test_prompts_that_are_asked_for_by_name_make_a_guide_of_their_own(
    reused: tuple[str, LegRecord, GuideManifest],
) -> None:
    run, scout, guide = reused
    chosen = tuple(sorted({row["prompt_id"] for row in stored(run, guide)})[:2])
    few = guide_of(run, scout, prompts=chosen[::-1])
    assert open_run(run).guide_spec(few).prompt_ids == chosen
    assert few.guide_id != guide.guide_id
    own = [identity(row) for row in stored(run, guide) if row["prompt_id"] in chosen]
    assert [identity(row) for row in stored(run, few)] == own


def test_both_sources_ask_the_guide_policy_only_what_the_rollouts_leave_open(tmp_path: Path) -> None:
    run = begun(tmp_path, "both")
    scout = scouted(run)
    guide = guide_of(run, scout, 5)
    steps, rows = occurrences(run, 0, 5), rollouts(run, scout)
    reusable = {
        prompt_id: found
        for prompt_id in steps
        if (found := latest_correct(rows, prompt_id)) and found[0]["step"] > min(steps[prompt_id])
    }
    served = {p for p, found in reusable.items() if found[0]["step"] > max(steps[p])}
    assert 0 < len(served) < len(steps)
    sampled = [row for row in stored(run, guide) if row["behavior_step"] == SCOUT_STOP]
    kept = [identity(row) for row in stored(run, guide) if row["behavior_step"] < SCOUT_STOP]
    solved = {row["prompt_id"] for row in sampled}
    assert solved
    assert not solved & served
    assert sorted(kept) == sorted(identity(row) for p, found in reusable.items() if p not in solved for row in found)
    # The guide policy answers as it does where it is asked alone, and is paid for those prompts only.
    alone = begun(tmp_path / "alone", "checkpoint")
    every = guide_of(alone, scouted(alone), 5)
    same = [row for row in stored(alone, every) if row["prompt_id"] in solved]
    assert [row["completion_ids"] for row in sampled] == [row["completion_ids"] for row in same]
    assert 0 < guide.tokens_guide < every.tokens_guide
    assert len({guide_id(guide.spec), guide_id(every.spec)}) == 2


def test_the_steps_that_led_to_a_checkpoint_lie_on_several_legs(tmp_path: Path) -> None:
    run = begun(tmp_path, "leg")
    trained(run, open_leg(run, "main", checkpoint(run, 0)), 4)
    first = make_guide(run, checkpoint(run, 4), 0, 2)
    replay = trained(run, open_leg(run, "replay", schedule(run, first.guide_id).parent, first.guide_id), 2)
    main = trained(run, open_leg(run, "main", checkpoint(run, 2)), 6)
    guide = make_guide(run, checkpoint(run, 6), 1, 4)
    line = [row for row in rollouts(run, replay, main) if 1 <= row["step"] < 6]
    wanted = [
        identity(row)
        for prompt_id, steps in occurrences(run, 1, 4).items()
        for row in latest_correct(line, prompt_id)
        if row["step"] > min(steps)
    ]
    assert wanted
    assert sorted(identity(row) for row in stored(run, guide)) == sorted(wanted)
