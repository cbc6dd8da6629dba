"""A process with all its children that lives no longer than we do: gone when we are, even after SIGKILL.

A small supervisor holds the other end of a pipe to us and ends the command's process group when the pipe closes. The
kernel's death signal would not do: it comes when the thread ends that started the child.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

GRACE_S = 5.0
"""Between SIGTERM and SIGKILL."""


class Supervised:
    """Starts at once.

    Args:
        command: program and arguments.
        environment: added to this process's.
        output: where its stdout and stderr go, as `subprocess` takes it; by default both come together in `output`.
        pass_fds: file descriptors that it inherits.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        output: int | IO[Any] = subprocess.PIPE,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "npo_core.supervised", *map(str, pass_fds), "--", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A Ctrl-C in the terminal is not for it: the pipe decides, so that we may still report our end.
            start_new_session=True,
            pass_fds=pass_fds,
            env={**os.environ, **(environment or {})},
        )

    @property
    def output(self) -> IO[bytes]:
        """What the process prints."""
        assert self._process.stdout is not None
        return self._process.stdout

    def poll(self) -> int | None:
        """The exit code of the process if it has ended."""
        return self._process.poll()

    def close(self) -> None:
        """Ends the process with its children; done when none is left."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait(timeout=6 * GRACE_S)


def supervise(command: Sequence[str], pass_fds: Sequence[int]) -> int:
    """Runs a command until it ends or standard input closes; then nothing of its process group is left.

    Returns:
        Its exit code, as shells have it.
    """
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=pass_fds)
    for descriptor in pass_fds:
        os.close(descriptor)

    def end_with_the_pipe() -> None:
        # Not sys.stdin: its lock, held by a daemon thread, would abort the interpreter's end.
        while os.read(0, 1):
            pass
        _end(child.pid)

    threading.Thread(target=end_with_the_pipe, daemon=True).start()
    code = child.wait()
    _end(child.pid)  # children that outlived it
    return code if code >= 0 else 128 - code


def _end(group: int) -> None:
    """Ends a process group, by force after a while."""
    try:
        os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    split = sys.argv.index("--")
    sys.exit(supervise(sys.argv[split + 1 :], [int(fd) for fd in sys.argv[1:split]]))
