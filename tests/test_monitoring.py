"""A warning is seen three ways, one of them acts on it, and nothing intervenes twice."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import monitoring
from flows.monitoring import ATTEMPTS, watchdog
from npo_core import tip
from npo_core.artifacts import RunArtifacts, open_run
from npo_core.begin import begin
from npo_core.config_file import load_config
from npo_core.debris import kind_of
from npo_core.interfaces import ConfigurationError, NearFutureError
from npo_core.run_config import configure
from npo_core.verify import verify_run
from npo_core.workspace import Workspace
from schemas import layout
from schemas.config import Config
from schemas.decisions import DecisionCode
from tasks import legs, monitor, policies, workspaces
from tests.command import autonpo_arguments, fingerprint, last_json, npo
from tests.copies import folder_of
from tests.prefect_stack import client_of, eventually, final_state, process_worker, worker_log

ASKERS = ("flow", "event", "watchdog")


def configuration(store: Path, name: str, **overrides: object) -> Config:
    """Of `autonpo_arguments`."""
    _, config, *sets = autonpo_arguments(store, name, **overrides)
    return load_config(config, sets[1::2])


@pytest.fixture(scope="module")
def warned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, to be copied, whose main line stands at its first warning, which nobody has looked at."""
    store = tmp_path_factory.mktemp("warned")
    uri = workspaces.begin_run.fn(configuration(store, "demo", evaluation__every=0))
    leg = legs.open_leg.fn(uri, "main", policies.commit_warm_start.fn(uri))
    for start in range(0, 8, 2):
        legs.train_segment.fn(uri, leg, start, start + 2)
    return store / "demo"


@pytest.fixture
def run(warned: Path, tmp_path: Path) -> RunArtifacts:
    shutil.copytree(warned, tmp_path / "demo", ignore=shutil.ignore_patterns(layout.LEASES))
    return open_run(f"file://{tmp_path}/demo")


def switched(run: RunArtifacts, **autonpo: object) -> RunArtifacts:
    """The run, opened once with other settings of AutoNPO, as `npo run` does."""
    config = configure(run)
    run_section = config.run.model_copy(update={"store": run.uri.rpartition("/")[0]})
    begin(config.model_copy(update={"run": run_section, "autonpo": config.autonpo.model_copy(update=autonpo)}))
    return run


def test_a_warning_is_waited_for_until_it_is_decided_and_a_rollback_until_it_is_done(run: RunArtifacts) -> None:
    config = configure(run)
    warning = tip.waiting(run, config)
    assert warning is not None
    assert (warning.step, warning.code, run.decisions()) == (8, DecisionCode.WARNING, [])
    ended = config.model_copy(update={"run": config.run.model_copy(update={"total_steps": 8})})
    assert tip.waiting(run, ended) is None, "nobody decides at the end of a run"
    decided = monitor.confirm.fn(run.uri, warning)
    assert decided.intervene
    assert tip.waiting(run, config) == decided
    assert monitor.confirm.fn(run.uri, warning) == decided, "made once"
    assert run.decisions() == [decided]


def test_whatever_opens_a_run_by_its_uri_sees_how_it_was_last_opened(run: RunArtifacts) -> None:
    assert run.store.read_bytes(layout.CONFIG) is None, "the first configuration is in the record"
    for executes in ("watchdog", "event", "flow"):
        assert configure(switched(run, executes=executes)).autonpo.executes == executes
        assert Workspace.of(run).config.autonpo.executes == executes
    with pytest.raises(ConfigurationError, match="kappa was"):
        switched(run, kappa=7.0)
    assert configure(run).autonpo.kappa != 7.0, "what is refused is not kept"


def test_a_request_is_filed_once_an_asker_and_is_neither_fault_nor_debris(run: RunArtifacts) -> None:
    warning = tip.waiting(run, configure(run))
    assert warning is not None
    first = {by: monitor.file_request.fn(run.uri, warning, by) for by in ASKERS}
    again = {by: monitor.file_request.fn(run.uri, warning, by) for by in ASKERS}
    assert first == again
    filed = {request.by: (request.leg_id, request.step, request.reason) for request in run.requests()}
    assert filed == dict.fromkeys(ASKERS, (warning.leg_id, 8, warning.reason))
    for by in ASKERS:
        assert kind_of(layout.request(warning.leg_id, 8, by)) == "record"
    assert tip.waiting(run, configure(run)) is not None, "a request decides nothing"
    opened = Workspace.of(switched(run, executes="event"))
    assert verify_run(run, opened.verifier, opened.decode) == []
    (Path(run.uri.removeprefix("file://")) / layout.request("0" * 12, 8, "flow")).write_text(
        first["flow"].model_copy(update={"leg_id": "0" * 12}).model_dump_json()
    )
    assert [fault.key for fault in verify_run(run, opened.verifier, opened.decode)] == [
        layout.request("0" * 12, 8, "flow")
    ]


