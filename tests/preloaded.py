"""Processes that begin with torch and transformers imported: importing them takes most of a small command's time.

A parent imports both, and nothing of ours, and forks for every command. What a command does from there on, it does in a
process of its own: our modules, Prefect's settings and the environment are read anew, and a kill ends it alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTED = ("torch", "transformers.models.qwen3.modeling_qwen3")


class PreloadedParent:
    """The parent; it ends with this process."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.preloaded", str(theirs.fileno())]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])

    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Runs `npo` with these arguments to its end. Threads may do so side by side.

        Raises:
            subprocess.TimeoutExpired: it was killed, for it took longer.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as order:
            order.write(json.dumps({"arguments": list(arguments), "environment": dict(environment)}).encode())
            order.flush()
            with theirs:
                descriptors = [file.fileno() for file in (order, out, err, theirs)]
                socket.send_fds(self._orders, [b"run"], descriptors)
            pid = int(ours.recv(64))
            late = not select.select([ours], [], [], timeout)[0]
            if late:
                os.kill(pid, signal.SIGKILL)
            status = int(ours.recv(64))
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
        if late:
            raise subprocess.TimeoutExpired(list(arguments), timeout, *texts)
        return subprocess.CompletedProcess(list(arguments), os.waitstatus_to_exitcode(status), *texts)


def serve(orders: socket.socket) -> None:
    """Forks for each order, and tells whoever gave it the pid and how it ended. Returns in the forked processes."""
    waiting: dict[int, tuple[int, socket.socket]] = {}
    while True:
        ready = select.select([orders, *waiting], [], [])[0]
        for pidfd in ready:
            if isinstance(pidfd, int):
                pid, reply = waiting.pop(pidfd)
                os.close(pidfd)
                status = os.waitpid(pid, 0)[1]
                with reply, contextlib.suppress(BrokenPipeError):
                    reply.send(str(status).encode())
        if orders not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(orders, 16, 4)
        if not message:
            sys.exit()
        pid = os.fork()
        if not pid:
            for fd, (_, other) in waiting.items():
                os.close(fd)
                other.close()
            orders.close()
            become(*descriptors)
            return
        for fd in descriptors[:3]:
            os.close(fd)
        reply = socket.socket(fileno=descriptors[3])
        reply.send(str(pid).encode())
        waiting[os.pidfd_open(pid)] = pid, reply


def become(order: int, out: int, err: int, reply: int) -> None:
    """Makes the forked process the one that was ordered."""
    os.close(reply)
    with os.fdopen(order, "rb") as file:
        file.seek(0)
        wanted = json.load(file)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for fd, standard in ((out, 1), (err, 2)):
        os.dup2(fd, standard)
        os.close(fd)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    sys.argv = ["npo", *wanted["arguments"]]


if __name__ == "__main__":
    for module in IMPORTED:
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
    serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module("flows.cli", run_name="__main__")
