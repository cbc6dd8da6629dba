"""The report's charts: plotly figures as JSON, one a quantity and horizontal axis. The browser draws them."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl

from schemas.records import EvalManifest

AXES = {"steps": "main-line step", "tokens": "generated tokens, scouts and guides included"}
"""Horizontal axes of the curves and their titles."""
COLOURS = {"warm": "#6b7280", "main": "#0072b2", "replay": "#007a5a", "scout": "#c47f00"}
"""One a kind of leg, told apart by colour-blind readers (after Okabe and Ito, darkened for thin lines)."""
BEFORE, AFTER = "#9aa5b1", "#0072b2"
SMOOTH = 9
"""Steps of the centred rolling mean that is drawn over the raw training curves."""

Figure = dict[str, Any]


def curves(steps: pl.DataFrame, evaluations: pl.DataFrame) -> dict[str, dict[str, Figure]]:
    """Training reward, held-out accuracy, entropy and replaced slots, each against every axis.

    Args:
        steps: `views.steps`.
        evaluations: `views.evaluations`.

    Returns:
        {chart: {axis: figure}}; without `accuracy` if nothing was evaluated, without `replaced` if no leg is guided.
    """
    charts = {
        "reward": {axis: _training(steps, axis, "reward", "mean training reward") for axis in AXES},
        "entropy": {axis: _training(steps, axis, "entropy", "token entropy (nats)") for axis in AXES},
    }
    if not evaluations.is_empty():
        charts["accuracy"] = {axis: _accuracy(steps, evaluations, axis) for axis in AXES}
    if steps["guided"].any():
        charts["replaced"] = {axis: _replaced(steps, axis) for axis in AXES}
    for figures in charts.values():
        for axis, figure in figures.items():
            # One range for all, so that they can be read across.
            end = max(*steps[_column(axis)], *evaluations[_column(axis)])
            figure["layout"]["xaxis"]["range"] = [-0.015 * end, 1.02 * end]
    return charts


def families(before: EvalManifest, after: EvalManifest) -> Figure:
    """Held-out accuracy of each task family at two evaluations, side by side."""
    names = sorted(after.tasks)
    figure = go.Figure()
    for label, manifest, colour in (("before", before, BEFORE), ("after", after, AFTER)):
        figure.add_bar(
            x=[_plain(name) for name in names],
            y=[manifest.tasks[name].accuracy if name in manifest.tasks else None for name in names],
            name=f"{label} (step {manifest.checkpoint.step})",
            marker_color=colour,
            hovertemplate="%{x}<br>accuracy %{y:.3f}<extra>" + label + "</extra>",
        )
    figure.update_layout(barmode="group", bargap=0.25)
    return finish(figure, "task family", "held-out accuracy", top=1.0)


def coverage(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Prompts of the windows that a guide solved, and those that it did not, by task family.

    Args:
        rows: [{task, solved, prompts}].
    """
    names = [_plain(row["task"]) for row in rows]
    solved = [row["solved"] for row in rows]
    figure = go.Figure()
    figure.add_bar(x=names, y=solved, name="solved by the guide", marker_color=COLOURS["replay"])
    figure.add_bar(
        x=names,
        y=[row["prompts"] - row["solved"] for row in rows],
        name="not solved",
        marker_color="#d3d9df",
    )
    figure.update_layout(barmode="stack", bargap=0.3)
    figure.update_traces(hovertemplate="%{x}<br>%{y} prompts")
    return finish(figure, "task family", "prompts of the window")


def _training(steps: pl.DataFrame, axis: str, column: str, title: str) -> Figure:
    figure = go.Figure()
    for name, kind, on_line, part in _stretches(steps):
        x = part[_column(axis)].to_list()
        smooth = part[column].rolling_mean(SMOOTH, min_samples=1, center=True)
        if on_line:
            figure.add_scatter(
                x=x, y=part[column].to_list(), mode="lines", line={"color": COLOURS[kind], "width": 1}, opacity=0.28,
                hoverinfo="skip", name=f"{name}, raw",
            )  # fmt: skip
        figure.add_scatter(
            x=x,
            y=smooth.to_list(),
            customdata=part.select("step", "total_tokens", column).rows(),
            mode="lines",
            line={"color": COLOURS[kind], "width": 2.4 if on_line else 1.6, "dash": "solid" if on_line else "dot"},
            opacity=1.0 if on_line else 0.55,
            name=name,
            hovertemplate="step %{customdata[0]}, %{customdata[1]:,} tokens<br>%{customdata[2]:.3f} "
            "(mean %{y:.3f})<extra>" + name + "</extra>",
        )
    return finish(figure, AXES[axis], title, legend=False)


