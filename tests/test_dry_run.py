"""A dry run finds all that is wrong at once, says what the real run then does, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from npo_core import testbed
from npo_core.artifacts import RunArtifacts, open_run
from npo_core.config_file import draft_config
from npo_core.dry_run import DryRun, dry_run
from npo_core.inventory import take_inventory
from npo_core.machine_check import Machine
from npo_core.plan import Sizes, Stage, make_plan, segments
from npo_core.retention import retain
from npo_core.run_config import configure
from npo_core.shapes import draw_pictures
from schemas.config import Config
from tests.command import ROOT, last_json, npo, run_arguments
from tests.s3_server import S3Server
from tests.tiny import tiny_model_dir

CONFIGS = sorted(path.stem for path in (ROOT / "deploy" / "configs").glob("*.yaml"))
CPUS = Machine(cores=2, memory=24 << 30, gpus=0, gpu=None, gpu_memory=0)
GPUS = Machine(cores=64, memory=512 << 30, gpus=8, gpu="H200", gpu_memory=141 * 10**9)
SMALL = {"data__held_out": 8, "evaluation__samples": 2}
BROKEN = {
    "run": {"name": "broken", "total_steps": 20, "segment_steps": 7},
    "model": {"path": "./nowhere"},
    "evaluation": {"every": 10},
    "rollout": {"group_size": 4, "max_new_tokens": 14},
    "algorithm": {"method": "npo", "guide_slots": 4},
    "verifier": {"kind": "python", "function": "nowhere:grade"},
    "learner": {"engine": "deepspeed"},
    "deepspeed": {"hostfile": "nowhere.txt"},
    "vllm": {"samples": ["guide"], "python": "nowhere/python"},
}


def written(tmp_path: Path, values: dict[str, Any]) -> Path:
    """A configuration file; its store is a folder that is not there."""
    values = {**values, "run": {"store": f"file://{tmp_path}/store", **values["run"]}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def tried(tmp_path: Path, machine: Machine = CPUS, **sections: Any) -> DryRun:
    """The dry run of a testbed configuration with these sections."""
    draft = draft_config(written(tmp_path, {"run": {"name": "demo"}, **sections}), [])
    return dry_run(draft, machine)


def said(found: DryRun, check: str) -> dict[str, str]:
    """What a check found, by status."""
    return {one.status: one.said for one in found.checks if one.check == check}


def model_files(tmp_path: Path, weights: bool = False) -> Path:
    """The testbed's model directory, with or without its weights."""
    shutil.copytree(
        testbed.model_dir(), tmp_path / "model", ignore=None if weights else shutil.ignore_patterns("*.safetensors")
    )
    return tmp_path / "model"


# ---- the command


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_every_shipped_configuration_passes_without_weights(config: str, tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "deploy" / "configs" / f"{config}.yaml").read_text())
    missing = set()
    if values["learner"].get("engine") == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        missing.add("learner.engine")
    if values.get("vllm") and not (ROOT / ".venv-vllm" / "bin" / "python").exists():
        missing.add("vllm.python")
    arguments = ["-s", f"run.store=file://{tmp_path}/store"]
    if "path" in values.get("data", {}):
        # The rows are the user's.
        (tmp_path / "shapes.png").write_bytes(next(iter(draw_pictures(1, 1, 3, 3, 0).values())))
        rows = [json.dumps({"prompt": f"{n} + 1 = ?", "answer": str(n + 1), "image": "shapes.png"}) for n in range(400)]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
        arguments += ["-s", f"data.path={tmp_path}/rows.jsonl"]
    result = npo("run", f"deploy/configs/{config}.yaml", *arguments, "--dry-run", "--json")
    assert result.returncode == (2 if missing else 0), result.stderr
    found = json.loads(result.stdout)
    assert {check["field"] for check in found["checks"] if check["status"] == "failed"} == missing
    assert found["ok"] == (not missing)
    assert found["tokens"]["total"] > 0
    assert found["storage"]["total"] > 0
    assert found["memory"]["learner"]["weights"] > 0


