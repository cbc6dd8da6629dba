"""A supervised process and its children end with us, however we end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from npo_core.supervised import Supervised
from tests.command import ROOT

FAMILY = "import subprocess, sys, time; subprocess.Popen(['sleep', '1000']); print('up', flush=True); time.sleep(1000)"


def family(mark: str) -> list[psutil.Process]:
    """Processes that have this mark in their environment, but for ourselves."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FAMILY_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def numbers(mark: str, count: int) -> bool:
    """Whether so many are there within a while: an environment cannot be read while a process becomes its program."""
    deadline = time.monotonic() + 30
    while len(family(mark)) != count and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(family(mark)) == count


def gone(mark: str) -> bool:
    return numbers(mark, 0)


def test_what_it_prints_and_its_exit_code_come_back() -> None:
    made = Supervised([sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"])
    assert sorted(made.output.read().split()) == [b"err", b"out"]
    made.close()
    assert made.poll() == 3


def test_closed_it_leaves_no_child(request: pytest.FixtureRequest) -> None:
    made = Supervised([sys.executable, "-c", FAMILY], {"FAMILY_MARK": request.node.name})
    assert made.output.readline() == b"up\n"
    assert numbers(request.node.name, 3)
    made.close()
    assert gone(request.node.name)


def test_killed_we_leave_neither_it_nor_a_child(request: pytest.FixtureRequest) -> None:
    code = (
        "import sys; from npo_core.supervised import Supervised\n"
        f"made = Supervised([sys.executable, '-c', {FAMILY!r}])\n"
        "print(made.output.readline(), flush=True); made.output.read()"
    )
    mark = request.node.name
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "FAMILY_MARK": mark}, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        assert b"up" in parent.stdout.readline()
        assert numbers(mark, 4)
        parent.send_signal(signal.SIGKILL)
    assert gone(mark)


def test_a_child_that_ignores_a_polite_end_is_killed(request: pytest.FixtureRequest) -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(1000)"
    )
    made = Supervised([sys.executable, "-c", stubborn], {"FAMILY_MARK": request.node.name})
    made.output.readline()
    made.close()
    assert gone(request.node.name)
