"""The study of Q, V and S on a run's own checkpoints."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from flows.cli_stages import _signal_table
from npo_core.artifacts import RunArtifacts, main_line_checkpoints, open_run
from npo_core.interfaces import ConfigurationError, NearFutureError
from npo_core.report.decisions import ESTIMATORS
from npo_core.signal_study import grid
from npo_core.verifiers.kinds import load_verifier
from npo_core.verify import verify_run
from npo_core.workspace import Workspace
from schemas import layout
from schemas.records import CheckpointRef, SignalManifest
from tasks import legs, policies, signals, workspaces
from tests.command import npo
from tests.test_cli import parsed
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
    with pytest.raises(ConfigurationError, match=r"--step 10: no checkpoint lies ahead of step 10"):
        grid(saved(0, 10), (10,), ())


@pytest.mark.parametrize("steps", [(), (0,)])
def test_a_run_with_nothing_to_compare_is_told_to_train_on(steps: tuple[int, ...]) -> None:
    with pytest.raises(NearFutureError, match="it has 1; train on"):
        grid(saved(0), steps, ())
    with pytest.raises(NearFutureError, match="it has 0; train on"):
        grid({}, steps, ())


def test_the_same_grid_asked_for_in_another_order_or_twice_is_the_same_grid() -> None:
    asked = grid(saved(0, 10, 20, 30), (10, 0, 10), (20, 10, 20))
    assert asked == grid(saved(0, 10, 20, 30), (0, 10), (10, 20))
    assert len(asked) == len(set(asked)) == 4


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


@pytest.mark.slow
def test_the_command_finds_the_same_study_whatever_the_order_of_its_options_and_prints_its_rows(
    run: RunArtifacts, prefect_server: dict[str, str]
) -> None:
    (manifest,) = run.signals()
    asked = [
        "--step",
        "2",
        "--step",
        "0",
        "--lookahead",
        "4",
        "--lookahead",
        "2",
        "--prompts",
        "12",
        "--samples",
        "4",
        "--json",
    ]
    told = parsed(npo("stage", "signal", run.uri, *asked, env=prefect_server))
    assert told["stage"] == "signal"
    (artifact,) = told["artifacts"]
    assert artifact["signal_id"] == manifest.signal_id
    assert artifact["rows"] == run.table(manifest, "signal").to_pylist()
    assert run.signals() == [manifest]


def test_the_printed_table_fits_a_narrow_terminal_and_stars_the_largest_signal_of_a_step() -> None:
    columns = ("quality", "baseline", *(f"{part}{name}" for part in ("", "signal_") for name in ESTIMATORS))
    rows = [
        {"step": 100, "lookahead": far, "failed": 1000, **dict.fromkeys(columns, value)}
        for far, value in ((100, 0.25), (110, 0.75), (120, None))
    ]
    printed = io.StringIO()
    Console(file=printed, width=80).print(_signal_table(rows))
    lines = [line.split() for line in printed.getvalue().splitlines() if line.split()[:1] == ["100"]]
    assert lines == [
        ["100", "100", "1,000", *["0.250"] * 8],
        ["100", "110", "1,000", "0.750", "0.750", *["0.750", "0.750*"] * 3],
        ["100", "120", "1,000", *["–"] * 8],
    ]


def test_the_checkpoints_of_the_main_line_are_the_grid(run: RunArtifacts) -> None:
    assert sorted(main_line_checkpoints(run)) == [0, 2, 4, 6]
