"""The future leg under settings of its own, and the steps after which it stops."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from npo_core.artifacts import open_run
from npo_core.interfaces import Prompt
from schemas.records import LegRecord
from tasks import legs, workspaces
from tests.command import fingerprint, last_json, npo, run_arguments, was_killed
from tests.test_stages import checkpoint, make_guide, open_leg, schedule, small, train_segment, warm_start

RATE, SCOUT_RATE = 1e-3, 3e-3
LEARNER = {"learning_rate": RATE, "warmup_steps": 8}
CHEAPER = {"group_size": 3, "prompts_per_step": 2, "learning_rate": SCOUT_RATE}


def begun(store: Path, **scout: Any) -> tuple[str, LegRecord]:
    """A run whose main line has come to step 2."""
    uri = workspaces.begin_run.fn(small(store, learner=LEARNER, future={"scout": scout, "k": 4}))
    leg = open_leg(uri, "main", warm_start(uri))
    train_segment(uri, leg, 0, 2)
    return uri, leg


def scouted(run: str, stop: int) -> LegRecord:
    """A scout from step 2."""
    leg = open_leg(run, "scout", checkpoint(run, 2))
    for start in range(2, stop, 2):
        train_segment(run, leg, start, start + 2)
    return leg


def rows(run: str, leg: LegRecord, role: str) -> list[dict[str, Any]]:
    opened = open_run(run)
    return [row for segment in opened.segments(leg.leg_id) for row in opened.table(segment, role).to_pylist()]


def batch(run: str, step: int) -> list[Prompt]:
    return workspaces.workspace(run).prompts.batch(step)


def test_a_cheaper_scout_trains_on_the_first_prompts_of_each_batch_with_a_rate_of_its_own(tmp_path: Path) -> None:
    run, _ = begun(tmp_path, **CHEAPER)
    leg = scouted(run, 4)
    for step, metrics in zip((2, 3), rows(run, leg, "metrics"), strict=True):
        groups = [row for row in rows(run, leg, "rollouts") if row["step"] == step]
        asked = [prompt.prompt_id for prompt in batch(run, step)[:2]]
        assert sorted((row["prompt_id"], row["slot"]) for row in groups) == sorted(
            (p, n) for p in asked for n in range(3)
        )
        # The parent's schedule goes on, at the scout's peak and not at the stored one.
        assert metrics["learning_rate"] == pytest.approx(SCOUT_RATE * (step + 1) / 8)


def test_a_scout_leaves_the_main_line_as_it_would_be_without_one(tmp_path: Path) -> None:
    ends = []
    for name, has_scout in (("alone", False), ("scouted", True)):
        run, leg = begun(tmp_path / name, **CHEAPER)
        if has_scout:
            # In one process, from the checkpoint that the main line goes on from.
            scouted(run, 4)
        train_segment(run, leg, 2, 4)
        ends.append(open_run(run).require_checkpoint(leg.leg_id, 4).digest)
    assert ends[0] == ends[1]


def test_a_replay_behind_a_cheaper_scout_is_as_wide_as_the_main_line(tmp_path: Path) -> None:
    run, _ = begun(tmp_path, **CHEAPER)
    guide = make_guide(run, legs.leg_checkpoint(run, scouted(run, 4), 4), 2, 4)
    assert set(open_run(run).guide_spec(guide).prompt_ids) == {
        prompt.prompt_id for step in (2, 3) for prompt in batch(run, step)
    }
    leg = open_leg(run, "replay", schedule(run, guide.guide_id).parent, guide.guide_id)
    train_segment(run, leg, 2, 4)
    own = [row for row in rows(run, leg, "rollouts") if row["source"] == "policy"]
    assert len(own) == 2 * 4 * 8
    assert [row["learning_rate"] for row in rows(run, leg, "metrics")] == pytest.approx([RATE * 3 / 8, RATE * 4 / 8])


def test_a_scout_is_done_where_its_own_metrics_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, _ = begun(tmp_path, patience=2, min_gain=1.0)  # no coverage rises by as much
    leg = scouted(run, 8)
    with caplog.at_level(logging.INFO, "npo"):
        assert [legs.scout_is_done(run, leg, step) for step in (2, 4, 6, 8)] == [False, False, True, True]
    assert "the scout stops at step 6: its coverage has grown by less than 1 in 2 steps" in caplog.text


def test_a_scout_without_patience_is_never_done(tmp_path: Path) -> None:
    run, _ = begun(tmp_path, min_gain=1.0)
    assert not legs.scout_is_done(run, scouted(run, 4), 4)


@pytest.mark.slow
def test_a_scout_that_stops_early_stops_at_the_same_step_after_a_kill(
    tmp_path: Path, prefect_server: dict[str, str]
) -> None:
    early = {
        "future__interventions__0__lookahead": 8,
        "future__scout__patience": 2,
        "future__scout__min_gain": 1.0,
        "future__source": "both",
        "algorithm__guide_slots": 2,
    }
    runs = []
    for name, moments in (("undisturbed", ()), ("killed", ("segment-manifest", "segment-step:2", "guide-sampling"))):
        arguments = run_arguments("testbed-npo", tmp_path / name, "demo", **early)
        for moment in moments:
            assert was_killed(npo(*arguments, env={**prefect_server, "NPO_FAULT": moment}))
        runs.append(open_run(last_json(npo(*arguments, "--json", env=prefect_server))["run"]))
    (guide,) = runs[0].guides()
    assert (guide.spec.checkpoint.step, guide.spec.stop) == (4, 4), "twice its patience, and not Δ"
    assert fingerprint(runs[0]) == fingerprint(runs[1])
