"""Many scheduled runs of a light stage in a row: do all complete, in time, and is nothing left behind or done twice?

A server with authentication and services, the deployments of deploy/bootstrap and a process worker. An interval
schedule starts the stage on a small finished run. It says how it stands after every ten runs. Started again with the
same --folder it goes on: runs that have ended there count.

    python -m tests.bench.scheduled --runs 200 --interval 10 --folder DIR --json OUT
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from npo_core.artifacts import RunArtifacts, open_run
from tests.bench.database_growth import files
from tests.bench.deployed import database, deployed
from tests.bench.output import MIB, arguments, markdown, spread, write_json
from tests.command import npo, run_arguments
from tests.prefect_stack import eventually, final_state, processes_of

RUN = "testbed-npo"
"""The run that the deployments of stages read by default."""
EVERY = 10


def finished_run(server: Mapping[str, str]) -> RunArtifacts:
    """A small run of GRPO, trained to its end."""
    done = npo(*run_arguments("testbed-grpo", server["NPO_STORE"], RUN), env=server)
    assert done.returncode == 0, done.stderr
    return open_run(f"{server['NPO_STORE']}/{RUN}")


def evaluations(run: RunArtifacts) -> list[str]:
    """Every evaluation that is committed, as who did it has named it."""
    return sorted(f"{made.eval_id} {made.nonce}" for made in run.evaluations())


def memory(server: Mapping[str, str]) -> dict[str, int]:
    """Resident bytes of the server and of the worker, and how many processes of flow runs there are."""
    kinds = {"server": 0, "worker": 0, "flow run processes": 0}
    for process in processes_of(server["PREFECT_HOME"]):
        try:
            command = " ".join(process.cmdline())
            kind = next((kind for kind in ("server", "worker") if f"prefect {kind} start" in command), None)
            if kind:
                kinds[kind] += process.memory_info().rss
            elif "npo_core.supervised" not in command:
                kinds["flow run processes"] += 1
        except psutil.NoSuchProcess:
            continue
    return kinds


def flow_runs(client: Any, deployment_id: Any) -> list[Any]:
    """Every flow run of a deployment, page by page."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId

    ours = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]))
    found: list[Any] = []
    while page := client.read_flow_runs(flow_run_filter=ours, limit=200, offset=len(found)):
        found += page
    return found


def watch(server: Mapping[str, str], client: Any, deployment_id: Any, runs: int) -> list[dict[str, Any]]:
    """Waits until so many runs have ended; how things stood at the start and after every ten."""
    stood: list[dict[str, Any]] = []
    while True:
        ended = Counter(state for made in flow_runs(client, deployment_id) if (state := final_state(made)))
        done = ended.total() >= runs
        if not stood or done or ended.total() >= sum(stood[-1]["ended"].values()) + EVERY:
            size = sum(files(database(server)).values())
            at = datetime.now(UTC).isoformat(timespec="seconds")
            stood.append({"at": at, "ended": dict(ended), **memory(server), "database": size})
            print(stood[-1], flush=True)
        if done:
            return stood
        time.sleep(5)


def measure(folder: Path, deployment: str, runs: int, interval: float) -> dict[str, Any]:
    """What came of so many scheduled runs."""
    from prefect.client.schemas.schedules import IntervalSchedule

    with deployed(folder, query_seconds=2) as (server, client):
        run = finished_run(server)
        before = evaluations(run)
        made = client.read_deployment_by_name(deployment)
        every = IntervalSchedule(interval=timedelta(seconds=interval))
        schedule = client.create_deployment_schedules(made.id, [(every, True)])[0]
        stood = watch(server, client, made.id, runs)
        client.delete_deployment_schedule(made.id, schedule.id)
        # Those that the schedule had planned are gone with it, those that had begun end.
        eventually(lambda: all(final_state(one) for one in flow_runs(client, made.id)), "the last runs end", 300)
        eventually(lambda: not memory(server)["flow run processes"], "the last process ends")
        ended = flow_runs(client, made.id)
        passed = [{state.name for state in client.read_flow_run_states(one.id)} for one in ended]
        verified = npo("verify", run.uri, "--json", env=server)
        return {
            "deployment": deployment,
            "interval": interval,
            "stood": stood,
            "ended": dict(Counter(one.state_name for one in ended)),
            "passed_through": dict(Counter(name for names in passed for name in names)),
            "seconds": [one.total_run_time.total_seconds() for one in ended if one.state_name == "Completed"],
            "delays": [
                (one.start_time - one.expected_start_time).total_seconds()
                for one in ended
                if one.start_time is not None
            ],
            "evaluations": {"before": len(before), "same": evaluations(run) == before},
            "verify": {"code": verified.returncode, "said": verified.stdout.splitlines()[-1:]},
        }


def faults(result: Mapping[str, Any]) -> list[str]:
    """What is not as it should be."""
    found = [f"{count} runs ended {state}" for state, count in result["ended"].items() if state != "Completed"]
    found += [f"{count} runs were Late" for state, count in result["passed_through"].items() if state == "Late"]
    if result["verify"]["code"]:
        found.append(f"npo verify: {result['verify']['said']}")
    if not result["evaluations"]["same"]:
        found.append("the evaluations are others than before")
    return found


def show(result: Mapping[str, Any]) -> str:
    """The result for people."""
    first, last = result["stood"][0], result["stood"][-1]
    rows = [(f"{name}, MiB", first[name] / MIB, last[name] / MIB) for name in ("server", "worker", "database")]
    return "\n\n".join(
        [
            f"{sum(result['ended'].values())} runs of {result['deployment']}, one every {result['interval']:g} s: "
            f"ended {result['ended']}, passed through {result['passed_through']}",
            markdown(("", "at the start", "at the end"), rows),
            f"seconds a run: {spread(result['seconds'])}; from its time to its start: {spread(result['delays'])}",
            f"evaluations: {result['evaluations']}; npo verify: {result['verify']}",
            "\n".join(faults(result)) or "all completed in time, nothing left over, nothing done twice",
        ]
    )


def main() -> None:
    """Measures and prints how it goes, and the result; exit code 1 if anything is not as it should be."""
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=int, default=200, help="runs to wait for")
    parser.add_argument("--interval", type=float, default=10, help="seconds between two")
    parser.add_argument("--deployment", default="evaluate/default", help="of a stage that takes no parameter but `run`")
    parser.add_argument("--folder", type=Path, help="of the server and the store; kept, and found again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = measure(folder, args.deployment, args.runs, args.interval)
    print(show(result))
    write_json(args.json, result)
    sys.exit(bool(faults(result)))


if __name__ == "__main__":
    main()
