"""Processes that judge, each of which may be killed without harm: a verdict that takes too much time or memory, or
ends its process, is a failed one, and the next question finds another process."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence

from npo_core.interfaces import ConfigurationError, NearFutureError, Prompt, Verdict, Verifier
from npo_core.verifiers.worker import OUT_OF_MEMORY
from schemas.verifier import VerifierSection

logger = logging.getLogger("npo")

WAITING = 10
"""A verdict may take so many times its CPU seconds by the clock."""
START_S = 600.0
"""Longest start of a process; imports take seconds, on a busy machine minutes."""


class PooledVerifier(Verifier):
    """A verifier whose verdicts are reached in processes of its own.

    Deterministic: each process starts with the same seeds, and what fails for memory, or ends a process that has
    judged before, is asked once more of a fresh one.

    Args:
        name: `name/version`.
        section: its settings, with a kind that is not `auto`.
    """

    can_fail = True

    def __init__(self, name: str, section: VerifierSection) -> None:
        self.name, self._section = name, section
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _end, self._workers)

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """See `Verifier.verify`."""
        return self.judge([(prompt, text)])[0]

    def judge(self, items: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """See `Verifier.judge`.

        Raises:
            ConfigurationError: a process cannot start, because the verifier cannot be loaded.
        """
        with self._lock:
            try:
                verdicts = _Round(self._workers, self._section, items).verdicts()
            except BaseException:
                _end(self._workers)  # some are in the middle of a question
                raise
        failed = Counter(verdict.failure for verdict in verdicts if verdict.failure is not None)
        if failed:
            first = next(verdict for verdict in verdicts if verdict.failure is not None)
            logger.warning(
                "verifier %s: of %d verdicts %d ran out of time, %d failed; the first: %s",
                self.name,
                len(verdicts),
                failed["timeout"],
                failed["error"],
                first.reason,
            )
        return verdicts

    def close(self) -> None:
        """Ends the processes. Another verdict starts new ones."""
        with self._lock:
            _end(self._workers)


class _Worker:
    """A process, and the question that it has been given, or will be when it has started."""

    def __init__(self, section: VerifierSection, question: int) -> None:
        self.question: int | None = question
        self.ready = False
        self.judged = 0
        self.deadline = time.monotonic() + START_S
        theirs, life = os.pipe()
        self._life: int | None = life
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "npo_core.verifiers.worker", section.model_dump_json(), str(theirs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(theirs,),
                # A Ctrl-C in the terminal is not for it. What it starts is in its group, and ends with it.
                start_new_session=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path),
                    "PYTHONHASHSEED": "0",
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                    "CUDA_VISIBLE_DEVICES": "",
                },
            )
        except OSError:
            os.close(life)
            raise
        finally:
            os.close(theirs)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions, self.replies = self._process.stdin, self._process.stdout

    def ask(self, line: bytes, within: float) -> None:
        """Gives it its question."""
        self.deadline = time.monotonic() + within
        # It may have ended, which its replies will tell.
        with contextlib.suppress(BrokenPipeError):
            self._questions.write(line)
            self._questions.flush()

    def code(self) -> int:
        """How a process that has closed its replies has ended: its exit code, or the negative number of a signal."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(10)
        self._process.kill()
        return self._process.wait()

    def end(self) -> None:
        """Kills it with all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.replies.close()
        with contextlib.suppress(BrokenPipeError):
            self._questions.close()
        if self._life is not None:
            os.close(self._life)
            self._life = None


class _Round:
    """The verdicts on some answers, each asked of whatever process is free."""

    def __init__(self, workers: list[_Worker], section: VerifierSection, items: Sequence[tuple[Prompt, str]]) -> None:
        self._workers, self._section, self._items = workers, section, items
        self._waiting = deque(range(len(items)))
        self._verdicts: dict[int, Verdict] = {}

    def verdicts(self) -> list[Verdict]:
        """All of them, in order."""
        with selectors.DefaultSelector() as self._selector:
            for worker in self._workers:
                self._selector.register(worker.replies, selectors.EVENT_READ, worker)
            while len(self._verdicts) < len(self._items):
                self._deal()
                first = min(worker.deadline for worker in self._workers if worker.question is not None)
                for key, _ in self._selector.select(max(0.0, first - time.monotonic())):
                    self._hear(key.data)
                for worker in list(self._workers):
                    if worker.question is not None and worker.deadline < time.monotonic():
                        self._overdue(worker)
        return [self._verdicts[i] for i in range(len(self._items))]

    def _deal(self) -> None:
        """Gives questions to free processes, and starts processes up to the limit."""
        free = [worker for worker in self._workers if worker.question is None]
        while self._waiting and (free or len(self._workers) < self._section.workers):
            if free:
                self._ask(free.pop(), self._waiting.popleft())
            else:
                self._start(self._waiting.popleft())

    def _start(self, question: int) -> None:
        worker = _Worker(self._section, question)
        self._workers.append(worker)
        self._selector.register(worker.replies, selectors.EVENT_READ, worker)

    def _ask(self, worker: _Worker, question: int) -> None:
        prompt, text = self._items[question]
        asked = {
            "answer": prompt.answer,
            "text": text,
            "messages": [dict(message) for message in prompt.messages],
            "metadata": prompt.metadata,
        }
        worker.question = question
        worker.ask(json.dumps(asked).encode() + b"\n", WAITING * self._section.timeout_s)

    def _hear(self, worker: _Worker) -> None:
        line = worker.replies.readline()
        if not line.endswith(b"\n"):
            self._lost(worker)
            return
        reply = json.loads(line)
        if "refused" in reply:
            what = f"function {self._section.function}" if self._section.function else f"kind {self._section.kind}"
            raise ConfigurationError(f"verifier.{what} cannot be loaded ({reply['refused']}); mend or install it")
        assert worker.question is not None  # nothing else makes it reply
        if "ready" in reply:
            self._ask(worker, worker.question)
            worker.ready = True
            return
        self._verdicts[worker.question] = Verdict(**reply)
        worker.question = None
        worker.judged += 1

    def _lost(self, worker: _Worker) -> None:
        """A process has ended."""
        code = worker.code()
        self._remove(worker)
        if not worker.ready:
            raise NearFutureError(f"a process of verifier.kind {self._section.kind} ended as it started ({_how(code)})")
        if worker.question is None:
            return
        if code == -signal.SIGPROF:
            reason = f"no verdict within {self._section.timeout_s:g} CPU seconds (verifier.timeout_s)"
            self._verdicts[worker.question] = Verdict(0.0, False, reason, "timeout")
        elif worker.judged:
            # What it judged before may be the reason.
            self._start(worker.question)
        elif code == OUT_OF_MEMORY:
            reason = f"no verdict within {self._section.memory_mib} MiB (verifier.memory_mib)"
            self._verdicts[worker.question] = Verdict(0.0, False, reason, "error")
        else:
            self._verdicts[worker.question] = Verdict(0.0, False, f"its process ended ({_how(code)})", "error")

    def _overdue(self, worker: _Worker) -> None:
        self._remove(worker)
        if not worker.ready:
            raise NearFutureError(f"a process of verifier.kind {self._section.kind} did not start in {START_S:g} s")
        assert worker.question is not None
        reason = (
            f"no verdict within {WAITING * self._section.timeout_s:g} s by the clock ({WAITING} verifier.timeout_s)"
        )
        self._verdicts[worker.question] = Verdict(0.0, False, reason, "timeout")

    def _remove(self, worker: _Worker) -> None:
        self._selector.unregister(worker.replies)
        self._workers.remove(worker)
        worker.end()


def _end(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