@pytest.fixture
def api(prefect_server: dict[str, str]) -> Iterator[None]:
    """Flows of this process speak to the tests' server."""
    from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

    server = {PREFECT_API_URL: prefect_server["PREFECT_API_URL"], PREFECT_LOGGING_TO_API_ENABLED: False}
    with temporary_settings(server):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("api")
def test_the_watchdog_asks_while_another_executes_and_decides_nothing(run: RunArtifacts) -> None:
    for executes in ("flow", "event"):
        ticks = [watchdog.fn(switched(run, executes=executes).uri) for _ in range(3)]
        assert [(tick.outcome, tick.step) for tick in ticks] == [("requested", 8)] * 3
        assert executes in ticks[0].reason
    assert [request.by for request in run.requests()] == ["watchdog"]
    assert run.decisions() == []
    assert run.store.list(layout.LEASES) == [], "it is no writer that others are warned of"


@pytest.mark.slow
@pytest.mark.usefixtures("api")
def test_the_watchdog_says_when_there_is_nothing_for_it(run: RunArtifacts, eight_steps: Path) -> None:
    with pytest.raises(ConfigurationError, match="a run of npo: only autonpo warns"):
        watchdog.fn(f"file://{eight_steps}/synthetic")
    with pytest.raises(NearFutureError, match="there is no run 'gone'"):
        watchdog.fn(run.uri.replace("demo", "gone"))
    assert watchdog.fn(switched(run, executes="flow").uri).outcome == "requested"
    config = configure(run)
    store = run.uri.rpartition("/")[0]
    begin(config.model_copy(update={"run": config.run.model_copy(update={"total_steps": 8, "store": store})}))
    tick = watchdog.fn(run.uri)
    assert (tick.outcome, tick.reason) == ("ended", "all 8 steps are trained")


@pytest.mark.slow
@pytest.mark.usefixtures("api")
def test_who_does_not_execute_asks_and_a_person_acts_whoever_executes(run: RunArtifacts) -> None:
    switched(run, executes="watchdog")
    assert monitoring.intervene(run.uri, "event") is None
    assert monitoring.intervene(run.uri) is None, "a person decides by `monitor`"
    assert run.decisions() == []
    decision = monitoring.monitor(run.uri)
    assert monitoring.intervene(run.uri, "event") is None
    replayed = monitoring.intervene(run.uri)
    assert replayed is not None
    assert (replayed.step, len(run.decisions())) == (decision.step, 1)
    assert [(request.step, request.by) for request in run.requests()] == [(8, "event")]


@pytest.mark.slow
def test_without_the_deployment_the_watchdog_names_the_remedy(
    run: RunArtifacts, prefect_server: dict[str, str]
) -> None:
    switched(run, executes="watchdog")
    refused = npo("stage", "watchdog", run.uri, env=prefect_server)
    assert refused.returncode == 1
    assert "has no deployment intervene/default" in refused.stderr
    assert "deploy/bootstrap" in refused.stderr


@pytest.mark.slow
def test_a_watchdog_that_tried_often_enough_gives_up(run: RunArtifacts, deployed: dict[str, str]) -> None:
    from prefect.states import Failed

    switched(run, executes="watchdog")
    with client_of(deployed) as client:
        for attempt in range(ATTEMPTS):
            assert f"attempt {attempt + 1}, is Scheduled" in watchdog.fn(run.uri).reason
            (flow_run,) = interventions(client, run, "Scheduled")
            client.set_flow_run_state(flow_run.id, Failed(), force=True)
        with pytest.raises(NearFutureError, match=f"ended {ATTEMPTS} times and left .* waiting at step 8"):
            watchdog.fn(run.uri)


