"""Stages by hand, where the order of things matters. The tasks' functions run here without a scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from npo_core.artifacts import open_run
from npo_core.begin import begin
from npo_core.interfaces import ConfigurationError, NearFutureError
from npo_core.workspace import Workspace
from schemas import layout
from schemas.config import Config
from schemas.records import CheckpointRef, LegRecord
from tasks import legs, policies, workspaces
from tasks.decisions import record_schedule

open_leg, train_segment = legs.open_leg.fn, legs.train_segment.fn
make_guide, warm_start = policies.make_guide.fn, policies.commit_warm_start.fn
schedule = record_schedule.fn


def small(store: Path, **sections: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "demo", "store": f"file://{store}", "total_steps": 6, "segment_steps": 2},
            "data": {"prompts": 16, "held_out": 8},
            "rollout": {"prompts_per_step": 4},
            "evaluation": {"every": 0},
            **sections,
        }
    )


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run whose main line has come to step 4."""
    uri = workspaces.begin_run.fn(small(tmp_path))
    warm = warm_start(uri)
    leg = open_leg(uri, "main", warm)
    for start in (0, 2):
        train_segment(uri, leg, start, start + 2)
    return uri


def tip(run: str) -> LegRecord:
    return legs.main_line_step(run)[1]


def checkpoint(run: str, step: int) -> CheckpointRef:
    return legs.main_line_checkpoint(run, step)


def test_a_refused_configuration_leaves_nothing_in_a_run_that_was_killed_while_it_began(tmp_path: Path) -> None:
    first = begin(small(tmp_path))
    (tmp_path / "demo" / layout.PROMPTS).unlink()
    with pytest.raises(ConfigurationError, match=r"data\.prompts was 16, is 24"):
        begin(small(tmp_path, data={"prompts": 24, "held_out": 8}))
    again = begin(small(tmp_path))
    assert again.run.prompts().equals(first.run.prompts())


@pytest.mark.parametrize(("start", "stop", "step"), [(2, 2, 4), (4, 2, 4), (4, 6, 4)])
def test_a_window_that_no_guide_can_serve_is_refused(run: str, start: int, stop: int, step: int) -> None:
    with pytest.raises(ConfigurationError, match=f"from step {step} cannot serve steps {start}-{stop}"):
        make_guide(run, checkpoint(run, step), start, stop)
    assert open_run(run).guides() == []


def test_guides_of_one_checkpoint_have_decisions_of_their_own(run: str) -> None:
    windows = [(0, 2), (0, 4), (2, 4)]
    for start, stop in windows:
        schedule(run, make_guide(run, checkpoint(run, 4), start, stop).guide_id)
    decisions = open_run(run).decisions()
    assert sorted((d.start, d.start + d.window) for d in decisions) == windows  # type: ignore[operator]


def test_no_decision_is_recorded_for_a_rollback_that_cannot_be(run: str) -> None:
    guide = make_guide(run, checkpoint(run, 4), 3, 4)
    with pytest.raises(NearFutureError, match="step 3"):
        schedule(run, guide.guide_id)
    assert open_run(run).decisions() == []


def test_the_main_line_does_not_leave_a_replay_before_its_windows_end(run: str) -> None:
    guide = make_guide(run, checkpoint(run, 4), 0, 4)
    leg = open_leg(run, "replay", schedule(run, guide.guide_id).parent, guide.guide_id)
    train_segment(run, leg, 0, 2)
    with pytest.raises(NearFutureError, match=f"npo stage replay .* --guide {guide.guide_id}"):
        legs.require_finished(run, *reversed(legs.main_line_step(run)))
    train_segment(run, leg, 2, 4)
    legs.require_finished(run, *reversed(legs.main_line_step(run)))


def test_a_leg_that_is_no_longer_the_tip_is_refused_before_it_trains(run: str) -> None:
    old = tip(run)
    guide = make_guide(run, checkpoint(run, 4), 0, 2)
    open_leg(run, "replay", schedule(run, guide.guide_id).parent, guide.guide_id)
    with pytest.raises(NearFutureError, match="no longer the tip"):
        train_segment(run, old, 4, 6)
    assert open_run(run).checkpoint(old.leg_id, 6) is None


def test_a_guide_wants_the_segment_of_its_checkpoint_committed(run: str) -> None:
    ref = checkpoint(run, 4)
    (Path(run.removeprefix("file://")) / layout.manifest(layout.segment(ref.leg_id, 2, 4))).unlink()
    with pytest.raises(NearFutureError, match="is not committed"):
        make_guide(run, ref, 0, 2)


def test_weights_that_another_attempt_committed_first_are_loaded_before_training_goes_on(tmp_path: Path) -> None:
    undisturbed = workspaces.begin_run.fn(small(tmp_path / "a"))
    disturbed = workspaces.begin_run.fn(small(tmp_path / "b"))
    for uri in (undisturbed, disturbed):
        leg = open_leg(uri, "main", warm_start(uri))
        train_segment(uri, leg, 0, 2)
        if uri == disturbed:
            drop_segment_and_disturb_the_engine(workspaces.workspace(uri), leg)
            train_segment(uri, leg, 0, 2)
        train_segment(uri, leg, 2, 4)
    ends = [open_run(uri).require_checkpoint(tip(uri).leg_id, 4) for uri in (undisturbed, disturbed)]
    assert ends[0].digest == ends[1].digest


def drop_segment_and_disturb_the_engine(opened: Workspace, leg: LegRecord) -> None:
    """As if an attempt had died between checkpoint and segment, and the next one computed other bits."""
    folder = opened.run.uri.removeprefix("file://")
    (Path(folder) / layout.manifest(layout.segment(leg.leg_id, 0, 2))).unlink()
    assert leg.parent is not None
    engine = opened.holding(leg.parent, optimizer=True)
    for parameter in engine.learner.parameters.values():  # type: ignore[attr-defined]
        parameter.data.mul_(1.001)