@pytest.mark.slow
def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    result = npo("run", written(tmp_path, BROKEN), "--dry-run", "--json")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.count("npo: error: ") == 1
    faults = {check["said"] for check in json.loads(result.stdout)["checks"] if check["status"] == "failed"}
    for part in (
        "evaluation.every 10 is not a multiple of run.segment_steps 7",
        "algorithm.method npo needs at least one entry in future.interventions",
        "algorithm.guide_slots 4 leaves no rollout",
        "model.path './nowhere'",
        "verifier.function nowhere:grade",
        "deepspeed.hostfile nowhere.txt cannot be read",
        "nowhere/python is not there",
    ):
        assert any(part in fault for fault in faults), part
        assert part in result.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_a_dry_run_writes_nothing_and_starts_no_server(tmp_path: Path) -> None:
    home = tmp_path / "home"
    place = tmp_path / "place"
    for folder in (home, place, tmp_path / "tmp"):
        folder.mkdir()
    (place / "rewards.py").write_text("def grade(answer, text, prompt, metadata):\n    return text == answer\n")
    values = {"run": {"name": "demo"}, "verifier": {"kind": "python", "function": "rewards:grade"}}
    config = written(tmp_path, values)
    before = sorted(tmp_path.rglob("*"))
    result = subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", str(config), "--dry-run"],
        cwd=place,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "XDG", "HF_"))},
            "PYTHONPATH": str(ROOT),
            "HOME": str(home),
            "TMPDIR": str(tmp_path / "tmp"),
            # A server would be asked here, and is not there.
            "PREFECT_API_URL": "http://127.0.0.1:9/api",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "python/rewards:grade@" in result.stdout
    assert "trained steps" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before


# ---- the plan and the run


@pytest.fixture(scope="module")
def small_run(
    tmp_path_factory: pytest.TempPathFactory, prefect_server: dict[str, str]
) -> tuple[list[str], Any, RunArtifacts]:
    """Arguments of a small NPO run, what a dry run said before it, and the run."""
    store = tmp_path_factory.mktemp("dry")
    arguments = run_arguments("testbed-npo", store, "demo", **SMALL, future__interventions__0__start=3)
    before = last_json(npo(*arguments, "--dry-run", "--json"))
    assert not list(store.iterdir())
    return arguments, before, open_run(str(last_json(npo(*arguments, "--json", env=prefect_server))["run"]))


def trained(run: RunArtifacts) -> dict[tuple[str, int, int], int]:
    """Generated tokens of every leg, by kind, start and stop."""
    made = {}
    for leg in run.legs():
        own = run.segments(leg.leg_id)
        if own:
            assert [(s.start, s.stop) for s in own] == segments(
                leg.start, own[-1].stop, configure(run).run.segment_steps
            )
            made[leg.kind, leg.start, own[-1].stop] = sum(segment.tokens_policy for segment in own)
    return made


@pytest.mark.slow
def test_the_plan_is_what_the_run_then_does(small_run: tuple[list[str], Any, RunArtifacts]) -> None:
    _, before, run = small_run
    legs = {(s["kind"], s["start"], s["stop"]): s for s in before["plan"]["stages"] if s["steps"]}
    made = trained(run)
    assert set(legs) == set(made)
    for name, tokens in made.items():
        assert 0 < tokens <= legs[name]["tokens"]
    (guide,) = (stage for stage in before["plan"]["stages"] if stage["kind"] == "guide")
    (manifest,) = run.guides()
    assert (guide["start"], guide["stop"]) == (manifest.spec.start, manifest.spec.stop)
    assert manifest.asked <= guide["prompts"]
    assert 0 < manifest.tokens_guide <= guide["tokens"]
    evaluations = run.evaluations()
    assert len(evaluations) == before["plan"]["evaluations"]
    assert 0 < sum(made.tokens for made in evaluations) <= before["tokens"]["evaluations"]
    assert sum(len(run.checkpoints(leg.leg_id)) for leg in run.legs()) == before["plan"]["checkpoints"]


@pytest.mark.slow
def test_the_storage_is_what_the_run_then_takes(small_run: tuple[list[str], Any, RunArtifacts]) -> None:
    _, before, run = small_run
    found = take_inventory(run)
    sizes = [
        sum(file.bytes for file in made.files if file.role in ("weights", "optimizer")) for made in found.checkpoints
    ]
    assert sum(sizes) == pytest.approx(before["storage"]["checkpoints"], rel=0.02)
    kept = retain(found, configure(run)).kept
    assert len(kept) <= before["plan"]["kept_checkpoints"] < len(sizes)
    folder = Path(run.store.path)
    on_disk = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    assert on_disk <= before["storage"]["rows"]


