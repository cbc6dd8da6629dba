"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from hypothesis import settings

if TYPE_CHECKING:
    from tests.s3_server import S3Server

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Deadlines measure how busy the machine is.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: one that begins last would keep one worker busy while the others wait."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment which points a command at one local Prefect server, with a home of its own."""
    from flows.local_server import LocalServer

    home = {"PREFECT_HOME": str(tmp_path_factory.mktemp("prefect"))}
    server = LocalServer(home)
    server.wait()
    yield {**home, "PREFECT_API_URL": server.api_url}
    server.close()


@pytest.fixture(scope="session")
def shared_by_workers(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all workers of this session see."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def npo_run(shared_by_workers: Path, prefect_server: dict[str, str]) -> str:
    """URI of a finished run of NPO on the testbed, to be read only."""
    from tests.command import run_arguments

    return made_once(
        shared_by_workers / "npo", lambda store: run_arguments("testbed-npo", store, "demo"), prefect_server
    )


@pytest.fixture(scope="session")
def autonpo_run(shared_by_workers: Path, prefect_server: dict[str, str]) -> str:
    """URI of a finished run of AutoNPO on the testbed that intervened twice, to be read only."""
    from tests.command import autonpo_arguments

    return made_once(shared_by_workers / "autonpo", lambda store: autonpo_arguments(store, "demo"), prefect_server)


def made_once(store: Path, arguments: Callable[[Path], list[str]], server: dict[str, str]) -> str:
    """URI of the run in a store that one worker makes while the others wait for it."""
    from tests.command import last_json, npo

    made = store.with_suffix(".uri")
    with FileLock(store.with_suffix(".lock")):
        if not made.exists():
            made.write_text(last_json(npo(*arguments(store), "--json", env=server))["run"])
        return made.read_text()


@pytest.fixture(scope="session")
def prefect_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of the user of a server with authentication, CSRF protection and services."""
    from tests.prefect_stack import protected_server

    with protected_server(tmp_path_factory.mktemp("deployments")) as server:
        yield server


@pytest.fixture(scope="session")
def deployed(prefect_stack: dict[str, str]) -> dict[str, str]:
    """`prefect_stack`, after deploy/bootstrap."""
    from tests.prefect_stack import bootstrap

    first = bootstrap(prefect_stack)
    assert first.returncode == 0, first.stdout + first.stderr
    return prefect_stack


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server that checks signatures, with a bucket `runs`."""
    from tests.s3_server import S3Server

    with S3Server() as server:
        server.make_bucket("runs")
        yield server


@pytest.fixture(scope="session")
def sixteen_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a synthetic run of sixteen steps in segments of two, to be copied and swept."""
    from tests.synthetic import build_run

    store = tmp_path_factory.mktemp("sixteen")
    build_run(store, steps=16, segment_steps=2)
    return store


@pytest.fixture(scope="session")
def eight_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a synthetic run of eight steps in segments of two, to be copied."""
    from tests.synthetic import build_run

    store = tmp_path_factory.mktemp("eight")
    build_run(store, steps=8, segment_steps=2)
    return store
