"""What a flow run of a deployment does to itself in the end."""

from __future__ import annotations

import signal
import subprocess
import sys

from tests.command import ROOT

END = "import signal, time; from flows import deployed; deployed._end(signal.SIGTERM); time.sleep(60)"


def test_in_somebody_else_s_process_group_it_ends_itself_alone() -> None:
    """As in a script, or in a process that serves several flows."""
    script = '"$0" -c "$1"; echo the shell goes on'
    said = subprocess.run(
        ["sh", "-c", script, sys.executable, END],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert (said.returncode, said.stdout) == (0, "the shell goes on\n"), said.stderr


def test_in_a_group_of_its_own_it_takes_its_children_along() -> None:
    code = f"import subprocess; subprocess.Popen(['sleep', '1000']); {END}"
    ended = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    # The child holds the pipe too.
    ended.communicate(timeout=60)
    assert ended.returncode == -signal.SIGTERM
