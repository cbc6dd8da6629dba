"""A policy under DeepSpeed's ZeRO, as one rank sees it: updates that add up over the ranks, and checkpoints in the
torch learner's form.

Every rank calls every method, with the same arguments: there are collectives in all of them.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from npo_core.interfaces import LocalCheckpoint, TrainBatch
from npo_core.learner import MOMENTS, OPTIMIZER_FILE, STATE_FILE, load_moments, resume_schedule, warmup
from npo_core.padding import rank_batches
from npo_core.pictures import pictures_of
from npo_core.policy import Policy
from npo_core.ranks import Ranks
from npo_core.update import Update, UpdateSums
from schemas.config import Config

MASTER_FILE = "optimizer/master.safetensors"
"""The float32 weights behind bfloat16 ones. The torch learner has none and reads none."""


class Forward(torch.nn.Module):
    """`Policy.token_logps` as a module: ZeRO 3 gathers weights where the forward of a module begins.

    Where one rank runs a module, all have to: they gather its weights and its gradients together. The rows of one may
    show pictures while another's show none: these get a further row, which shows a blank one and counts for nothing.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.model, self._policy = policy.model, policy
        self._blank = policy.vision.blank() if policy.vision else None

    def forward(self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray], temperature: float) -> Any:
        """See `Policy.token_logps`."""
        if self._blank is None or any(map(pictures_of, prompts)):
            return self._policy.token_logps(prompts, completions, temperature)
        rows = [*prompts, self._blank], [*completions, np.zeros(1, np.int32)]
        return tuple(values_BT[:-1] for values_BT in self._policy.token_logps(*rows, temperature))


