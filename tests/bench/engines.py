"""The engines side by side: log-probabilities, tokens a second, seconds an update.

The embedded testbed's policy has heads of 24, for which vLLM has no kernel on CPUs; `model` trains one with heads of 32
by the same recipe. The others measure with it. `learners` takes turns, so that what else the machine does falls on all.

    python -m tests.bench.engines model MODEL
    python -m tests.bench.engines agreement MODEL
    python -m tests.bench.engines sampling MODEL
    python -m tests.bench.engines learners MODEL
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from npo_core.deepspeed_learner import DeepSpeedLearner
from npo_core.generate import TransformersGenerator
from npo_core.interfaces import Learner, LocalCheckpoint, Prompt, SamplingParams, StreamKey, TrainBatch
from npo_core.learner import TorchLearner
from npo_core.policy import Policy
from npo_core.prompts import encode, load_source
from npo_core.streams import philox
from npo_core.testbed.warm_start import WarmStartRecipe, train
from npo_core.vllm_generator import VllmGenerator
from npo_core.vllm_process import VllmProcess
from npo_core.weight_sync import compare
from schemas.config import Config
from tests.bench.output import arguments, markdown, spread, write_json

CONFIG = Config.model_validate(
    {"run": {"name": "bench"}, "learner": {"device": "cpu"}, "vllm": {"max_model_len": 64}},
)
GROUP = CONFIG.rollout.group_size
LEARNERS: dict[str, dict[str, Any]] = {
    "torch": {},
    "DeepSpeed, 1 rank": {"engine": "deepspeed", "ranks": 1},
    "DeepSpeed, 2 ranks": {"engine": "deepspeed", "ranks": 2},
}


class Testbed:
    """Prompts of the testbed for a policy that `model` has trained."""

    def __init__(self, model_dir: Path) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        self.params = SamplingParams(1.0, CONFIG.rollout.max_new_tokens, (tokenizer.eos_token_id,))
        self.pool: list[Prompt] = load_source(CONFIG)[0]
        self.ids = [encode(tokenizer, prompt) for prompt in self.pool]

    def streams(self, prompts: int, step: int) -> list[StreamKey]:
        """Of the first prompts' groups."""
        return [
            StreamKey(0, "rollout", step, prompt.prompt_id, slot)
            for prompt in self.pool[:prompts]
            for slot in range(GROUP)
        ]


@contextmanager
def vllm(model_dir: Path, policy: Policy) -> Iterator[tuple[VllmGenerator, float, float]]:
    """vLLM with the policy's weights, and the seconds of its first and of its second engine."""
    generator = VllmGenerator(VllmProcess(CONFIG.vllm, "float32", "cpu"), policy, 1.0, 1e-4, in_place=False)
    with tempfile.TemporaryDirectory() as directory:
        policy.save_weights(Path(directory) / "weights")
        checkpoint = LocalCheckpoint(Path(directory), "", 0)
        try:
            first, second = (_seconds(lambda: generator.load(checkpoint)) for _ in range(2))
            yield generator, first, second
        finally:
            generator.close()


def agreement(model_dir: Path) -> tuple[str, dict[str, Any]]:
    """Log-probabilities of the same tokens by what sampled them, by a plain forward of transformers, and by the
    learner's forward in micro-batches and chunks."""
    bed, policy, prompts = Testbed(model_dir), _policy(model_dir), 64
    rows = [ids for ids in bed.ids[:prompts] for _ in range(GROUP)]
    sampled = {"transformers": TransformersGenerator(policy, 1024)}
    table = []
    with vllm(model_dir, policy) as (generator, *_):
        for name, sampler in {**sampled, "vLLM": generator}.items():
            rollouts = sampler.sample(bed.ids[:prompts], GROUP, bed.params, bed.streams(prompts, 0))
            learner = policy.log_probs(rows, rollouts.completion_ids, 1.0)[0]
            plain = plain_forward(policy, rows, rollouts.completion_ids)
            for pair, one, other in (
                (f"{name}, sampling – learner's forward", rollouts.logprobs, learner),
                (f"{name}, sampling – plain forward", rollouts.logprobs, plain),
                ("learner's forward – plain forward", learner, plain),
            ):
                table.append((pair, compare(one, other)))
    lines = [(pair, a.tokens, f"{a.mean:.1e}", f"{a.largest:.1e}") for pair, a in table]
    return markdown(("pair", "tokens", "mean", "largest"), lines), {"agreement": table}


