"""The drawing of the tree of legs: geometry only, the template draws it as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEFT, RIGHT, TOP, ROW, WIDTH = 235, 24, 30, 42, 1100
"""Pixels: room for the labels, right margin, room for the axis, height of a leg's row, width of the drawing."""
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
"""Distances between ticks of the step axis; the first one that gives at most ten is taken."""


@dataclass(frozen=True)
class Bar:
    """One stretch of a leg."""

    x: float
    width: float
    on_line: bool


@dataclass(frozen=True)
class Row:
    """One leg."""

    y: float
    kind: str
    label: str
    detail: str
    x: float
    """Where its first step lies."""
    bars: tuple[Bar, ...]
    branch: str | None
    """SVG path from the parent's row."""
    teach: str | None
    """SVG path from the checkpoint that guides it."""


@dataclass(frozen=True)
class Tree:
    """A drawing in a box of `WIDTH` × `height`."""

    rows: tuple[Row, ...]
    ticks: tuple[tuple[float, int], ...]
    height: float
    width: int = WIDTH


def draw(
    legs: Sequence[dict[str, Any]],
    main_line: dict[str, tuple[int, int]],
    guides: dict[str, tuple[str, int]],
) -> Tree:
    """Places every leg as a bar on the axis of steps, below its parent.

    Args:
        legs: as in `views.show`.
        main_line: by leg, the steps [start, stop) of it that lie on the main line.
        guides: by guide, the (leg, step) of the checkpoint which answered.
    """
    last = max((leg["stop"] for leg in legs), default=0) or 1

    def at(step: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    ys = {leg["leg_id"]: TOP + ROW * (i + 0.5) for i, leg in enumerate(legs)}
    rows = []
    for leg in legs:
        y, start, stop = ys[leg["leg_id"]], leg["start"], leg["stop"]
        cuts = main_line.get(leg["leg_id"])
        pieces = [(start, stop, False)] if cuts is None else [(*cuts, True), (cuts[1], stop, False)]
        guide = guides.get(leg["guide_id"]) if leg["guide_id"] else None
        rows.append(
            Row(
                y=y,
                kind=leg["kind"],
                label=f"{leg['kind']} {leg['leg_id']}",
                detail=f"steps {start}–{stop}, {leg['status']}" if stop > start else leg["status"],
                x=at(start),
                bars=tuple(Bar(at(a), at(b) - at(a), on_line) for a, b, on_line in pieces if b > a),
                branch=f"M{at(start):.1f},{ys[leg['parent']]:.1f} V{y:.1f}" if leg["parent"] in ys else None,
                teach=_curve(at(guide[1]), ys[guide[0]], at(start) + 14, y) if guide and guide[0] in ys else None,
            )
        )
    gap = next((t for t in TICKS if last / t <= 10), last)
    ticks = tuple((at(step), step) for step in range(0, last + 1, gap))
    return Tree(tuple(rows), ticks, TOP + ROW * len(rows) + 8)


def _curve(x0: float, y0: float, x1: float, y1: float) -> str:
    middle = (y0 + y1) / 2
    return f"M{x0:.1f},{y0:.1f} C{x0:.1f},{middle:.1f} {x1:.1f},{middle:.1f} {x1:.1f},{y1 - 9:.1f}"
