"""The deployments on a real Prefect server, with authentication, CSRF protection and its services: made, run, gone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.local_server import LocalServer
from npo_core.artifacts import RunArtifacts, open_run
from tests.command import ROOT, last_json, npo, run_arguments

pytestmark = pytest.mark.slow

STAGES = ["warm-start", "scout", "guide", "replay", "main", "monitor", "intervene", "evaluate", "signal", "report"]
FLOWS = [*STAGES, "grpo", "npo", "autonpo"]
ELSEWHERE = ["guide", "main", "grpo", "npo", "autonpo"]
REQUIRED: dict[str, dict[str, Any]] = {
    "guide": {"checkpoint": {"leg_id": "0", "step": 0, "digest": "0"}},
    "replay": {"guide_id": "0"},
}
"""Parameters without a sensible default."""
WORKER_S = 90


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a server's user; whatever runs with its PREFECT_HOME is gone afterwards."""
    folder = tmp_path_factory.mktemp("deployments")
    home = {"PREFECT_HOME": str(folder / "prefect")}
    secret = "somebody:good password"
    protected = {
        "PREFECT_SERVER_API_AUTH_STRING": secret,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        # By default it may take a minute until a schedule that was just switched on plans its runs.
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "3",
    }
    started = LocalServer({**home, **protected}, services=True)
    try:
        started.wait()
        yield {
            **home,
            "PREFECT_API_URL": started.api_url,
            "PREFECT_API_AUTH_STRING": secret,
            "NPO_HOME": str(ROOT),
            "NPO_STORE": f"file://{folder}/runs",
            "NPO_IMAGE": "near-future:test",
        }
    finally:
        started.close()
        left = processes_of(home["PREFECT_HOME"])
        for process in left:
            process.kill()
        assert not left, [process.cmdline() for process in left]


def processes_of(home: str) -> list[psutil.Process]:
    """Processes that have this PREFECT_HOME: the environment is inherited, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT_HOME") == home and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def bootstrap(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "NPO_"))}
    return subprocess.run(
        [sys.executable, ROOT / "deploy/bootstrap"],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@contextmanager
def client_of(server: dict[str, str]) -> Iterator[Any]:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    settings = {PREFECT_API_URL: server["PREFECT_API_URL"], PREFECT_API_AUTH_STRING: server["PREFECT_API_AUTH_STRING"]}
    with temporary_settings(settings), get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="module")
def deployed(server: dict[str, str]) -> dict[str, str]:
    first = bootstrap(server)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "deployed 23 deployments" in first.stdout
    return server


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
        "automations": {a.id: a.model_dump() for a in client.read_automations()},
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
    server: dict[str, str], variable: str, value: str, message: str
) -> None:
    refused = bootstrap({**server, variable: value})
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
        assert len(after["automations"]) == 1
        assert ("training", 1) in after["queues"]


def test_every_flow_has_its_deployments_and_they_refuse_wrong_parameters(deployed: dict[str, str]) -> None:
    from prefect import Flow
    from prefect.exceptions import PrefectHTTPStatusError

    from flows import pipeline, stages

    defined = {made.name for module in (stages, pipeline) for made in vars(module).values() if isinstance(made, Flow)}
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


@pytest.fixture
def run(deployed: dict[str, str]) -> RunArtifacts:
    """A small finished run in the store of the deployments."""
    store = deployed["NPO_STORE"]
    last_json(npo(*run_arguments("testbed-grpo", store, "testbed-npo"), "--json", env=deployed))
    return open_run(f"{store}/testbed-npo")


@pytest.fixture
def worker(deployed: dict[str, str]) -> Iterator[None]:
    """A process worker, and nothing of it afterwards."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "npo-process", "--type", "process"]
    environment = {**os.environ, **deployed, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    with (Path(deployed["PREFECT_HOME"]) / "worker.log").open("w") as log:
        started = subprocess.Popen(command, cwd="/", env=environment, stdout=log, stderr=log)
    try:
        yield
    finally:
        family = [*psutil.Process(started.pid).children(recursive=True), psutil.Process(started.pid)]
        started.terminate()
        _, stubborn = psutil.wait_procs(family, timeout=20)
        for process in stubborn:
            process.kill()
        started.wait()


def eventually(found: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WORKER_S
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {WORKER_S} s")


def test_a_worker_evaluates_a_run_once_and_schedules_fire(
    deployed: dict[str, str], run: RunArtifacts, worker: None
) -> None:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
    from prefect.client.schemas.schedules import IntervalSchedule

    with client_of(deployed) as client:

        def evaluated() -> list[str]:
            """Runs the deployment and returns the evaluations that there are then."""
            deployment = client.read_deployment_by_name("evaluate/default")
            # The run is the deployment's own default.
            made = client.create_flow_run_from_deployment(deployment.id, parameters={"step": 6})
            ended = eventually(lambda: final_state(client.read_flow_run(made.id)), "evaluate/default ends")
            assert ended == "Completed", (Path(deployed["PREFECT_HOME"]) / "worker.log").read_text()
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


def final_state(flow_run: Any) -> str | None:
    return flow_run.state_name if flow_run.state and flow_run.state.is_final() else None
