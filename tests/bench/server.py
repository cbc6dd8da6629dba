"""One Prefect server for everything that a benchmark starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from flows.local_server import LocalServer
from tests.prefect_stack import protected_server


@contextmanager
def shared_server() -> Iterator[None]:
    """Sets PREFECT_API_URL to a server that lives as long as the block. Enter it before Prefect is imported."""
    os.environ["PREFECT_LOGGING_LEVEL"] = "CRITICAL"
    server = LocalServer()
    try:
        server.wait()
        os.environ["PREFECT_API_URL"] = server.api_url
        yield
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        server.close()


@contextmanager
def deployments_server(folder: Path) -> Iterator[None]:
    """The same with what deployments have beside: authentication, services, heartbeats, and the flows' own logs."""
    with protected_server(folder) as server:
        client = {name: server[name] for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")}
        with patch.dict(os.environ, {**client, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}):
            yield
