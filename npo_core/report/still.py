"""The report's curves as one still picture, for pages that run no script: the same figures, drawn as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from math import ceil, log10
from typing import Any

import jinja2

from npo_core import views
from npo_core.artifacts import RunArtifacts
from npo_core.report import charts
from npo_core.report import decisions as autonpo

WIDTH, HEIGHT = 420, 240
"""Pixels of a panel, its axes' labels included."""
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 26, 40
"""Margins of a panel, which hold the labels."""
COLUMNS = 2
LEGEND = 34
"""Pixels above the panels."""
POINTS = 1000
"""Points of a line that are drawn; a panel has fewer pixels than that."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One curve of a panel, as an SVG path."""

    path: str
    area: str | None
    """Path of the area below it, if that is filled."""
    style: Mapping[str, Any]
    """plotly's `color`, `width` and `dash`."""
    opacity: float


@dataclass(frozen=True)
class Panel:
    """One chart, in pixels of the picture."""

    x: float
    y: float
    title: str
    legend: tuple[tuple[str, str], ...]
    """Names and colours of lines that the title does not explain."""
    x_title: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]
    dots: tuple[tuple[Point, str], ...]
    """Places and colours."""
    marks: tuple[tuple[float, str], ...]
    """Places and colours of vertical lines."""


def draw_curves(run: RunArtifacts) -> str | None:
    """Reward, entropy, held-out accuracy and replaced slots against the main line's steps, as SVG; None if nothing is
    trained yet."""
    steps = views.steps(run)
    if steps.is_empty():
        return None
    curves = charts.curves(steps, views.evaluations(run, steps))
    autonpo.mark(curves, [decision for decision in run.decisions() if decision.source == "autonpo"], steps)
    panels = [_panel(figures["steps"], i) for i, figures in enumerate(curves.values())]
    return _template().render(
        width=COLUMNS * WIDTH,
        height=LEGEND + ceil(len(panels) / COLUMNS) * HEIGHT,
        panels=panels,
        legend=[(kind, colour) for kind, colour in charts.COLOURS.items() if kind in set(steps["kind"])],
        box={"left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM},
    )


def _panel(figure: charts.Figure, index: int) -> Panel:
    data, layout = figure["data"], figure["layout"]
    low, high = layout["xaxis"]["range"]
    values = [y for trace in data for y in trace["y"] if y is not None]
    top, bottom = 1.05 * max(values, default=1.0) or 1.0, min(0.0, *values)

    def at(x: float, y: float) -> Point:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (x - low) / (high - low)
        return round(across, 1), round(TOP + (HEIGHT - TOP - BOTTOM) * (top - y) / (top - bottom), 1)

    def points(trace: Mapping[str, Any]) -> list[Point | None]:
        pairs = list(zip(trace["x"], trace["y"], strict=True))
        return [None if y is None else at(x, y) for x, y in pairs[:: ceil(len(pairs) / POINTS) or 1]]

    lines = [
        Line(
            _path(places := points(trace)),
            _area(places, at(low, 0)[1]) if trace.get("fill") == "tozeroy" else None,
            trace["line"],
            trace.get("opacity", 1.0),
        )
        for trace in data
        if "lines" in trace["mode"]
    ]
    return Panel(
        x=index % COLUMNS * WIDTH,
        y=LEGEND + index // COLUMNS * HEIGHT,
        title=layout["yaxis"]["title"]["text"],
        legend=tuple((trace["name"], trace["line"]["color"]) for trace in data if trace.get("showlegend")),
        x_title=layout["xaxis"]["title"]["text"],
        x_ticks=tuple((at(value, 0)[0], label) for value, label in _ticks(max(low, 0.0), high)),
        y_ticks=tuple((at(low, value)[1], label) for value, label in _ticks(bottom, top)),
        lines=tuple(lines),
        dots=tuple(dot for trace in data if "markers" in trace["mode"] for dot in _dots(trace, at)),
        marks=tuple((at(shape["x0"], 0)[0], shape["line"]["color"]) for shape in layout.get("shapes", ())),
    )


def _dots(trace: Mapping[str, Any], at: Any) -> Iterator[tuple[Point, str]]:
    """Places and colours of a trace's markers that have a size."""
    marker, count = trace["marker"], len(trace["x"])
    sizes, colours = (
        value if isinstance(value, list) else [value] * count for value in (marker["size"], marker["color"])
    )
    for x, y, size, colour in zip(trace["x"], trace["y"], sizes, colours, strict=True):
        if size and y is not None:
            yield at(x, y), colour


def _pieces(points: Sequence[Point | None]) -> Iterator[list[Point]]:
    """The stretches between the gaps."""
    for gap, part in groupby(points, key=lambda point: point is None):
        if not gap:
            yield [point for point in part if point is not None]


def _path(points: Sequence[Point | None]) -> str:
    return " ".join("M" + " L".join(f"{x},{y}" for x, y in piece) for piece in _pieces(points))


def _area(points: Sequence[Point | None], floor: float) -> str:
    return " ".join(f"{_path(p)} L{p[-1][0]},{floor} L{p[0][0]},{floor} Z" for p in _pieces(points))


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """At most seven round values from `low` to `high`, and their labels."""
    power = 10.0 ** (ceil(log10(high - low)) - 2)
    gap = next(gap for factor in (1, 2, 5, 10, 20, 50, 100) if (high - low) / (gap := factor * power) <= 6)
    return [(i * gap, f"{i * gap:.6g}") for i in range(ceil(low / gap), int(high / gap) + 1)]


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(files("npo_core.report").joinpath("curves.svg.j2").read_text(encoding="utf-8"))
