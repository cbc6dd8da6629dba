"""vLLM itself, in the environment that `make setup-vllm` makes: what it samples, and whose weights it samples from."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from npo_core.engine import Engine
from npo_core.generate import TransformersGenerator
from npo_core.interfaces import LocalCheckpoint, NearFutureError, SamplingParams, StreamKey, TrainBatch
from npo_core.learner import TorchLearner
from npo_core.policy import Policy
from npo_core.supervised import Supervised
from npo_core.vllm_generator import VllmGenerator, VllmRollouts
from npo_core.vllm_process import VllmProcess
from npo_core.vllm_served import VllmServed
from npo_core.weight_sync import Sync, compare, synchronize
from schemas.config import Config
from schemas.learner import LearnerSection
from schemas.model import ModelSection
from schemas.vllm import VllmSection
from tests.command import ROOT, last_json, npo
from tests.tiny import STOP, prompts_of, tiny_model_dir

pytestmark = [pytest.mark.engines, pytest.mark.slow]

BIN = ROOT / ".venv-vllm" / "bin"
SETTINGS = VllmSection(python=str(BIN / "python"), max_model_len=64)
PARAMS = SamplingParams(temperature=0.8, max_new_tokens=10, stop_ids=(STOP,))
TOLERANCE = 1e-4


def checkpoint(path: Path, step: int = 0) -> LocalCheckpoint:
    return LocalCheckpoint(path, f"digest {step}", step)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    # vLLM's attention on CPUs wants heads of at least 32.
    model_dir = tiny_model_dir(tmp_path_factory.mktemp("policy") / "weights", head_dim=32)
    return Policy(model_dir, ModelSection(), LearnerSection(device="cpu"))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, policy: Policy) -> Iterator[VllmGenerator]:
    """A generator that holds the policy."""
    generator = VllmGenerator(VllmProcess(SETTINGS, "float32", "cpu"), policy, 0.8, TOLERANCE, in_place=False)
    path = tmp_path_factory.mktemp("checkpoint")
    policy.save_weights(path / "weights")
    generator.load(checkpoint(path))
    yield generator
    generator.close()


def keys(prompts: int, n: int) -> list[StreamKey]:
    return [StreamKey(3, "guide", 5, f"p{p}", slot) for p in range(prompts) for slot in range(n)]


def test_its_log_probabilities_are_those_of_the_trainer(started: VllmGenerator) -> None:
    prompts = prompts_of([3, 7, 5, 12])
    rollouts = started.sample(prompts, 16, PARAMS, keys(4, 16))
    assert set(rollouts.finish_reasons) == {"stop", "length"}, "the case must have rows of both kinds"
    rows = [prompt for prompt in prompts for _ in range(16)]
    scored = started.score(rows, rollouts.completion_ids, PARAMS.temperature)
    agreement = compare(rollouts.logprobs, scored)
    assert agreement.largest < 1e-4, agreement
    print(f"vLLM against transformers: {agreement}")
    for ids, entropies, reason in zip(
        rollouts.completion_ids, rollouts.entropies, rollouts.finish_reasons, strict=True
    ):
        assert STOP not in ids[:-1].tolist()
        assert (ids[-1] == STOP) == (reason == "stop")
        assert reason == "stop" or len(ids) == PARAMS.max_new_tokens
        assert len(entropies) == len(ids)
        assert (entropies > 0).all()


def test_its_samples_follow_the_policys_distribution(started: VllmGenerator) -> None:
    prompts, n = prompts_of([6]), 4000
    first = SamplingParams(PARAMS.temperature, 1, ())
    drawn = np.concatenate(started.sample(prompts, n, first, keys(1, n)).completion_ids)
    vocabulary = started.policy.model.config.vocab_size
    tokens = [np.array([token], np.int32) for token in range(vocabulary)]
    expected = np.exp(np.concatenate(started.score(prompts * vocabulary, tokens, PARAMS.temperature)))
    np.testing.assert_allclose(np.bincount(drawn, minlength=vocabulary) / n, expected, atol=4 * 0.5 / n**0.5)


def test_equal_keys_give_equal_samples_in_another_batch(started: VllmGenerator) -> None:
    prompts, n = prompts_of([3, 8, 5]), 4
    whole = started.sample(prompts, n, PARAMS, keys(3, n))
    part = started.sample(prompts[1:2], n, PARAMS, keys(3, n)[n : 2 * n])
    assert [ids.tolist() for ids in part.completion_ids] == [ids.tolist() for ids in whole.completion_ids[n : 2 * n]]
    other = started.sample(prompts, n, PARAMS, [replace(key, seed=4) for key in keys(3, n)])
    assert [ids.tolist() for ids in other.completion_ids] != [ids.tolist() for ids in whole.completion_ids]


def test_temperature_zero_gives_the_trainers_likeliest_tokens(started: VllmGenerator) -> None:
    prompts, params = prompts_of([3, 8, 5]), replace(PARAMS, temperature=0.0)
    ours = TransformersGenerator(started.policy, max_rows=8).sample(prompts, 1, params, keys(3, 1))
    theirs = started.sample(prompts, 1, params, keys(3, 1))
    assert [ids.tolist() for ids in theirs.completion_ids] == [ids.tolist() for ids in ours.completion_ids]
    assert not np.concatenate([*theirs.logprobs, *theirs.entropies]).any()


def test_a_completion_that_has_no_room_is_told_as_such(started: VllmGenerator) -> None:
    long = SamplingParams(PARAMS.temperature, 60, ())
    with pytest.raises(NearFutureError, match=r"raise vllm\.max_model_len"):
        started.sample(prompts_of([20]), 1, long, keys(1, 1))


def test_weights_a_small_step_old_are_caught_within_a_tolerance_that_would_pass_them(
    started: VllmGenerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = started.policy
    policy.save_weights(tmp_path / "old" / "weights")
    loose = VllmGenerator(started.engine, policy, PARAMS.temperature, 0.05, in_place=False)
    loose.load(checkpoint(tmp_path / "old"))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1 + 1e-4)
    policy.save_weights(tmp_path / "new" / "weights")

    # An engine that kept all of them.
    started.engine.reload(tmp_path / "old" / "weights")
    kept = loose.probe()
    assert kept.mean < 0.05
    assert not kept.within(0.05)
    assert "its answers are those of before" in str(kept)

    # One that kept some.
    loose.in_place = True
    with caplog.at_level("INFO", "npo"):
        loose.load(checkpoint(tmp_path / "new", 1))
    said = [record.getMessage() for record in caplog.records]
    assert any("does not hold the trainer's weights after an update in place" in line for line in said)
    assert any("holds the trainer's weights, by a fresh engine in a fresh process" in line for line in said)
    assert loose.probe().within(TOLERANCE)


def test_a_reload_in_place_that_keeps_the_old_weights_is_caught(
    started: VllmGenerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On CPUs `reload_weights` says that all went well, and vLLM's linear layers go on with the old weights."""
    policy = started.policy
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    policy.save_weights(tmp_path / "weights")

    engine = started.engine
    in_place = Sync("an update in place", lambda: engine.reload(tmp_path / "weights"), TOLERANCE)
    with pytest.raises(NearFutureError, match=r"an update in place: mean \|Δ log p\| [\d.]+e[-+]0[01]"):
        synchronize([in_place], started.probe)

    # What the generator makes of it where updates in place are thought to work: a fresh engine.
    trusting = VllmGenerator(engine, policy, PARAMS.temperature, TOLERANCE, in_place=True)
    with caplog.at_level("INFO", "npo"):
        trusting.load(checkpoint(tmp_path, 1))
    said = [record.getMessage() for record in caplog.records]
    assert any("does not hold the trainer's weights after an update in place" in line for line in said)
    assert any("holds the trainer's weights, by a fresh engine in a fresh process" in line for line in said)
    assert trusting.probe().within(TOLERANCE)


