"""A real PostgreSQL server of this machine's packages, empty, for the life of a block."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.local_server import free_port

OWNER = "postgres"
"""Whom the server runs as where we are root, whom it refuses."""
WAIT_S = 60.0

# The shell ends the server when our end of the pipe closes, however we end; SIGINT throws out whoever is connected.
WITH_THE_PIPE = '"$@" </dev/null & read -r _; kill -INT $!; wait $!'


@contextmanager
def postgresql() -> Iterator[str]:
    """URL of its database, as Prefect's settings take it."""
    binaries, as_owner = _binaries(), _as_owner()
    # Not in pytest's folder: only root may enter that.
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    try:
        if as_owner:
            shutil.chown(folder, **as_owner)
        data, port = folder / "data", free_port()
        subprocess.run(
            [binaries / "initdb", "--pgdata", data, "--username", "prefect", "--auth", "trust", "--no-sync"],
            check=True,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            **as_owner,
        )
        command = [binaries / "postgres", "-D", data, "-k", folder, "-h", "127.0.0.1", "-p", str(port), "-F"]
        with (folder / "log").open("w") as log:
            shell = subprocess.Popen(
                ["sh", "-c", WITH_THE_PIPE, "sh", *command],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **as_owner,
            )
        try:
            _wait([binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-q"], folder / "log")
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
        finally:
            shell.communicate(timeout=WAIT_S)
    finally:
        shutil.rmtree(folder)


def _binaries() -> Path:
    found = [*sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")), *filter(None, [shutil.which("initdb")])]
    assert found, "no PostgreSQL here: apt-get install postgresql, or put its initdb on the PATH"
    return Path(found[0]).parent


def _as_owner() -> dict[str, Any]:
    return {"user": OWNER, "group": OWNER} if os.geteuid() == 0 else {}


def _wait(is_ready: list[Any], log: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while subprocess.run(is_ready, check=False).returncode:
        assert time.monotonic() < deadline, f"PostgreSQL does not answer: {log.read_text()}"
        time.sleep(0.2)
