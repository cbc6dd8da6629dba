"""The report's curves as one still picture, for pages that run no script: the same figures, drawn by matplotlib."""

from __future__ import annotations

from io import BytesIO
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from npo_core import views
from npo_core.artifacts import RunArtifacts
from npo_core.report import charts
from npo_core.report import decisions as autonpo

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 2
PANEL_INCHES = (4.2, 2.4)
DASHES = {"solid": "-", "dot": ":", "dash": "--"}
"""matplotlib's word for plotly's."""


def draw_curves(run: RunArtifacts) -> bytes | None:
    """Reward, entropy, held-out accuracy and replaced slots against the main line's steps, as PNG; None if nothing is
    trained yet."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    steps = views.steps(run)
    if steps.is_empty():
        return None
    curves = charts.curves(steps, views.evaluations(run, steps))
    autonpo.mark(curves, [decision for decision in run.decisions() if decision.source == "autonpo"], steps)
    rows = -(-len(curves) // COLUMNS)
    picture = Figure((PANEL_INCHES[0] * COLUMNS, PANEL_INCHES[1] * rows), layout="constrained")
    panels = picture.subplots(rows, COLUMNS, squeeze=False).flat
    for panel, figures in zip_longest(panels, curves.values()):
        if figures is None:
            panel.remove()
        else:
            _draw(panel, figures["steps"])
    kinds = [(kind, colour) for kind, colour in charts.COLOURS.items() if kind in set(steps["kind"])]
    lines = [Line2D([], [], color=colour, label=kind) for kind, colour in kinds]
    picture.legend(handles=lines, loc="outside upper left", ncols=len(lines), frameon=False)
    content = BytesIO()
    # Without the library's version in it, equal curves are equal bytes.
    picture.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _draw(panel: Axes, figure: charts.Figure) -> None:
    layout = figure["layout"]
    for trace in figure["data"]:
        _trace(panel, trace)
    for shape in layout.get("shapes", ()):
        panel.axvline(shape["x0"], color=shape["line"]["color"], linestyle="--", linewidth=1)
    panel.set_xlim(layout["xaxis"]["range"])
    panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))
    panel.set_xlabel(layout["xaxis"]["title"]["text"])
    panel.set_title(layout["yaxis"]["title"]["text"], loc="left", fontsize=10)
    panel.grid(color="#e8ecf0")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    if any(trace.get("showlegend") for trace in figure["data"]):
        panel.legend(frameon=False, fontsize=8)


def _trace(panel: Axes, trace: dict[str, Any]) -> None:
    """One of plotly's scatter traces."""
    # What is no number is a gap.
    x, y = trace["x"], [float("nan") if value is None else value for value in trace["y"]]
    opacity = trace.get("opacity", 1.0)
    if "lines" in trace["mode"]:
        line = trace["line"]
        style = {"color": line["color"], "linewidth": line["width"], "linestyle": DASHES[line.get("dash", "solid")]}
        panel.plot(x, y, alpha=opacity, label=trace["name"] if trace.get("showlegend") else None, **style)
        if trace.get("fill") == "tozeroy":
            panel.fill_between(x, y, color=line["color"], alpha=0.15)
    if "markers" in trace["mode"]:
        marker = trace["marker"]
        sizes = marker["size"] if isinstance(marker["size"], list) else [marker["size"]] * len(x)
        panel.scatter(x, y, s=[size**2 for size in sizes], c=marker["color"], zorder=3)
