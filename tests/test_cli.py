"""The command keeps its contract: JSON last on stdout, logs on stderr, exit codes, examples; stages work by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from flows.cli import app
from npo_core.artifacts import RunArtifacts, main_line_checkpoint, open_run
from tests.command import ROOT, fingerprint, npo, run_arguments

TINY = {"data__held_out": 8, "evaluation__every": 2, "evaluation__samples": 1}


def parsed(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """stdout is one line, a strict JSON object."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert result.returncode == 0, result.stderr
    *rest, last = result.stdout.splitlines()
    assert not rest, "logs belong on stderr"
    value = json.loads(last, parse_constant=refuse)
    assert isinstance(value, dict)
    return value


def fields(rows: Sequence[dict[str, Any]]) -> set[str]:
    """The fields that every row has; there is one."""
    return set.intersection(*map(set, rows))


# ---- help


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


COMMANDS = sorted(commands(typer.main.get_command(app)))


def test_there_are_the_documented_commands() -> None:
    named = {" ".join(path) for path in COMMANDS}
    assert named >= {"run", "ls", "show", "inspect", "metrics", "compare", "verify", "report", "export"}
    stages = ("warm-start", "scout", "guide", "replay", "main", "evaluate", "report")
    assert named >= {f"stage {stage}" for stage in stages}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_help_of_every_command_has_an_example(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0
    _, heading, examples = result.output.partition("Example")
    assert heading
    assert f"npo {' '.join(path)} " in examples


# ---- two finished runs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def grpo_run(home: Path, prefect_server: dict[str, str]) -> dict[str, Any]:
    """What `npo run --json` said of a GRPO run with both trackers."""
    arguments = run_arguments(
        "testbed-grpo",
        home / "store",
        "grpo",
        **TINY,
        run__trackers="[tensorboard, wandb]",
        run__tracker_dir=home / "trackers",
    )
    return parsed(npo(*arguments, "--json", env={**prefect_server, "WANDB_MODE": "offline"}))


ENTRY_POINT = """
import sys
from flows import npo
from npo_core.config_file import load_config
print(npo(load_config(sys.argv[1], sys.argv[2:])).model_dump_json())
"""


@pytest.fixture(scope="module")
def npo_run(home: Path, prefect_server: dict[str, str]) -> dict[str, Any]:
    """What the Python entry point returned for an NPO run."""
    _, config, *options = run_arguments("testbed-npo", home / "store", "npo", **TINY)
    overrides = [option for option in options if option != "-s"]
    result = subprocess.run(
        [sys.executable, "-c", ENTRY_POINT, config, *overrides],
        cwd=ROOT,
        env={**os.environ, **prefect_server, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout.splitlines()[-1]))


def copied(run: dict[str, Any], target: Path) -> RunArtifacts:
    """A copy of a run that a test may change."""
    source = open_run(run["run"])
    shutil.copytree(source.uri.removeprefix("file://"), target / source.run_id)
    return open_run(f"file://{target}/{source.run_id}")


@pytest.mark.slow
def test_run_tells_where_how_far_and_how_well(grpo_run: dict[str, Any]) -> None:
    assert grpo_run.keys() == {"run", "status", "head_step", "eval", "report"}
    assert (grpo_run["status"], grpo_run["head_step"]) == ("done", 8)
    assert grpo_run["eval"].keys() == {"before", "after", "tasks"}
    assert 0 <= grpo_run["eval"]["after"] <= 1
    assert fields(list(grpo_run["eval"]["tasks"].values())) == {"before", "after"}
    assert Path(grpo_run["report"].removeprefix("file://")).read_text().startswith("<!")


@pytest.mark.slow
def test_a_python_entry_point_runs_the_same_flow(npo_run: dict[str, Any]) -> None:
    assert (npo_run["status"], npo_run["head_step"]) == ("done", 8)
    run = open_run(npo_run["run"])
    assert sorted(leg.kind for leg in run.legs()) == ["main", "replay", "scout", "warm"]
    assert npo_run["after"]["checkpoint"]["step"] == 8


@pytest.mark.slow
def test_trackers_hold_the_run(grpo_run: dict[str, Any], home: Path) -> None:
    run_id = open_run(grpo_run["run"]).run_id
    assert list((home / "trackers" / "tensorboard" / run_id).glob("main-*/events.*"))
    assert list((home / "trackers" / "wandb").rglob("*.wandb"))
    for sink in ("tensorboard", "wandb"):
        assert len(list((home / "trackers" / sink / "exported" / run_id).iterdir())) == 4


@pytest.mark.slow
def test_every_view_prints_the_json_of_the_contract(
    grpo_run: dict[str, Any], npo_run: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    def ask(*arguments: object) -> dict[str, Any]:
        return parsed(npo(*arguments, "--json"))

    shown = ask("show", npo_run["run"])
    assert shown.keys() >= {"legs", "head", "interventions", "tokens"}
    assert fields(shown["legs"]) >= {"leg_id", "kind", "parent", "start", "stop", "status", "guide_id"}
    assert shown["tokens"].keys() == {"policy", "guide", "discarded"}
    assert all(count > 0 for count in shown["tokens"].values())
    assert shown["head"]["step"] == 8
    assert [i["start"] for i in shown["interventions"]] == [0]

    assert {row["run_id"] for row in ask("ls", home / "store")["runs"]} == {"grpo", "npo"}
    inspected = ask("inspect", npo_run["run"], "--step", 1, "--limit", 500)["rows"]
    assert fields(inspected) >= {"leg_id", "step", "prompt_id", "slot", "source", "reward", "text", "prompt"}
    assert {row["step"] for row in inspected} == {1}
    exported = ask("inspect", npo_run["run"], "--parquet", tmp_path / "rows.parquet")
    assert exported["count"] > len(inspected) > 0
    assert [row["step"] for row in ask("metrics", npo_run["run"])["rows"]] == list(range(8))
    compared = ask("compare", grpo_run["run"], npo_run["run"])
    assert fields(compared["rows"]) == {"axis", "at", "run", "accuracy"}
    assert {row["run"] for row in compared["rows"]} == {grpo_run["run"], npo_run["run"]}
    assert ask("verify", npo_run["run"]) == {"faults": []}
    report = ask("report", npo_run["run"], "--out", tmp_path / "report.html")["report"]
    assert Path(report).stat().st_size > 10_000


@pytest.mark.slow
def test_every_view_speaks_to_people_too(grpo_run: dict[str, Any], npo_run: dict[str, Any], home: Path) -> None:
    run = npo_run["run"]
    asked: list[tuple[list[str], str]] = [
        (["ls", str(home / "store")], "grpo"),
        (["show", run], "generated tokens:"),
        (["inspect", run, "--source", "guide", "--limit", "2"], "guide"),
        (["metrics", run], "Main line"),
        (["compare", grpo_run["run"], run], "Held-out accuracy"),
    ]
    for arguments, said in asked:
        result = npo(*arguments)
        assert result.returncode == 0, result.stderr
        assert said in result.stdout


# ---- stages


@pytest.mark.slow
def test_every_stage_finds_what_is_committed(
    npo_run: dict[str, Any], tmp_path: Path, prefect_server: dict[str, str]
) -> None:
    run = copied(npo_run, tmp_path)
    before = fingerprint(run)
    legs = {leg.kind: leg.leg_id for leg in run.legs()}
    guide = run.guides()[0]
    asked: dict[str, tuple[list[object], dict[str, Any]]] = {
        "warm-start": ([], {"leg_id": legs["warm"], "step": 0}),
        "scout": (["--start", 0, "--lookahead", 4], {"leg_id": legs["scout"], "step": 4}),
        "guide": (
            ["--leg", legs["scout"], "--step", 4, "--start", 0, "--stop", 4],
            {"guide_id": guide.guide_id, "nonce": guide.nonce},
        ),
        "replay": (["--guide", guide.guide_id], {"leg_id": legs["replay"], "step": 4}),
        "main": (["--stop", 8], {"leg_id": legs["main"], "step": 8}),
        "evaluate": (["--step", 8], {"eval_id": npo_run["after"]["eval_id"]}),
        "report": ([], {}),
    }

    def stage(name: str) -> dict[str, Any]:
        return parsed(npo("stage", name, run.uri, *asked[name][0], "--json", env=prefect_server))

    with ThreadPoolExecutor(2) as pool:
        for name, told in zip(asked, pool.map(stage, asked), strict=True):
            assert told["stage"] == name
            (artifact,) = told["artifacts"]
            if name == "report":
                assert Path(artifact.removeprefix("file://")).exists()
            else:
                assert artifact.items() >= asked[name][1].items(), name
    assert fingerprint(run) == before


@pytest.mark.slow
def test_a_late_intervention_by_hand_moves_the_head_and_keeps_the_abandoned_steps(
    grpo_run: dict[str, Any], tmp_path: Path, prefect_server: dict[str, str]
) -> None:
    run = copied(grpo_run, tmp_path)
    before = fingerprint(run)

    def stage(name: str, *options: object) -> dict[str, Any]:
        told = parsed(npo("stage", name, run.uri, *options, "--json", env=prefect_server))
        return dict(told["artifacts"][0])

    scout = stage("scout", "--start", 4, "--lookahead", 2)
    assert run.head() == open_run(grpo_run["run"]).head(), "looking ahead moves nothing"
    guide = stage("guide", "--leg", scout["leg_id"], "--step", scout["step"], "--start", 4, "--stop", 6)
    replay = stage("replay", "--guide", guide["guide_id"])
    assert (replay["step"], guide["spec"]["start"], guide["spec"]["stop"]) == (6, 4, 6)
    main = stage("main", "--stop", 8)

    shown = parsed(npo("show", run.uri, "--json"))
    legs = {leg["leg_id"]: leg for leg in shown["legs"]}
    (old,) = (leg for leg in shown["legs"] if leg["kind"] == "main" and leg["leg_id"] != main["leg_id"])
    assert (shown["head"]["leg_id"], shown["head"]["step"]) == (main["leg_id"], 8)
    assert (old["start"], old["stop"], old["status"]) == (0, 8, "cut")
    assert legs[scout["leg_id"]]["status"] == "scout"
    assert legs[replay["leg_id"]] | {"parent": old["leg_id"], "start": 4, "stop": 6} == legs[replay["leg_id"]]
    assert legs[main["leg_id"]]["parent"] == replay["leg_id"]
    assert [(i["start"], i["lookahead"]) for i in shown["interventions"]] == [(4, 2)]
    assert shown["tokens"]["discarded"] > 0
    after = fingerprint(run)
    for part in ("segments", "checkpoints", "evaluations"):
        assert before[part].items() <= after[part].items(), f"{part} of the abandoned steps are gone"
    assert parsed(npo("verify", run.uri, "--json")) == {"faults": []}


# ---- export


@pytest.mark.slow
def test_an_export_is_the_checkpoint(grpo_run: dict[str, Any], tmp_path: Path) -> None:
    run = open_run(grpo_run["run"])
    told = parsed(npo("export", run.uri, "--to", tmp_path / "model", "--step", 4, "--json"))
    assert told.keys() >= {"path", "digest"}
    ref = main_line_checkpoint(run, 4)
    assert told["digest"] == run.require_checkpoint(ref.leg_id, 4).weights_digest
    own = run.checkout(ref, tmp_path / "checkpoint", weights_only=True).weights
    exported, original = (AutoModelForCausalLM.from_pretrained(path) for path in (told["path"], own))
    tokenizer = AutoTokenizer.from_pretrained(told["path"])
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x297374="}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    assert ids.numel() > 0
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, original(ids).logits)
