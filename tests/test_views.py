"""Views against numbers counted by hand, or by plain loops over the artifacts, and the commands which print them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from flows import cli_views
from npo_core import views
from npo_core.artifacts import RunArtifacts, open_run
from npo_core.compare import accuracy_at, compare, steps_to_accuracy, target_accuracy
from npo_core.interfaces import ConfigurationError, NearFutureError
from npo_core.rows import Where
from npo_core.testbed import model_dir
from npo_core.trajectories import inspect
from schemas.records import LegRecord
from tests.synthetic import GROUP, PROMPTS_A_STEP, build_run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: `npo` is main [0, 5), scout [5, 15), guide, replay [5, 15), main [15, 20); `grpo` is main [0, 20).
    The folder's name would be a pattern, were it globbed."""
    root = tmp_path_factory.mktemp("store") / "runs [a*b]"
    build_run(root, steps=20, segment_steps=5, name="npo")
    build_run(root, steps=20, segment_steps=5, name="grpo", with_replay=False)
    return root


@pytest.fixture(scope="module")
def npo(store: Path) -> RunArtifacts:
    return open_run(f"{store}/npo")


@pytest.fixture(scope="module")
def grpo(store: Path) -> RunArtifacts:
    return open_run(f"{store}/grpo")


def leg(run: RunArtifacts, kind: str, start: int) -> LegRecord:
    return next(leg for leg in run.legs() if (leg.kind, leg.start) == (kind, start))


def sampled(run: RunArtifacts, kind: str, start: int) -> dict[int, int]:
    """Completion tokens of the policy by step of a leg, counted row by row."""
    counts: Counter[int] = Counter()
    for segment in run.segments(leg(run, kind, start).leg_id):
        for row in run.table(segment, "rollouts").to_pylist():
            if row["source"] == "policy":
                counts[row["step"]] += len(row["completion_ids"])
    return dict(counts)


def test_show_is_the_tree_with_its_head_and_its_disjoint_token_counts(npo: RunArtifacts) -> None:
    shown = views.show(npo)
    kinds = [(entry["kind"], entry["start"], entry["stop"], entry["status"]) for entry in shown["legs"]]
    assert sorted(kinds) == [
        ("main", 0, 5, "main-line"),
        ("main", 15, 20, "head"),
        ("replay", 5, 15, "main-line"),
        ("scout", 5, 15, "scout"),
        ("warm", 0, 0, "main-line"),
    ]
    parents = {entry["leg_id"]: entry["parent"] for entry in shown["legs"]}
    first, scout, replay = leg(npo, "main", 0), leg(npo, "scout", 5), leg(npo, "replay", 5)
    assert parents[scout.leg_id] == parents[replay.leg_id] == first.leg_id
    assert shown["head"] == {"leg_id": leg(npo, "main", 15).leg_id, "epoch": 3, "step": 20}
    assert [(d["step"], d["start"], d["window"]) for d in shown["interventions"]] == [(5, 5, 10)]
    line = [sampled(npo, *of) for of in (("main", 0), ("replay", 5), ("main", 15))]
    assert shown["tokens"] == {
        "policy": sum(sum(counts.values()) for counts in line),
        "guide": npo.guides()[0].tokens_guide,
        "discarded": sum(sampled(npo, "scout", 5).values()),
    }


def test_metrics_are_the_main_line_once_a_step_with_all_that_it_cost(npo: RunArtifacts) -> None:
    rows = views.metrics(npo)
    assert rows["step"].to_list() == list(range(20))
    assert rows["kind"].to_list() == ["main"] * 5 + ["replay"] * 10 + ["main"] * 5
    # Ten scout steps are paid for where the replay begins.
    assert rows["trained_steps"].to_list() == [*range(1, 6), *range(16, 31)]
    first, replay = sampled(npo, "main", 0), sampled(npo, "replay", 5)
    before = sum(first.values()) + sum(sampled(npo, "scout", 5).values()) + npo.guides()[0].tokens_guide
    assert rows["total_tokens"][0] == first[0]
    assert rows["total_tokens"][4] == sum(first.values())
    assert rows["total_tokens"][5] == before + replay[5]
    assert rows["total_tokens"][14] == before + sum(replay.values())
    assert rows["total_tokens"][19] == sum(views.show(npo)["tokens"].values())


