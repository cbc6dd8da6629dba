"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.s3_server import S3Server

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Deadlines measure how busy the machine is.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


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
def s3_server() -> Iterator[S3Server]:
    """An S3 server that checks signatures, with a bucket `runs`."""
    from tests.s3_server import S3Server

    with S3Server() as server:
        server.make_bucket("runs")
        yield server
