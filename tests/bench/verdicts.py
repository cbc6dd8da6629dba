"""Verdicts a second of math-verify through the pool: `python -m tests.bench.verdicts [WORKERS]`.

Answers as policies give them on competition mathematics: boxed, right and wrong by turns, a paragraph each, all
different, so that no cache knows them.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing

from npo_core.interfaces import Prompt
from npo_core.verifiers.kinds import name
from npo_core.verifiers.pool import PooledVerifier
from schemas.verifier import VerifierSection

ANSWERS = 2000
FORMS = (
    ("{n}", "{m}"),
    ("\\frac{{{n}}}{{7}}", "{m}/7"),
    ("{n}\\pi", "{m} \\pi"),
    ("x^2+{n}x", "x(x+{m})"),
    ("({n}, 3)", "({m},3)"),
    ("\\sqrt{{{n}}}", "\\sqrt{{{m}}}"),
)


def items(count: int) -> list[tuple[Prompt, str]]:
    """(prompt, answer); every second answer is wrong."""
    made = []
    for n in range(count):
        gold, given = FORMS[n % len(FORMS)]
        right = (n // len(FORMS)) % 2 == 0
        prompt = Prompt(str(n), "maths", ({"role": "user", "content": "?"},), gold.format(n=n + 2))
        text = "We expand, collect terms and find the value. " * 20
        made.append((prompt, f"<think>{text}</think>So it is \\boxed{{{given.format(m=n + (2 if right else 3))}}}."))
    return made


def main(workers: int) -> None:
    """Prints the rate, the start of the processes not counted."""
    section = VerifierSection(kind="math-verify", workers=workers)
    with closing(PooledVerifier(name(section), section)) as verifier:
        began = time.perf_counter()
        verifier.judge(items(2 * workers))
        started = time.perf_counter()
        verdicts = verifier.judge(items(ANSWERS))
        took = time.perf_counter() - started
    correct = sum(verdict.correct for verdict in verdicts) / len(verdicts)
    print(
        f"{verifier.name}, {workers} workers: {ANSWERS / took:.0f} verdicts a second ({ANSWERS} answers, "
        f"{correct:.0%} correct, start {started - began:.1f} s)"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