class ZeroPolicy:
    """A checkpoint's policy, optimizer and schedule, spread over the ranks.

    Args:
        config: the run's.
        ranks: this one among the others.
        checkpoint: what to begin with; one without an optimizer gets a fresh one.
        learning_rate: peak rate.
    """

    def __init__(self, config: Config, ranks: Ranks, checkpoint: LocalCheckpoint, learning_rate: float) -> None:
        self.config, self.ranks = config, ranks
        settings = config.learner.model_copy(update={"device": str(ranks.device)})
        policy = self.policy = Policy(checkpoint.weights, config.model, settings, config.run.seed)
        self.model, self.parameters = policy.model, policy.parameters
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=0.0,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.engine, *_ = deepspeed.initialize(
            model=Forward(policy), optimizer=self.optimizer, config=deepspeed_config(config, self.model)
        )
        if self._stage == 3:
            deepspeed.zero.register_external_parameter(self.engine.module, self.model.get_output_embeddings().weight)
        # DeepSpeed makes AdamW's state in the first step; one at rate 0 and without a gradient changes nothing else.
        token = np.zeros(1, np.int32)
        self._backward(self._no_share(token, token), last=True)
        self.engine.step()
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warmup(settings.warmup_steps))
        self._resume(checkpoint, learning_rate)

    def step(self, batch: TrainBatch, reference: list[np.ndarray] | None) -> dict[str, float]:
        """See `Learner.step`; `reference` has the starting policy's log-probabilities of the update's rows."""
        update = Update.of(batch, self.config.algorithm, self.config.rollout)
        if self.config.learner.updates_per_batch > 1 and update.rows:
            update = replace(update, start=self.log_probs(update.prompts, update.completions)[0])
        update = replace(update, reference=reference)
        metrics: dict[str, float] = {}
        for _ in range(self.config.learner.updates_per_batch):
            metrics = self._update(update)
        return metrics

    @torch.no_grad()
    def log_probs(
        self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """See `Learner.log_probs`; every rank computes some of the rows and gets all."""
        starts = np.cumsum([0, *map(len, completions)])
        found_2N = torch.zeros((2, int(starts[-1])), dtype=torch.float64)
        lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
        for micro in self._own(lengths):
            rows = micro or [0]
            logps_BT, entropies_BT, _ = self.engine(
                [prompts[i] for i in rows], [completions[i] for i in rows], self.config.rollout.temperature
            )
            for b, i in enumerate(micro):
                for values_N, values_BT in zip(found_2N, (logps_BT, entropies_BT), strict=True):
                    values_N[starts[i] : starts[i + 1]] = values_BT[b, : len(completions[i])].cpu()
        logps_N, entropies_N = self.ranks.total(found_2N).float().numpy()
        return np.split(logps_N, starts[1:-1]), np.split(entropies_N, starts[1:-1])

    def write_weights(self, path: Path) -> None:
        """Writes the weights by parameter, in one file."""
        weights = self._whole(self._weight)
        if self.ranks.first:
            save_file(weights, path)

    def save(self, target: Path) -> None:
        """See `Learner.save`."""
        weights = self._whole(self._weight)
        moments: dict[str, Tensor] = {}
        for moment in MOMENTS[:2]:
            whole = self._whole(partial(self._state, moment=moment))
            moments |= {f"{name}.{moment}": value for name, value in whole.items()}
        moments |= {f"{name}.step": self._steps[0].cpu().reshape(()).clone() for name in self.parameters}
        masters = self._whole(safe_get_full_fp32_param) if self._has_masters else None
        if not self.ranks.first:
            return
        self.policy.save_weights(target / "weights", weights)
        (target / "optimizer").mkdir(parents=True, exist_ok=True)
        save_file(moments, target / OPTIMIZER_FILE)
        if masters is not None:
            save_file(masters, target / MASTER_FILE)
        (target / STATE_FILE).write_text(json.dumps({"scheduler": self.scheduler.state_dict()}, sort_keys=True))

    def close(self) -> None:
        """Frees what DeepSpeed holds, so that another checkpoint can take its place."""
        self.engine.destroy()
        del self.engine, self.optimizer, self.scheduler, self.policy, self.model, self.parameters
        gc.collect()

    @property
    def _stage(self) -> int:
        return self.config.deepspeed.zero_stage

    @property
    def _has_masters(self) -> bool:
        return self.config.model.dtype == "bfloat16"

    @property
    def _steps(self) -> list[Tensor]:
        """AdamW's counters, all of one value."""
        return [state["step"] for state in self.optimizer.state.values()]

    def _update(self, update: Update) -> dict[str, float]:
        """One optimizer update on the rows that have a gradient."""
        batch = update.batch
        loss = torch.zeros((), dtype=torch.float64)
        sums = UpdateSums()
        own = self._own(update.lengths)
        for i, micro in enumerate(own):
            if micro:
                share, seen = update.share(self.engine, micro)
                loss += share.detach().cpu()
                sums += seen.through(Tensor.cpu, Tensor.cpu)
            else:
                share = self._no_share(batch.prompt_ids[0], batch.completion_ids[0])
            self._backward(share, last=i == len(own) - 1)
        loss, sums = self.ranks.total(loss), sums.through(self.ranks.total, self.ranks.largest)
        rate = float(self.scheduler.get_last_lr()[0])
        norm = self._clipped() if self._stage == 0 else None
        self.engine.step()
        self.scheduler.step()
        norm = float(self.engine.get_global_grad_norm()) if norm is None else norm
        return update.metrics(sums, float(loss), norm, rate)

    def _own(self, lengths: Sequence[int]) -> list[list[int]]:
        """This rank's micro-batches."""
        return rank_batches(lengths, self.ranks.count, self.config.learner.micro_batch_tokens)[self.ranks.rank]

    def _no_share(self, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
        """A share of the loss that is 0, of a rank that takes part in a pass without rows of its own."""
        return self.engine([prompt], [completion], self.config.rollout.temperature)[0].sum() * 0

    def _clipped(self) -> float:
        """Clips the gradient and returns its norm before, which DeepSpeed tells from stage 1 on only."""
        return float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.learner.max_grad_norm))

    def _backward(self, share: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over the ranks; the shares of the batch's loss are to be added up.
        self.engine.backward(share * self.ranks.count)

    def _resume(self, checkpoint: LocalCheckpoint, learning_rate: float) -> None:
        """Takes optimizer and schedule; without any, the state is that of a fresh one."""
        steps = 0.0
        if (checkpoint.path / STATE_FILE).exists():
            state = json.loads((checkpoint.path / STATE_FILE).read_text())
            tensors = load_moments(checkpoint, self.parameters)
            for name, parameter in self.parameters.items():
                for moment in MOMENTS[:2]:
                    self._set_state(parameter, moment, tensors[f"{name}.{moment}"])
                steps = float(tensors[f"{name}.step"])
            resume_schedule(self.scheduler, state["scheduler"], learning_rate)
        for step in self._steps:
            step.fill_(steps)
        if self._has_masters and (checkpoint.path / MASTER_FILE).exists():
            for name, master in load_file(checkpoint.path / MASTER_FILE).items():
                safe_set_full_fp32_param(self.parameters[name], master.to(self.ranks.device))

    def _whole(self, read: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """A value of every parameter, put together from the ranks' parts; the first rank alone keeps it."""
        whole: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            value = read(parameter)
            if self.ranks.first:
                whole[name] = value.detach().to("cpu", copy=True).contiguous()
        return whole

    def _weight(self, parameter: Tensor) -> Tensor:
        if self._stage < 3:
            return parameter
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _state(self, parameter: Tensor, moment: str) -> Tensor:
        if self._stage == 0:
            return self.optimizer.state[parameter][moment]
        return safe_get_full_optimizer_state(parameter, moment)

    def _set_state(self, parameter: Tensor, moment: str, value: Tensor) -> None:
        if self._stage == 0:
            self.optimizer.state[parameter][moment].copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value.float().to(self.ranks.device), moment)


def deepspeed_config(config: Config, model: Any) -> dict[str, Any]:
    """What `deepspeed.initialize` takes; batches and gradient accumulation are ours to count.

    Args:
        config: the run's.
        model: the transformers model.
    """
    section = config.deepspeed
    # DeepSpeed allocates whole buckets in every pass, half a billion elements each by default.
    bucket = min(500_000_000, sum(p.numel() for p in model.parameters()))
    zero: dict[str, Any] = {
        "stage": section.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if section.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if section.offload_param:
        zero["offload_param"] = {"device": "cpu"}
    if section.zero_stage == 3:
        # Vectors, as of norms, stay whole on every rank; matrices are split, however small the model.
        zero["stage3_param_persistence_threshold"] = model.config.get_text_config().hidden_size
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.learner.max_grad_norm if section.zero_stage else 0.0,
        "zero_optimization": zero,
        # AdamW is torch's, so that a run can change engines.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,
    }
