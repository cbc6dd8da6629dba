"""The commands of the compose file, run as plain processes: server, store, bucket, bootstrap and worker."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.composed import BIN, SECRETS, SERVICES, image
from tests.s3_server import WITH_THE_PIPE, free_ports


@contextmanager
def process(command: list[str], folder: Path, env: Mapping[str, str]) -> Iterator[Path]:
    """Runs a command in a folder of its own for as long as the block; yields its log. It ends however we end."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log"
    shell = subprocess.Popen(
        ["sh", "-c", WITH_THE_PIPE, "sh", str(log), *command],
        stdin=subprocess.PIPE,
        start_new_session=True,
        cwd=folder,
        env=surroundings(folder, env),
    )
    try:
        yield log
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()


def surroundings(folder: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Environment of a container: nothing of ours but the interpreter's."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "NPO_", "PREFECT_"))}
    return {**ours, "PATH": BIN, "PREFECT_HOME": str(folder / "prefect"), **env}


def environment(service: str, ports: Mapping[str, int] | None = None, **hosts: str) -> dict[str, str]:
    """A service's environment as compose would fill it in, with hosts and ports of services as they are here."""
    filled = {}
    for key, value in SERVICES[service]["environment"].items():
        value = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda match: SECRETS[match[1]], value)
        for host, here in hosts.items():
            value = value.replace(host.replace("_", "-"), here)
        filled[key] = ported([value], ports)[0] if ports and key.endswith("_URL") else value
    return filled


def ported(command: list[str], ports: Mapping[str, int]) -> list[str]:
    """A command with ports of ours for those of the compose file."""
    return [re.sub("|".join(ports), lambda match: str(ports[match[0]]), part) for part in command]


def healthy(service: str, ports: Mapping[str, int], log: Path, timeout: float = 90) -> None:
    """Runs the service's health check until it says yes."""
    check = SERVICES[service]["healthcheck"]["test"]
    assert check[0] == "CMD"
    command = ported(check[1:], ports)
    if command[0] == "wget" and not shutil.which("wget"):
        command = [sys.executable, "-c", f"import urllib.request as r; r.urlopen({command[-1]!r})"]
    command[0] = sys.executable if command[0] == "python" else command[0]
    until(lambda: subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0, log, timeout)


def until(ask: Callable[[], bool], log: Path, timeout: float) -> None:
    """Asks until the answer is yes; fails with the end of the log."""
    deadline = time.monotonic() + timeout
    while not ask():
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.5)


def seaweedfs_command(folder: Path) -> tuple[list[str], int, str]:
    """The compose file's command on ports and in a folder of ours, its S3 port, and its master's address."""
    kinds = [f"{part}.{port}" for part in ("s3", "master", "volume", "filer") for port in ("port", "port.grpc")]
    ports = dict(zip(kinds, free_ports(len(kinds)), strict=True))
    service = SERVICES["seaweedfs"]
    ours = {"-dir": folder, "-ip": "127.0.0.1", "-ip.bind": "127.0.0.1", "-s3.port": ports.pop("s3.port")}
    command = service["entrypoint"] + [
        f"{flag}={ours[flag]}" if (flag := part.split("=")[0]) in ours else part for part in service["command"]
    ]
    command += [f"-{kind}={port}" for kind, port in ports.items()]
    return command, ours["-s3.port"], f"127.0.0.1:{ports['master.port']}.{ports['master.port.grpc']}"


def status(url: str, **headers: str) -> int:
    """What a request is answered with."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_the_commands_of_the_compose_file_train_a_run(tmp_path: Path) -> None:
    """Server, store, bucket, deployments and worker as the compose file has them, with SQLite for PostgreSQL; then a
    deployment's flow run is trained by the worker, and its files lie in the store."""
    weed, s3_port, master = seaweedfs_command(tmp_path / "s3")
    (tmp_path / "s3").mkdir()
    api_port, worker_port = free_ports(2)
    api = f"http://127.0.0.1:{api_port}/api"
    ports = {"4200": api_port, "8333": s3_port, "8080": worker_port}

    server = ported(SERVICES["prefect-server"]["command"], ports)
    server[server.index("0.0.0.0")] = "127.0.0.1"
    database = "PREFECT_SERVER_DATABASE_"
    server_env = {k: v for k, v in environment("prefect-server").items() if not k.startswith(database)}
    home = image(tmp_path)
    ours = {"NPO_HOME": str(home), "PYTHONPATH": str(home)}
    ours |= {"PREFECT_WORKER_WEBSERVER_PORT": str(worker_port), "PREFECT_WORKER_QUERY_SECONDS": "1"}
    bootstrap_env, worker_env = (
        {**ours, **environment(name, ports, prefect_server="127.0.0.1", seaweedfs="127.0.0.1")}
        for name in ("bootstrap", "worker")
    )
    bucket = [part.replace("seaweedfs:9333", master) for part in SERVICES["bucket"]["command"]]
    client = surroundings(tmp_path / "client", worker_env)

    with (
        process(weed, tmp_path / "weed", environment("seaweedfs")) as weed_log,
        process(server, tmp_path / "server", server_env) as server_log,
    ):
        healthy("seaweedfs", ports, weed_log)
        for _ in range(2):  # a bucket that is there is left alone
            subprocess.run([*SERVICES["bucket"]["entrypoint"], *bucket], env=client, check=True, timeout=60)
        assert status(f"http://127.0.0.1:{s3_port}/runs") == 403

        healthy("prefect-server", ports, server_log)
        assert status(f"{api}/admin/version") == 401
        assert status(f"{api}/csrf-token?client=tests") in (401, 422)

        command = [sys.executable, *SERVICES["bootstrap"]["command"]]
        made = subprocess.run(
            command,
            cwd=home,
            env=surroundings(tmp_path / "bootstrap", bootstrap_env),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert made.returncode == 0, made.stdout + made.stderr
        with process(SERVICES["worker"]["command"], tmp_path / "worker", worker_env) as worker_log:
            healthy("worker", ports, worker_log)
            config = {
                "run": {"name": "served", "store": "s3://runs/runs", "total_steps": 2, "segment_steps": 2},
                "data": {"prompts": 16, "held_out": 16},
                "rollout": {"prompts_per_step": 4},
                "evaluation": {"every": 0, "samples": 2},
                "algorithm": {"method": "grpo"},
            }
            parameters = json.dumps({"config": config})
            for module in (
                ["prefect", "deployment", "run", "grpo/default", "--params", parameters, "--watch"],
                ["flows.cli", "show", "s3://runs/runs/served", "--json"],
            ):
                said = subprocess.run(
                    [sys.executable, "-m", *module], cwd=home, env=client, capture_output=True, text=True, timeout=200
                )
                assert said.returncode == 0, said.stdout + said.stderr + worker_log.read_text()[-3000:]
            assert json.loads(said.stdout.splitlines()[-1])["head"]["step"] == 2