def test_rollouts_come_from_the_policy_as_each_update_left_it(started: VllmGenerator) -> None:
    policy, prompts, n = started.policy, prompts_of([4, 6]), 8
    settings = Config.model_validate(
        {
            "run": {"name": "t"},
            "rollout": {"temperature": PARAMS.temperature},
            "learner": {"learning_rate": 3e-2, "device": "cpu"},
            "algorithm": {"sampling_correction": "token-truncated"},
        }
    )
    rollouts, learner = VllmRollouts(started), TorchLearner(policy, settings)
    moved = []
    for step in range(2):
        sampled = rollouts.sample(prompts, n, PARAMS, keys(2, n))
        rows = [prompt for prompt in prompts for _ in range(n)]
        advantages = np.resize([1.0, -1.0], len(rows))
        guide = np.zeros(len(rows), bool)
        data = TrainBatch(step, rows, sampled.completion_ids, advantages, guide, [None] * len(rows), sampled.logprobs)
        metrics = learner.step(data)
        # Another engine, which is seen, and the same policy: it was stepped since the engine last had it.
        assert 0 < metrics["sampling/sampling_logp_difference/max"] < TOLERANCE
        assert metrics["sampling/corrected"] == 0
        moved.append(compare(sampled.logprobs, rollouts.score(rows, sampled.completion_ids, PARAMS.temperature)))
    assert all(gap.mean > 100 * TOLERANCE for gap in moved), "the case must move the policy"


