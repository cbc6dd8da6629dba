"""Runs on S3: the same as on disk, through every fault and every kill; and the secret key stays where it was."""

from __future__ import annotations

import io
import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest

from npo_core.artifacts import open_run
from npo_core.faults import FAULT_POINTS
from tests.command import autonpo_arguments, fingerprint, last_json, npo, run_arguments, was_killed
from tests.fault_proxy import Fault, FaultProxy
from tests.s3_server import S3Server

pytestmark = pytest.mark.slow

SHORT_TIMEOUTS = {"FSSPEC_S3": json.dumps({"config_kwargs": {"read_timeout": 1, "connect_timeout": 1}})}
RATES = dict.fromkeys(Fault, 0.025)
MOST_STARTS = 20
OUTAGE_AT = 500
"""Of some 1300 requests that the run makes."""

# In the order in which an AutoNPO run comes by them, so that each start gets one fault further.
MOMENTS = (
    "leg-record",  # the warm leg
    "checkpoint-data",  # the starting policy
    "head-moved",  # to the warm leg
    "evaluation-data",  # of the starting policy
    "segment-step:2",  # in the main line's first segment
    "checkpoint-manifest",
    "segment-data",
    "segment-manifest",
    "probe-sampled",  # today's policy has answered, nothing is decided
    "probe-sampled:2",  # and π(t−Δ) too
    "decision-record",  # decided, nothing acted
    "guide-sampling",
    "guide-data",
    "leg-record:3",  # the replay leg: warm and main are found
    "head-moved",  # to it
    "decision-record",  # the second intervention
    "segment-data",
)


@dataclass(frozen=True)
class Finished:
    """An undisturbed run on S3 and everything that commands printed about it."""

    uri: str
    printed: dict[str, str]


@pytest.fixture(autouse=True)
def credentials(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, and every command that it starts, may use the server."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, prefect_server: dict[str, str], s3_server: S3Server, npo_run: str
) -> Finished:
    """The same run on S3, and every command that takes a run."""
    # All that Prefect ever logs, so that the search for the secret sees all of it.
    env = {**prefect_server, **s3_server.env, "PREFECT_LOGGING_LEVEL": "DEBUG"}
    store, folder = "s3://runs/calm", tmp_path_factory.mktemp("out")
    uri = f"{store}/demo"
    run = run_arguments("testbed-npo", store, "demo")
    commands: list[list[object]] = [
        [*run],
        [*run, "--json"],
        ["ls", store, "--json"],
        ["show", uri],
        ["show", uri, "--json"],
        ["inspect", uri, "--step", 1, "--parquet", folder / "rows.parquet"],
        ["metrics", uri, "--json"],
        ["compare", npo_run, uri, "--json"],
        ["verify", uri, "--json"],
        ["report", uri, "--out", folder / "report.html"],
        ["export", uri, "--to", folder / "model", "--json"],
        ["stage", "signal", uri, "--step", 4, "--lookahead", 2, "--prompts", 4, "--samples", 2, "--json"],
        ["stage", "evaluate", uri, "--step", 2],
    ]
    printed = {}
    for command in commands:
        result = npo(*command, env=env)
        assert result.returncode == 0, f"{command}: {result.stderr}"
        printed[" ".join(map(str, command))] = result.stdout + result.stderr
    printed["report.html"] = (folder / "report.html").read_text()
    return Finished(uri, printed)


def test_a_run_on_s3_is_the_same_as_npo_run_for_every_command(finished: Finished, npo_run: str) -> None:
    wanted, found = fingerprint(open_run(npo_run)), fingerprint(open_run(finished.uri))
    # `stage evaluate` was asked for one more.
    assert wanted["evaluations"].items() <= found.pop("evaluations").items()
    del wanted["evaluations"]
    assert found == wanted


def test_the_secret_key_is_in_no_object_no_output_and_not_with_prefect(
    finished: Finished, prefect_server: dict[str, str], s3_server: S3Server
) -> None:
    secret = s3_server.secret.encode()
    objects = dict(stored(s3_server, "runs"))
    assert any(key.endswith(".parquet") for key in objects)
    assert [key for key, data in objects.items() if secret in data or secret in unpacked(key, data)] == []
    assert [name for name, text in finished.printed.items() if s3_server.secret in text] == []
    home = [path for path in Path(prefect_server["PREFECT_HOME"]).rglob("*") if path.is_file()]
    assert any(path.name == "prefect.db" for path in home)
    assert [path for path in home if secret in path.read_bytes()] == []
    for kind in ("flow_runs", "task_runs", "logs"):
        answer = asked(prefect_server["PREFECT_API_URL"], kind)
        assert answer != b"[]", kind
        assert secret not in answer, kind


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 8))])
def test_through_every_fault_a_run_finishes_or_resumes_bit_identical(
    seed: int, prefect_server: dict[str, str], s3_server: S3Server, npo_run: str
) -> None:
    arguments = [*run_arguments("testbed-npo", f"s3://runs/faults-{seed}", "demo"), "--json"]
    with FaultProxy(s3_server.port, seed, RATES) as proxy:
        env = {**prefect_server, **SHORT_TIMEOUTS, "AWS_ENDPOINT_URL": proxy.endpoint}
        stops = []
        while (result := npo(*arguments, env=env)).returncode:
            assert result.returncode == 1, result.stderr
            stops.append(only_error(result))
            assert len(stops) < MOST_STARTS, stops
    counts = {fault.value: proxy.injected[fault] for fault in Fault}
    share = proxy.injected.total() / proxy.requests
    print(f"seed {seed}: {share:.0%} of {proxy.requests} requests: {counts}; stopped {len(stops)} times: {stops}")
    uri = last_json(result)["run"]
    assert npo("verify", uri).returncode == 0
    assert fingerprint(open_run(uri)) == fingerprint(open_run(npo_run))
    assert set(proxy.injected) == set(Fault)


