"""Verdicts in real processes: what takes too long, too much or its process with it costs a verdict and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from npo_core.begin import begin, warm_start
from npo_core.interfaces import ConfigurationError, NearFutureError, Prompt, Verdict
from npo_core.segment import run_segment
from npo_core.verifiers.kinds import name
from npo_core.verifiers.pool import PooledVerifier
from schemas.verifier import VerifierSection
from tests.command import ROOT
from tests.test_segment import small

Start = Callable[..., PooledVerifier]

FUNCTIONS = """
import itertools, os, signal, subprocess, sys, time
judged = itertools.count()
def act(answer, text, prompt, metadata):
    if text == "spin":
        while True: pass
    if text == "one long call": return 9**9**9 == 0
    if text == "sleep": time.sleep(600)
    if text.startswith("child"): subprocess.run(["sleep", text.split()[1]])
    if text == "exit": os._exit(3)
    if text == "exit if used" and next(judged): os._exit(3)
    if text == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
    if text == "memory": return len(bytearray(1 << 40)) == 0
    if text == "hidden memory":
        held = []
        try:
            while True: held.append(bytearray(1 << 22))
        except Exception: return False
    if text == "raise": raise ValueError("no \\ud800 idea")
    if text == "leave": sys.exit(0)
    if text == "print": print("x" * 100_000); os.write(1, b"junk")
    if text == "nan": return float("nan")
    if text == "pid": return {"reward": os.getpid()}
    if text == "order": time.sleep(0.02 * (int(answer) % 3))
    return {"reward": float(answer), "correct": True}
"""


def prompt(answer: str = "1") -> Prompt:
    return Prompt("p", "t", ({"role": "user", "content": "q"},), answer)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    (tmp_path / "acts.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    opened: list[PooledVerifier] = []

    def begin_one(**fields: Any) -> PooledVerifier:
        chosen = {"kind": "python", "function": "acts:act", "timeout_s": 0.5, "memory_mib": 256, **fields}
        if chosen["kind"] != "python":
            del chosen["function"]
        section = VerifierSection.model_validate(chosen)
        opened.append(PooledVerifier(name(section), section))
        return opened[-1]

    yield begin_one
    for verifier in opened:
        verifier.close()
    assert not workers()


def workers(parent: int | None = None) -> list[psutil.Process]:
    """Processes of pools below a process, ours by default."""
    below = psutil.Process(parent).children(recursive=True)
    return [process for process in below if "npo_core.verifiers.worker" in " ".join(process.cmdline())]


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(psutil.pid_exists, pids))


@pytest.mark.parametrize(
    ("text", "failure", "reason"),
    [
        ("spin", "timeout", "no verdict within 0.5 CPU seconds"),
        ("one long call", "timeout", "no verdict within 0.5 CPU seconds"),
        ("sleep", "timeout", "no verdict within 5 s by the clock"),
        ("child 600", "timeout", "no verdict within 5 s by the clock"),
        ("exit", "error", "its process ended (exit code 3)"),
        ("segfault", "error", "its process ended (by SIGSEGV)"),
        ("memory", "error", "no verdict within 256 MiB"),
        ("hidden memory", "error", "no verdict within 256 MiB"),
        ("raise", "error", "ValueError: no   idea"),
        ("leave", "error", "SystemExit: 0"),
        ("nan", "error", "its reward is nan"),
    ],
)
def test_a_failed_verdict_says_why_and_the_next_ones_are_right(
    start: Start, text: str, failure: str, reason: str
) -> None:
    verifier = start(workers=1, timeout_s=0.5 if failure == "timeout" else 60)
    before, failed, after = verifier.judge([(prompt("0.25"), ""), (prompt(), text), (prompt("0.75"), "")])
    assert (failed.reward, failed.correct, failed.failure) == (0.0, False, failure)
    assert reason in failed.reason
    assert (before.reward, after.reward) == (0.25, 0.75)
    assert before.failure is after.failure is None


def test_a_child_of_a_killed_verdict_ends_with_it(start: Start) -> None:
    seconds = str(10**6 + os.getpid())  # nobody else sleeps so long
    verdict = start(workers=1).verify(prompt(), f"child {seconds}")
    assert verdict.failure == "timeout"
    assert gone([p.pid for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", seconds]])


def test_verdicts_come_in_the_order_of_the_answers(start: Start) -> None:
    verifier = start(workers=3)
    assert [v.reward for v in verifier.judge([(prompt(str(i)), "order") for i in range(60)])] == list(range(60))
    assert len(workers()) == 3
    assert verifier.judge([]) == []


def test_a_process_that_has_judged_before_is_not_held_against_an_answer(start: Start) -> None:
    verifier = start(workers=1)
    assert [v.failure for v in verifier.judge([(prompt(), "exit if used")] * 3)] == [None] * 3


def test_processes_start_with_the_first_verdict_and_stay_until_closed(start: Start) -> None:
    verifier = start(workers=1)
    assert not workers()
    first = verifier.verify(prompt(), "pid")
    assert verifier.verify(prompt(), "pid") == first
    verifier.close()
    assert not workers()
    assert verifier.verify(prompt(), "pid") != first


def test_a_process_killed_between_verdicts_is_replaced(start: Start) -> None:
    verifier = start(workers=1)
    verifier.verify(prompt(), "")
    [worker] = workers()
    worker.kill()
    assert verifier.verify(prompt("0.5"), "").reward == 0.5


def test_what_a_function_prints_is_no_verdict(start: Start) -> None:
    assert start().verify(prompt("0.5"), "print").reward == 0.5


def test_a_function_that_is_not_there_is_told_by_name(start: Start) -> None:
    with pytest.raises(ConfigurationError, match=r"verifier\.function acts:missing cannot be loaded \(AttributeError"):
        start(function="acts:missing").verify(prompt(), "")


HOSTILE = {
    "digits": "9" * 10_000_000,
    "boxed digits": f"\\boxed{{{'9' * 10_000_000}}}",
    "nested": "\\boxed{" + "\\frac{1}{" * 5000 + "1" + "}" * 5001,
    "brackets": "$" + "(" * 100_000 + "$",
    "tower": "\\boxed{9**9**9}",
    "latex tower": "\\boxed{9^{9^{9}}}",
    "factorials": "\\boxed{(10^7)!!!}",
    "unclosed": "\\boxed{" * 10**6,
    "spaces": "answer" + " " * 10**6 + ":",
    "nuls": "\0" * 10**5,
    "surrogates": "\ud800\\boxed{\udfff}",
}


@pytest.mark.parametrize("kind", ["exact", "numeric", "choice", "math-verify"])
def test_hostile_answers_cost_their_own_verdict(start: Start, kind: str) -> None:
    answer = "B" if kind == "choice" else "2"
    verifier = start(kind=kind, workers=1, timeout_s=1, memory_mib=1024)
    for hostile, text in HOSTILE.items():
        began = time.monotonic()
        bad, good = verifier.judge([(prompt(answer), text), (prompt(answer), f"\\boxed{{{answer}}}")])
        assert time.monotonic() - began < 60, hostile
        assert (bad.reward, bad.correct) == (0.0, False), hostile
        bad.reason.encode()  # every file takes it
        assert good == Verdict(1.0, True, "correct"), hostile


@pytest.mark.parametrize("kind", ["math-verify", "reasoning-gym"])
def test_no_process_of_a_pool_holds_torch(start: Start, kind: str) -> None:
    start(kind=kind, workers=1).verify(prompt("2"), "2")
    [worker] = workers()
    held = Path(f"/proc/{worker.pid}/maps").read_text()
    assert "numpy" in held
    assert not {word for word in ("libtorch", "libcuda") if word in held}


@pytest.mark.parametrize("text", ["spin", "sleep", "one long call", ""])
def test_nothing_is_left_of_a_pool_whose_process_was_killed(tmp_path: Path, text: str) -> None:
    (tmp_path / "acts.py").write_text(FUNCTIONS)
    (tmp_path / "run.py").write_text(
        textwrap.dedent(f"""
        import time
        from npo_core.interfaces import Prompt
        from npo_core.verifiers.pool import PooledVerifier
        from schemas.verifier import VerifierSection
        verifier = PooledVerifier("v", VerifierSection(kind="python", function="acts:act", timeout_s=600, workers=2))
        ask = lambda text: verifier.judge([(Prompt("p", "t", (), "1"), text)] * 2)
        ask("")
        print("judged", flush=True)
        ask({text!r})
        time.sleep(600)
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "run.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stdout.readline() == b"judged\n"
    pids = [worker.pid for worker in workers(run.pid)]
    assert len(pids) == 2
    time.sleep(0.3)  # into the second verdicts
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert gone(pids)


