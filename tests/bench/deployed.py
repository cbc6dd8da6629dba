"""What the benchmarks of deployments start: a protected server, deploy/bootstrap's deployments and a worker."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.prefect_stack import (
    bootstrap,
    client_of,
    eventually,
    final_state,
    process_worker,
    protected_server,
    worker_log,
)

FINISH_S = 3600.0
TINY: dict[str, Any] = {
    "data": {"prompts": 16, "held_out": 16},
    "rollout": {"prompts_per_step": 1, "group_size": 2, "max_new_tokens": 4},
    "evaluation": {"every": 0, "samples": 1},
    "algorithm": {"method": "grpo"},
}
"""A configuration whose steps cost next to nothing."""


@contextmanager
def deployments(folder: Path) -> Iterator[dict[str, str]]:
    """Environment of the user of a server with our deployments. In a folder that was used before, it is as it was."""
    with protected_server(folder) as server:
        done = bootstrap(server)
        assert done.returncode == 0, done.stdout + done.stderr
        yield server


@contextmanager
def deployed(folder: Path, query_seconds: float) -> Iterator[tuple[dict[str, str], Any]]:
    """The same with a worker, and a client of the server."""
    with deployments(folder) as server:
        polling = {**server, "PREFECT_WORKER_QUERY_SECONDS": str(query_seconds)}
        with process_worker(polling), client_of(server) as client:
            workers = "/work_pools/npo-process/workers/filter"
            eventually(lambda: client.request("POST", workers).json(), "the worker reports")
            yield server, client


def tiny(server: Mapping[str, str], name: str, steps: int) -> dict[str, Any]:
    """Parameters of `grpo/default`: so many segments of one step."""
    run = {"name": name, "store": server["NPO_STORE"], "total_steps": steps, "segment_steps": 1}
    return {"config": {**TINY, "run": run}}


def finished(server: Mapping[str, str], client: Any, flow_run_id: Any) -> Any:
    """The flow run when it has ended, which it must have done well."""
    eventually(lambda: final_state(client.read_flow_run(flow_run_id)), f"flow run {flow_run_id} ends", FINISH_S)
    flow_run = client.read_flow_run(flow_run_id)
    assert flow_run.state_name == "Completed", f"{json.dumps(flow_run.state.message)}\n{worker_log(server).read_text()}"
    return flow_run


def database(server: Mapping[str, str]) -> Path:
    """The server's SQLite file."""
    return Path(server["PREFECT_HOME"]) / "prefect.db"
