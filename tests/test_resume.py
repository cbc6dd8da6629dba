"""A run that is killed and started again ends bit-identical to one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from npo_core.artifacts import open_run
from npo_core.faults import FAULT_POINTS
from tests.command import autonpo_arguments, fingerprint, last_json, npo, run_arguments, was_killed

pytestmark = pytest.mark.slow

# In the order in which a run comes by them, so that each start gets one fault further.
MOMENTS = (
    "leg-record",  # the warm leg
    "checkpoint-data",  # the starting policy
    "head-moved",  # to the warm leg
    "evaluation-data",  # of the starting policy
    "segment-step:2",  # in the scout's first segment
    "checkpoint-manifest",  # of the scout
    "segment-data",
    "segment-manifest",
    "guide-sampling",
    "guide-data",
    "decision-record",  # to replay with the guide: no leg yet
    "leg-record",  # the replay leg: the head still at the warm leg
    "head-moved",  # to the replay leg
    "segment-data",  # of the replay leg
)


@pytest.fixture(scope="module")
def undisturbed(npo_run: str) -> dict[str, Any]:
    """What an NPO run leaves that nobody kills."""
    return fingerprint(open_run(npo_run))


def test_every_fault_point_of_npo_is_among_the_moments() -> None:
    assert {moment.partition(":")[0] for moment in MOMENTS} == set(FAULT_POINTS) - {"probe-sampled"}


def test_killed_at_every_fault_point_it_ends_bit_identical(
    tmp_path: Path, prefect_server: dict[str, str], undisturbed: dict[str, Any]
) -> None:
    arguments = run_arguments("testbed-npo", tmp_path, "demo")
    for moment in MOMENTS:
        assert was_killed(npo(*arguments, env={**prefect_server, "NPO_FAULT": moment})), f"no kill at {moment}"
    result = last_json(npo(*arguments, "--json", env=prefect_server))
    run = open_run(result["run"])
    assert fingerprint(run) == undisturbed
    assert npo("verify", result["run"]).returncode == 0


def test_an_extended_autonpo_run_is_what_a_long_one_leaves(
    tmp_path: Path, prefect_server: dict[str, str], autonpo_run: str
) -> None:
    # It ends where the monitor warns: asked for no more steps, it does not roll back.
    last_json(npo(*autonpo_arguments(tmp_path, "demo", run__total_steps=8), "--json", env=prefect_server))
    extended = last_json(npo(*autonpo_arguments(tmp_path, "demo"), "--json", env=prefect_server))
    found, wanted = (fingerprint(open_run(run)) for run in (extended["run"], autonpo_run))
    for part in ("head", "legs", "segments", "checkpoints", "guides", "decisions"):
        assert found[part] == wanted[part]


def test_a_finished_run_asked_for_again_changes_nothing_and_more_steps_extend_it(
    tmp_path: Path, prefect_server: dict[str, str], undisturbed: dict[str, Any]
) -> None:
    short = run_arguments("testbed-npo", tmp_path, "demo", run__total_steps=6)
    first = last_json(npo(*short, "--json", env=prefect_server))
    before = fingerprint(open_run(first["run"]))
    again = last_json(npo(*short, "--json", env=prefect_server))
    assert fingerprint(open_run(again["run"])) == before
    extended = last_json(npo(*run_arguments("testbed-npo", tmp_path, "demo"), "--json", env=prefect_server))
    assert extended["head_step"] == 8
    longer = fingerprint(open_run(extended["run"]))
    for part in ("head", "legs", "segments", "checkpoints", "guides"):
        assert longer[part] == undisturbed[part], f"{part}: extended is not what a long run leaves"


def test_a_run_starts_from_another_runs_checkpoint(tmp_path: Path, prefect_server: dict[str, str]) -> None:
    first = last_json(npo(*run_arguments("testbed-grpo", tmp_path, "first"), "--json", env=prefect_server))
    second = run_arguments(
        "testbed-grpo", tmp_path, "second", model__start_from=f"{first['run']}@4", run__total_steps=4
    )
    result = last_json(npo(*second, "--json", env=prefect_server))
    source, taken = open_run(first["run"]), open_run(result["run"])
    tip = source.require_checkpoint(source.head().leg_id, 4)  # type: ignore[union-attr]
    warm = next(leg for leg in taken.legs() if leg.kind == "warm")
    assert taken.require_checkpoint(warm.leg_id, 0).weights_digest == tip.weights_digest