def _accuracy(steps: pl.DataFrame, evaluations: pl.DataFrame, axis: str) -> Figure:
    figure = go.Figure()
    held = _with_holds(steps, evaluations.filter("main_line").sort("step"))
    lines = [("main line", "main", True, held)]
    lines += [
        (f"{kind} {leg_id}", kind, False, part)
        for (leg_id, kind), part in evaluations.filter(~pl.col("main_line")).group_by(
            ["leg_id", "kind"], maintain_order=True
        )
    ]
    for name, kind, on_line, part in lines:
        figure.add_scatter(
            x=part[_column(axis)].to_list(),
            y=part["accuracy"].to_list(),
            customdata=part.select("step", "total_tokens", "trained_steps").rows(),
            mode="lines+markers",
            marker={
                "size": [0 if eval_id is None else 6 for eval_id in part["eval_id"]],
                "color": [COLOURS[k] for k in part["kind"]],
                "opacity": 1,
            },
            line={"color": COLOURS[kind], "width": 2 if on_line else 1.4, "dash": "solid" if on_line else "dot"},
            opacity=1.0 if on_line else 0.55,
            name=name,
            hovertemplate="step %{customdata[0]}, %{customdata[1]:,} tokens, %{customdata[2]} trained steps<br>"
            "accuracy %{y:.3f}<extra>" + name + "</extra>",
        )
    return finish(figure, AXES[axis], "held-out accuracy", legend=False)


def _with_holds(steps: pl.DataFrame, evaluations: pl.DataFrame) -> pl.DataFrame:
    """The main line's evaluations, and a point without an `eval_id` where each of its legs begins to train: until then
    scouts and guides spent tokens while the policy stayed what it was."""
    begun = steps.filter("main_line").group_by("leg_id", maintain_order=True).first()
    holds = (
        begun.select(
            "kind",
            "step",
            trained_steps=pl.col("trained_steps") - 1,
            total_tokens=pl.col("total_tokens") - pl.col("tokens/policy").cast(pl.Int64),
        )
        .sort("step")
        .join_asof(evaluations.select("step", "accuracy"), on="step")
    )
    return pl.concat([evaluations, holds], how="diagonal").sort("total_tokens", "eval_id", nulls_last=True)


def _replaced(steps: pl.DataFrame, axis: str) -> Figure:
    figure = go.Figure()
    explained = False  # the legend names each kind of line once, however many replays there are
    for name, kind, on_line, part in _stretches(steps):
        if not on_line:
            continue
        guided = bool(part["guided"][0])
        x = part[_column(axis)].to_list()
        if guided:
            figure.add_scatter(
                x=x, y=part["npo/eligible"].to_list(), mode="lines", line={"color": "#8b95a1", "width": 1.4},
                name="hard groups (gate passed)", showlegend=not explained,
                hovertemplate="%{y} hard groups<extra></extra>",
            )  # fmt: skip
        figure.add_scatter(
            x=x,
            y=part["npo/replaced"].fill_null(0).to_list(),
            customdata=part.select("step", "total_tokens").rows(),
            mode="lines",
            fill="tozeroy" if guided else "none",
            line={"color": COLOURS[kind], "width": 1.8},
            name="slots replaced" if guided else name,
            showlegend=guided and not explained,
            hovertemplate="step %{customdata[0]}, %{customdata[1]:,} tokens<br>%{y} slots replaced<extra>"
            + name
            + "</extra>",
        )
        explained = explained or guided
    return finish(figure, AXES[axis], "prompt groups a step")


def _stretches(steps: pl.DataFrame) -> list[tuple[str, str, bool, pl.DataFrame]]:
    """(name, kind, on the main line, rows) of every leg's main-line and abandoned part; the main line is drawn last."""
    parts = [
        (f"{kind} {leg_id}" + ("" if on_line or kind == "scout" else ", abandoned"), kind, on_line, part.sort("step"))
        for (leg_id, kind, on_line), part in steps.group_by(["leg_id", "kind", "main_line"], maintain_order=True)
    ]
    return sorted(parts, key=lambda part: part[2])


def _column(axis: str) -> str:
    return {"steps": "step", "tokens": "total_tokens"}[axis]


def _plain(name: str) -> str:
    """Plotly reads a little HTML in labels; names are text."""
    return html.escape(name, quote=False)


def finish(figure: go.Figure, x_title: str, y_title: str, legend: bool = True, top: float | None = None) -> Figure:
    """The figure as JSON, in the report's style."""
    grid = {"gridcolor": "#e8ecf0", "zerolinecolor": "#c3cbd4", "automargin": True}
    figure.update_layout(
        template="none",
        margin={"l": 54, "r": 12, "t": 14, "b": 46},
        font={"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 12, "color": "#1d2733"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"align": "left"},
        showlegend=legend,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        xaxis={**grid, "title": {"text": x_title, "standoff": 8}},
        yaxis={**grid, "title": {"text": y_title}, "rangemode": "tozero", "range": None if top is None else [0, top]},
    )
    parsed: Figure = json.loads(figure.to_json())
    return parsed
