"""Time from `prefect deployment run grpo/default` to the end of the first training step, and where it goes.

A server with authentication and services, the deployments of deploy/bootstrap and a process worker. Each run is new and
tiny, so that the first step itself costs nothing. The command and the bare API call take turns. The times are those of
the flow run's states on the server, of the run's record, and of the step's telemetry; all clocks are this machine's.

    python -m tests.bench.first_step --repeats 5 --json OUT
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from npo_core.artifacts import open_run
from tests.bench.deployed import deployed, finished, tiny
from tests.bench.output import arguments, markdown, spread, write_json

PARTS = (
    "call to flow run",
    "flow run to worker",
    "process and imports of Prefect",
    "torch and the run's record",
    "start policy, its evaluation, leg",
    "first step",
)
"""Parts of the whole, in order."""


def by_command(server: Mapping[str, str], parameters: dict[str, Any]) -> UUID:
    """Creates a flow run as a user does."""
    command = [sys.executable, "-m", "prefect", "deployment", "run", "grpo/default", "--params", json.dumps(parameters)]
    said = subprocess.run(command, env={**os.environ, **server}, capture_output=True, text=True, check=True)
    found = re.search(r"UUID: ([0-9a-f-]{36})", said.stdout)
    assert found, said.stdout
    return UUID(found[1])


def by_api(client: Any, parameters: dict[str, Any]) -> UUID:
    """Creates a flow run by one call, from a process that has Prefect imported."""
    deployment = client.read_deployment_by_name("grpo/default")
    made: UUID = client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id
    return made


def seconds(server: Mapping[str, str], client: Any, flow_run_id: UUID, run: str, called: datetime) -> dict[str, float]:
    """Seconds of each part, and of the whole."""
    flow_run = finished(server, client, flow_run_id)
    states = {state.type.value: state.timestamp for state in client.read_flow_run_states(flow_run_id)}
    trained = open_run(f"{server['NPO_STORE']}/{run}")
    first = trained.segments(next(leg.leg_id for leg in trained.legs() if leg.kind == "main"))[0]
    telemetry = trained.table(first, "telemetry").to_pylist()[0]
    ended = datetime.fromisoformat(telemetry["finished_at"])
    marks = [
        called,
        flow_run.created,
        states["PENDING"],
        states["RUNNING"],
        datetime.fromisoformat(trained.record().created_at),
        ended - timedelta(seconds=telemetry["step_time"]),
        ended,
    ]
    spans = [(after - before).total_seconds() for before, after in itertools.pairwise(marks)]
    return {**dict(zip(PARTS, spans, strict=True)), "whole": (ended - called).total_seconds()}


def measure(folder: Path, repeats: int, query_seconds: float) -> dict[str, list[dict[str, float]]]:
    """Seconds of every repeat, by the way in which the flow run is created."""
    measured: dict[str, list[dict[str, float]]] = {"command": [], "api": []}
    with deployed(folder, query_seconds) as (server, client):
        for n in range(repeats):
            for way in measured:
                parameters, called = tiny(server, f"{way}-{n}", steps=1), datetime.now(UTC)
                made = by_command(server, parameters) if way == "command" else by_api(client, parameters)
                measured[way].append(seconds(server, client, made, f"{way}-{n}", called))
                print(f"{way} {n}: {measured[way][-1]['whole']:.1f} s", file=sys.stderr)
    return measured


def main() -> None:
    """Measures and prints the table."""
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="runs a way")
    parser.add_argument(
        "--query-seconds", type=float, default=10, help="how often the worker asks for work; Prefect's default is 10"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), args.repeats, args.query_seconds)
    parts = (*PARTS, "whole")
    rows = [(part, *(spread([times[part] for times in way]) for way in measured.values())) for part in parts]
    print(markdown(("seconds, median and range", "prefect deployment run", "API call"), rows))
    write_json(args.json, {"query_seconds": args.query_seconds, "seconds": measured})


if __name__ == "__main__":
    main()
