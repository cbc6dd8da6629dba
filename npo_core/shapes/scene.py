"""Pictures of shapes in a grid, drawn with Pillow: equal scenes give equal bytes under one version of it."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from npo_core.streams import philox

CELL = 16
"""Width and height of a cell, in pixels."""
KINDS = ("circle", "square", "triangle")
COLOURS = {"red": (205, 50, 50), "green": (45, 150, 60), "blue": (50, 70, 200)}
GRIDS = ((1, 3), (2, 3), (3, 3), (4, 3))
"""Rows and columns that a scene may have."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one shape in each cell of a grid."""

    rows: int
    columns: int
    cells: tuple[tuple[str, str], ...]
    """(kind, colour), in reading order."""
    seed: int
    """Of sizes, places and shades, which no question asks for."""

    def draw(self) -> bytes:
        """The picture, PNG, of columns·CELL × rows·CELL pixels."""
        rng = philox("shapes", "drawing", self.seed)
        picture = Image.new("RGB", (self.columns * CELL, self.rows * CELL), _shade((235, 235, 235), rng))
        pen = ImageDraw.Draw(picture)
        for n, (kind, colour) in enumerate(self.cells):
            row, column = divmod(n, self.columns)
            across, down = (int(offset) for offset in rng.integers(-1, 2, size=2))
            x, y, half = column * CELL + CELL // 2 + across, row * CELL + CELL // 2 + down, int(rng.integers(4, 7))
            _draw_shape(pen, kind, (x - half, y - half, x + half, y + half), _shade(COLOURS[colour], rng))
        file = io.BytesIO()
        picture.save(file, "PNG")
        return file.getvalue()


def draw_scene(grid: tuple[int, int], rng: np.random.Generator) -> Scene:
    """A scene of uniform kinds and colours."""
    rows, columns = grid
    colours = tuple(COLOURS)
    cells = tuple((KINDS[rng.integers(len(KINDS))], colours[rng.integers(len(colours))]) for _ in range(rows * columns))
    return Scene(rows, columns, cells, int(rng.integers(2**31)))


def _shade(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    """The colour, a little lighter or darker."""
    red, green, blue = (int(np.clip(value + rng.integers(-20, 21), 0, 255)) for value in colour)
    return red, green, blue


def _draw_shape(
    pen: ImageDraw.ImageDraw, kind: str, box: tuple[int, int, int, int], colour: tuple[int, int, int]
) -> None:
    left, top, right, bottom = box
    if kind == "circle":
        pen.ellipse(box, fill=colour)
    elif kind == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=colour)
