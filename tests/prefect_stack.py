"""A Prefect server as users have one, with its UI, authentication, CSRF protection and its services, our deployments on
it, a worker, and whatever they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from flows.local_server import LocalServer
from tests.command import ROOT

SECRET = "somebody:good password"
WAIT_S = 90.0


@dataclass(frozen=True)
class _Running:
    server: LocalServer
    settings: dict[str, str]


_running: dict[str, _Running] = {}
"""By PREFECT_HOME."""


@contextmanager
def protected_server(folder: Path, settings: Mapping[str, str] | None = None) -> Iterator[dict[str, str]]:
    """Environment of a server's user, with the variables of deploy/prefect.yaml; whatever runs with its PREFECT_HOME
    is gone afterwards.

    Args:
        folder: of the server, and of the store of runs.
        settings: of the server, beside its defaults.
    """
    home = {"PREFECT_HOME": str(folder / "prefect")}
    protected = {
        "PREFECT_SERVER_API_AUTH_STRING": SECRET,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # By default it may take a minute until a schedule that was just switched on plans its runs.
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "3",
        **(settings or {}),
    }
    _running[home["PREFECT_HOME"]] = started = _Running(
        LocalServer({**home, **protected}, services=True, ui=True), protected
    )
    try:
        started.server.wait()
        yield {
            **home,
            "PREFECT_API_URL": started.server.api_url,
            "PREFECT_API_AUTH_STRING": SECRET,
            "NPO_HOME": str(ROOT),
            "NPO_STORE": f"file://{folder}/runs",
            "NPO_IMAGE": "near-future:test",
        }
    finally:
        _running.pop(home["PREFECT_HOME"]).server.close()
        left = processes_of(home["PREFECT_HOME"])
        for process in left:
            process.kill()
        assert not left, [process.cmdline() for process in left]


@contextmanager
def without_server(server: Mapping[str, str]) -> Iterator[None]:
    """Within the block the server is gone, by SIGKILL; after it, it answers again on the same port, as before."""
    home = {"PREFECT_HOME": server["PREFECT_HOME"]}
    before = _running[home["PREFECT_HOME"]]
    for process in processes_of(home["PREFECT_HOME"]):
        if "server" in process.cmdline() and "start" in process.cmdline():
            process.kill()
    before.server.close()
    try:
        yield
    finally:
        again = LocalServer({**home, **before.settings}, services=True, ui=True, port=before.server.port)
        _running[home["PREFECT_HOME"]] = replace(before, server=again)
        again.wait()


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


def bootstrap(environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs deploy/bootstrap with these variables alone."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "NPO_"))}
    return subprocess.run(
        [sys.executable, ROOT / "deploy/bootstrap"],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@contextmanager
def client_of(server: Mapping[str, str]) -> Iterator[Any]:
    """A client of the server's API."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    settings = {PREFECT_API_URL: server["PREFECT_API_URL"], PREFECT_API_AUTH_STRING: server["PREFECT_API_AUTH_STRING"]}
    with temporary_settings(settings), get_client(sync_client=True) as client:
        yield client


def start_worker(server: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A process worker; what it prints goes to `worker_log`."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "npo-process", "--type", "process"]
    environment = {**os.environ, "PREFECT_WORKER_QUERY_SECONDS": "1", **server}
    with worker_log(server).open("a") as log:
        return subprocess.Popen(command, cwd="/", env=environment, stdout=log, stderr=log)


def worker_log(server: Mapping[str, str]) -> Path:
    """What the workers printed."""
    return Path(server["PREFECT_HOME"]) / "worker.log"


@contextmanager
def process_worker(server: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process worker, and nothing of it afterwards."""
    started = start_worker(server)
    try:
        yield started
    finally:
        family = [started]
        if started.poll() is None:
            family += psutil.Process(started.pid).children(recursive=True)
            started.terminate()
        _, stubborn = psutil.wait_procs(family, timeout=20)
        for process in stubborn:
            process.kill()
        started.wait()


def eventually(found: Callable[[], Any], what: str, within: float = WAIT_S) -> Any:
    """The first true value that `found` returns; asked twice a second."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {within:.0f} s")


def final_state(flow_run: Any) -> str | None:
    """Name of the state that a flow run ended in, or None."""
    return flow_run.state_name if flow_run.state and flow_run.state.is_final() else None
