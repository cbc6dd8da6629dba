"""The study of Q, V and S on a run's own checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npo_core.artifacts import RunArtifacts, main_line_checkpoints, open_run
from npo_core.interfaces import ConfigurationError
from npo_core.prompts import load_verifier
from npo_core.signal_study import grid
from npo_core.verify import verify_run
from npo_core.workspace import Workspace
from schemas import layout
from schemas.records import CheckpointRef, SignalManifest
from tasks import legs, policies, signals, workspaces
from tests.test_stages import small

measure_signal = signals.measure_signal.fn


def saved(*steps: int) -> dict[int, CheckpointRef]:
    return {step: CheckpointRef(leg_id="leg", step=step, digest=str(step)) for step in steps}


def points(*arguments: object) -> list[tuple[int, int]]:
    return [(now.step, ahead.step - now.step) for now, ahead in grid(*arguments)]  # type: ignore[arg-type]


def test_by_default_the_start_and_the_middle_are_studied_over_distances_spread_evenly() -> None:
    found = points(saved(*range(0, 101, 5)), (), ())
    assert {step for step, _ in found} == {0, 50}
    assert [far for step, far in found if step == 0] == [5, 20, 30, 45, 60, 75, 85, 100]
    assert [far for step, far in found if step == 50] == [5, 10, 20, 25, 30, 35, 45, 50]


def test_only_distances_that_lead_to_a_checkpoint_are_points() -> None:
    assert points(saved(0, 10, 20, 40), (0, 20), (20, 40)) == [(0, 20), (0, 40), (20, 20)]


def test_a_step_without_a_checkpoint_and_a_distance_that_leads_nowhere_are_told_what_there_is() -> None:
    with pytest.raises(ConfigurationError, match=r"--step 15: .* its steps: 0, 10"):
        grid(saved(0, 10), (15,), ())
    with pytest.raises(ConfigurationError, match=r"--lookahead 7: no checkpoint lies so far ahead of step 0"):
        grid(saved(0, 10), (0,), (7,))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunArtifacts:
    """A run of six steps, studied."""
    config = small(tmp_path_factory.mktemp("signal"), learner={"learning_rate": 1e-3})
    uri = workspaces.begin_run.fn(config)
    leg = legs.open_leg.fn(uri, "main", policies.commit_warm_start.fn(uri))
    for start in (0, 2, 4):
        legs.train_segment.fn(uri, leg, start, start + 2)
    measure_signal(uri, (0, 2), (2, 4), 12, 4)
    return open_run(uri)


def faults(run: RunArtifacts) -> list[str]:
    opened = Workspace.of(run)
    return [fault.problem for fault in verify_run(run, load_verifier(opened.config), opened.decode)]


def test_every_point_is_measured_on_the_prompts_that_the_earlier_policy_fails(run: RunArtifacts) -> None:
    (manifest,) = run.signals()
    rows = run.table(manifest, "signal").to_pylist()
    assert [(row["step"], row["lookahead"]) for row in rows] == [(0, 2), (0, 4), (2, 2), (2, 4)]
    for row in rows:
        assert row["prompts"] == 12
        assert 0 < row["failed"] <= 12
        assert row["samples"] == 4 * row["failed"]
        for name in ("kl_token", "kl_sequence", "chi2"):
            assert row[f"{name}_low"] >= 1
            assert row[f"signal_{name}"] == pytest.approx(row["quality"] / row[name])
        assert row["quality_low"] <= row["quality"] <= row["quality_high"]
        assert 0 <= row["baseline"] <= 1
    assert manifest.tokens > 0
    assert faults(run) == []


def test_asked_for_again_it_is_found_and_another_grid_is_another_study(run: RunArtifacts) -> None:
    (before,) = run.signals()
    assert measure_signal(run.uri, (0, 2), (2, 4), 12, 4) == before
    other = measure_signal(run.uri, (2,), (2,), 12, 4)
    assert other.signal_id != before.signal_id
    same, one = run.table(before, "signal").to_pylist()[2], run.table(other, "signal").to_pylist()[0]
    assert same == one, "a point does not depend on what else is studied"
    folder = Path(run.uri.removeprefix("file://")) / layout.signal(other.signal_id)
    for file in folder.iterdir():
        file.unlink()


def test_verify_sees_a_study_that_was_altered(run: RunArtifacts) -> None:
    (manifest,) = run.signals()
    path = Path(run.uri.removeprefix("file://")) / layout.manifest(layout.signal(manifest.signal_id))
    before = path.read_bytes()
    altered = SignalManifest.model_validate_json(before).model_dump(mode="json")
    altered["spec"]["samples"] += 1
    path.write_text(json.dumps(altered))
    assert any("was altered: it is study" in problem for problem in faults(run))
    path.write_bytes(before)
    assert faults(run) == []


def test_the_checkpoints_of_the_main_line_are_the_grid(run: RunArtifacts) -> None:
    assert sorted(main_line_checkpoints(run)) == [0, 2, 4, 6]
