"""One process of a pool: reads a question a line, writes a verdict a line. `python -m npo_core.verifiers.worker`.

The kernel ends it, whatever it computes: by SIGPROF when a verdict has used up its CPU seconds, and by SIGIO when the
process that started it is gone. It never gets the chance to handle either.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import resource
import select
import signal
import sys
from typing import Any

from npo_core.interfaces import Verdict
from npo_core.verifiers.judges import Judge, Question, UnusableReferenceError, printable
from schemas.verifier import VerifierSection

OUT_OF_MEMORY = 77
"""Exit code: after a MemoryError a process may hold anything."""


def main() -> None:
    """Serves until standard input closes. Arguments: the section as JSON, a descriptor that closes with the parent."""
    die_with(int(sys.argv[2]))
    section = VerifierSection.model_validate_json(sys.argv[1])
    replies, questions = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0), "rb")
    # What a verifier prints goes among the run's other messages; what it reads is nothing.
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        judge = warm(section)
    except BaseException as error:
        _say(replies, {"refused": printable(f"{type(error).__name__}: {error}")})
        return
    much = limit_memory(section.memory_mib)
    _say(replies, {"ready": True})
    for line in questions:
        signal.setitimer(signal.ITIMER_PROF, section.timeout_s)
        reply = answer(judge, line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        # Libraries take a MemoryError for a wrong answer.
        if not reply["correct"] and _peak() > much:
            os._exit(OUT_OF_MEMORY)
        _say(replies, reply)


def warm(section: VerifierSection) -> Judge:
    """The judge of a kind, after it has loaded what its first verdict loads: that is no part of a verdict's time."""
    from npo_core.verifiers.kinds import build

    judge = build(section)
    if section.kind == "math-verify":
        judge(Question("\\frac{1}{2}", "\\boxed{0.5}"))
    return judge


def answer(judge: Judge, line: bytes) -> dict[str, Any]:
    """The reply to one question."""
    random.seed(0)
    try:
        asked = json.loads(line)
        metadata = asked["metadata"]
        question = Question(
            asked["answer"],
            asked["text"],
            tuple(asked["messages"]),
            None if metadata is None else json.loads(metadata),
        )
        verdict = judge(question)
        if not math.isfinite(verdict.reward):
            raise ValueError(f"its reward is {verdict.reward}")
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except UnusableReferenceError as error:
        return _failed(f"the reference answer {printable(asked['answer'], 80)} is unusable: {error}")
    except BaseException as error:
        return _failed(f"{type(error).__name__}: {error}")
    return _reply(verdict)


def die_with(parent: int) -> None:
    """Ends this process, by SIGIO's default action, when the other end of a pipe closes."""
    fcntl.fcntl(parent, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent, fcntl.F_SETFL, fcntl.fcntl(parent, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([parent], [], [], 0)[0]:
        os._exit(0)  # it closed before we asked


def limit_memory(mib: int) -> int:
    """Lets this process take so much more address space than it has now.

    Returns:
        What a verdict has hardly taken without having met the limit, bytes of address space: half of it.
    """
    now = _peak()
    limit = now + (mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return now + (mib << 19)


def _peak() -> int:
    """The most address space that this process ever had, bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmPeak"))


def _failed(reason: str) -> dict[str, Any]:
    return _reply(Verdict(0.0, False, printable(reason), "error"))


def _reply(verdict: Verdict) -> dict[str, Any]:
    return {
        "reward": verdict.reward,
        "correct": verdict.correct,
        "reason": verdict.reason,
        "failure": verdict.failure,
    }


def _say(replies: Any, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