@pytest.mark.parametrize("taken", ["merged", "adapter"])
def test_adapters_are_sampled_from_as_each_update_left_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, taken: str
) -> None:
    settings = Config.model_validate(
        {
            "run": {"name": "t"},
            "model": {"lora": {"rank": 4, "alpha": 8}},
            "rollout": {"temperature": PARAMS.temperature},
            "learner": {"learning_rate": 3e-2, "device": "cpu"},
            "algorithm": {"sampling_correction": "token-truncated"},
            "vllm": {**SETTINGS.model_dump(), "samples": ["rollout"], "lora": taken},
        }
    )
    engine = Engine.build(settings, tiny_model_dir(tmp_path / "weights", head_dim=32), lambda load: load(tmp_path))
    caplog.set_level("INFO", "npo")
    prompts, n = prompts_of([4, 6]), 8
    rows = [prompt for prompt in prompts for _ in range(n)]
    try:
        for step in range(3):
            sampled = engine.rollouts.sample(prompts, n, PARAMS, keys(2, n))
            advantages, guide = np.resize([1.0, -1.0], len(rows)), np.zeros(len(rows), bool)
            engine.learner.step(
                TrainBatch(step, rows, sampled.completion_ids, advantages, guide, [None] * len(rows), sampled.logprobs)
            )
            moved = compare(sampled.logprobs, engine.rollouts.score(rows, sampled.completion_ids, PARAMS.temperature))
            assert moved.mean > 100 * TOLERANCE, "the case must move the policy"
    finally:
        engine.close()
    said = [record.getMessage() for record in caplog.records]
    ways = [line.partition(", by ")[2].partition(":")[0] for line in said if "holds the trainer's weights, by" in line]
    # An adapter is taken in place, even on a CPU.
    assert len(ways) == 3
    assert [("in place" in way) for way in ways] == [False] + [taken == "adapter"] * 2, ways


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A testbed policy with heads that vLLM has kernels for; it has learned for a moment."""
    from npo_core.testbed.warm_start import WarmStartRecipe, train

    path = tmp_path_factory.mktemp("testbed")
    train(replace(WarmStartRecipe(), head_dim=32, steps=120), path)
    return path


def test_a_run_takes_rollouts_guide_and_evaluation_from_vllm(
    testbed: Path, tmp_path: Path, prefect_server: dict[str, str]
) -> None:
    arguments = {
        "run.name": "by-vllm",
        "run.store": f"file://{tmp_path}",
        "model.path": str(testbed),
        "run.total_steps": "2",
        "run.segment_steps": "1",
        "evaluation.every": "0",
        "evaluation.samples": "1",
        "data.held_out": "16",
        "rollout.prompts_per_step": "4",
        "future.interventions": "[{start: 0, lookahead: 1, window: 1}]",
        "algorithm.sampling_correction": "token-truncated",
        "vllm.samples": "[rollout, guide, evaluation]",
        "vllm.python": SETTINGS.python,
        "vllm.max_model_len": "64",
    }
    overrides = [part for name, value in arguments.items() for part in ("-s", f"{name}={value}")]
    done = npo("run", "deploy/configs/testbed-npo.yaml", *overrides, "--json", env=prefect_server)
    run = str(last_json(done)["run"])
    # The scout's step and the main line's two; the guide, and the evaluations of start and end.
    assert done.stderr.count("the engine holds the trainer's weights") >= 6
    assert npo("verify", run, env=prefect_server).returncode == 0


def test_a_server_of_the_users_serves_the_checkpoint_that_it_holds(testbed: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "64"]
    # The testbed's tokenizer knows its symbols alone, and the server would try words on it.
    options += ["--enforce-eager", "--logprobs-mode", "processed_logprobs", "--skip-tokenizer-init"]
    environment = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (tmp_path / "log").open("wb") as log:
        # What `vllm serve` starts; the command itself looks for a package named vllm, which vllm-cpu is not.
        command = [str(BIN / "python"), "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(testbed)]
        server = Supervised([*command, *options], environment, output=log)
    try:
        wait_for(f"{url}/health", server, tmp_path / "log")
        policy = Policy(testbed, ModelSection(), LearnerSection(device="cpu"))
        generator = VllmGenerator(VllmServed(url), policy, 0.8, TOLERANCE, in_place=False)
        path = tmp_path / "held"
        policy.save_weights(path / "weights")
        generator.load(checkpoint(path))
        rollouts = generator.sample(prompts_of([5, 6]), 4, PARAMS, keys(2, 4))
        assert len(rollouts.completion_ids) == 8
        with torch.no_grad():
            policy.model.get_output_embeddings().weight.mul_(1.1)
        policy.save_weights(tmp_path / "another" / "weights")
        with pytest.raises(NearFutureError, match="samples from another policy"):
            generator.load(checkpoint(tmp_path / "another", 1))
    finally:
        server.close()


def wait_for(url: str, server: Supervised, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(1)
        else:
            return
    raise AssertionError(log.read_text()[-3000:])
