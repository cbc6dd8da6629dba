"""AutoNPO on the embedded testbed, by the command: it intervenes by itself, and every decision can be explained."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from npo_core import lineage, views
from npo_core.artifacts import RunArtifacts, open_run
from npo_core.explain import moments
from npo_core.monitor import recent_mistakes
from npo_core.rows import Where
from npo_core.trajectories import trajectories
from npo_core.workspace import Workspace
from schemas import tables
from schemas.decisions import DecisionRecord
from schemas.records import GuideManifest, LegRecord
from tests.command import autonpo_arguments, last_json, npo, run_arguments, was_killed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(autonpo_run: str) -> RunArtifacts:
    return open_run(autonpo_run)


@pytest.fixture(scope="module")
def interventions(run: RunArtifacts) -> list[DecisionRecord]:
    made = [decision for decision in run.decisions() if decision.intervene]
    assert len(made) == 2
    return made


def replay_of(run: RunArtifacts, decision: DecisionRecord) -> tuple[LegRecord, GuideManifest]:
    """The leg that a decision led to, and its guide."""
    guides = {guide.guide_id: guide for guide in run.guides() if guide.spec.checkpoint == decision.guide}
    (leg,) = (leg for leg in run.legs() if leg.guide_id in guides)
    return leg, guides[leg.guide_id or ""]


def explained(uri: str, *overrides: str) -> list[dict[str, Any]]:
    sets = [word for override in overrides for word in ("-s", override)]
    return list(last_json(npo("explain", uri, *sets, "--json"))["decisions"])


def test_training_rolls_back_to_the_decisions_checkpoint_and_the_abandoned_steps_stay(
    run: RunArtifacts, interventions: list[DecisionRecord]
) -> None:
    shown = views.show(run)
    for decision in interventions:
        abandoned = next(leg for leg in shown["legs"] if leg["leg_id"] == decision.leg_id)
        assert abandoned["stop"] == decision.step
        assert abandoned["status"] in ("cut", "abandoned")
        replay, guide = replay_of(run, decision)
        assert replay.parent == decision.parent
        assert (guide.spec.start, guide.spec.stop) == (decision.start, decision.step)
    assert shown["head"]["step"] == 16


def test_the_replay_uses_the_guide_for_the_decisions_mistakes_only(
    run: RunArtifacts, interventions: list[DecisionRecord]
) -> None:
    rows = trajectories(run, tables.TRAJECTORIES.names, Where(source="guide"))
    assert rows.height > 0
    for decision in interventions:
        frozen = {mistake.prompt_id for mistake in decision.mistakes}
        replay, guide = replay_of(run, decision)
        assert set(run.guide_spec(guide).prompt_ids) == frozen
        assert set(rows.filter(leg_id=replay.leg_id)["prompt_id"]) <= frozen


def test_state_is_rewound_with_the_checkpoint_and_the_clock_is_not(
    run: RunArtifacts, interventions: list[DecisionRecord]
) -> None:
    first, second = interventions
    assert first.parent is not None
    before = run.monitor_state(first.parent)
    assert before.observations[-1].step == first.parent.step - 1
    replay, _ = replay_of(run, first)
    after = run.monitor_state(run.checkpoints(replay.leg_id)[0].ref)
    assert after.observations[: len(before.observations)] == before.observations, "goes on from where it was"
    assert after.observations[len(before.observations)].step == first.parent.step
    assert (first.clock, second.clock) == (first.step, second.step + (first.lookahead or 0))


def test_stored_metrics_give_the_state_of_every_checkpoint_again(run: RunArtifacts) -> None:
    settings = Workspace.of(run).config.autonpo
    seen = list(moments(run, settings))
    assert len(seen) > 8
    for moment in seen:
        assert moment.state == run.monitor_state(run.require_checkpoint(moment.leg.leg_id, moment.step).ref)


def test_a_decision_freezes_what_it_was_made_of(run: RunArtifacts, interventions: list[DecisionRecord]) -> None:
    for decision in interventions:
        assert decision.guide is not None
        pool = run.monitor_state(decision.guide).pool
        assert decision.mistakes == recent_mistakes(pool, decision.step, decision.lookahead or 0)
        chosen = next(c for c in decision.candidates if c.lookahead == decision.lookahead)
        assert chosen.parent == decision.parent
        assert chosen.baseline is not None
        assert chosen.signal[decision.variance or ""].value == max(
            c.signal[decision.variance or ""].value for c in decision.candidates if c.pool >= 2
        )


def test_probes_are_paid_for(run: RunArtifacts) -> None:
    spent = sum(decision.tokens_probe for decision in run.decisions())
    guides = sum(guide.tokens_guide for guide in run.guides())
    assert spent > 0
    assert views.show(run)["tokens"]["guide"] == guides + spent
    steps = views.steps(run)
    # Every probe's warning was acted on here, so the tip depended on all of them.
    own = steps["tokens/policy"].sum()
    line = {stretch.leg.leg_id for stretch in lineage.main_line(run.legs(), run.head())}
    assert steps.filter("main_line").sort("step")["total_tokens"][-1] == own + guides + spent, line


def test_every_moment_is_explained_as_it_was_decided(run: RunArtifacts, interventions: list[DecisionRecord]) -> None:
    rows = explained(run.uri)
    trained = [(leg.leg_id, segment.stop) for leg in run.legs() for segment in run.segments(leg.leg_id)]
    assert [(row["leg_id"], row["step"]) for row in rows] == trained
    acted = [(row["leg_id"], row["step"], row["lookahead"], row["reason"]) for row in rows if row["intervene"]]
    assert acted == [(d.leg_id, d.step, d.lookahead, d.reason) for d in interventions]
    assert not any(row["differs"] for row in rows)
    assert [row["clock"] for row in rows] == [*range(2, 2 * len(rows) + 1, 2)], "the clock never goes back"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("autonpo.first_check=9", "too-early"),
        ("autonpo.min_gain=0", "would have decided"),
        ("autonpo.min_quality=1", "would have decided low-quality"),
        ("autonpo.probe_prompts=3", "would have probed"),
    ],
)
def test_other_settings_explain_up_to_the_first_decision_that_differs(
    autonpo_run: str, interventions: list[DecisionRecord], override: str, says: str
) -> None:
    rows = explained(autonpo_run, override)
    assert [row["differs"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert (rows[-1]["leg_id"], rows[-1]["step"]) == (interventions[0].leg_id, interventions[0].step)
    assert says in rows[-1]["reason"]
    assert "what follows is unknown" in rows[-1]["reason"]


def test_settings_of_another_section_explain_nothing(autonpo_run: str) -> None:
    refused = npo("explain", autonpo_run, "-s", "algorithm.gate=0.3")
    assert refused.returncode == 2
    assert "only autonpo.… can be set" in refused.stderr


def test_a_run_of_another_method_is_told_what_autonpo_would_have_made_of_it(
    tmp_path: Path, prefect_server: dict[str, str]
) -> None:
    plain = last_json(npo(*run_arguments("testbed-grpo", tmp_path, "plain"), "--json", env=prefect_server))
    eager = ("autonpo.patience=2", "autonpo.trend_steps=8", "autonpo.trend_z=0", "autonpo.min_gain=9")
    rows = explained(plain["run"], *eager, "autonpo.first_check=1")
    assert "too-short" in {row["code"] for row in rows}
    assert rows[-1]["code"] == "warning" or not rows[-1]["differs"]


def test_a_decision_is_committed_before_anything_acts_on_it(tmp_path: Path, prefect_server: dict[str, str]) -> None:
    arguments = autonpo_arguments(tmp_path, "demo")
    assert was_killed(npo(*arguments, env={**prefect_server, "NPO_FAULT": "decision-record"}))
    run = open_run(f"file://{tmp_path}/demo")
    assert [decision.intervene for decision in run.decisions()] == [True]
    assert run.guides() == []
    assert {leg.kind for leg in run.legs()} == {"warm", "main"}


def test_monitor_and_intervene_run_as_stages_of_their_own(tmp_path: Path, prefect_server: dict[str, str]) -> None:
    arguments = autonpo_arguments(tmp_path, "demo")
    assert was_killed(npo(*arguments, env={**prefect_server, "NPO_FAULT": "decision-record"}))
    uri = f"file://{tmp_path}/demo"
    decided = last_json(npo("stage", "monitor", uri, "--json", env=prefect_server))["artifacts"][0]
    assert decided["code"] == "intervene"
    done = last_json(npo("stage", "intervene", uri, "--json", env=prefect_server))["artifacts"][0]
    assert done["step"] == decided["step"]
    assert last_json(npo("stage", "intervene", uri, "--json", env=prefect_server))["artifacts"] == []
    quiet = last_json(npo("stage", "monitor", uri, "--json", env=prefect_server))["artifacts"][0]
    assert quiet["code"] == "cooldown"
    assert len(open_run(uri).decisions()) == 1, "a quiet moment is not written down"


@pytest.fixture(scope="module")
def listening_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Prefect server with its services: the one that `npo` starts for itself keeps no events."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = {"PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, **home}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    api = {**home, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    try:
        _eventually(lambda: urllib.request.urlopen(f"{api['PREFECT_API_URL']}/health", timeout=5).status == 200)
        yield api
    finally:
        server.terminate()
        server.wait(timeout=60)


def test_prefect_hears_of_a_warning_before_it_is_decided_and_people_of_the_decision(
    tmp_path: Path, listening_server: dict[str, str]
) -> None:
    arguments = autonpo_arguments(tmp_path, "demo", autonpo__executes="event")
    waits = last_json(npo(*arguments, "--json", env=listening_server))
    assert (waits["status"], waits["head_step"], waits["eval"]["after"], waits["report"]) == ("waiting", 8, None, None)
    (asked,) = last_json(npo("explain", waits["run"], "--json"))["requests"]
    assert (asked["step"], asked["by"]) == (8, "flow")

    def told() -> list[Any]:
        wanted = {"filter": {"event": {"name": ["npo.lookahead.stagnation"]}}}
        events = _post(listening_server, "events/filter", wanted)["events"]
        return [event["payload"] | {"resource": event["resource"]["prefect.resource.id"]} for event in events]

    _eventually(lambda: bool(told()))
    assert open_run(waits["run"]).decisions() == []
    wanted = {"run": waits["run"], "leg_id": asked["leg_id"], "step": 8, "code": "warning", "reason": asked["reason"]}
    assert told() == [wanted | {"resource": "npo.run.demo"}]

    decision = last_json(npo("stage", "monitor", waits["run"], "--json", env=listening_server))["artifacts"][0]
    key = f"decision-demo-{decision['leg_id']}-{decision['step']}"
    shown = {artifact["key"]: artifact["data"] for artifact in _post(listening_server, "artifacts/filter", {})}
    assert f"| {decision['lookahead']} **chosen** |" in shown[key]


def _eventually(holds: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if holds():
                return
        time.sleep(0.5)
    raise AssertionError("it did not come about in time")


def _post(server: dict[str, str], path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{server['PREFECT_API_URL']}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)
