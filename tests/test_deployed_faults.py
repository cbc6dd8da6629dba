"""Deployed runs whose worker, process or server is killed, or which somebody cancels: no process is left, no segment is
lost or doubled, and the next run goes on to what an undisturbed one leaves."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest

from npo_core.artifacts import RunArtifacts, open_run
from npo_core.config_file import load_config
from npo_core.interfaces import NearFutureError
from tests.command import ROOT, fingerprint, last_json, npo, run_arguments
from tests.postgresql import postgresql
from tests.prefect_stack import (
    bootstrap,
    client_of,
    eventually,
    final_state,
    process_worker,
    processes_of,
    protected_server,
    without_server,
    worker_log,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 96
"""A leg that lasts: each fault comes in its middle, and so does the next one."""
START_WITHIN_S = 180.0
GONE_WITHIN_S = 90.0
"""How long after a fault something of the flow run may still be there: at most 15 s until it notices and 30 s of grace,
on a busy machine."""
SERVER_AND_WORKER = re.compile(r"npo_core\.supervised|prefect server start|prefect worker start")


def recipe(steps: int) -> dict[str, Any]:
    """What is not as in the small runs of other tests."""
    return {"run__total_steps": steps, "evaluation__every": 16}


@dataclass(frozen=True)
class Deployed:
    """The deployment grpo/default on a server, and the run that it trains there."""

    server: Mapping[str, str]
    client: Any
    store: str

    def start(self, steps: int = STEPS, **job_variables: object) -> UUID:
        """A flow run, without waiting for it."""
        _, path, *overrides = run_arguments("testbed-grpo", self.store, "demo", **recipe(steps))
        config = load_config(str(ROOT / path), overrides[1::2]).model_dump(mode="json", exclude_defaults=True)
        deployment = self.client.read_deployment_by_name("grpo/default")
        made = self.client.create_flow_run_from_deployment(
            deployment.id, parameters={"config": config}, job_variables=job_variables
        )
        return made.id  # type: ignore[no-any-return]

    @property
    def run(self) -> RunArtifacts:
        return open_run(f"{self.store}/demo")

    def segments(self) -> int:
        """How many are committed by now."""
        try:
            run = self.run
        except NearFutureError:
            return 0
        return sum(len(run.segments(leg.leg_id)) for leg in run.legs())

    def comes_amid_its_leg(self, flow_run: UUID) -> psutil.Process:
        """Waits until a flow run has committed a segment that was not there when it began, and returns its process."""
        eventually(
            lambda: self.client.read_flow_run(flow_run).state_name == "Running", f"{flow_run} begins", START_WITHIN_S
        )
        self.trains_on(flow_run)
        assert final_state(self.client.read_flow_run(flow_run)) is None, self.report(flow_run)
        return psutil.Process(int(self.client.read_flow_run(flow_run).infrastructure_pid))

    def trains_on(self, flow_run: UUID) -> None:
        """Waits until one more segment is committed."""
        before = self.segments()
        eventually(lambda: self.segments() > before, f"{flow_run} commits segment {before + 1}", START_WITHIN_S)

    def report(self, flow_run: UUID) -> str:
        """The state of a flow run, and what the workers said."""
        return f"{self.client.read_flow_run(flow_run).state}\n{worker_log(self.server).read_text()}"

    def cancel(self, flow_run: UUID) -> None:
        """As the UI does it."""
        from prefect.states import Cancelling

        self.client.set_flow_run_state(flow_run, Cancelling())

    def left(self) -> list[str]:
        """Processes beside the server and a worker."""
        commands = (" ".join(process.cmdline()) for process in processes_of(self.server["PREFECT_HOME"]))
        return [command for command in commands if not SERVER_AND_WORKER.search(command)]

    def slots(self) -> int:
        """Flow runs that hold a place of the deployment."""
        limit = self.client.read_deployment_by_name("grpo/default").global_concurrency_limit
        return self.client.read_global_concurrency_limit_by_name(limit.name).active_slots  # type: ignore[no-any-return]

    def ends_without_a_trace(self, flow_run: UUID, state: str, within: float = GONE_WITHIN_S) -> None:
        """Waits until a flow run has ended in this state, no process of it is left, and its place is free."""
        ended = eventually(lambda: final_state(self.client.read_flow_run(flow_run)), f"{flow_run} ends", within)
        assert ended == state, self.report(flow_run)
        eventually(lambda: not self.left(), f"still there: {self.left()}", GONE_WITHIN_S)
        eventually(lambda: self.slots() == 0, "the deployment has no place free", GONE_WITHIN_S)

    def is_what_nobody_disturbed(self, undisturbed: dict[str, Any]) -> None:
        """Every step once, the same bits, and nothing that a verification finds."""
        run = self.run
        main = next(leg for leg in run.legs() if leg.kind == "main")
        tables = [run.table(segment, "metrics", ["step"]) for segment in run.segments(main.leg_id)]
        assert [row["step"] for table in tables for row in table.to_pylist()] == list(range(STEPS))
        assert fingerprint(run) == undisturbed
        verified = npo("verify", run.uri)
        assert verified.returncode == 0, verified.stdout + verified.stderr


@pytest.fixture(scope="module")
def stack(deployed: dict[str, str]) -> Iterator[Deployed]:
    """On SQLite."""
    with client_of(deployed) as client:
        yield Deployed(deployed, client, f"{deployed['NPO_STORE']}/faults")


@pytest.fixture(scope="module", autouse=True)
def dead(stack: Deployed) -> UUID:
    """A flow run that was killed with its worker: its 90 s of silence pass while other tests run."""
    flow_run = stack.start()
    with process_worker(stack.server) as worker:
        process = stack.comes_amid_its_leg(flow_run)
        worker.kill()
        process.kill()
    return flow_run


@pytest.fixture(scope="module")
def undisturbed(dead: UUID, deployed: dict[str, str]) -> dict[str, Any]:
    """What the same run leaves that nobody disturbs."""
    arguments = run_arguments("testbed-grpo", f"{deployed['NPO_STORE']}/undisturbed", "demo", **recipe(STEPS))
    return fingerprint(open_run(last_json(npo(*arguments, "--json", env=deployed))["run"]))


def test_on_postgresql_a_run_outlives_its_worker_a_restart_and_a_cancel(
    tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    with (
        postgresql() as url,
        protected_server(tmp_path, {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}) as server,
        client_of(server) as client,
    ):
        made = bootstrap(server)
        assert made.returncode == 0, made.stdout + made.stderr
        stack = Deployed(server, client, f"{server['NPO_STORE']}/faults")
        first = stack.start()
        with process_worker(server) as worker:
            stack.comes_amid_its_leg(first)
            worker.kill()
            stack.ends_without_a_trace(first, "Crashed")
        with process_worker(server):
            # However fast it trains, it is not done when the server is back.
            endless = replace(stack, store=f"{stack.store}-endless")
            second = endless.start(steps=2000)
            endless.comes_amid_its_leg(second)
            with without_server(server):
                pass
            endless.trains_on(second)
            endless.cancel(second)
            endless.ends_without_a_trace(second, "Cancelled")
            third = stack.start()
            stack.ends_without_a_trace(third, "Completed", within=300)
        stack.is_what_nobody_disturbed(undisturbed)


def test_killed_with_its_worker_it_crashes_in_the_end_and_the_next_run_goes_on_until_it_is_killed(
    stack: Deployed, dead: UUID
) -> None:
    following = stack.start()
    with process_worker(stack.server):
        # It still holds its place, in the queue and of the deployment, if its silence has not been long enough.
        stack.ends_without_a_trace(dead, "Crashed", within=180)
        stack.comes_amid_its_leg(following).kill()
        stack.ends_without_a_trace(following, "Crashed")


def test_when_its_worker_is_killed_it_ends_by_itself(stack: Deployed) -> None:
    # Otherwise its next line into the worker's pipe would end it too, by accident.
    flow_run = stack.start(stream_output=False)
    with process_worker(stack.server) as worker:
        stack.comes_amid_its_leg(flow_run)
        worker.kill()
        stack.ends_without_a_trace(flow_run, "Crashed")


def test_when_it_is_cancelled_it_ends_at_once(stack: Deployed) -> None:
    endless = replace(stack, store=f"{stack.store}-endless")
    flow_run = endless.start(steps=2000)
    with process_worker(stack.server):
        endless.comes_amid_its_leg(flow_run)
        endless.cancel(flow_run)
        endless.ends_without_a_trace(flow_run, "Cancelled")
    assert endless.segments() < 1000


def test_when_somebody_gives_it_a_final_state_its_process_ends(stack: Deployed) -> None:
    from prefect.states import Failed

    endless = replace(stack, store=f"{stack.store}-endless")
    flow_run = endless.start(steps=2000)
    with process_worker(stack.server):
        endless.comes_amid_its_leg(flow_run)
        stack.client.set_flow_run_state(flow_run, Failed(), force=True)
        endless.ends_without_a_trace(flow_run, "Failed")
    assert endless.segments() < 1000


def test_when_its_worker_does_not_hear_of_a_cancel_it_ends_all_the_same(stack: Deployed) -> None:
    endless = replace(stack, store=f"{stack.store}-endless")
    flow_run = endless.start(steps=2000)
    with process_worker(stack.server) as worker:
        endless.comes_amid_its_leg(flow_run)
        worker.send_signal(signal.SIGSTOP)
        stack.cancel(flow_run)
        endless.ends_without_a_trace(flow_run, "Cancelled")
        worker.kill()
    assert endless.segments() < 1000


def test_when_the_server_restarts_it_goes_on_to_the_end_and_its_log_is_there(
    stack: Deployed, undisturbed: dict[str, Any]
) -> None:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
    from prefect.client.schemas.sorting import LogSort

    flow_run = stack.start()
    with process_worker(stack.server):
        stack.comes_amid_its_leg(flow_run)
        lease = stack.client.read_flow_run(flow_run).state.state_details.deployment_concurrency_lease_id
        with without_server(stack.server):
            pass
        # As the flow run does every 225 s; one that fails ends it.
        stack.client.renew_concurrency_lease(lease, 300)
        stack.ends_without_a_trace(flow_run, "Completed", within=300)
    stack.is_what_nobody_disturbed(undisturbed)

    stages = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run]))
    ids = {stage.id for stage in stack.client.read_flow_runs(flow_run_filter=stages)}

    def logged() -> list[str]:
        logs = stack.client.read_logs(limit=200, sort=LogSort.TIMESTAMP_DESC)
        return [log.message for log in logs if log.name == "npo" and log.flow_run_id in ids]

    eventually(lambda: any(f"main 0-{STEPS} {STEPS}/{STEPS}" in line for line in logged()), "the last line of our log")