@pytest.mark.slow
def test_a_run_that_is_there_goes_on_only_under_its_own_recipe(small_run: tuple[list[str], Any, RunArtifacts]) -> None:
    arguments, _, run = small_run
    again = last_json(npo(*arguments, "--dry-run", "--json"))
    (store,) = (check for check in again["checks"] if check["check"] == "store")
    assert "its main line at step 8" in store["said"]
    other = npo(*arguments, "-s", "learner.learning_rate=1e-5", "--dry-run")
    assert other.returncode == 2
    assert "learner.learning_rate was 0.0003, is 1e-05" in other.stderr
    follows = last_json(
        npo(*arguments, "-s", "run.name=next", "-s", f"model.start_from={run.uri}@4", "--dry-run", "--json")
    )
    assert f"at step 4 of {run.uri}" in follows["checks"][1]["said"]


@pytest.mark.slow
def test_an_autonpo_run_stays_within_its_plan(autonpo_run: str) -> None:
    run = open_run(autonpo_run)
    config = configure(run)
    plan = make_plan(config, Sizes(config.data.prompts, config.data.held_out))
    stages = {stage.kind: stage for stage in plan.stages}
    made = trained(run)
    for kind in ("main", "replay"):
        legs = {name: tokens for name, tokens in made.items() if name[0] == kind}
        assert sum(stop - start for _, start, stop in legs) <= stages[kind].steps
        assert sum(legs.values()) <= stages[kind].tokens
    assert len(run.guides()) == 2 <= stages["guide"].times
    assert sum(guide.tokens_guide for guide in run.guides()) <= stages["guide"].tokens
    assert sum(decision.tokens_probe for decision in run.decisions()) <= stages["probe"].tokens
    assert len(run.evaluations()) <= plan.evaluations
    found = take_inventory(run)
    assert len(found.checkpoints) <= plan.checkpoints
    assert len(retain(found, config).kept) <= plan.kept_checkpoints


def test_legs_between_interventions_are_planned_where_there_are_steps_between() -> None:
    interventions = [
        {"start": 0, "lookahead": 6, "window": 4},
        {"start": 4, "lookahead": 3},
        {"start": 9, "lookahead": 3},
    ]
    config = Config.model_validate(
        {
            "run": {"name": "demo", "total_steps": 12, "segment_steps": 4},
            "algorithm": {"method": "npo"},
            "future": {"interventions": interventions, "source": "leg", "scout": {"group_size": 2}},
            "evaluation": {"every": 8},
        }
    )
    plan = make_plan(config, Sizes(512, 10))
    made = [(stage.kind, stage.start, stage.stop, stage.checkpoints, stage.evaluations) for stage in plan.stages]
    assert made == [
        ("warm-start", 0, 0, 1, 1),
        ("scout", 0, 6, 2, 0),
        ("guide", 0, 4, 0, 0),
        ("replay", 0, 4, 1, 0),
        ("scout", 4, 7, 1, 0),
        ("guide", 4, 7, 0, 0),
        ("replay", 4, 7, 1, 0),
        ("main", 7, 9, 2, 1),
        ("scout", 9, 12, 1, 0),
        ("guide", 9, 12, 0, 0),
        ("replay", 9, 12, 1, 0),
    ]
    assert plan.evaluations == 3
    assert plan.tokens["guides"] == 0
    scouts = [stage for stage in plan.stages if stage.kind == "scout"]
    assert all(scout.rollouts == scout.steps * 32 * 2 for scout in scouts)
    assert isinstance(plan.stages[0], Stage)


@pytest.mark.slow
def test_a_bucket_is_read_and_left_as_it_was(s3_server: S3Server) -> None:
    arguments = run_arguments("testbed-npo", "s3://runs/dry", "demo")
    checks = last_json(npo(*arguments, "--dry-run", "--json", env=s3_server.env))["checks"]
    store = [check["said"] for check in checks if check["check"] == "store"]
    assert "s3://runs/dry/demo does not exist yet" in store
    assert any("may be written: nothing is written here" in what for what in store)
    assert s3_server.client().list_objects_v2(Bucket="runs", Prefix="dry/")["KeyCount"] == 0
    result = npo(*run_arguments("testbed-npo", "s3://no-such-bucket/dry", "demo"), "--dry-run", env=s3_server.env)
    assert result.returncode == 2
    assert "make the bucket, or choose another run.store" in result.stderr