@pytest.mark.slow
def test_what_a_person_cancelled_the_watchdog_does_not_start_again(run: RunArtifacts, deployed: dict[str, str]) -> None:
    from prefect.states import Cancelled

    switched(run, executes="watchdog")
    with client_of(deployed) as client:
        assert watchdog.fn(run.uri).outcome == "started"
        (flow_run,) = interventions(client, run, "Scheduled")
        client.set_flow_run_state(flow_run.id, Cancelled(), force=True)
        assert [watchdog.fn(run.uri).outcome for _ in range(2)] == ["cancelled"] * 2
        assert len(interventions(client, run)) == 1


def interventions(client: Any, run: RunArtifacts, *states: str) -> list[Any]:
    """Flow runs of `intervene/default` about a run; in any state where none is named."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId

    deployment = client.read_deployment_by_name(monitoring.INTERVENE)
    made = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id])), limit=200
    )
    return [m for m in made if m.parameters["run"] == run.uri and (not states or m.state_name in states)]


def ended(client: Any, run: RunArtifacts, by: str) -> list[str]:
    """The states of the flow runs that `by` started about a run, if all of them have ended."""
    states = [final_state(made) for made in interventions(client, run) if made.parameters["by"] == by]
    return [state for state in states if state is not None] if all(states) else []


@pytest.mark.slow
def test_event_and_watchdog_end_where_the_flow_ends_and_nothing_intervenes_twice(
    autonpo_run: str, deployed: dict[str, str]
) -> None:
    by_flow, store = open_run(autonpo_run), deployed["NPO_STORE"]
    by_watchdog, by_event = (open_run(f"{store}/{executes}/demo") for executes in ("watchdog", "event"))

    def run_by(executes: str) -> Any:
        arguments = autonpo_arguments(f"{store}/{executes}", "demo", autonpo__executes=executes)
        return last_json(npo(*arguments, "--json", env=deployed))

    with client_of(deployed) as client:
        assert run_by("watchdog")["status"] == "waiting"
        shutil.copytree(folder_of(by_watchdog), folder_of(by_event))
        assert {watchdog.fn(by_watchdog.uri).outcome for _ in range(3)} == {"started"}
        with process_worker({**deployed, "NPO_FAULT": "decision-record"}):
            states = eventually(lambda: ended(client, by_watchdog, "watchdog"), "the attempt is killed", 300)
            assert states == ["Crashed"], worker_log(deployed).read_text()
            eventually(lambda: ended(client, by_watchdog, "event"), "the event asks", 300)
        assert [decision.intervene for decision in by_watchdog.decisions()] == [True]

        assert run_by("event")["status"] == "waiting", "and emits the event, as it does each time"
        eventually(lambda: interventions(client, by_event), "the event starts the intervention", 300)
        parameters = {"run": by_event.uri, "by": "event"}
        again = client.read_deployment_by_name(monitoring.INTERVENE)
        client.create_flow_run_from_deployment(again.id, parameters=parameters)
        watch = client.read_deployment_by_name("watchdog/default")
        ticked = client.create_flow_run_from_deployment(watch.id, parameters={"run": by_watchdog.uri})

        def done() -> bool:
            if not ended(client, by_watchdog, "watchdog") or watchdog.fn(by_watchdog.uri).outcome != "ended":
                return False
            return all(ended(client, made, "event") for made in (by_event, by_watchdog))

        with process_worker(deployed):
            eventually(done, "both have ended", 400)
            assert eventually(lambda: final_state(client.read_flow_run(ticked.id)), "the tick ends") == "Completed"
        assert sorted(ended(client, by_watchdog, "watchdog")) == ["Completed", "Completed", "Crashed"]
        assert set(ended(client, by_event, "event")) == {"Completed"}

    assert run_by("event")["status"] == "done"
    for run in (by_event, by_watchdog):
        assert fingerprint(run) == fingerprint(by_flow)
        assert [(d.step, d.intervene) for d in run.decisions()] == [(8, True), (10, True)]
    asked = [{(request.step, request.by) for request in run.requests()} for run in (by_event, by_watchdog)]
    assert asked[0] == {(8, "flow"), (10, "flow")}
    assert asked[1] - {(10, "event")} == {(8, "flow"), (8, "event"), (10, "flow")}