# ---- in a run


def test_a_run_counts_the_verdicts_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the testbed's prompts, by a function that judges as the testbed does and gives up on some texts."""
    (tmp_path / "strict.py").write_text(
        "import zlib\n"
        "def exact(answer, text, prompt, metadata):\n"
        "    luck = zlib.crc32(text.encode()) % 4\n"
        "    if luck == 0: raise ValueError(text)\n"
        "    while luck == 1: pass\n"
        "    return answer == text\n"
    )
    monkeypatch.chdir(tmp_path)
    data = {"data": {"prompts": 4, "held_out": 2}, "rollout": {"prompts_per_step": 2}}
    chosen = {"kind": "python", "function": "strict:exact", "timeout_s": 0.2}
    tables = {}
    for run, fields in (("testbed", {}), ("own", chosen)):
        opened = begin(small(tmp_path / "store", run, verifier=fields, **data))
        engine = opened.holding(warm_start(opened), optimizer=True)
        leg = opened.context("leg", "w")
        tables[run] = run_segment(leg, engine.generator, engine.learner, 0, 1, lambda step, metrics: None)
        if run == "own":
            assert opened.verifier.name.startswith("python/strict:exact@")
        opened.close()
    assert not workers()
    theirs, ours = (tables[run].rollouts.to_pylist() for run in ("testbed", "own"))
    assert [row["text"] for row in theirs] == [row["text"] for row in ours]
    errors = timeouts = 0
    for plain, own in zip(theirs, ours, strict=True):
        fails, hangs = (zlib.crc32(plain["text"].encode()) % 4 == luck for luck in (0, 1))
        errors, timeouts = errors + fails, timeouts + hangs
        assert own["correct"] == (plain["correct"] and not fails and not hangs)
    assert errors
    assert timeouts
    counted = ("verifier/errors", "verifier/timeouts")
    [metrics] = tables["own"].metrics.select(counted).to_pylist()
    assert metrics == {"verifier/errors": errors, "verifier/timeouts": timeouts}
    [metrics] = tables["testbed"].metrics.select(counted).to_pylist()
    assert metrics == dict.fromkeys(counted)


def test_a_run_is_not_resumed_under_a_changed_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "mine.py"
    module.write_text("def f(**asked): return True\n")
    monkeypatch.chdir(tmp_path)
    config = small(tmp_path / "store", verifier={"kind": "python", "function": "mine:f"})
    assert begin(config).verifier
    module.write_text("def f(**asked): return False\n")
    with pytest.raises(NearFutureError, match=r"was verified by python/mine:f@\w{12}, this .* has python/mine"):
        _ = begin(config).verifier
