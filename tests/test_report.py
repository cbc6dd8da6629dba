"""The report: what goes into it, and what a real browser shows of it, hostile text included."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import Select, WebDriverWait

from npo_core import views
from npo_core.artifacts import RunArtifacts
from npo_core.interfaces import NearFutureError, Prompt, Verdict
from npo_core.report import sample as sampling
from npo_core.report import write_report
from npo_core.report.build import embed
from npo_core.report.effect import before_and_after, guides
from npo_core.report.tree import LEFT, RIGHT, WIDTH, draw
from tests import synthetic
from tests.browser import data_of, opened

SCRIPT, IMAGE = "<script>alert(1);window.pwned=1</script>", "</script><img src=x onerror=alert(2)>"
SEPARATORS = "\u2028&amp;\u2029"


def token_text(token: int) -> str:
    """Characters, but for two digits that are hostile."""
    return {ord("1"): SCRIPT, ord("2"): IMAGE, ord("3"): "a\nb", ord("4"): SEPARATORS}.get(token, chr(token))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunArtifacts:
    """A run whose prompts, families and verdicts are hostile."""
    plain, verify = synthetic._prompt, synthetic.SyntheticVerifier.verify

    def prompt(index: int, seed: int) -> Prompt:
        made = plain(index, seed)
        content = f"{SCRIPT}{IMAGE}{made.messages[0]['content']}"
        return Prompt(made.prompt_id, f"{made.task}{IMAGE}", ({"role": "user", "content": content},), made.answer)

    def verdict(verifier: synthetic.SyntheticVerifier, prompt: Prompt, text: str) -> Verdict:
        judged = verify(verifier, prompt, text)
        return Verdict(judged.reward, judged.correct, f"{judged.reason} {IMAGE}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_prompt", prompt)
        patch.setattr(synthetic.SyntheticVerifier, "verify", verdict)
        return synthetic.build_run(tmp_path_factory.mktemp("store"), steps=20, segment_steps=5)


@pytest.fixture(scope="module")
def report(run: RunArtifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(write_report(run, token_text), encoding="utf-8")
    return path


@pytest.fixture
def browser(report: Path, tmp_path: Path) -> Iterator[WebDriver]:
    """Headless Chromium with the report open and its charts drawn."""
    with opened(report, tmp_path) as browser:
        yield browser


def lines(browser: WebDriver, chart: str) -> list[str]:
    """SVG paths of a chart's curves."""
    paths = browser.find_elements(By.CSS_SELECTOR, f"#chart-{chart} .js-line")
    return [path.get_attribute("d") or "" for path in paths]


def ticks(browser: WebDriver, chart: str) -> list[str]:
    return [tick.text for tick in browser.find_elements(By.CSS_SELECTOR, f"#chart-{chart} .xtick text")]


def tokens(browser: WebDriver, side: str) -> str:
    return "".join(
        span.get_attribute("textContent") or ""
        for span in browser.find_elements(By.CSS_SELECTOR, f"#{side} .tokens span")
    )


# ---- in the browser


@pytest.mark.slow
def test_curves_are_drawn_against_steps_and_against_tokens(browser: WebDriver) -> None:
    for chart in ("accuracy", "reward", "entropy", "replaced"):
        assert max(d.count("L") + d.count(",") for d in lines(browser, chart)) >= 4, chart
    # Four legs: raw and mean of the three on the main line, mean of the scout.
    assert len(lines(browser, "reward")) == 7
    assert len(browser.find_elements(By.CSS_SELECTOR, "#chart-families .bars .point")) == 6
    assert len(browser.find_elements(By.CSS_SELECTOR, "#chart-coverage-0 .bars .point")) == 6
    before, at = lines(browser, "reward"), ticks(browser, "reward")
    assert set(at) <= {str(step) for step in range(21)}
    browser.find_element(By.CSS_SELECTOR, "label[for=axis-tokens]").click()
    assert lines(browser, "reward") != before
    assert any(tick.endswith("k") for tick in ticks(browser, "reward"))
    browser.find_element(By.CSS_SELECTOR, "label[for=axis-steps]").click()
    assert (lines(browser, "reward"), ticks(browser, "reward")) == (before, at)


