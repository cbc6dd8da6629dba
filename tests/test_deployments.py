"""The deployments on a real Prefect server, with authentication, CSRF protection and its services: made, run, gone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from npo_core.artifacts import RunArtifacts, open_run
from tests.command import ROOT, last_json, npo, run_arguments
from tests.prefect_stack import bootstrap, client_of, eventually, final_state, process_worker, worker_log

pytestmark = pytest.mark.slow

STAGES = ["warm-start", "scout", "guide", "replay", "main", "evaluate", "signal", "report"]
MONITORING = ["monitor", "intervene", "watchdog"]
FLOWS = [*STAGES, *MONITORING, "grpo", "npo", "autonpo"]
ELSEWHERE = ["guide", "main", "grpo", "npo", "autonpo"]
REQUIRED: dict[str, dict[str, Any]] = {
    "guide": {"checkpoint": {"leg_id": "0", "step": 0, "digest": "0"}},
    "replay": {"guide_id": "0"},
}
"""Parameters without a sensible default."""


@pytest.fixture(scope="module", autouse=True)
def schedules_off(prefect_stack: dict[str, str]) -> Iterator[None]:
    """Afterwards no schedule is active: what these tests switch on would keep other tests' workers busy."""
    yield
    with client_of(prefect_stack) as client:
        for deployment in client.read_deployments(limit=200):
            for schedule in deployment.schedules:
                client.update_deployment_schedule(deployment.id, schedule.id, active=False)
        late = [made for made in client.read_flow_runs(limit=200) if made.auto_scheduled and not final_state(made)]
        for made in late:
            client.delete_flow_run(made.id)


def state_of(client: Any) -> dict[str, Any]:
    """What bootstrap made, without times of change and versions."""
    volatile = {"updated", "version_id", "version_info", "status", "last_polled"}
    deployments = client.read_deployments(limit=200)
    return {
        "deployments": {
            d.id: {
                **d.model_dump(exclude={*volatile, "schedules"}),
                "schedules": [s.model_dump(include={"slug", "active", "schedule", "parameters"}) for s in d.schedules],
            }
            for d in deployments
        },
        "pools": {p.id: p.model_dump(exclude=volatile) for p in client.read_work_pools()},
        "queues": sorted((q.name, q.concurrency_limit) for q in client.read_work_queues(work_pool_name="npo-process")),
        # A deploy makes the automations of its triggers anew.
        "automations": {
            a.name: a.model_dump(exclude={"id": True, "trigger": {"id"}}) for a in client.read_automations()
        },
    }


@pytest.mark.parametrize("name", ["PREFECT_API_URL", "NPO_HOME", "NPO_STORE", "NPO_IMAGE"])
def test_an_unset_variable_is_named_before_anything_is_made(name: str) -> None:
    variables = ("PREFECT_API_URL", "NPO_HOME", "NPO_STORE", "NPO_IMAGE")
    refused = bootstrap({variable: "/anything" for variable in variables if variable != name})
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"bootstrap: {name} not set; export it")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PREFECT_API_URL", "http://127.0.0.1:9/api", "PREFECT_API_URL http://127.0.0.1:9/api does not answer"),
        ("PREFECT_API_URL", "http://127.0.0.1:4200", "it looks like http://HOST:4200/api"),
        ("PREFECT_API_AUTH_STRING", "somebody:wrong", "refuses us (401); set PREFECT_API_AUTH_STRING"),
        ("PREFECT_API_AUTH_STRING", "", "refuses us (401); set PREFECT_API_AUTH_STRING"),
        ("NPO_HOME", "here", "NPO_HOME 'here' is no absolute path"),
        ("NPO_STORE", "runs", "NPO_STORE 'runs' is no URL"),
        ("NPO_STORE", "s3://key:secret@bucket/runs", "the URL holds credentials"),
    ],
)
def test_a_server_or_value_that_will_not_do_is_told_in_one_line(
    prefect_stack: dict[str, str], variable: str, value: str, message: str
) -> None:
    refused = bootstrap({**prefect_stack, variable: value})
    assert refused.returncode == 1
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_second_bootstrap_changes_nothing_not_even_a_schedule_that_was_switched_on(deployed: dict[str, str]) -> None:
    with client_of(deployed) as client:
        assert not any(schedule.active for d in client.read_deployments(limit=200) for schedule in d.schedules)
        monitor = client.read_deployment_by_name("monitor/default")
        client.update_deployment_schedule(monitor.id, monitor.schedules[0].id, active=True)
        before = state_of(client)
        second = bootstrap(deployed)
        assert second.returncode == 0, second.stdout + second.stderr
        assert "made" not in second.stdout
        after = state_of(client)
        assert after == before
        assert len(after["pools"]) == 3
        assert len(after["automations"]) == 2
        assert ("training", 1) in after["queues"]


