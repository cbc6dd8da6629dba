"""One local Prefect server for everything that a benchmark starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from flows.local_server import LocalServer


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