@pytest.mark.slow
def test_pages_through_trajectories_by_button_key_and_choice(browser: WebDriver, report: Path) -> None:
    groups = data_of(report.read_text(encoding="utf-8"))["groups"]

    def meta() -> str:
        return browser.find_element(By.ID, "prompt-meta").text

    def place() -> str:
        return browser.find_element(By.ID, "place").text

    assert place() == f"group 1 of {len(groups)}"
    assert groups[0]["prompt_id"] in meta()
    assert not browser.find_element(By.ID, "previous").is_enabled()
    browser.find_element(By.ID, "next").click()
    assert groups[1]["prompt_id"] in meta()
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.ARROW_RIGHT)
    assert place().startswith("group 3 ")
    body.send_keys(Keys.ARROW_LEFT)
    assert place().startswith("group 2 ")
    body.send_keys(Keys.SHIFT + Keys.ARROW_RIGHT)
    jumped = next(i for i, group in enumerate(groups) if group["step"] > groups[0]["step"])
    assert place().startswith(f"group {jumped + 1} ")

    browser.find_element(By.ID, "only").click()
    guided = [group for group in groups if group["replaced"]]
    assert place().endswith(f"of {len(guided)}")
    Select(browser.find_element(By.ID, "step")).select_by_index(3)
    Select(browser.find_element(By.ID, "prompt")).select_by_index(1)
    shown = guided[int(place().split()[1]) - 1]
    assert shown["prompt_id"] in meta()
    # The policy's rollouts beside the guide's, the displaced one among them.
    assert len(browser.find_elements(By.CSS_SELECTOR, "#policy .rollout")) == synthetic.GROUP
    assert len(browser.find_elements(By.CSS_SELECTOR, "#policy .rollout.displaced")) == 1
    assert len(browser.find_elements(By.CSS_SELECTOR, "#guide .rollout.of-guide")) == 1
    row = next(row for row in shown["rows"] if row["source"] == "guide")
    colours = [span.get_attribute("class") for span in browser.find_elements(By.CSS_SELECTOR, "#guide .tokens span")]
    assert colours == ["p0" if p >= -0.10536 else "p1" if p >= -0.69315 else "p2" if p >= -1.60944 else
                       "p3" if p >= -2.99573 else "p4" if p >= -4.60517 else "p5" for p in row["logprobs"]]  # fmt: skip


@pytest.mark.slow
def test_hostile_text_is_shown_and_does_nothing(browser: WebDriver, report: Path) -> None:
    groups = data_of(report.read_text(encoding="utf-8"))["groups"]
    assert browser.find_element(By.ID, "words").text.startswith(SCRIPT + IMAGE)
    seen = ""
    for _ in groups[:30]:
        seen += tokens(browser, "policy")
        browser.find_element(By.ID, "next").click()
    assert SCRIPT in seen
    assert IMAGE in seen
    assert SEPARATORS in seen
    assert IMAGE in browser.find_element(By.ID, "policy").text  # the verdict
    assert IMAGE in browser.find_element(By.ID, "prompt-meta").text  # the family
    assert IMAGE in browser.find_element(By.CSS_SELECTOR, "#families table").text
    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert.accept()
    assert browser.execute_script(
        "return [window.pwned === undefined, document.images.length, document.scripts.length]"
    ) == [
        True,
        0,
        3,
    ]
    # Even a script that got into the page would not run.
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.pwned = 1'; document.body.append(s)"
    )
    assert browser.execute_script("return window.pwned === undefined")


@pytest.mark.slow
def test_nothing_is_asked_of_the_network(browser: WebDriver) -> None:
    browser.find_element(By.CSS_SELECTOR, "label[for=axis-tokens]").click()
    browser.find_element(By.ID, "next").click()
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # The browser's own start page asks for its own things.
    asked = [p["request"]["url"] for p in requests if p["documentURL"] == browser.current_url]
    assert browser.current_url in asked  # the log sees requests
    assert [url for url in asked if url != browser.current_url and not url.startswith(("data:", "blob:"))] == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.slow
def test_a_narrow_window_needs_no_sideways_scrolling(browser: WebDriver) -> None:
    browser.set_window_size(500, 900)
    fits = "return window.innerWidth <= 520 && document.documentElement.scrollWidth <= window.innerWidth"
    WebDriverWait(browser, 20).until(lambda b: b.execute_script(fits))


# ---- what is in the file


def test_json_in_the_page_cannot_end_its_script_and_comes_back_as_it_was() -> None:
    data = {"text": [SCRIPT, IMAGE, SEPARATORS, "<!--", "\\u003c"]}
    assert not set("<>&\u2028\u2029") & set(embed(data))
    assert json.loads(embed(data)) == data


