"""Two writers of one run: whoever commits first wins, the other adopts its work, and nothing is lost or there twice."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from npo_core.artifacts import RunArtifacts, open_run
from npo_core.run_files import origin
from npo_core.store import FsspecStore, open_store
from schemas.records import Head, Manifest
from tests.command import ROOT, autonpo_arguments, fingerprint, last_json, npo, run_arguments
from tests.fault_proxy import Fault, FaultProxy, Once
from tests.s3_server import S3Server

pytestmark = pytest.mark.slow

WRITERS = 12


@pytest.fixture(autouse=True)
def credentials(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store of a test's own, on disk and on S3."""
    return f"file://{tmp_path}" if request.param == "file" else f"s3://runs/{tmp_path.name}"


@pytest.fixture(scope="module")
def undisturbed(npo_run: str) -> dict[str, Any]:
    """What one writer leaves."""
    return fingerprint(open_run(npo_run))


# ---- the head and the manifests


def test_of_many_writers_one_creates_and_one_moves_the_head(store: str) -> None:
    stores = [open_store(store) for _ in range(WRITERS)]
    start = threading.Barrier(WRITERS)

    def write(number: int) -> tuple[str, list[int]]:
        own, moves = stores[number], []
        start.wait()
        committed = own.commit("artifact", Manifest(kind="made", files=(), **origin({"writer": str(number)})))
        for _ in range(8):
            head = own.read("head.json", Head)
            new = Head(leg_id=f"leg-{number}", epoch=0 if head is None else head.epoch + 1)
            if own.swap("head.json", head, new):
                moves.append(new.epoch)
        return committed.nonce, moves

    with ThreadPoolExecutor(WRITERS) as pool:
        nonces, moves = zip(*pool.map(write, range(WRITERS)), strict=True)
    assert len(set(nonces)) == 1
    last = stores[0].read("head.json", Head)
    assert last is not None
    assert sorted(epoch for made in moves for epoch in made) == list(range(last.epoch + 1))


@pytest.fixture
def behind_proxy(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A store behind a proxy, which knows by then that the server has conditional writes."""
    with FaultProxy(s3_server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_store(f"s3://runs/{tmp_path.name}")
        store.create_bytes("first", b"{}")
        yield store, proxy


@pytest.mark.parametrize("fault", [Fault.RESET_AFTER, Fault.ERROR_500_AFTER, Fault.DUPLICATE])
def test_a_commit_whose_reply_was_lost_is_known_by_its_nonce(
    behind_proxy: tuple[FsspecStore, FaultProxy], fault: Fault
) -> None:
    store, proxy = behind_proxy
    proxy.rates = Once({fault: 1.0})
    manifest = Manifest(kind="made", files=(), **origin({}))
    assert store.commit("artifact", manifest).nonce == manifest.nonce
    assert proxy.injected[fault] == 1
    other = Manifest(kind="made", files=(), **origin({}))
    assert store.commit("artifact", other).nonce == manifest.nonce


@pytest.mark.parametrize("fault", [Fault.RESET_AFTER, Fault.ERROR_500_AFTER])
def test_a_move_of_the_head_whose_reply_was_lost_has_happened_once(
    behind_proxy: tuple[FsspecStore, FaultProxy], fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, proxy = behind_proxy
    run = RunArtifacts(store, "run")
    first = run.move_head(None, "main")
    put = store.objects._put  # type: ignore[attr-defined]

    def put_and_lose_the_reply(*arguments: Any, **condition: str) -> bool:
        proxy.rates = Once({fault: 1.0})
        return put(*arguments, **condition)

    monkeypatch.setattr(store.objects, "_put", put_and_lose_the_reply)
    assert run.move_head(first, "replay") == Head(leg_id="replay", epoch=1) == run.head()
    assert proxy.injected[fault] == 1


# ---- whole runs


def test_two_processes_of_one_run_end_with_the_work_of_one(
    store: str, prefect_server: dict[str, str], undisturbed: dict[str, Any]
) -> None:
    arguments = [*run_arguments("testbed-npo", store, "demo"), "--json"]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: npo(*arguments, env=prefect_server), range(2)))
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    run = open_run(last_json(results[0])["run"])
    assert fingerprint(run) == undisturbed
    assert npo("verify", run.uri).returncode == 0


def test_two_processes_of_one_autonpo_run_decide_once(
    tmp_path: Path, prefect_server: dict[str, str], autonpo_run: str
) -> None:
    arguments = [*autonpo_arguments(f"s3://runs/{tmp_path.name}", "demo"), "--json"]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: npo(*arguments, env=prefect_server), range(2)))
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    run = open_run(last_json(results[0])["run"])
    assert fingerprint(run) == fingerprint(open_run(autonpo_run))
    assert npo("verify", run.uri).returncode == 0


def test_stages_run_again_while_the_run_goes_on_find_what_is_there(
    tmp_path: Path, prefect_server: dict[str, str], undisturbed: dict[str, Any]
) -> None:
    store = f"s3://runs/{tmp_path.name}"
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *run_arguments("testbed-npo", store, "demo")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **prefect_server},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = open_run(f"{store}/demo")
    seen = 0
    while process.poll() is None:
        if run.find_record() is None or run.head() is None:
            continue
        for stage in (["warm-start"], ["evaluate", "--step", "0"], ["scout", "--start", "0", "--lookahead", "4"]):
            again = npo("stage", stage[0], run.uri, *stage[1:], env=prefect_server)
            assert again.returncode == 0, again.stderr
            seen += 1
    assert process.returncode == 0, process.stderr and process.stderr.read()
    assert seen
    assert fingerprint(run) == undisturbed
    assert npo("verify", run.uri).returncode == 0
