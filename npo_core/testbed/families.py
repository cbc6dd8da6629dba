"""Eight families of small tasks whose answer is the whole working, one symbol for each symbol of the input.

Each step has a right rule and a wrong habit. Both write the new state, so that a mistake is carried on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from npo_core.interfaces import ConfigurationError, Prompt
from npo_core.streams import philox
from schemas.digest import digest_json, short

COUNTED_DIGITS = 5
"""The count family counts one of the digits 0–4."""


@dataclass(frozen=True)
class Problem:
    """A task instance."""

    family: Family
    digits: tuple[int, ...]
    """The input, each 0–9."""
    counted: int | None = None
    """Which digit the count family counts; None in the others."""

    @property
    def text(self) -> str:
        """What the policy reads: `s4821=`, and `c3:4821=` in the count family."""
        counted = "" if self.counted is None else f"{self.counted}:"
        return f"{self.family.tag}{counted}{_write(self.digits)}="

    def working(self, habits: Sequence[bool] | None = None) -> str:
        """The working, by the right rule, or by the wrong habit in the steps where `habits` is true.

        Raises:
            ValueError: there is not one entry of `habits` for each digit.
        """
        if habits is None:
            habits = [False] * len(self.digits)
        if len(habits) != len(self.digits):
            raise ValueError(f"{len(habits)} habits for {len(self.digits)} digits")
        state, states = self.family.start, []
        for step, habit in enumerate(habits):
            state = (self.family.habit if habit else self.family.right)(state, self, step)
            states.append(state)
        return _write(states)

    def prompt(self) -> Prompt:
        """The prompt; its identifier is a hash of family and text."""
        return Prompt(
            prompt_id=short(digest_json([self.family.name, self.text])),
            task=self.family.name,
            messages=({"role": "user", "content": self.text},),
            answer=self.working(),
        )


Rule = Callable[[int, Problem, int], int]
"""(state, problem, step) → new state, 0–9, which is the symbol that is written."""


@dataclass(frozen=True)
class Family:
    """A task family."""

    name: str
    tag: str
    """First character of its prompts."""
    start: int
    """State before the first step."""
    right: Rule
    habit: Rule


FAMILIES = (
    Family("sum", "s", 0, lambda s, p, i: (s + p.digits[i]) % 10, lambda s, p, i: (s + p.digits[i] + 1) % 10),
    Family("difference", "d", 0, lambda s, p, i: (s - p.digits[i]) % 10, lambda s, p, i: (p.digits[i] - s) % 10),
    Family("maximum", "x", 0, lambda s, p, i: max(s, p.digits[i]), lambda s, p, i: p.digits[i]),
    Family("minimum", "n", 9, lambda s, p, i: min(s, p.digits[i]), lambda s, p, i: max(s, p.digits[i])),
    Family("parity", "p", 0, lambda s, p, i: s ^ (p.digits[i] & 1), lambda s, p, i: p.digits[i] & 1),
    Family("count", "c", 0, lambda s, p, i: (s + (p.digits[i] == p.counted)) % 10, lambda s, p, i: (s + 1) % 10),
    # The neighbour is the symbol that was due one step earlier; the last one's is, cyclically, the first.
    Family("reversal", "r", 0, lambda s, p, i: p.digits[-1 - i], lambda s, p, i: p.digits[-i]),
    Family("increment", "i", 0, lambda s, p, i: (p.digits[i] + 1) % 10, lambda s, p, i: p.digits[i]),
)


def draw(family: Family, length: int, rng: np.random.Generator) -> Problem:
    """A problem with `length` uniform digits."""
    counted = int(rng.integers(COUNTED_DIGITS)) if family.name == "count" else None
    return Problem(family, tuple(int(digit) for digit in rng.integers(10, size=length)), counted)


def make_prompts(
    count: int, held_out: int, min_length: int, max_length: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Draws a training pool of `count` prompts and a held-out set of `held_out`, disjoint and without duplicates.

    In each, families and lengths (`min_length` to `max_length` input symbols) are as even as their numbers allow. The
    held-out set does not depend on `count`.

    Returns:
        (training pool, held-out set).

    Raises:
        ConfigurationError: there are not that many distinct inputs of these lengths.
    """
    cells = _cells(range(min_length, max_length + 1))
    for n, (_, length) in enumerate(cells):
        wanted = sum(len(range(n, size, len(cells))) for size in (count, held_out))
        if wanted > 10**length:
            raise ConfigurationError(
                f"data.prompts {count} and data.held_out {held_out} need {wanted} distinct inputs of length {length} "
                f"in each family, but there are {10**length}; raise data.min_length or lower data.prompts"
            )
    taken: set[str] = set()

    def split(size: int, name: str) -> list[Prompt]:
        rng = philox("testbed", seed, name)
        prompts = []
        for n in range(size):
            family, length = cells[n % len(cells)]
            prompt = draw(family, length, rng).prompt()
            while prompt.prompt_id in taken:
                prompt = draw(family, length, rng).prompt()
            taken.add(prompt.prompt_id)
            prompts.append(prompt)
        return prompts

    held_out_prompts = split(held_out, "held_out")
    return split(count, "train"), held_out_prompts


def _cells(lengths: Sequence[int]) -> list[tuple[Family, int]]:
    """Every pair of family and length once. In each beginning of the list both are even: the two go round together,
    and one moves on by a place when they would meet again."""
    families, size = len(FAMILIES), len(lengths)
    round_trip = math.lcm(families, size)
    return [(FAMILIES[n % families], lengths[(n + n // round_trip) % size]) for n in range(families * size)]


def _write(digits: Sequence[int]) -> str:
    return "".join(map(str, digits))
