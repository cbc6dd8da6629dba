"""A run in Markdown: what stays text, what becomes an address. `test_ui.py` has it rendered by a real browser."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from npo_core import views
from npo_core.artifacts import RunArtifacts, open_run
from npo_core.markdown import address, code, link, summary, text
from npo_core.report.charts import COLOURS
from npo_core.report.still import draw_curves


@pytest.fixture
def run(eight_steps: Path) -> RunArtifacts:
    (name,) = (path.name for path in eight_steps.iterdir())
    return open_run(f"file://{eight_steps}/{name}")


def summary_of(run: RunArtifacts, public_url: str | None) -> str:
    report, curves = f"{run.uri}/reports/report-1.html", f"{run.uri}/reports/curves-1.png"
    scores, decisions = views.main_evaluations(run), run.decisions()
    return summary(views.show(run), scores, decisions, report, curves, public_url)


def test_text_is_one_line_without_markup() -> None:
    assert text("a\n# b | *c* <b> & d") == "a \\# b \\| \\*c\\* &lt;b&gt; &amp; d"
    assert text("took 0.25 of 10") == "took 0.25 of 10"


@pytest.mark.parametrize("bare", ["http://a.example", "HTTPS://a.example", "www.a.example", "me@a.example"])
def test_bare_addresses_are_broken_where_nobody_sees_it(bare: str) -> None:
    assert bare not in text(f"see {bare}")
    assert text(bare).replace("\u2060", "") == bare


def test_code_holds_ticks() -> None:
    assert code("s3://bucket/runs") == "`s3://bucket/runs`"
    assert code("a `b` ``c``") == "``` a `b` ``c`` ```"


def test_a_link_cannot_be_ended_by_its_address() -> None:
    assert link("report", "https://a.example/a(b) c") == "[report](https://a.example/a%28b%29%20c)"


@pytest.mark.parametrize("public_url", ["https://a.example/runs", "https://a.example/runs/"])
def test_a_file_of_the_run_has_its_address_below_the_public_one(public_url: str) -> None:
    found = address("s3://bucket/deep/mine/reports/r-1.html", "s3://bucket/deep/mine", public_url)
    assert found == "https://a.example/runs/mine/reports/r-1.html"


def test_without_a_public_address_the_summary_says_how_to_give_one(run: RunArtifacts) -> None:
    words = summary_of(run, None)
    assert "`run.public_url`" in words
    assert "](" not in words
    assert f"`{run.uri}/reports/report-1.html`" in words


def test_with_a_public_address_the_summary_shows_the_curves_and_links_the_report(run: RunArtifacts) -> None:
    words = summary_of(run, "https://a.example")
    assert "`run.public_url`" not in words
    assert f"](https://a.example/{run.run_id}/reports/report-1.html)" in words
    assert f"](https://a.example/{run.run_id}/reports/curves-1.png)" in words


def test_recent_segments_are_the_means_and_sums_of_their_steps(run: RunArtifacts) -> None:
    leg = max((leg.leg_id for leg in run.legs()), key=lambda leg_id: len(run.segments(leg_id)))
    steps = views.steps(run).filter(leg_id=leg)
    (last,) = views.recent_segments(run, leg, 1).to_dicts()
    within = steps.filter(steps["step"].is_between(last["start"], last["stop"], closed="left"))
    assert last["stop"] == steps["step"].max() + 1
    assert last["reward"] == pytest.approx(within["reward"].mean())
    assert last["tokens"] == within["tokens/policy"].sum()
    assert views.recent_segments(run, leg, 2).height == 2


def test_the_still_picture_draws_every_kind_of_leg_and_comes_out_the_same(run: RunArtifacts) -> None:
    content = draw_curves(run)
    assert content is not None
    assert draw_curves(run) == content
    with Image.open(BytesIO(content)) as picture:
        colours = {"#{:02x}{:02x}{:02x}".format(*colour[:3]) for _, colour in picture.getcolors(1 << 24)}
    assert {COLOURS[leg.kind] for leg in run.legs() if leg.kind != "warm"} <= colours
