"""Checkpoints are asked other prompts than the run's: committed with them, found again, kept apart from the curve."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from npo_core import compare, evaluated, views
from npo_core.artifacts import RunArtifacts, open_run
from npo_core.config_file import load_benchmark
from npo_core.data_files import data_files
from npo_core.interfaces import ConfigurationError
from tests.command import last_json, npo, run_arguments

pytestmark = pytest.mark.slow

LONG = "deploy/benchmarks/testbed-long.yaml"
SMALL = """
name: small
data: {source: testbed, prompts: 8, held_out: 8, min_length: 5, max_length: 6, pool_seed: 3}
verifier: {kind: testbed}
samples: 4
temperature: 0.5
max_new_tokens: 9
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark file of sixteen prompts."""
    path = tmp_path_factory.mktemp("benchmark") / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, prefect_server: dict[str, str]) -> str:
    """A finished run of four steps that no benchmark was asked of; copies of it are."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = run_arguments("testbed-grpo", folder, "plain", run__total_steps=4)
    last_json(npo(*arguments, "--json", env=prefect_server))
    return f"file://{folder}/plain"


@pytest.fixture(scope="module")
def before(trained: str) -> dict[str, Any]:
    """What the run says without benchmarks."""
    return said(open_run(trained))


@pytest.fixture(scope="module")
def asked(
    trained: str, before: dict[str, Any], small: Path, tmp_path_factory: pytest.TempPathFactory, prefect_server: Any
) -> tuple[str, dict[str, Any]]:
    """A copy of the run that was asked two benchmarks at its tip, one of them at its start too, and what was said."""
    folder = tmp_path_factory.mktemp("asked")
    shutil.copytree(trained.removeprefix("file://"), folder / "plain")
    run = f"file://{folder}/plain"
    evaluate = ("stage", "evaluate", run, "--benchmark", small)
    first = last_json(npo(*evaluate, "--benchmark", LONG, "--json", env=prefect_server))
    last_json(npo(*evaluate, "--step", 0, "--json", env=prefect_server))
    return run, first


def said(run: RunArtifacts) -> dict[str, Any]:
    """What depends on the held-out evaluations."""
    steps = views.steps(run)
    return {
        "evaluations": [made.eval_id for made in run.evaluations()],
        "curve": views.evaluations(run, steps).to_dicts(),
        "main": [made.accuracy for made in views.main_evaluations(run)],
        "metrics": views.metrics(run).to_dicts(),
        "segments": views.recent_segments(run, run.legs()[-1].leg_id, 9).to_dicts(),
        "compare": [{**row, "run": None} for row in compare.compare([run])["rows"]],
    }


def test_its_prompts_lie_beside_its_answers_and_all_of_them_were_asked(asked: tuple[str, dict[str, Any]]) -> None:
    run, first = asked
    opened = open_run(run)
    for artifact, prompts, samples in zip(first["artifacts"], (16, 128), (4, 8), strict=True):
        made = opened.evaluation(artifact["eval_id"])
        assert made is not None
        assert made.benchmark is not None
        table = opened.table(made, "prompts")
        assert table.num_rows == prompts
        assert made.file("prompts").key.startswith(f"evals/{made.eval_id}/prompts-")
        answers = opened.table(made, "samples")
        assert set(answers["prompt_id"].to_pylist()) == set(table["prompt_id"].to_pylist())
        assert answers.num_rows == prompts * samples == sum(task.samples for task in made.tasks.values())


def test_its_sampling_is_its_own_and_in_its_manifest(asked: tuple[str, dict[str, Any]]) -> None:
    run, first = asked
    spec = first["artifacts"][0]["benchmark"]
    assert (spec["name"], spec["temperature"], spec["max_new_tokens"]) == ("small", 0.5, 9)
    assert spec["verifier"] == "testbed/1"
    made = open_run(run).evaluation(first["artifacts"][0]["eval_id"])
    assert made is not None
    longest = max(map(len, open_run(run).table(made, "samples")["completion_ids"].to_pylist()))
    assert longest <= 9


def test_scores_are_in_the_json_by_task_macro_and_overall(asked: tuple[str, dict[str, Any]]) -> None:
    _, first = asked
    assert first["stage"] == "evaluate"
    for artifact in first["artifacts"]:
        scores = artifact["scores"]
        assert scores["overall"]["pass_at"]["1"]["value"] == pytest.approx(artifact["accuracy"])
        assert scores["tasks"].keys() == artifact["tasks"].keys()
        ks = [str(k) for k in (1, 2, 4, 8) if k <= artifact["samples_per_prompt"]]
        assert list(scores["macro"]["pass_at"]) == ks
        values = [scores["overall"]["pass_at"][k]["value"] for k in ks]
        assert values == sorted(values)


def test_curves_comparisons_and_metrics_are_those_of_the_held_out_prompts(
    asked: tuple[str, dict[str, Any]], before: dict[str, Any]
) -> None:
    after = said(open_run(asked[0]))
    assert len(open_run(asked[0]).all_evaluations()) == len(after["evaluations"]) + 3
    assert after == before


def test_it_is_found_and_not_done_again(
    asked: tuple[str, dict[str, Any]], small: Path, prefect_server: dict[str, str]
) -> None:
    run, first = asked
    again = last_json(npo("stage", "evaluate", run, "--benchmark", small, "--json", env=prefect_server))
    assert again["artifacts"] == first["artifacts"][:1]


def test_forced_it_comes_out_the_same(
    asked: tuple[str, dict[str, Any]], small: Path, prefect_server: dict[str, str]
) -> None:
    run, first = asked
    done = npo("stage", "evaluate", run, "--benchmark", small, "--force", env=prefect_server)
    assert done.returncode == 0, done.stderr
    assert f"computed again and equal: evals/{first['artifacts'][0]['eval_id']}" in done.stderr


