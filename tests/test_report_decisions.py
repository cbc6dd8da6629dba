"""AutoNPO in the report: marks on the curves, a table and charts of decisions, and studies of Q, V and S."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from selenium.webdriver.common.by import By

from npo_core import views
from npo_core.artifacts import RunArtifacts, main_line_checkpoints
from npo_core.report import write_report
from npo_core.report.decisions import mark, rows, studies
from schemas import tables
from schemas.decisions import Candidate, DecisionCode, DecisionRecord, Estimate, Mistake
from schemas.records import CheckpointRef, SignalSpec
from tests import synthetic
from tests.browser import data_of, opened

HOSTILE = "<img src=x onerror=alert(1)>"


def near(value: float) -> Estimate:
    return Estimate(value=value, low=value - 0.0625, high=value + 0.125)


def candidate(parent: CheckpointRef, step: int, quality: float, variance: float, pool: int = 20) -> Candidate:
    return Candidate(
        lookahead=step - parent.step,
        parent=parent,
        pool=pool,
        prompts=8,
        samples=64,
        quality=near(quality),
        pass_rate=near(0.25),
        kl_per_token=near(0.1),
        relative_ess=near(0.5),
        variance={"kl_token": near(variance)},
        signal={"kl_token": near(quality / variance)},
        baseline=near(0.125),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunArtifacts:
    """A run with a decision to roll back, one in vain, and a study."""
    run = synthetic.build_run(tmp_path_factory.mktemp("store"), steps=20, segment_steps=5)
    saved = main_line_checkpoints(run)
    for step, code in ((15, DecisionCode.INTERVENE), (20, DecisionCode.LOW_QUALITY)):
        rolls_back = code is DecisionCode.INTERVENE
        run.commit_decision(
            DecisionRecord(
                leg_id=saved[step].leg_id,
                step=step,
                intervene=rolls_back,
                reason=f"why {HOSTILE}",
                source="autonpo",
                code=code,
                clock=step + 100,
                candidates=(candidate(saved[step - 5], step, 0.5, 1.25), candidate(saved[step - 10], step, 0.75, 2.5)),
                variance="kl_token",
                mistakes=tuple(Mistake(f"p{n:03d}", 12, 0.0) for n in range(17)) if rolls_back else (),
                lookahead=5 if rolls_back else None,
                start=step - 5 if rolls_back else None,
                created_at="2026-01-01T00:00:00+00:00",
            )
        )
    points = ((saved[0], saved[5]), (saved[0], saved[10]), (saved[5], saved[10]))
    spec = SignalSpec(points=points, prompts=32, samples=8, mistake_threshold=0.125, kappa=1.0, seed=0)
    columns = [
        name for name in tables.SIGNAL.names if name not in ("step", "lookahead", "prompts", "failed", "samples")
    ]
    rows = [
        {"step": now.step, "lookahead": ahead.step - now.step, "prompts": 32, "failed": 20, "samples": 160}
        | dict.fromkeys(columns, n + 0.5)
        for n, (now, ahead) in enumerate(points)
    ]
    run.commit_signal(spec, pa.Table.from_pylist(rows, tables.SIGNAL), 1000, {})
    return run


@pytest.fixture(scope="module")
def html(run: RunArtifacts) -> str:
    return write_report(run, chr)


def test_every_curve_is_marked_where_a_decision_fell(run: RunArtifacts, html: str) -> None:
    steps = views.steps(run)
    last = {
        d.step: steps.filter(leg_id=d.leg_id, step=d.step - 1)["total_tokens"][0] for d in run.decisions() if d.code
    }
    wanted = {"steps": [15, 20], "tokens": [last[15], last[20]]}
    for figures in data_of(html)["curves"].values():
        for axis, at in wanted.items():
            assert sorted(shape["x0"] for shape in figures[axis]["layout"]["shapes"]) == at
            marks = [trace for trace in figures[axis]["data"] if trace["name"].startswith("AutoNPO")]
            assert {trace["name"]: trace["x"] for trace in marks} == {
                "AutoNPO, rolled back": [at[0]],
                "AutoNPO, in vain": [at[1]],
            }


def test_what_a_reason_says_is_text_wherever_it_stands(html: str) -> None:
    assert HOSTILE not in html
    assert "why &lt;img src=x onerror=alert(1)&gt;" in html
    hovers = [t for t in data_of(html)["curves"]["reward"]["steps"]["data"] if t["name"].startswith("AutoNPO")]
    assert all("&lt;img" in text for trace in hovers for text in trace["text"])


def test_the_table_shows_the_chosen_distance_and_of_a_decision_in_vain_the_best_quality(html: str) -> None:
    section = html[html.index('id="decisions"') : html.index('id="signal"')]
    first, second = section.split("<tr><td>")[1:]
    assert "0.50 [0.44, 0.62]" in first
    assert "1.25 [1.19, 1.38]" in first
    assert "0.40 [0.34, 0.53]" in first
    assert "<td>115</td>" in first
    assert "<td>20</td><td>8</td><td>17</td>" in first
    assert "<td>20</td><td>8</td><td>0</td>" in second
    assert "0.75 [0.69, 0.88]" in second
    assert "low-quality" in second


def test_a_distance_with_too_few_mistakes_to_be_chosen_is_not_shown_as_the_best(run: RunArtifacts) -> None:
    vain = next(d for d in run.decisions() if d.code is DecisionCode.LOW_QUALITY)
    few = candidate(vain.candidates[0].parent, vain.step, 1.0, 1.0, pool=3)
    made = vain.model_copy(update={"candidates": (few, *vain.candidates[1:])})
    assert [row["candidate"].lookahead for row in rows([made], min_pool=16)] == [10]
    assert [row["candidate"].lookahead for row in rows([made], min_pool=3)] == [5]
    assert [row["candidate"] for row in rows([made], min_pool=21)] == [None]


def test_a_decision_before_its_leg_trained_a_step_is_marked_against_steps_alone(run: RunArtifacts) -> None:
    made = next(d for d in run.decisions() if d.code).model_copy(update={"leg_id": "untrained"})
    curves: dict = {"reward": {axis: {"data": [], "layout": {}} for axis in ("steps", "tokens")}}
    mark(curves, [made], views.steps(run))
    assert [trace["x"] for trace in curves["reward"]["steps"]["data"]] == [[made.step]]
    assert curves["reward"]["tokens"] == {"data": [], "layout": {}}


def test_each_probe_has_a_chart_with_intervals_and_the_chosen_distance(html: str) -> None:
    figures = data_of(html)["figures"]
    quality, signal, variance = figures["probe-0"]["data"]
    assert (quality["x"], quality["y"]) == ([5, 10], [0.5, 0.75])
    assert quality["error_y"]["array"] == [0.125, 0.125]
    assert quality["error_y"]["arrayminus"] == [0.0625, 0.0625]
    assert signal["y"] == pytest.approx([0.4, 0.3])
    assert (variance["y"], variance["yaxis"]) == ([1.25, 2.5], "y2")
    assert [shape["x0"] for shape in figures["probe-0"]["layout"]["shapes"]] == [5]
    assert "shapes" not in figures["probe-1"]["layout"], "nothing was chosen"


def test_a_study_has_a_chart_for_each_step(run: RunArtifacts, html: str) -> None:
    assert [(study["step"], study["failed"]) for study in studies(run)] == [(0, 20), (5, 20)]
    quality = next(t for t in data_of(html)["figures"]["study-0"]["data"] if t["name"] == "Q̂")
    assert (quality["x"], quality["y"]) == ([5, 10], [0.5, 1.5])


def test_a_run_without_decisions_has_no_section_about_them(tmp_path: Path) -> None:
    plain = write_report(synthetic.build_run(tmp_path, steps=5, with_replay=False, segment_steps=5), chr)
    assert 'id="decisions"' not in plain
    assert 'id="signal"' not in plain


@pytest.mark.slow
def test_a_browser_draws_the_charts_and_complains_of_nothing(html: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(html, encoding="utf-8")
    with opened(path, tmp_path / "profile") as browser:
        for name in ("probe-0", "probe-1", "study-0", "study-1"):
            assert browser.find_elements(By.CSS_SELECTOR, f"#chart-{name} .js-line"), f"{name} is not drawn"
        assert len(browser.find_elements(By.CSS_SELECTOR, "#chart-reward .shapelayer path")) == 2
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
