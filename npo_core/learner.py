"""The torch learner: one process, AdamW, micro-batches sorted by length. Exact: save and load restore every bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from npo_core.interfaces import LocalCheckpoint, NearFutureError, TrainBatch
from npo_core.padding import length_sorted_batches
from npo_core.policy import Policy
from npo_core.update import Update, UpdateSums, reference_logps
from schemas.config import Config

OPTIMIZER_FILE = "optimizer/optimizer.safetensors"
STATE_FILE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""AdamW's state of a parameter: the optimizer file holds `PARAMETER.MOMENT`, whatever engine wrote it."""


class TorchLearner:
    """Updates a policy in place.

    Args:
        policy: the model.
        config: `learner`, `algorithm` and `rollout` are read.
        reference: the starting policy, needed iff `algorithm.kl_beta` > 0.
    """

    def __init__(self, policy: Policy, config: Config, reference: Policy | None = None) -> None:
        self.policy, self.reference = policy, reference
        self.settings, self.algorithm, self.rollout = config.learner, config.algorithm, config.rollout
        self.parameters = policy.parameters
        self._fresh_optimizer(self.settings.learning_rate)

    def load(self, checkpoint: LocalCheckpoint, learning_rate: float) -> None:
        """See `Learner.load`."""
        self.policy.load_weights(checkpoint.weights)
        self._fresh_optimizer(learning_rate)
        if not (checkpoint.path / STATE_FILE).exists():
            return
        state = json.loads((checkpoint.path / STATE_FILE).read_text())
        tensors = load_moments(checkpoint, self.parameters)
        self.optimizer.load_state_dict(
            {
                "state": {i: {m: tensors[f"{name}.{m}"] for m in MOMENTS} for i, name in enumerate(self.parameters)},
                "param_groups": self.optimizer.state_dict()["param_groups"],
            }
        )
        resume_schedule(self.scheduler, state["scheduler"], learning_rate)

    def log_probs(
        self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """See `Learner.log_probs`."""
        return self.policy.log_probs(prompts, completions, self.rollout.temperature)

    def step(self, batch: TrainBatch) -> dict[str, float]:
        """See `Learner.step`. With several updates a batch the metrics are the last update's."""
        update = Update.of(batch, self.algorithm, self.rollout)
        if self.settings.updates_per_batch > 1 and update.rows:
            update = replace(update, start=self.log_probs(update.prompts, update.completions)[0])
        if self.reference:
            update = replace(update, reference=reference_logps(self.reference, update))
        metrics: dict[str, float] = {}
        for _ in range(self.settings.updates_per_batch):
            metrics = self._update(update)
        return metrics

    def save(self, target: Path) -> None:
        """See `Learner.save`.

        Raises:
            NearFutureError: the directory cannot be written.
        """
        try:
            self._save(target)
        except (SafetensorError, OSError) as error:
            raise NearFutureError(
                f"a checkpoint cannot be written into the scratch directory {target} ({error}); free space there, or "
                "name another one by TMPDIR, and run again; nothing that was committed is lost"
            ) from error

    def close(self) -> None:
        """See `Learner.close`."""

    def _save(self, target: Path) -> None:
        self.policy.save_weights(target / "weights")
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            for moment, value in self._moments(parameter).items():
                tensors[f"{name}.{moment}"] = value.contiguous()
        (target / "optimizer").mkdir(parents=True, exist_ok=True)
        save_file(tensors, target / OPTIMIZER_FILE)
        (target / STATE_FILE).write_text(json.dumps({"scheduler": self.scheduler.state_dict()}, sort_keys=True))

    def _update(self, update: Update) -> dict[str, float]:
        """One optimizer update on the rows that have a gradient."""
        for parameter in self.parameters.values():
            # Zeros, not None: a batch without any gradient still steps the optimizer's moments.
            parameter.grad = torch.zeros_like(parameter)
        loss = 0.0
        sums = UpdateSums()
        for micro in length_sorted_batches(update.lengths, self.settings.micro_batch_tokens):
            share, seen = update.share(self.policy.token_logps, micro)
            share.backward()
            loss += float(share.detach())
            sums += seen
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm))
        rate = float(self.scheduler.get_last_lr()[0])
        metrics = update.metrics(sums, loss, norm, rate)
        self.optimizer.step()
        self.scheduler.step()
        return metrics

    def _fresh_optimizer(self, learning_rate: float) -> None:
        settings = self.settings
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warmup(settings.warmup_steps))

    def _moments(self, parameter: torch.Tensor) -> dict[str, Any]:
        """AdamW's state of a parameter; zeros before the first step."""
        return self.optimizer.state.get(parameter) or {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def load_moments(checkpoint: LocalCheckpoint, parameters: Iterable[str]) -> dict[str, torch.Tensor]:
    """AdamW's state by `PARAMETER.MOMENT`.

    Raises:
        NearFutureError: it is another model's.
    """
    tensors = load_file(checkpoint.path / OPTIMIZER_FILE)
    expected = {f"{name}.{moment}" for name in parameters for moment in MOMENTS}
    if set(tensors) != expected:
        raise NearFutureError(
            f"the optimizer of checkpoint {checkpoint.digest[:12]}, step {checkpoint.step}, is not the model's: "
            f"{len(expected - set(tensors))} tensors missing, {len(set(tensors) - expected)} unknown"
        )
    return tensors


def resume_schedule(scheduler: torch.optim.lr_scheduler.LambdaLR, state: dict[str, Any], learning_rate: float) -> None:
    """The schedule goes on where it was, at this peak rate and not the stored one."""
    rate = learning_rate * scheduler.lr_lambdas[0](state["last_epoch"])
    scheduler.load_state_dict({**state, "base_lrs": [learning_rate], "_last_lr": [rate]})
    scheduler.optimizer.param_groups[0]["lr"] = rate


def warmup(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at step s: (s + 1)/steps during the warm-up, then 1."""
    return lambda step: min(1.0, (step + 1) / steps) if steps else 1.0