@pytest.mark.parametrize(
    "change",
    ["pool_seed: 4", "samples: 2", "temperature: 0.6", "max_new_tokens: 8", "name: other", "verifier: {kind: exact}"],
)
def test_another_question_is_another_evaluation(
    asked: tuple[str, dict[str, Any]], small: Path, tmp_path: Path, change: str
) -> None:
    from npo_core.benchmarks import open_benchmark
    from npo_core.lineage import eval_id
    from npo_core.workspace import Workspace

    def identity(path: Path) -> str:
        workspace = Workspace.of(open_run(asked[0]))
        opened = open_benchmark(load_benchmark(path), workspace.config)
        tip = views.main_evaluations(workspace.run)[-1].checkpoint
        return eval_id(tip, opened.samples, workspace.record, False, opened.spec)

    key = change.partition(":")[0]
    old = next(part for part in re.split(r"\n|, |(?<=\d)}", SMALL) if part.startswith(key))
    other = tmp_path / "other.yaml"
    other.write_text(SMALL.replace(old, change))
    assert identity(small) == asked[1]["artifacts"][0]["eval_id"]
    assert identity(other) != identity(small)


def test_show_and_the_report_list_it(asked: tuple[str, dict[str, Any]], prefect_server: dict[str, str]) -> None:
    run, first = asked
    shown = last_json(npo("show", run, "--json"))
    listed = [(one["benchmark"], one["step"]) for one in shown["benchmarks"]]
    assert listed == [
        ("small", 0),
        ("small", 4),
        ("testbed-long", 4),
    ]
    assert shown["benchmarks"][1]["scores"] == first["artifacts"][0]["scores"]
    assert "testbed-long" in npo("show", run).stdout
    report = last_json(npo("report", run, "--json", env=prefect_server))["report"]
    page = Path(report.removeprefix("file://")).read_text(encoding="utf-8")
    section = page.partition('<section id="benchmarks">')[2].partition("</section>")[0]
    assert section.count("<tr><td>") == 3
    assert "testbed-long" in section


def test_verify_and_gc_know_it(asked: tuple[str, dict[str, Any]]) -> None:
    run, _ = asked
    checked = npo("verify", run)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    files = [path for path in Path(run.removeprefix("file://")).rglob("evals/*/*") if path.is_file()]
    long_ago = 1_000_000_000
    for path in files:
        os.utime(path, (long_ago, long_ago))
    swept = npo("gc", run, "--json")
    assert swept.returncode == 0, swept.stderr
    assert all(path.exists() for path in files)


def test_verify_sees_other_prompts_than_were_asked(asked: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    run, first = asked
    shutil.copytree(run.removeprefix("file://"), tmp_path / "plain")
    folder = tmp_path / "plain" / "evals" / first["artifacts"][0]["eval_id"]
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["benchmark"]["name"] = "renamed"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    checked = npo("verify", f"file://{tmp_path}/plain", "--json")
    assert checked.returncode == 1
    assert "was altered: it is evaluation" in checked.stdout
    (entry,) = (entry for entry in manifest["files"] if entry["role"] == "prompts")
    lost = tmp_path / "plain" / entry["key"]
    lost.unlink()
    assert entry["key"] in npo("verify", f"file://{tmp_path}/plain", "--json").stdout


def test_its_files_say_whose_they_are(asked: tuple[str, dict[str, Any]]) -> None:
    files = data_files(open_run(asked[0]), "samples")
    assert sorted(file["benchmark"] or "" for file in files) == ["", "", "small", "small", "testbed-long"]
    assert data_files(open_run(asked[0]), "greedy") == []


def test_greedy_answers_lie_beside_the_same_samples(
    trained: str, tmp_path: Path, prefect_server: dict[str, str]
) -> None:
    shutil.copytree(trained.removeprefix("file://"), tmp_path / "plain")
    arguments = run_arguments("testbed-grpo", tmp_path, "plain", run__total_steps=4, evaluation__greedy="true")
    last_json(npo(*arguments, "--json", env=prefect_server))
    run = open_run(f"file://{tmp_path}/plain")
    plain, bold = (made for made in run.evaluations() if made.checkpoint.step == 4)
    assert (plain.greedy, bold.greedy) == (False, True)
    assert plain.file("samples").sha256 == bold.file("samples").sha256
    assert plain.accuracy == bold.accuracy
    greedy = run.table(bold, "greedy")
    assert greedy.num_rows == 16
    assert {value for row in greedy["behavior_logprobs"].to_pylist() for value in row} == {0.0}
    assert [(file["stop"], file["rows"]) for file in data_files(run, "greedy")] == [(0, 16), (4, 16)]
    scores = evaluated.read_scores(run, bold)
    assert scores.overall.greedy is not None
    assert scores.overall.greedy.value == sum(greedy["correct"].to_pylist()) / 16
    assert scores.overall.pass_at[1].value == pytest.approx(plain.accuracy)
    assert npo("verify", run.uri).returncode == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: x\ndata: {sauce: testbed}\n", "data.sauce: unknown key; did you mean source"),
        ("data: {}\n", "name: is required"),
        ("name: x\ndata: {}\nsample: 3\n", "sample: unknown key; did you mean samples"),
        ("- 1\n", "holds no keys"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"benchmark .*wrong\.yaml") as caught:
        load_benchmark(path)
    assert told in str(caught.value)


def test_a_missing_file_is_bad_usage(trained: str) -> None:
    done = npo("stage", "evaluate", trained, "--benchmark", "nowhere.yaml")
    assert done.returncode == 2
    assert "benchmark nowhere.yaml cannot be read" in done.stderr
