"""The torch learner: one process, AdamW, micro-batches sorted by length. Exact: save and load restore every bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from npo_core.interfaces import LocalCheckpoint, NearFutureError, TrainBatch
from npo_core.losses import LossInputs, LossSums, token_losses, token_weights
from npo_core.padding import length_sorted_batches, pad_rows
from npo_core.policy import Policy
from schemas.config import Config

OPTIMIZER_FILE = "optimizer/optimizer.safetensors"
STATE_FILE = "state.json"


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
        self.parameters = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
        self._fresh_optimizer(self.settings.learning_rate)

    def load(self, checkpoint: LocalCheckpoint, learning_rate: float) -> None:
        """See `Learner.load`."""
        self.policy.load_weights(checkpoint.weights)
        self._fresh_optimizer(learning_rate)
        if not (checkpoint.path / STATE_FILE).exists():
            return
        state = json.loads((checkpoint.path / STATE_FILE).read_text())
        tensors = load_file(checkpoint.path / OPTIMIZER_FILE)
        expected = {f"{name}.{moment}" for name in self.parameters for moment in ("exp_avg", "exp_avg_sq", "step")}
        if set(tensors) != expected:
            raise NearFutureError(
                f"the optimizer of checkpoint {checkpoint.digest[:12]}, step {checkpoint.step}, is not the model's: "
                f"{len(expected - set(tensors))} tensors missing, {len(set(tensors) - expected)} unknown"
            )
        self.optimizer.load_state_dict(
            {
                "state": {
                    i: {m: tensors[f"{name}.{m}"] for m in ("step", "exp_avg", "exp_avg_sq")}
                    for i, name in enumerate(self.parameters)
                },
                "param_groups": self.optimizer.state_dict()["param_groups"],
            }
        )
        # The schedule goes on where it was, at this peak rate and not the stored one.
        rate = learning_rate * warmup(self.settings.warmup_steps)(state["scheduler"]["last_epoch"])
        self.scheduler.load_state_dict({**state["scheduler"], "base_lrs": [learning_rate], "_last_lr": [rate]})
        self.optimizer.param_groups[0]["lr"] = rate

    def log_probs(
        self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """See `Learner.log_probs`."""
        return self.policy.log_probs(prompts, completions, self.rollout.temperature)

    def step(self, batch: TrainBatch) -> dict[str, float]:
        """See `Learner.step`. With several updates a batch the metrics are the last update's."""
        # A row with advantage 0 adds a constant to the loss unless the KL term sees it.
        beta = self.algorithm.kl_beta
        rows = [i for i, a in enumerate(batch.advantages_B) if a != 0 or beta > 0]
        prompts = [batch.prompt_ids[i] for i in rows]
        completions = [batch.completion_ids[i] for i in rows]
        several = self.settings.updates_per_batch > 1
        start = self.log_probs(prompts, completions)[0] if several and rows else None
        reference = (
            self.reference.log_probs(prompts, completions, self.rollout.temperature)[0] if self.reference else None
        )
        weights_B = token_weights(
            torch.tensor([len(ids) for ids in batch.completion_ids]),
            self.algorithm.aggregation,
            self.rollout.max_new_tokens,
        )
        metrics: dict[str, float] = {}
        for _ in range(self.settings.updates_per_batch):
            metrics = self._update(batch, rows, weights_B, start, reference)
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

    def _save(self, target: Path) -> None:
        self.policy.save_weights(target / "weights")
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            for moment, value in self._moments(parameter).items():
                tensors[f"{name}.{moment}"] = value.contiguous()
        (target / "optimizer").mkdir(parents=True, exist_ok=True)
        save_file(tensors, target / OPTIMIZER_FILE)
        (target / STATE_FILE).write_text(json.dumps({"scheduler": self.scheduler.state_dict()}, sort_keys=True))

    def _update(
        self,
        batch: TrainBatch,
        rows: list[int],
        weights_B: torch.Tensor,
        start: list[np.ndarray] | None,
        reference: list[np.ndarray] | None,
    ) -> dict[str, float]:
        """One optimizer update on the rows that have a gradient."""
        device = self.policy.device
        for parameter in self.parameters.values():
            # Zeros, not None: a batch without any gradient still steps the optimizer's moments.
            parameter.grad = torch.zeros_like(parameter)
        loss = 0.0
        sums = LossSums()
        lengths = [len(batch.prompt_ids[i]) + len(batch.completion_ids[i]) for i in rows]
        for micro in length_sorted_batches(lengths, self.settings.micro_batch_tokens):
            own = [rows[j] for j in micro]
            logps_BT, _, mask_BT = self.policy.token_logps(
                [batch.prompt_ids[i] for i in own], [batch.completion_ids[i] for i in own], self.rollout.temperature
            )

            def padded(values: Sequence[np.ndarray | None], like: torch.Tensor = logps_BT) -> torch.Tensor:
                return pad_rows(values, like.shape[1], like.dtype, device)

            losses = token_losses(
                LossInputs(
                    step=batch.step,
                    logps_BT=logps_BT,
                    old_logps_BT=logps_BT.detach() if start is None else padded([start[j] for j in micro]),
                    mask_BT=mask_BT,
                    advantages_B=torch.from_numpy(batch.advantages_B[own]).to(device),
                    guide_B=torch.from_numpy(batch.guide_B[own]).to(device),
                    guide_logps_BT=padded([batch.guide_logprobs[i] for i in own]),
                    ref_logps_BT=padded([reference[j] for j in micro]) if reference else None,
                ),
                self.algorithm,
            )
            share = losses.weighted_sum(weights_B[own].to(device))
            share.backward()
            loss += float(share.detach())
            sums += losses.sums
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm))
        if not (np.isfinite(norm) and np.isfinite(loss)):
            raise FloatingPointError(f"step {batch.step}: loss {loss} and gradient norm {norm} are not finite")
        rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        tokens = sum(map(len, batch.completion_ids))
        trained = float(sum(len(batch.completion_ids[i]) for i in rows))
        metrics = sums.metrics(self.algorithm.kl_beta, tokens)
        return {**metrics, "loss": loss, "grad_norm": norm, "learning_rate": rate, "tokens/trained": trained}

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


def warmup(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at step s: (s + 1)/steps during the warm-up, then 1."""
    return lambda step: min(1.0, (step + 1) / steps) if steps else 1.0