def test_a_rollback_takes_steps_off_the_main_line_and_leaves_them_visible(tmp_path: Path) -> None:
    run = build_run(tmp_path, steps=8, segment_steps=2, with_replay=False)
    main = leg(run, "main", 0)
    parent = run.require_checkpoint(main.leg_id, 4).ref
    child = LegRecord(leg_id="child", kind="main", parent=parent, start=4, recipe_digest="r", created_at="2027")
    run.move_head(run.head(), run.open_leg(child).leg_id)
    assert views.metrics(run)["step"].to_list() == [0, 1, 2, 3]
    every = views.steps(run)
    assert every["step"].to_list() == list(range(8))
    assert every["main_line"].to_list() == [True] * 4 + [False] * 4
    scores = views.evaluations(run, every)
    assert dict(scores.select("step", "main_line").iter_rows()) == {0: True, 2: True, 4: True, 6: False, 8: False}
    status = {entry["leg_id"]: entry["status"] for entry in views.show(run)["legs"]}
    assert (status[main.leg_id], status["child"]) == ("cut", "head")
    assert views.head_step(run) == 4


def test_inspect_finds_what_was_asked_for_and_no_more(npo: RunArtifacts) -> None:
    step = inspect(npo, Where(step=7), limit=1000)
    legs = {leg(npo, "scout", 5).leg_id, leg(npo, "replay", 5).leg_id}
    assert set(step["leg_id"]) == legs
    assert step.filter(pl.col("source") == "policy").height == 2 * PROMPTS_A_STEP * GROUP
    guided = inspect(npo, Where(source="guide"), limit=1000)
    assert guided.height == views.steps(npo)["npo/replaced"].sum() > 0
    assert guided["correct"].all()
    one = inspect(npo, Where(prompts=("p007",), min_reward=1.0), limit=3)
    assert one.height == 3
    assert set(one["prompt_id"]) == {"p007"}
    assert one["reward"].min() == 1.0
    assert one["prompt"][0].endswith("=")


