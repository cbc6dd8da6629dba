"""TRL's side: its `GRPOTrainer` on the same checkpoint, the same prompts in the same order, the same settings.

Checks from what TRL calls and logs that it did that work: one generation of all rollouts and one optimizer step for
each step, the expected prompt at each row, our rewards, and the configured learning rate.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from datasets import Dataset  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.bench.output import arguments, markdown, write_json
from tests.bench.work import StepRecord, Work, small_work


def train_trl(work: Work, steps: int, on_step: Callable[[StepRecord], None] = lambda _: None) -> list[StepRecord]:
    """Trains with TRL and returns what it did.

    Args:
        on_step: called after each step; its time is not counted.

    Raises:
        RuntimeError: TRL did other work than ours does.
    """
    torch.set_num_threads(work.config.learner.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(work.model_dir, local_files_only=True)
    recorder = Recorder(work, on_step)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        # About the new name of a setting, which not every release of transformers has that ours works with.
        warnings.simplefilter("ignore", FutureWarning)
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(
                work.model_dir, dtype=torch.float32, attn_implementation=work.config.model.attention
            ),
            recorder.reward,
            settings(work, steps, directory),
            dataset(work, steps),
            processing_class=tokenizer,
            callbacks=[recorder],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    check(work, recorder, [entry for entry in trainer.state.log_history if "reward" in entry], steps)
    return recorder.records


def settings(work: Work, steps: int, directory: str) -> GRPOConfig:
    """Our configuration in TRL's words. Where TRL's default differs, the comment says what it is."""
    rollout, learner, algorithm = work.config.rollout, work.config.learner, work.config.algorithm
    return GRPOConfig(
        output_dir=directory,
        max_steps=steps,
        seed=work.config.run.seed,
        use_cpu=True,
        bf16=False,  # None, which means bfloat16
        gradient_checkpointing=False,  # True
        shuffle_dataset=False,  # True; the dataset is laid out in the order of the steps
        per_device_train_batch_size=work.rows,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_iterations=1,
        num_generations=rollout.group_size,
        max_completion_length=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=1.0,
        top_k=0,
        learning_rate=learner.learning_rate,
        lr_scheduler_type="constant",  # linear, to zero
        adam_beta1=learner.betas[0],
        adam_beta2=learner.betas[1],  # 0.999
        adam_epsilon=learner.eps,
        weight_decay=learner.weight_decay,
        max_grad_norm=learner.max_grad_norm,
        loss_type="grpo",  # dapo
        beta=algorithm.kl_beta,
        epsilon=algorithm.clip_low,
        epsilon_high=algorithm.clip_high,
        scale_rewards="group",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def dataset(work: Work, steps: int) -> Dataset:
    """The prompts of all steps, one row a prompt. TRL's sampler repeats each row `num_generations` times in place and
    makes a step of each `rows / num_generations` consecutive rows."""
    prompts = [prompt for step in range(steps) for prompt in work.prompts.batch(step)]
    return Dataset.from_dict(
        {
            "prompt": [[dict(message) for message in prompt.messages] for prompt in prompts],
            "prompt_id": [prompt.prompt_id for prompt in prompts],
        }
    )


class Recorder(TrainerCallback):
    """The reward function, and the clock of each step. TRL's own logging lies outside the time of a step."""

    def __init__(self, work: Work, on_step: Callable[[StepRecord], None]) -> None:
        self.work, self.on_step = work, on_step
        self.records: list[StepRecord] = []
        self.generations: list[int] = []
        self.optimizer_steps: list[int] = []

    def reward(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], prompt_id: Sequence[str], **_: Any
    ) -> list[float]:
        """Rewards of a generated batch, by our verifier on the decoded completions."""
        self.generated = time.perf_counter()
        self.generations[-1] += 1
        self.prompt_ids = tuple(prompt_id)
        self.tokens = sum(map(len, completion_ids))
        self.rewards = [
            self.work.verifier.verify(self.work.prompts.get(name), completion[0]["content"]).reward
            for name, completion in zip(prompt_id, completions, strict=True)
        ]
        self.verified = time.perf_counter()
        return self.rewards

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Starts the step's clock."""
        self.generations.append(0)
        self.optimizer_steps.append(0)
        self.began = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Counts."""
        self.optimizer_steps[-1] += 1

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stops the step's clock."""
        done = time.perf_counter()
        self.records.append(
            StepRecord(
                step=len(self.records),
                prompt_ids=self.prompt_ids,
                reward=sum(self.rewards) / len(self.rewards),
                tokens=self.tokens,
                trained_tokens=self.tokens,
                generate_s=self.generated - self.began,
                verify_s=self.verified - self.generated,
                update_s=done - self.verified,
            )
        )
        self.on_step(self.records[-1])


def check(work: Work, recorder: Recorder, logged: Sequence[Mapping[str, Any]], steps: int) -> None:
    """Compares what TRL called and logged with the work that was asked for.

    Raises:
        RuntimeError: they differ; says where.
    """
    expected = [work.row_prompts(step) for step in range(steps)]
    if [record.prompt_ids for record in recorder.records] != expected:
        raise RuntimeError("TRL trained on other prompts than ours, or in another order")
    if recorder.generations != [1] * steps or recorder.optimizer_steps != [1] * steps:
        raise RuntimeError(
            f"TRL did not make one generation ({recorder.generations}) and one update ({recorder.optimizer_steps}) "
            "in each step"
        )
    if len(logged) != steps:
        raise RuntimeError(f"TRL logged {len(logged)} steps, not {steps}")
    for record, entry in zip(recorder.records, logged, strict=True):
        wanted = {
            "reward": record.reward,
            "learning_rate": work.config.learner.learning_rate,
            "completions/mean_length": record.tokens / work.rows,
        }
        for name, value in wanted.items():
            if not math.isclose(entry[name], value, rel_tol=1e-5, abs_tol=1e-9):
                raise RuntimeError(f"TRL logged {name} {entry[name]} in step {record.step}, not {value}")
        if not math.isfinite(entry["grad_norm"]):
            raise RuntimeError(f"TRL's gradient norm is {entry['grad_norm']} in step {record.step}")


def main() -> None:
    """Trains a few steps on the testbed and prints them."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    args = parser.parse_args()
    work = small_work(args.seed, args.learning_rate)
    records = train_trl(
        work, args.steps, lambda r: print(f"step {r.step}: {r.reward:.3f}, {r.seconds:.2f} s", file=sys.stderr)
    )
    columns = ("step", "rollouts", "tokens", "reward", "generate s", "update s", "s")
    print(
        markdown(
            columns,
            [(r.step, len(r.prompt_ids), r.tokens, r.reward, r.generate_s, r.update_s, r.seconds) for r in records],
        )
    )
    write_json(args.json, {"steps": records})


if __name__ == "__main__":
    main()
