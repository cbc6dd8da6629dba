"""AutoNPO in the report: its decisions as marks on the curves, and Q̂, V̂ and Ŝ over Δ, of each probe and of studies."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl

from npo_core.artifacts import RunArtifacts
from npo_core.report.charts import Figure, finish
from schemas.decisions import Candidate, DecisionRecord, Estimate

ROLLED_BACK, IN_VAIN = "#b4460b", "#8b95a1"
QUALITY, SIGNAL, VARIANCE, BASELINE = "#0072b2", "#007a5a", "#c47f00", "#8b95a1"
ESTIMATORS = ("kl_token", "kl_sequence", "chi2")


def mark(curves: Mapping[str, Mapping[str, Figure]], decisions: Sequence[DecisionRecord], steps: pl.DataFrame) -> None:
    """Draws a vertical line where each decision fell, with its reason on hover, into every curve.

    Args:
        curves: `charts.curves`; changed in place.
        decisions: AutoNPO's. Against tokens, one that fell before its leg trained a step has no place and no mark.
        steps: `views.steps`.
    """
    spent = {(leg_id, step): total for leg_id, step, total in steps["leg_id", "step", "total_tokens"].iter_rows()}
    for figures in curves.values():
        for axis, figure in figures.items():
            for intervene, name, colour in ((True, "rolled back", ROLLED_BACK), (False, "in vain", IN_VAIN)):
                placed = [
                    (d.step if axis == "steps" else spent.get((d.leg_id, d.step - 1)), d)
                    for d in decisions
                    if d.intervene == intervene
                ]
                at, own = [x for x, _ in placed if x is not None], [d for x, d in placed if x is not None]
                if not own:
                    continue
                figure["layout"].setdefault("shapes", []).extend(_line(x, colour) for x in at)
                figure["data"].append(
                    {
                        "type": "scatter",
                        "x": at,
                        "y": [0] * len(own),
                        "mode": "markers",
                        "marker": {"symbol": "triangle-up", "size": 11, "color": colour},
                        "text": [_hover(d) for d in own],
                        "hovertemplate": "%{text}<extra></extra>",
                        "name": f"AutoNPO, {name}",
                        "showlegend": False,
                    }
                )


def rows(decisions: Sequence[DecisionRecord], min_pool: int) -> list[dict[str, Any]]:
    """The table of decisions: each record, its chosen distance, or the one of the best Q̂, and that one's numbers.

    Args:
        decisions: AutoNPO's.
        min_pool: mistakes that a distance needs to be chosen, from the recipe.
    """
    found = []
    for decision in decisions:
        shown = _shown(decision, min_pool)
        name = decision.variance or ""
        found.append(
            {
                "record": decision,
                "candidate": shown,
                "variance": shown.variance.get(name) if shown else None,
                "signal": shown.signal.get(name) if shown else None,
            }
        )
    return found


def probe_chart(decision: DecisionRecord) -> Figure | None:
    """Q̂, V̂ and Ŝ over the distances of a probe; None if there was none."""
    name = decision.variance or ""
    measured = [c for c in decision.candidates if c.quality is not None and name in c.signal]
    if not measured:
        return None
    series: dict[str, tuple[str, Sequence[Estimate | None]]] = {
        "Q̂": (QUALITY, [c.quality for c in measured]),
        "Ŝ": (SIGNAL, [c.signal[name] for c in measured]),
        "V̂ (right)": (VARIANCE, [c.variance[name] for c in measured]),
    }
    figure = _chart([c.lookahead for c in measured], series)
    if decision.lookahead is not None and decision.intervene:
        figure["layout"].setdefault("shapes", []).append(_line(decision.lookahead, ROLLED_BACK))
    return figure


def studies(run: RunArtifacts) -> list[dict[str, Any]]:
    """A chart for each step of each study of the run: `step`, `failed`, `prompts`, `samples`, `signal_id`, `figure`."""
    found = []
    for manifest in run.signals():
        table = pl.DataFrame(run.table(manifest, "signal"))
        for (step,), part in table.group_by(["step"], maintain_order=True):
            measured = part.filter(pl.col("quality").is_not_null()).sort("lookahead").to_dicts()
            if not measured:
                continue
            colours = {"quality": ("Q̂", QUALITY), "baseline": ("Q of π(t) itself", BASELINE)}
            series: dict[str, tuple[str, Sequence[Estimate | None]]] = {
                label: (colour, [_estimate(r, name) for r in measured]) for name, (label, colour) in colours.items()
            }
            for name, colour in zip(ESTIMATORS, (SIGNAL, "#56b4e9", "#cc79a7"), strict=True):
                series[f"Ŝ by {name}"] = (colour, [_estimate(r, f"signal_{name}") for r in measured])
            series["V̂ by kl_token (right)"] = (VARIANCE, [_estimate(r, "kl_token") for r in measured])
            found.append(
                {
                    "signal_id": manifest.signal_id,
                    "step": step,
                    "prompts": part["prompts"][0],
                    "failed": part["failed"][0],
                    "samples": manifest.spec.samples,
                    "figure": _chart([r["lookahead"] for r in measured], series),
                }
            )
    return found


def _chart(lookaheads: Sequence[int], series: Mapping[str, tuple[str, Sequence[Estimate | None]]]) -> Figure:
    """Lines with error bars over Δ; what is named `(right)` has the right axis."""
    figure = go.Figure()
    for label, (colour, estimates) in series.items():
        points = [(x, e) for x, e in zip(lookaheads, estimates, strict=True) if e is not None]
        right = label.endswith("(right)")
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[e.value for _, e in points],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [e.high - e.value for _, e in points],
                "arrayminus": [e.value - e.low for _, e in points],
                "thickness": 1,
                "width": 3,
            },
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": "dot" if right else "solid"},
            name=label,
            yaxis="y2" if right else "y",
            hovertemplate="Δ = %{x}<br>%{y:.3f}<extra>" + label + "</extra>",
        )
    made = finish(figure, "Δ (steps)", "Q̂ and Ŝ")
    axis = {"overlaying": "y", "side": "right", "showgrid": False, "title": {"text": "V̂"}, "automargin": True}
    # Ticks of its own: by default they stand beside the left axis's, at odd numbers.
    made["layout"]["yaxis2"] = {**axis, "rangemode": "tozero", "tickmode": "auto", "nticks": 6}
    return made


def _shown(decision: DecisionRecord, min_pool: int) -> Candidate | None:
    """The distance that was chosen, or where none was, the one with the best Q̂ of those that could have been."""
    if decision.intervene:
        return next((c for c in decision.candidates if c.lookahead == decision.lookahead), None)
    measured = [c for c in decision.candidates if c.quality is not None and c.pool >= min_pool]
    return max(measured, key=lambda c: c.quality.value if c.quality else 0.0, default=None)


def _estimate(row: Mapping[str, Any], name: str) -> Estimate | None:
    value = row[name]
    return None if value is None else Estimate(value=value, low=row[f"{name}_low"], high=row[f"{name}_high"])


def _line(x: float, colour: str) -> dict[str, Any]:
    return {
        "type": "line",
        "xref": "x",
        "yref": "paper",
        "x0": x,
        "x1": x,
        "y0": 0,
        "y1": 1,
        "line": {"color": colour, "width": 1.2, "dash": "dash"},
    }


def _hover(decision: DecisionRecord) -> str:
    """Plotly reads a little HTML in texts; reasons are text."""
    words = html.escape(decision.reason, quote=False).split()
    lines: list[str] = [""]
    for word in words:
        if len(lines[-1]) + len(word) > 70:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join([f"<b>{decision.code}</b> at step {decision.step}", *lines])