def test_every_flow_has_its_deployments_and_they_refuse_wrong_parameters(deployed: dict[str, str]) -> None:
    from prefect import Flow
    from prefect.exceptions import PrefectHTTPStatusError

    from flows import monitoring, pipeline, stages

    modules = (stages, monitoring, pipeline)
    defined = {made.name for module in modules for made in vars(module).values() if isinstance(made, Flow)}
    assert defined == set(FLOWS)
    with client_of(deployed) as client:
        names = [f"{name}/default" for name in FLOWS]
        names += [f"{name}/{pool}" for name in ELSEWHERE for pool in ("docker", "kubernetes")]
        assert len(client.read_deployments(limit=200)) == len(names)
        for name in names:
            deployment = client.read_deployment_by_name(name)
            schema = deployment.parameter_openapi_schema["properties"]
            assert all(parameter["description"] for parameter in schema.values()), name
            wrong = (
                {"config": {"run": {"name": "Not A Slug"}}}
                if "config" in schema
                else {"run": 3, **REQUIRED.get(deployment.entrypoint.partition(":")[2], {})}
            )
            with pytest.raises(PrefectHTTPStatusError) as refused:
                client.create_flow_run_from_deployment(deployment.id, parameters=wrong)
            assert refused.value.response.status_code == 409
            detail = refused.value.response.text
            assert ("does not match" if "config" in schema else "3 is not of type 'string'") in detail, detail
            assert ("'config.run.name'" if "config" in schema else "'run'") in detail, detail
            url = "s3://key:secret@bucket/runs"
            wrong = (
                {"config": {"run": {"name": "a", "store": url}}} if "config" in schema else {**wrong, "run": f"{url}/a"}
            )
            with pytest.raises(PrefectHTTPStatusError, match="does not match"):
                client.create_flow_run_from_deployment(deployment.id, parameters=wrong)


def test_kubernetes_jobs_are_made_of_our_template(deployed: dict[str, str]) -> None:
    template = json.loads((ROOT / "deploy/kubernetes/base-job-template.json").read_text())
    with client_of(deployed) as client:
        assert client.read_work_pool("npo-kubernetes").base_job_template == template


@pytest.fixture
def run(deployed: dict[str, str]) -> RunArtifacts:
    """A small finished run in the store of the deployments."""
    store = deployed["NPO_STORE"]
    last_json(npo(*run_arguments("testbed-grpo", store, "testbed-npo"), "--json", env=deployed))
    return open_run(f"{store}/testbed-npo")


def test_a_worker_evaluates_a_run_once_and_schedules_fire(deployed: dict[str, str], run: RunArtifacts) -> None:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
    from prefect.client.schemas.schedules import IntervalSchedule

    with process_worker(deployed), client_of(deployed) as client:

        def evaluated() -> list[str]:
            """Runs the deployment and returns the evaluations that there are then."""
            deployment = client.read_deployment_by_name("evaluate/default")
            # The run is the deployment's own default.
            made = client.create_flow_run_from_deployment(deployment.id, parameters={"step": 6})
            ended = eventually(lambda: final_state(client.read_flow_run(made.id)), "evaluate/default ends")
            assert ended == "Completed", worker_log(deployed).read_text()
            return sorted(f"{e.eval_id} {e.nonce}" for e in run.evaluations())

        before = run.evaluations()
        first = evaluated()
        assert len(first) == len(before) + 1
        assert evaluated() == first

        report = client.read_deployment_by_name("report/default")
        runs = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[report.id]))
        client.update_deployment_schedule(report.id, report.schedules[0].id, active=True)
        scheduled = eventually(lambda: client.read_flow_runs(flow_run_filter=runs), "the example schedule plans runs")
        assert all(made.state_name == "Scheduled" and made.auto_scheduled for made in scheduled)

        soon = IntervalSchedule(interval=timedelta(seconds=10))
        client.create_deployment_schedules(report.id, [(soon, True)])
        ended = eventually(
            lambda: [s for made in client.read_flow_runs(flow_run_filter=runs) if (s := final_state(made))],
            "a scheduled run ends",
        )
        assert set(ended) == {"Completed"}