# ---- single checks


def test_a_hostfile_is_looked_at_whether_or_not_deepspeed_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where it is not installed.
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    found = tried(tmp_path, learner={"engine": "deepspeed"}, deepspeed={"hostfile": "nowhere.txt"})
    assert {fault.field for fault in found.faults} == {"learner.engine", "deepspeed.hostfile"}
    assert any("deepspeed.hostfile nowhere.txt cannot be read: No such file" in fault.said for fault in found.faults)


def test_wrong_sections_are_told_with_what_the_others_hold(tmp_path: Path) -> None:
    found = tried(
        tmp_path, run={"name": "demo", "total_stps": 3}, rollout={"max_new_tokens": "many"}, model={"path": "./no"}
    )
    assert {fault.field for fault in found.faults} == {"run.total_stps", "rollout.max_new_tokens", "model.path"}
    assert said(found, "store") == {"unchecked": "the section run must be mended first"}
    assert found.run is None
    assert found.plan is None


def own_rows(tmp_path: Path, **data: Any) -> DryRun:
    """The dry run of thirty rows that the testbed's tokenizer knows, and one that it does not."""
    rows = [*({"q": f"s{n}=", "a": str(n)} for n in range(10, 40)), {"q": "what?", "a": "1"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    section = {"source": "jsonl", "path": str(tmp_path / "rows.jsonl"), "columns": {"prompt": "q", "answer": "a"}}
    sizes = {"rollout": {"prompts_per_step": 8}, "verifier": {"kind": "exact"}}
    return tried(tmp_path, data={**section, "held_out": 6, **data}, **sizes)


def test_rows_of_ones_own_are_counted_and_planned_with(tmp_path: Path) -> None:
    found = own_rows(tmp_path, bad_rows="skip")
    assert not found.faults
    assert "31 rows of jsonl" in said(found, "data")["ok"]
    assert "24 prompts to train on, 6 held out, 4 tokens the longest" in said(found, "data")["ok"]
    warned = [check.said for check in found.checks if check.check == "data" and check.status == "warning"]
    assert warned[0] == "left out: 1 bad"
    assert "rows.jsonl:31: the model's chat template cannot render it" in warned[1]
    assert "longest prompt 4 and answer 14 tokens fit" in said(found, "context")["ok"]
    assert found.plan is not None
    assert found.plan.evaluation_tokens == found.plan.evaluations * 6 * 4 * 14


def test_rows_of_ones_own_that_cannot_be_used_are_faults(tmp_path: Path) -> None:
    for data, told in (
        ({}, "1 of the 31 rows of jsonl"),
        ({"path": "nowhere.jsonl"}, "data.path nowhere.jsonl is neither a file"),
        ({"columns": {"prompt": "q", "answer": "b"}}, "data.columns.answer 'b' is no column of"),
        ({"bad_rows": "skip", "held_out": 29}, "rollout.prompts_per_step 8 exceeds the 1 prompts"),
    ):
        (fault,) = own_rows(tmp_path, **data).faults
        assert (fault.check, fault.field) == ("data", "data.path")
        assert told in fault.said
    hub = own_rows(tmp_path, source="hf", path="nobody/no-such-rows-are-here")
    assert not hub.faults
    assert "the run downloads it" in said(hub, "data")["unchecked"]


def test_an_answer_that_does_not_fit_the_models_positions_is_refused(tmp_path: Path) -> None:
    found = tried(tmp_path, rollout={"max_new_tokens": 60})
    (fault,) = found.faults
    assert fault.field == "rollout.max_new_tokens"
    assert "rollout.max_new_tokens 60 exceed the model's positions, 64" in fault.said
    short = tried(tmp_path, vllm={"samples": ["guide"], "max_model_len": 20, "python": sys.executable})
    assert "exceed vllm.max_model_len, 20" in said(short, "context")["failed"]


def test_a_model_directory_without_weights_is_planned_with_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    folder = model_files(tmp_path)
    found = tried(tmp_path, model={"path": str(folder)})
    assert not found.faults
    assert "no .safetensors file yet" in said(found, "model")["warning"]
    whole = tried(tmp_path)
    assert (found.storage, found.memory) == (whole.storage, whole.memory)
    (folder / "config.json").write_text("{")
    assert "its config.json cannot be used" in said(tried(tmp_path, model={"path": str(folder)}), "model")["failed"]


def test_a_hub_name_that_is_not_here_is_unchecked(tmp_path: Path) -> None:
    found = tried(tmp_path, model={"path": "nobody/no-such-model-is-here"})
    assert not found.faults
    assert "not in this machine's cache of the hub" in said(found, "model")["unchecked"]
    assert "unchecked" in said(found, "memory")
    assert found.plan is not None


def test_adapters_are_counted_and_places_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="model.lora needs it")
    folder = tiny_model_dir(tmp_path / "model")
    AutoTokenizer.from_pretrained(testbed.model_dir()).save_pretrained(folder)
    lora = {"rank": 4, "targets": ["q_proj"]}
    found = tried(tmp_path, model={"path": str(folder), "lora": lora})
    # Two layers, each 4 rows of 32 and 4 columns of 4 heads × 8.
    count = 2 * 4 * (32 + 32)
    assert f"adapters of {count:,} parameters" in said(found, "model")["ok"]
    assert found.storage is not None
    assert found.storage.checkpoint == 3 * 4 * count
    wrong = tried(tmp_path, model={"path": str(folder), "lora": {"targets": ["nowhere"]}})
    assert "model.lora.targets ['nowhere'] do not fit" in said(wrong, "model")["failed"]


def large(tmp_path: Path, machine: Machine, **sections: Any) -> DryRun:
    """The dry run of an 8B model that is not there, on a machine."""
    model = {"path": "Qwen/Qwen3-8B", "dtype": "bfloat16"}
    return tried(tmp_path, machine, model=model, rollout={"max_new_tokens": 1024}, **sections)


def test_gpus_are_counted_and_their_memory_too(tmp_path: Path) -> None:
    torch_alone = large(tmp_path, GPUS)
    assert "computes on H200, 8 of them" in said(torch_alone, "devices")["ok"]
    # Four times the weights, and the cache of 256 rows of 1024 tokens, 144 KiB each.
    expected = 4 * 2 * 8_190_735_360 + 256 * 1024 * 144 * 1024
    assert torch_alone.memory is not None
    assert torch_alone.memory.device == expected
    assert f"takes {expected / 1e9:.2f} GB" in said(torch_alone, "memory")["ok"]
    vllm = {"samples": ["guide"], "python": sys.executable, "gpu_memory_utilization": 0.4}
    assert "beside vLLM's 40%" in said(large(tmp_path, GPUS, vllm=vllm), "memory")["failed"]
    # As many bytes as DeepSpeed's ranks split come with a copy of the weights on the first GPU.
    sections = {"learner": {"engine": "deepspeed"}, "deepspeed": {"ranks": 8, "zero_stage": 3}}
    spread = large(tmp_path, GPUS, **sections).memory
    assert spread is not None
    assert spread.learner.total == 18 * 8_190_735_360 / 8
    assert spread.device == spread.learner.total + spread.copy + spread.cache
    away = {**sections["deepspeed"], "offload_optimizer": True}
    offloaded = large(tmp_path, GPUS, **{**sections, "deepspeed": away}).memory
    assert offloaded is not None
    assert offloaded.device == spread.device - 12 * 8_190_735_360 / 8


def test_ranks_beyond_the_gpus_are_refused_and_without_any_only_told(tmp_path: Path) -> None:
    sections = {"learner": {"engine": "deepspeed"}, "deepspeed": {"ranks": 9}}
    few = large(tmp_path, GPUS, **sections)
    assert "deepspeed.ranks 9 wants 9 GPUs, and this machine has 8" in said(few, "devices")["failed"]
    none = large(tmp_path, CPUS, **sections)
    assert "failed" not in said(none, "devices")
    assert "deepspeed.ranks 9 wants 9 GPUs, and this machine has none" in said(none, "devices")["warning"]
    assert "this machine has 25.8 GB" in said(none, "memory")["warning"]
    named = tried(tmp_path, learner={"device": "cuda"})
    assert "learner.device cuda wants 1 GPU, and this machine has none" in said(named, "devices")["warning"]


def test_a_store_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = tried(tmp_path, run={"name": "demo", "store": f"file://{tmp_path}/file/store"})
    (fault,) = found.faults
    assert fault.field == "run.store"
    assert f"{tmp_path}/file is a file" in fault.said