@torch.no_grad()
def plain_forward(policy: Policy, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Log-probabilities by the model's own forward, row by row, without cache, padding or chunks."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids_1L = torch.from_numpy(np.concatenate([prompt, completion])).long()[None]
        logps_LV = policy.model(input_ids=ids_1L).logits[0].log_softmax(-1)
        places_T = torch.arange(len(prompt), ids_1L.shape[1])
        found.append(logps_LV[places_T - 1, ids_1L[0, places_T]].numpy())
    return found


def sampling(model_dir: Path, repeats: int = 5) -> tuple[str, dict[str, Any]]:
    """Completion tokens a second of each generator, entropies included, a rollout step's rows and a guide block's."""
    bed, policy = Testbed(model_dir), _policy(model_dir)
    rates: dict[tuple[str, int], list[float]] = {}
    with vllm(model_dir, policy) as (generator, first, second):
        generators = {"transformers": TransformersGenerator(policy, 1024), "vLLM": generator}
        for turn in range(repeats + 1):
            for prompts in (32, 64):
                for name, sampler in generators.items():
                    began = time.perf_counter()
                    rollouts = sampler.sample(bed.ids[:prompts], GROUP, bed.params, bed.streams(prompts, turn))
                    rate = sum(map(len, rollouts.completion_ids)) / (time.perf_counter() - began)
                    if turn:  # the first warms up
                        rates.setdefault((name, prompts), []).append(rate)
    lines = [(name, f"{prompts} × {GROUP}", *_whole(values)) for (name, prompts), values in rates.items()]
    text = markdown(("generator", "rows", "tokens a second, median", "range"), lines)
    text += f"\n\nvLLM's first engine took {first:.1f} s, the next {second:.1f} s, each with its probe."
    result = {"rates": {f"{n}, {p} prompts": v for (n, p), v in rates.items()}, "engine_s": [first, second]}
    return text, result


def learners(model_dir: Path, repeats: int = 12) -> tuple[str, dict[str, Any]]:
    """Seconds of an update on the same rows, 32 × 8 sampled ones with made-up advantages."""
    bed, policy = Testbed(model_dir), _policy(model_dir)
    batches = [_batch(bed, TransformersGenerator(policy, 1024), step) for step in range(repeats + 2)]
    seconds: dict[str, list[float]] = {name: [] for name in LEARNERS}
    with ExitStack() as stack:
        start = LocalCheckpoint(Path(stack.enter_context(tempfile.TemporaryDirectory())), "", 0)
        TorchLearner(policy, CONFIG).save(start.path)
        engines = {name: stack.enter_context(_learner(start, **kind)) for name, kind in LEARNERS.items()}
        for batch in batches:
            for name, learner in engines.items():
                seconds[name].append(_seconds(lambda learner=learner, batch=batch: learner.step(batch)))  # type: ignore[misc]
    counted = {name: values[2:] for name, values in seconds.items()}
    base = statistics.median(counted["torch"])
    lines = [(name, spread(values), f"{statistics.median(values) / base:.2f}") for name, values in counted.items()]
    return markdown(("learner", "seconds an update", "of torch's"), lines), {"seconds": counted}


@contextmanager
def _learner(start: LocalCheckpoint, engine: str = "torch", ranks: int = 1) -> Iterator[Learner]:
    config = CONFIG.model_copy(
        update={
            "learner": CONFIG.learner.model_copy(update={"engine": engine}),
            "deepspeed": CONFIG.deepspeed.model_copy(update={"ranks": ranks}),
        }
    )
    learner = (DeepSpeedLearner if engine == "deepspeed" else TorchLearner)(_policy(start.weights), config)
    learner.load(start, config.learner.learning_rate)
    try:
        yield learner
    finally:
        if isinstance(learner, DeepSpeedLearner):
            learner.close()


def _batch(bed: Testbed, generator: TransformersGenerator, step: int) -> TrainBatch:
    prompts = CONFIG.rollout.prompts_per_step
    rollouts = generator.sample(bed.ids[:prompts], GROUP, bed.params, bed.streams(prompts, step))
    rows = [ids for ids in bed.ids[:prompts] for _ in range(GROUP)]
    advantages_B = philox("bench", step).standard_normal(len(rows))
    return TrainBatch(step, rows, rollouts.completion_ids, advantages_B, np.zeros(len(rows), bool), [None] * len(rows))


def _policy(model_dir: Path) -> Policy:
    return Policy(model_dir, CONFIG.model, CONFIG.learner)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _whole(values: Sequence[float]) -> tuple[str, str]:
    return f"{statistics.median(values):,.0f}", f"{min(values):,.0f}–{max(values):,.0f}"


def main(words: Sequence[str] | None = None) -> None:
    """Prints one measurement as a table."""
    parser = arguments(__doc__)
    measures = {"agreement": agreement, "sampling": sampling, "learners": learners}
    parser.add_argument("measure", choices=["model", *measures])
    parser.add_argument("model", type=Path, help="directory of the policy")
    chosen = parser.parse_args(words)
    torch.set_num_threads(1)
    if chosen.measure == "model":
        train(replace(WarmStartRecipe(), head_dim=32), chosen.model)
        return
    print(f"load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores", file=sys.stderr)
    text, result = measures[chosen.measure](chosen.model)
    print(text)
    write_json(chosen.json, result)


if __name__ == "__main__":
    main()
