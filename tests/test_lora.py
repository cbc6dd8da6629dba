"""Adapters beside frozen weights: what is trained, saved, taken over, merged and exported."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from npo_core import lora
from npo_core.artifacts import main_line_checkpoint, open_run
from npo_core.begin import starting_model
from npo_core.engine import Engine
from npo_core.export import export_checkpoint
from npo_core.interfaces import ConfigurationError, LocalCheckpoint
from npo_core.learner import TorchLearner
from npo_core.policy import Policy
from schemas.config import Config
from tests.command import fingerprint, last_json, npo, run_arguments, was_killed
from tests.test_learner import RATE, batch, config
from tests.tiny import tiny_model_dir, tiny_policy

LORA = {"rank": 4, "alpha": 8}


def settings(**sections: Any) -> Config:
    return config(model={"lora": LORA}, **sections)


def policy_of(path: Path, settings_: Config) -> Policy:
    return Policy(tiny_model_dir(path), settings_.model, settings_.learner, settings_.run.seed)


def logps(policy: Policy) -> np.ndarray:
    data = batch(0)
    return np.concatenate(policy.log_probs(data.prompt_ids, data.completion_ids, 0.9)[0])


def test_fresh_adapters_change_nothing_and_are_the_same_for_one_seed(tmp_path: Path) -> None:
    ours = policy_of(tmp_path / "model", settings())
    assert (logps(ours) == logps(tiny_policy(tmp_path / "plain"))).all()
    again = policy_of(tmp_path / "again", settings())
    assert all(torch.equal(p, again.parameters[name]) for name, p in ours.parameters.items())
    other = Policy(tmp_path / "model", settings().model, settings().learner, seed=1)
    assert not all(torch.equal(p, other.parameters[name]) for name, p in ours.parameters.items())


def test_only_adapters_are_trained_saved_and_restored_to_every_bit(tmp_path: Path) -> None:
    settings_ = settings()
    learner = TorchLearner(policy_of(tmp_path / "model", settings_), settings_)
    before = {name: p.clone() for name, p in learner.policy.model.named_parameters()}
    for step in range(3):
        learner.step(batch(step))
    changed = {name for name, p in learner.policy.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(learner.parameters)
    assert all("lora_" in name for name in changed)
    learner.save(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved" / "weights").rglob("*") if path.is_file()}
    assert names == {"adapter_model.safetensors", "adapter_config.json"}

    other = TorchLearner(policy_of(tmp_path / "other", settings_), settings_)
    other.load(LocalCheckpoint(tmp_path / "saved", "0" * 64, 3), RATE)
    for one in (learner, other):
        one.step(batch(3))
    assert all(torch.equal(p, other.parameters[name]) for name, p in learner.parameters.items())


def test_peft_reads_the_adapter_and_the_merged_model_is_the_same_policy(tmp_path: Path) -> None:
    settings_ = settings()
    directory = tmp_path / "model"
    learner = TorchLearner(policy_of(directory, settings_), settings_)
    for step in range(3):
        learner.step(batch(step))
    learner.policy.save_weights(directory)
    wanted = logps(learner.policy)
    # transformers alone reads the weights beside it: the adapter does not get in by itself.
    base = AutoModelForCausalLM.from_pretrained(directory)
    assert not any("lora" in name for name, _ in base.named_parameters())
    theirs = dict(PeftModel.from_pretrained(base, directory / "adapter").named_parameters())
    for name, parameter in learner.parameters.items():
        assert torch.equal(theirs[f"base_model.model.{name}"], parameter)
    plain = config()
    merged = Policy(lora.merge(directory, tmp_path / "merged"), plain.model, plain.learner)
    assert np.abs(logps(merged) - logps(tiny_policy(tmp_path / "plain"))).max() > 1e-2, "it has to have learnt"
    assert logps(merged) == pytest.approx(wanted, abs=1e-5)
    # The same without a checkpoint, as an engine takes it in training; and what the adapters lie beside.
    learner.policy.save_merged(tmp_path / "merged in memory")
    learner.policy.save_base(tmp_path / "base")
    for name, like in (("merged in memory", merged), ("base", tiny_policy(tmp_path / "plain"))):
        written = Policy(tmp_path / name, plain.model, plain.learner)
        assert all(torch.equal(p, like.parameters[n]) for n, p in written.parameters.items()), name


def test_bfloat16_weights_have_float32_adapters(tmp_path: Path) -> None:
    settings_ = config(model={"dtype": "bfloat16", "lora": LORA})
    policy = policy_of(tmp_path / "model", settings_)
    assert {p.dtype for p in policy.parameters.values()} == {torch.float32}
    assert policy.model.get_output_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("targets", "problem"), [(["nothing"], "do not fit the model"), (["q_proj", "lm_head"], "name an embedding")]
)
def test_targets_that_cannot_be_are_refused(tmp_path: Path, targets: list[str], problem: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"model\.lora\.targets .*{problem}"):
        policy_of(tmp_path / "model", config(model={"lora": {**LORA, "targets": targets}}))


def test_without_peft_the_command_that_installs_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'near-future\[lora\]'"):
        policy_of(tmp_path / "model", settings())


def test_the_recipe_without_lora_is_what_it_was_and_the_start_says_how_much_is_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "lora" not in config().recipe()["model"]
    assert settings().recipe()["model"]["lora"]["rank"] == 4
    caplog.set_level(logging.INFO, logger="npo")
    Engine.build(settings(), tiny_model_dir(tmp_path / "model"), lambda load: load(tmp_path / "model"))
    assert "LoRA trains" in caplog.text


@pytest.mark.slow
def test_a_run_killed_and_resumed_ends_bit_identical_and_is_exported(
    tmp_path: Path, prefect_server: dict[str, str]
) -> None:
    short = {"model__lora": '{"rank": 4, "alpha": 8}', "run__total_steps": 4, "evaluation__every": 0}
    calm = last_json(
        npo(*run_arguments("testbed-grpo", tmp_path / "calm", "demo", **short), "--json", env=prefect_server)
    )
    killed = run_arguments("testbed-grpo", tmp_path / "killed", "demo", **short)
    for moment in ("segment-step:2", "checkpoint-data", "checkpoint-manifest:2", "segment-manifest"):
        assert was_killed(npo(*killed, env={**prefect_server, "NPO_FAULT": moment})), f"no kill at {moment}"
    result = last_json(npo(*killed, "--json", env=prefect_server))
    run = open_run(result["run"])
    assert fingerprint(run) == fingerprint(open_run(calm["run"]))
    assert npo("verify", result["run"]).returncode == 0

    ref = main_line_checkpoint(run)
    manifest = run.require_checkpoint(ref.leg_id, ref.step)
    assert {entry.role for entry in manifest.files} == {"adapter", "optimizer", "state", "monitor"}
    exported, _ = export_checkpoint(run, ref, tmp_path / "adapter", adapter=True)
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {path.name for path in exported.iterdir()}
    merged, _ = export_checkpoint(run, ref, tmp_path / "merged")
    plain, tuned = (
        load_file(run.checkout(run.starting_policy().ref, tmp_path / "base").weights / "model.safetensors"),
        load_file(merged / "model.safetensors"),
    )
    assert plain.keys() == tuned.keys()
    assert any(not torch.equal(plain[name], tuned[name]) for name in plain)
    # Another run starts from that policy.
    other = Config.model_validate({"run": {"name": "next"}, "model": {"start_from": result["run"]}})
    started = load_file(starting_model(other, tmp_path / "next") / "model.safetensors")
    assert all(torch.equal(started[name], tuned[name]) for name in tuned)
    with pytest.raises(ConfigurationError, match="has no adapter"):
        export_checkpoint(run, main_line_checkpoint(run, 0), tmp_path / "none", adapter=True)