def test_debris_in_the_store_is_not_read(store: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(store, root)
    before = views.steps(open_run(f"{root}/npo"))
    segment = next((root / "npo/legs").rglob("segments/000000-000005"))
    for file in list(segment.glob("*.parquet")):
        shutil.copy(file, file.with_name(file.name.replace("-", "-debris-")))
    shutil.copytree(segment, segment.with_name("000005-000010"), ignore=shutil.ignore_patterns("manifest.json"))
    assert views.steps(open_run(f"{root}/npo")).equals(before)


def test_a_truncated_file_is_one_message_with_a_remedy(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "copy")
    run = open_run(f"{tmp_path}/copy/npo")
    for file in (tmp_path / "copy/npo/legs").rglob("metrics-*.parquet"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(NearFutureError, match="restore it from a copy"):
        views.metrics(run)


CURVE = pl.DataFrame(
    {
        "step": [0, 10, 20, 30, 40, 50],
        "trained_steps": [0, 10, 40, 50, 60, 70],
        "total_tokens": [0, 100, 400, 500, 600, 700],
        "accuracy": [0.0, 0.3, 0.3, 0.6, 0.6, 0.9],
    }
)
"""A run that scouted twenty steps between its steps 10 and 20. Means of three: –, –, 0.2, 0.4, 0.5, 0.7."""


def test_accuracy_at_equal_cost_is_that_of_the_last_evaluation_before_it() -> None:
    assert accuracy_at(CURVE, "step", 25) == 0.3
    assert accuracy_at(CURVE, "trained_steps", 39) == 0.3
    assert accuracy_at(CURVE, "trained_steps", 50) == 0.6
    assert accuracy_at(CURVE, "total_tokens", 99) == 0.0
    assert accuracy_at(CURVE, "total_tokens", 701) is None


def test_the_target_is_the_mean_of_three_at_sixty_percent_and_is_reached_by_a_mean_of_three() -> None:
    assert target_accuracy(CURVE) == pytest.approx(0.4)  # 60 % of 50 steps is step 30
    own = steps_to_accuracy("a", CURVE, 0.4)
    assert (own.main_steps, own.trained_steps, own.total_tokens) == (30, 50, 500)
    assert steps_to_accuracy("a", CURVE, 0.45).main_steps == 40
    assert steps_to_accuracy("a", CURVE, 0.71).main_steps is None
    assert target_accuracy(CURVE.head(2)) is None


def test_compare_charges_a_run_for_its_scout(npo: RunArtifacts, grpo: RunArtifacts) -> None:
    result = compare([grpo, npo])
    by_run = {run.uri: {e.checkpoint.step: e.accuracy for e in views.main_evaluations(run)} for run in (grpo, npo)}
    cells = {(row["axis"], row["at"], row["run"]): row["accuracy"] for row in result["rows"]}
    for step in (0, 5, 10, 15, 20):
        assert cells["main_steps", step, grpo.uri] == cells["trained_steps", step, grpo.uri] == by_run[grpo.uri][step]
        assert cells["main_steps", step, npo.uri] == by_run[npo.uri][step]
    # After 15 trained steps NPO's main line is at step 5, after 20 at step 10, after 30 it is done.
    assert cells["trained_steps", 15, npo.uri] == by_run[npo.uri][5]
    assert cells["trained_steps", 20, npo.uri] == by_run[npo.uri][10]
    assert cells["trained_steps", 30, npo.uri] == by_run[npo.uri][20]
    assert cells["trained_steps", 30, grpo.uri] is None
    first, second = result["steps_to_accuracy"]
    assert first["speedup"] == {"main_steps": 1.0, "trained_steps": 1.0, "total_tokens": 1.0}
    assert second["trained_steps"] == second["main_steps"] + 10


def test_compare_refuses_a_run_named_twice(npo: RunArtifacts) -> None:
    with pytest.raises(NearFutureError, match="twice"):
        compare([npo, npo])


# ---- commands

app = typer.Typer()
cli_views.register(app)


def npo_json(*arguments: str, code: int = 0) -> dict:
    """What a command prints as the last line of stdout."""
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_commands_print_one_json_object_with_the_contracts_fields(store: Path) -> None:
    run = f"{store}/npo"
    assert [entry["run_id"] for entry in npo_json("ls", str(store))["runs"]] == ["grpo", "npo"]
    shown = npo_json("show", run)
    assert {"legs", "head", "interventions", "tokens"} <= shown.keys()
    assert shown["legs"][0].keys() == {"leg_id", "kind", "parent", "start", "stop", "status", "guide_id"}
    assert len(npo_json("inspect", run, "--limit", "3")["rows"]) == 3
    assert len(npo_json("metrics", run)["rows"]) == 20
    assert npo_json("compare", f"{store}/grpo", run)["rows"][0].keys() == {"axis", "at", "run", "accuracy"}


def test_commands_print_tables_for_people(store: Path) -> None:
    run = f"{store}/npo"
    for arguments, said in (
        (["ls", str(store)], "grpo"),
        (["show", run], "head: leg"),
        (["inspect", run, "--source", "guide"], "group accuracy"),
        (["metrics", run], "replay"),
        (["compare", f"{store}/grpo", run], "at equal total tokens"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0
        assert said in result.stdout


def test_every_command_has_help_with_an_example() -> None:
    for name in ("ls", "show", "inspect", "metrics", "compare", "verify", "report", "export"):
        assert f"npo {name} " in CliRunner().invoke(app, [name, "--help"]).stdout


def test_inspect_exports_all_rows_with_their_tokens(store: Path, npo: RunArtifacts, tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    npo_json("inspect", f"{store}/npo", "--source", "policy", "--parquet", str(out))
    rows = pl.read_parquet(out)
    assert rows.height == 30 * PROMPTS_A_STEP * GROUP
    assert rows["completion_ids"].list.len().sum() == sum(sum(sampled(npo, *of).values()) for of in
        (("main", 0), ("scout", 5), ("replay", 5), ("main", 15)))  # fmt: skip


def test_text_that_would_steer_a_terminal_is_written_out() -> None:
    assert cli_views.visible("a\x1b[2J\x07b\nc") == "a\\x1b[2J\\x07b\nc"


def test_export_makes_a_model_directory_of_the_step_that_was_asked_for(
    store: Path, npo: RunArtifacts, tmp_path: Path
) -> None:
    target = tmp_path / "model"
    made = npo_json("export", f"{store}/npo", "--to", str(target), "--step", "10")
    assert made["digest"] == npo.require_checkpoint(leg(npo, "replay", 5).leg_id, 10).weights_digest
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in target.iterdir()}
    assert list(tmp_path.iterdir()) == [target]
    refused = CliRunner().invoke(app, ["export", f"{store}/npo", "--to", str(target)])
    assert isinstance(refused.exception, ConfigurationError)


def test_verify_names_the_faults_and_exits_with_one_and_report_writes_the_file(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "copy")
    run = open_run(f"{tmp_path}/copy/npo")
    shutil.rmtree(tmp_path / "copy/npo/model")
    run.put_model(model_dir())  # a tokenizer that loads
    file = next((tmp_path / "copy/npo/legs").rglob("rollouts-*.parquet"))
    file.write_bytes(file.read_bytes()[:-1])
    faults = npo_json("verify", run.uri, code=1)["faults"]
    assert any(fault["key"].endswith(file.name) for fault in faults)
    shutil.copy(next((store / "npo").rglob(file.name)), file)
    out = tmp_path / "report.html"
    assert npo_json("report", run.uri, "--out", str(out)) == {"report": str(out)}
    assert out.read_text().startswith("<!doctype html>")
    assert Path(npo_json("report", run.uri)["report"].removeprefix("file://")).read_text().startswith("<!doctype html>")


def test_a_run_that_is_not_there_is_named_with_those_that_are(store: Path) -> None:
    result = CliRunner().invoke(app, ["show", f"{store}/nope"])
    assert isinstance(result.exception, NearFutureError)
    assert "grpo, npo" in str(result.exception)
