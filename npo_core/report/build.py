"""Puts a report together: facts, charts, the tree of legs, the guides' effect and a sample of trajectories.

Model text is hostile by default. It enters the file as JSON in which `<`, `>` and `&` are escaped, reaches the page by
`textContent`, and the content security policy runs no script but the two whose hashes it names.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import jinja2
import plotly.offline
import polars as pl

from npo_core import views
from npo_core.artifacts import RunArtifacts
from npo_core.interfaces import NearFutureError
from npo_core.report import charts, effect
from npo_core.report import decisions as autonpo
from npo_core.report.sample import MAX_GROUPS, MAX_TOKENS, sample
from npo_core.report.tree import draw

_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def write_report(run: RunArtifacts, token_text: Callable[[int], str]) -> str:
    """The report of a run: one HTML document that loads nothing.

    Args:
        run: the run.
        token_text: text of one token of the run's tokenizer.

    Raises:
        NearFutureError: nothing is trained yet, or a data file is damaged.
    """
    steps = views.steps(run)
    if steps.is_empty():
        raise NearFutureError(f"run {run.uri} has no committed step to report; start or resume it with `npo run`")
    record = run.record()
    shown = views.show(run)
    evaluations = views.evaluations(run, steps)
    scores = views.main_evaluations(run)
    guides = [
        {**guide, "fate": effect.before_and_after(run, steps, guide["start"], guide["stop"])}
        for guide in effect.guides(run)
    ]
    picked = sample(run, steps, token_text)
    figures = {f"coverage-{i}": charts.coverage(guide["families"]) for i, guide in enumerate(guides)}
    if scores:
        figures["families"] = charts.families(scores[0], scores[-1])
    curves = charts.curves(steps, evaluations)
    decisions = [decision for decision in run.decisions() if decision.source == "autonpo"]
    autonpo.mark(curves, decisions, steps)
    probes = {f"probe-{i}": figure for i, d in enumerate(decisions) if (figure := autonpo.probe_chart(d)) is not None}
    studies = autonpo.studies(run)
    figures |= probes | {f"study-{i}": study["figure"] for i, study in enumerate(studies)}
    embedded = {group["prompt_id"] for group in picked.groups}
    data = {
        "curves": curves,
        "figures": figures,
        "groups": picked.groups,
        "vocabulary": picked.vocabulary,
        "prompts": {key: value for key, value in _prompts(run).items() if key in embedded},
    }
    scripts = {"plotly": plotly.offline.get_plotlyjs(), "browser": _resource("browser.js")}
    return _template().render(
        record=record,
        recipe=record.recipe,
        shown=shown,
        curves=curves,
        kinds=[kind for kind in charts.COLOURS if kind in set(steps["kind"])],
        tree=draw(
            shown["legs"],
            _line_parts(steps),
            {guide["guide_id"]: (guide["leg"], guide["step"]) for guide in guides},
        ),
        guides=guides,
        decisions=autonpo.rows(decisions, record.recipe["autonpo"]["min_pool"]) if decisions else [],
        probes=probes,
        studies=studies,
        scores=scores,
        steps_trained=steps.height,
        sample=picked,
        limits={"groups": MAX_GROUPS, "tokens": MAX_TOKENS},
        data=embed(data),
        scripts=scripts,
        hashes=" ".join(_source_hash(text) for text in scripts.values()),
        style=_resource("style.css"),
        # Not the present time: a report of the same run is the same file.
        as_of=_newest(run)[:16].replace("T", " "),
    )


def _newest(run: RunArtifacts) -> str:
    """When the newest of what the report shows was committed."""
    segments = [segment for done in views.segments(run).values() for segment in done]
    return max([run.record().created_at, *(made.created_at for made in (*segments, *run.all_evaluations()))])


def embed(data: Any) -> str:
    """JSON that may stand in a script element, whatever its strings hold."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return functools.reduce(lambda t, pair: t.replace(*pair), _ESCAPES.items(), text)


def _prompts(run: RunArtifacts) -> dict[str, dict[str, str]]:
    words = views.prompt_words(run)
    rows = run.prompts().select(["prompt_id", "answer"]).to_pylist()
    return {row["prompt_id"]: {"words": words[row["prompt_id"]], "answer": row["answer"]} for row in rows}


def _line_parts(steps: pl.DataFrame) -> dict[str, tuple[int, int]]:
    parts = steps.filter("main_line").group_by("leg_id").agg(pl.col("step").min(), stop=pl.col("step").max() + 1)
    return {leg_id: (start, stop) for leg_id, start, stop in parts.iter_rows()}


def _source_hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _resource(name: str) -> str:
    return files("npo_core.report").joinpath(name).read_text(encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["share"] = lambda value, digits=1: "–" if value is None else f"{100 * value:.{digits}f} %"
    environment.filters["estimate"] = lambda e: "–" if e is None else f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"
    environment.filters["interval"] = lambda e: (
        "–" if e is None else "{value:.3f} [{low:.3f}, {high:.3f}]".format_map(e)
    )
    environment.filters["count"] = lambda value: f"{value:,}".replace(",", "\u202f")
    return environment.from_string(_resource("template.html.j2"))
