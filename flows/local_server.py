"""A Prefect server for the life of one process: started beside our imports, gone when we are, even after SIGKILL.

Prefect's own ephemeral server outlives a parent that is killed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from flows.interrupt import insistent_interrupt
from npo_core.interfaces import NearFutureError
from npo_core.supervised import Supervised

STARTUP_TIMEOUT_S = 120.0
SERVER = (sys.executable, "-m", "prefect", "server", "start", "--analytics-off", "--host", "127.0.0.1")


@contextmanager
def prefect_api() -> Iterator[None]:
    """The Prefect API that PREFECT_API_URL names, or a local server that lives as long as the block.

    Enter it before Prefect is imported: Prefect reads its settings at import.

    Raises:
        NearFutureError: the API does not answer, or refuses what it is asked.
    """
    # The terminal is ours: Prefect would print a traceback for every error.
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    if os.environ.get("PREFECT_API_URL"):
        with _reachable(), insistent_interrupt():
            yield
        return
    server = LocalServer()
    os.environ["PREFECT_API_URL"] = server.api_url
    try:
        import npo_core.workspace  # noqa: F401  # torch and transformers load while the server starts

        server.wait()
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        # Nobody watches this server for them, and every flow would wait up to a second for the thread that sends them.
        without_heartbeats = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
        with without_heartbeats, _reachable(), insistent_interrupt():
            yield
    finally:
        del os.environ["PREFECT_API_URL"]
        server.close()


@contextmanager
def _reachable() -> Iterator[None]:
    """Tells in one message that the Prefect API failed, and not our work."""
    try:
        yield
    except Exception as error:
        import httpx

        # Prefect wraps the first call's failure.
        reason = next((e for e in (error, error.__cause__) if isinstance(e, httpx.HTTPError)), None)
        if reason is None:
            raise
        raise NearFutureError(
            f"the Prefect API at PREFECT_API_URL {os.environ['PREFECT_API_URL']} does not answer as it should "
            f"({str(reason) or type(reason).__name__}); start that server, or unset PREFECT_API_URL to have a local "
            "one; then the same command resumes"
        ) from error


class LocalServer:
    """Starts at once; `wait` until it answers.

    Args:
        environment: added to this process's for the server, say PREFECT_HOME.
        services: whether schedules fire and automations act, which costs a little CPU.
        port: by default one that is free.
        ui: whether it serves Prefect's UI.
    """

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        services: bool = False,
        port: int | None = None,
        ui: bool = False,
    ) -> None:
        self.port = port or free_port()
        options = [option for option, on in (("--no-services", services), ("--no-ui", ui)) if not on]
        self._process = Supervised(
            [*SERVER, *options, "--port", str(self.port)],
            {
                **(environment or {}),
                "PREFECT_LOGGING_LEVEL": "CRITICAL",
                "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
                # By default the UI asks the API at port 4200, whatever the server's own is.
                "PREFECT_SERVER_UI_API_URL": "/api",
            },
            output=subprocess.DEVNULL,
        )

    @property
    def api_url(self) -> str:
        """What PREFECT_API_URL is to be."""
        return f"http://127.0.0.1:{self.port}/api"

    def wait(self) -> None:
        """Returns when the server answers.

        Raises:
            NearFutureError: it ended, or did not answer in time.
        """
        deadline = time.monotonic() + STARTUP_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{self.api_url}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise NearFutureError(
            f"the local Prefect server did not answer on port {self.port}; `prefect server start` shows the reason, "
            "and PREFECT_API_URL names a server that runs already"
        )

    def close(self) -> None:
        """Ends the server."""
        self._process.close()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