def test_no_hostile_text_stands_in_the_file_as_markup(report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    assert "<img" not in html.replace(_plotly(), "")
    assert SCRIPT not in html
    assert len(re.findall("<script", html.replace(_plotly(), ""))) == 3


def test_the_file_says_how_much_of_the_run_it_carries(run: RunArtifacts, report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    total = views.steps(run).height * synthetic.PROMPTS_A_STEP
    replaced = int(views.steps(run)["npo/replaced"].sum())
    text = re.sub(r"\s+", " ", html)
    assert f"<strong>400 of {total}</strong>" in text
    groups = data_of(html)["groups"]
    assert len(groups) == 400
    assert sum(group["replaced"] for group in groups) == replaced  # fewer than their share: all of them
    assert f"{replaced} of {replaced} groups with a guide trajectory" in text
    assert {group["step"] for group in groups} == set(range(20))
    assert f"npo inspect {run.uri} --step STEP --prompt PROMPT" in text


def index(replaced: int, others: int, tokens: int) -> pl.DataFrame:
    count = replaced + others
    return pl.DataFrame(
        {"group": range(count), "replaced": [i < replaced for i in range(count)], "tokens": [tokens] * count}
    )


@pytest.mark.parametrize(
    ("replaced", "others", "tokens", "chosen_replaced", "chosen_others"),
    [
        (10, 20, 100, 10, 20),  # room for all
        (1000, 1000, 100, 300, 100),  # both shares are full
        (1000, 40, 100, 360, 40),  # what the others leave
        (50, 1000, 100, 50, 350),  # what the guided ones leave
        (0, 5, 10**9, 0, 1),  # always one
    ],
)
def test_the_sample_is_bounded_and_prefers_guided_groups(
    replaced: int, others: int, tokens: int, chosen_replaced: int, chosen_others: int
) -> None:
    chosen = sampling.choose(index(replaced, others, tokens))
    assert (chosen["replaced"].sum(), chosen.height) == (chosen_replaced, chosen_replaced + chosen_others)


def test_the_sample_is_bounded_in_tokens_and_spread_over_the_run() -> None:
    chosen = sampling.choose(index(0, 1000, sampling.MAX_TOKENS // 50))
    assert 30 <= chosen.height <= 50
    assert chosen["group"].diff().max() <= 1000 // 30 + 1


def test_the_effect_is_counted_on_the_main_line_before_and_after(run: RunArtifacts) -> None:
    (guide,) = guides(run)
    assert guide["solved"] == sum(family["solved"] for family in guide["families"])
    assert guide["prompts"] == sum(family["prompts"] for family in guide["families"]) == 48
    line = views.steps(run).filter("main_line").select("leg_id", "step").rows()
    history: dict[str, list[tuple[int, float, bool]]] = {}
    for manifest in (segment for segments in views.segments(run).values() for segment in segments):
        rows = run.table(manifest, "rollouts").to_pylist()
        guided = {(row["step"], row["prompt_id"]) for row in rows if row["source"] == "guide"}
        for row in rows:
            if row["slot"] == 0 and row["source"] == "policy" and (row["leg_id"], row["step"]) in line:
                place = (row["step"], row["prompt_id"])
                history.setdefault(row["prompt_id"], []).append((row["step"], row["group_accuracy"], place in guided))
    took, first, after = [], [], []
    for prompt_id, events in history.items():
        inside = sorted(event for event in events if 5 <= event[0] < 15)
        outside = sorted(event for event in events if event[0] >= 15)
        if any(event[2] for event in inside):
            took.append(prompt_id)
            first.append(inside[0][1])
            after += [event[1] for event in outside[:1]]
    fate = before_and_after(run, views.steps(run), 5, 15)[0]
    assert (fate["replaced"], fate["prompts"], fate["returned"]) == (True, len(took), len(after))
    assert fate["first"] == pytest.approx(sum(first) / len(first))
    assert fate["after"] == pytest.approx(sum(after) / len(after))


def test_the_tree_places_legs_on_the_axis_of_steps() -> None:
    legs = [
        {"leg_id": "m", "kind": "main", "parent": None, "start": 0, "stop": 10, "status": "cut", "guide_id": None},
        {"leg_id": "r", "kind": "replay", "parent": "m", "start": 5, "stop": 10, "status": "head", "guide_id": "g"},
    ]
    tree = draw(legs, {"m": (0, 5), "r": (5, 10)}, {"g": ("m", 10)})
    main, replay = tree.rows
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    assert [(bar.x, bar.on_line) for bar in main.bars] == [(LEFT, True), (middle, False)]
    assert main.bars[0].width == main.bars[1].width
    assert [(bar.x, bar.on_line) for bar in replay.bars] == [(middle, True)]
    assert replay.branch is not None
    assert replay.branch.startswith(f"M{middle:.1f},{main.y:.1f}")
    assert replay.teach is not None
    assert replay.teach.startswith(f"M{WIDTH - RIGHT:.1f},{main.y:.1f}")
    assert [step for _, step in tree.ticks] == list(range(11))


def test_a_plain_run_has_no_guide_and_says_so_nowhere(tmp_path: Path) -> None:
    html = write_report(synthetic.build_run(tmp_path, steps=4, segment_steps=2, with_replay=False), chr)
    assert "chart-replaced" not in html
    assert 'class="effect"' not in html
    assert data_of(html)["curves"].keys() == {"reward", "entropy", "accuracy"}


def test_a_run_without_a_step_has_no_report(tmp_path: Path) -> None:
    run = synthetic.build_run(tmp_path, steps=2, segment_steps=2, with_replay=False)
    shutil.rmtree(next(tmp_path.rglob("segments")))
    with pytest.raises(NearFutureError, match="no committed step"):
        write_report(run, chr)


def _plotly() -> str:
    import plotly.offline

    return plotly.offline.get_plotlyjs()