def test_a_store_that_goes_away_in_the_middle_stops_a_run_and_the_same_command_resumes_it(
    prefect_server: dict[str, str], s3_server: S3Server, npo_run: str
) -> None:
    arguments = [*run_arguments("testbed-npo", "s3://runs/outage", "demo"), "--json"]
    with FaultProxy(s3_server.port) as proxy, ThreadPoolExecutor() as other:
        env = {**prefect_server, **SHORT_TIMEOUTS, "AWS_ENDPOINT_URL": proxy.endpoint}
        running = other.submit(npo, *arguments, env=env)
        while proxy.requests < OUTAGE_AT and not running.done():
            time.sleep(0.01)
        proxy.rates = {Fault.ERROR_500: 0.5, Fault.RESET_BEFORE: 0.5}
        stopped = running.result()
        assert stopped.returncode == 1, stopped.stderr
        print(only_error(stopped))
        proxy.paused = True
        uri = last_json(npo(*arguments, env=env))["run"]
    assert fingerprint(open_run(uri)) == fingerprint(open_run(npo_run))
    assert npo("verify", uri).returncode == 0


def test_a_store_that_ignores_conditions_is_refused_unless_there_is_one_writer(
    prefect_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Server(auth=False) as server, FaultProxy(server.port, without_conditions=True) as proxy:
        server.make_bucket("runs")
        for name, value in {**server.env, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(name, value)
        arguments = [*run_arguments("testbed-grpo", "s3://runs/unconditional", "demo"), "--json"]
        refused = npo(*arguments, env=prefect_server)
        assert refused.returncode == 2, refused.stderr
        assert "run.single_writer" in only_error(refused)
        assert list(stored(server, "runs")) == []
        uri = last_json(npo(*arguments, "-s", "run.single_writer=true", env=prefect_server))["run"]
        assert npo("verify", uri).returncode == 0


def test_every_fault_point_is_among_the_moments() -> None:
    assert {moment.partition(":")[0] for moment in MOMENTS} == set(FAULT_POINTS)


@pytest.mark.timeout(1500)
def test_killed_at_every_fault_point_over_s3_it_ends_bit_identical(
    prefect_server: dict[str, str], autonpo_run: str
) -> None:
    assert len([decision for decision in open_run(autonpo_run).decisions() if decision.intervene]) == 2
    arguments = autonpo_arguments("s3://runs/killed", "demo")
    for moment in MOMENTS:
        result = npo(*arguments, env={**prefect_server, "NPO_FAULT": moment})
        assert was_killed(result), f"no kill at {moment}: {result.stderr}"
    uri = last_json(npo(*arguments, "--json", env=prefect_server))["run"]
    assert fingerprint(open_run(uri)) == fingerprint(open_run(autonpo_run))
    assert npo("verify", uri).returncode == 0


@pytest.mark.parametrize(
    ("case", "command"),
    [
        *((case, "run") for case in ("no credentials", "wrong secret", "no bucket", "server down")),
        ("no credentials", "ls"),
        ("wrong secret", "show"),
        ("no bucket", "ls"),
        ("server down", "show"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(
    case: str,
    command: str,
    tmp_path: Path,
    prefect_server: dict[str, str],
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, env, remedy = f"s3://runs/{tmp_path.name}", dict(prefect_server), "credentials|AWS_"
    if case == "no credentials":
        monkeypatch.setenv("HOME", str(tmp_path))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
    elif case == "wrong secret":
        env["AWS_SECRET_ACCESS_KEY"] = f"WRONG{s3_server.secret}"
    elif case == "no bucket":
        store, remedy = f"s3://nowhere/{tmp_path.name}", "bucket"
    else:
        env["AWS_ENDPOINT_URL"], remedy = "http://127.0.0.1:1", "AWS_ENDPOINT_URL"
        env["FSSPEC_S3"] = json.dumps({"config_kwargs": {"retries": {"mode": "standard", "max_attempts": 2}}})
    arguments = {"run": run_arguments("testbed-grpo", store, "demo"), "show": ["show", f"{store}/demo"]}
    result = npo(*arguments.get(command, ["ls", store]), "--json", env=env, timeout=90)
    assert result.returncode in (1, 2), result.stderr
    line = only_error(result)
    print(f"{command}, {case}: {line}")
    assert store.removeprefix("s3://").partition("/")[0] in line
    assert re.search(remedy, line), line
    assert s3_server.secret not in result.stdout + result.stderr


def only_error(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that says why the command ended; beside it there is only its log."""
    *log, line = result.stderr.splitlines() or [""]
    assert line.startswith("npo: error: "), result.stderr
    assert [entry for entry in log if not re.match(r"\d\d:\d\d:\d\d ", entry)] == [], result.stderr
    return line


def stored(server: S3Server, bucket: str) -> Iterator[tuple[str, bytes]]:
    """Every object with its content."""
    client = server.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for entry in page.get("Contents", []):
            yield entry["Key"], client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()


def unpacked(key: str, data: bytes) -> bytes:
    """A Parquet file's content and metadata without compression; of other objects nothing."""
    if not key.endswith(".parquet"):
        return b""
    content = pl.read_parquet(io.BytesIO(data)).write_ndjson()
    return f"{content}{pl.read_parquet_metadata(io.BytesIO(data))}".encode()


def asked(api_url: str, kind: str) -> bytes:
    """What the Prefect server holds of one kind."""
    request = urllib.request.Request(
        f"{api_url}/{kind}/filter", json.dumps({"limit": 200}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        return reply.read()
