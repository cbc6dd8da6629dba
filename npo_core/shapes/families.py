"""Four families of questions about a picture, whose answer is the whole working: one symbol a cell, in reading order.

As in the testbed each step has a right rule and a wrong habit, and both write the new state, so that a mistake is
carried on. A last symbol alone could be guessed; all of them cannot, without the picture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from npo_core.interfaces import ConfigurationError, Prompt
from npo_core.shapes.scene import COLOURS, GRIDS, Scene, draw_scene
from npo_core.streams import philox
from schemas.digest import digest_bytes, digest_json, short

Rule = Callable[[int, Scene, int, str], int]
"""(state, scene, cell, colour that the question names) → new state."""


@dataclass(frozen=True)
class Family:
    """A family of questions."""

    name: str
    tag: str
    """First symbol of its questions."""
    right: Rule
    habit: Rule
    symbols: str
    """What is written for each state."""
    names_colour: bool = False


def _kind(scene: Scene, cell: int) -> int:
    return "cst".index(scene.cells[cell][0][0])


def _colour(scene: Scene, cell: int) -> int:
    return "rgb".index(scene.cells[cell][1][0])


def _confused(state: int) -> int:
    """Squares and triangles taken for each other, and so green and blue."""
    return (0, 2, 1)[state]


def _is(scene: Scene, cell: int, colour: str) -> int:
    return int(scene.cells[cell][1] == colour)


def _lead(state: int, scene: Scene, cell: int, sign: int) -> int:
    """Red cells so far, less blue ones; habit counts blue for red."""
    return max(-1, min(1, state - 1 + sign * (_is(scene, cell, "red") - _is(scene, cell, "blue")))) + 1


FAMILIES = (
    Family("kinds", "K", lambda s, p, i, c: _kind(p, i), lambda s, p, i, c: _confused(_kind(p, i)), "cst"),
    Family("colours", "C", lambda s, p, i, c: _colour(p, i), lambda s, p, i, c: _confused(_colour(p, i)), "rgb"),
    Family("count", "N", lambda s, p, i, c: s + _is(p, i, c), lambda s, p, i, c: s + 1, "0123456789xyz", True),
    Family("lead", "L", lambda s, p, i, c: _lead(s, p, i, 1), lambda s, p, i, c: _lead(s, p, i, -1), "<=>"),
)
START = {"lead": 1}
"""State before the first cell, where it is not 0."""


@dataclass(frozen=True)
class Question:
    """A question about a scene."""

    family: Family
    scene: Scene
    colour: str = ""
    """What the count family counts; empty in the others."""

    @property
    def text(self) -> str:
        """What the policy reads after the picture: `K=`, or `Nr=` for the red ones."""
        return f"{self.family.tag}{self.colour[:1]}="

    def working(self, habits: Sequence[bool] | None = None) -> str:
        """The working, by the right rule, or by the wrong habit at the cells where `habits` is true.

        Raises:
            ValueError: there is not one entry of `habits` for each cell.
        """
        cells = len(self.scene.cells)
        state, written = START.get(self.family.name, 0), ""
        for cell, habit in zip(range(cells), habits or [False] * cells, strict=True):
            state = (self.family.habit if habit else self.family.right)(state, self.scene, cell, self.colour)
            written += self.family.symbols[state]
        return written

    def prompt(self, ref: str) -> Prompt:
        """The prompt, with the reference of the scene's picture."""
        content = [{"type": "image"}, {"type": "text", "text": self.text}]
        return Prompt(
            prompt_id=short(digest_json([self.family.name, self.text, ref])),
            task=self.family.name,
            messages=({"role": "user", "content": content},),
            answer=self.working(),
            image_refs=(ref,),
        )


def grids(min_cells: int, max_cells: int) -> list[tuple[int, int]]:
    """The grids of so many cells.

    Raises:
        ConfigurationError: there is none.
    """
    found = [grid for grid in GRIDS if min_cells <= grid[0] * grid[1] <= max_cells]
    if not found:
        raise ConfigurationError(
            f"data.min_length {min_cells} and data.max_length {max_cells} leave no grid of shapes: there are grids of "
            "3, 6, 9 and 12 cells; widen the range"
        )
    return found


def make_prompts(
    count: int, held_out: int, min_length: int, max_length: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """(training pool, held-out set) of so many prompts about scenes of `min_length` to `max_length` cells. The families
    take turns, and ask about one picture each round; no picture is in both sets.

    Raises:
        ConfigurationError: there is no such grid.
    """
    pools = [
        [question.prompt(ref) for question, ref, _ in _pool(name, size, min_length, max_length, seed)]
        for name, size in (("train", count), ("held_out", held_out))
    ]
    return pools[0], pools[1]


def draw_pictures(count: int, held_out: int, min_length: int, max_length: int, seed: int) -> Mapping[str, bytes]:
    """The pictures of `make_prompts`, PNG files by their SHA-256."""
    pools = (("train", count), ("held_out", held_out))
    return {ref: file for name, size in pools for _, ref, file in _pool(name, size, min_length, max_length, seed)}


@functools.lru_cache(maxsize=4)
def _pool(name: str, size: int, min_cells: int, max_cells: int, seed: int) -> tuple[tuple[Question, str, bytes], ...]:
    """Questions, each with its picture's reference and file; drawn once for prompts and pictures."""
    allowed, colours = grids(min_cells, max_cells), tuple(COLOURS)
    rng = philox("shapes", seed, name)
    found: list[tuple[Question, str, bytes]] = []
    for n in range(-(-size // len(FAMILIES))):
        scene = draw_scene(allowed[n % len(allowed)], rng)
        file = scene.draw()
        for family in FAMILIES[: size - n * len(FAMILIES)]:
            colour = colours[rng.integers(len(colours))] if family.names_colour else ""
            found.append((Question(family, scene, colour), digest_bytes(file), file))
    return tuple(found)
