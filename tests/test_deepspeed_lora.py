"""Adapters under DeepSpeed: trained as the torch learner trains them, and handed over in both directions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from npo_core.deepspeed_learner import DeepSpeedLearner
from npo_core.interfaces import LocalCheckpoint
from npo_core.learner import TorchLearner
from npo_core.policy import Policy
from schemas.config import Config
from tests.test_deepspeed_learner import TOLERANCE, steps
from tests.test_learner import RATE, config
from tests.tiny import tiny_model_dir

pytestmark = pytest.mark.engines


def settings(ranks: int, stage: int, dtype: str) -> Config:
    return config(
        model={"dtype": dtype, "lora": {"rank": 4, "alpha": 8}},
        learner={"engine": "deepspeed", "micro_batch_tokens": 40, "warmup_steps": 4},
        deepspeed={"ranks": ranks, "zero_stage": stage},
    )


class Adapters:
    """Two learners of one run, and where their checkpoints lie."""

    def __init__(self, path: Path, settings_: Config) -> None:
        self.path = path
        self.model = tiny_model_dir(path / "model")

        def policy() -> Policy:
            return Policy(self.model, settings_.model, settings_.learner, settings_.run.seed)

        self.torch = TorchLearner(policy(), settings_)
        self.deepspeed = DeepSpeedLearner(policy(), settings_)

    def saved(self, learner: TorchLearner | DeepSpeedLearner, name: str) -> LocalCheckpoint:
        """What the learner has now, as a run checks it out: the adapter beside the starting weights."""
        learner.save(self.path / name)
        assert not (self.path / name / "weights" / "model.safetensors").exists()
        shutil.copytree(self.model, self.path / name / "weights", dirs_exist_ok=True)
        return LocalCheckpoint(self.path / name, "0" * 64, 0)


def adapter(checkpoint: LocalCheckpoint) -> torch.Tensor:
    """All values of a checkpoint's adapter."""
    values = load_file(checkpoint.weights / "adapter" / "adapter_model.safetensors")
    return torch.cat([values[name].double().flatten() for name in sorted(values)])


def distance(one: LocalCheckpoint, other: LocalCheckpoint) -> float:
    """Relative L2 distance of two adapters."""
    return float((adapter(one) - adapter(other)).norm() / adapter(other).norm())


@pytest.mark.parametrize(
    ("ranks", "stage", "dtype", "tolerance"),
    [
        (1, 1, "float32", TOLERANCE),
        (2, 0, "float32", TOLERANCE),
        (2, 2, "float32", TOLERANCE),
        (2, 3, "float32", TOLERANCE),
        (2, 2, "bfloat16", 2e-2),
    ],
)
def test_it_trains_adapters_as_torch_does_and_they_take_over_from_each_other(
    tmp_path: Path, ranks: int, stage: int, dtype: str, tolerance: float
) -> None:
    ours = Adapters(tmp_path, settings(ranks, stage, dtype))
    try:
        first = ours.saved(ours.torch, "start")
        ours.torch.load(first, RATE)
        steps(ours.torch, 0, 3)
        halfway = ours.saved(ours.torch, "torch-3")
        steps(ours.torch, 3, 6)
        wanted = ours.saved(ours.torch, "torch-6")
        ours.deepspeed.load(first, RATE)
        steps(ours.deepspeed, 0, 3)
        theirs = ours.saved(ours.deepspeed, "deepspeed-3")
        steps(ours.deepspeed, 3, 6)
        found = ours.saved(ours.deepspeed, "deepspeed-6")
        # The policy of this process, which samples, has the new adapters too.
        held = torch.cat([p.double().flatten() for _, p in sorted(ours.deepspeed.policy.parameters.items())])
        assert torch.equal(held.detach(), adapter(found))
        ours.deepspeed.load(halfway, RATE)
        steps(ours.deepspeed, 3, 6)
        taken_over = ours.saved(ours.deepspeed, "taken-over-6")
        ours.torch.load(theirs, RATE)
        steps(ours.torch, 3, 6)
        given_back = ours.saved(ours.torch, "given-back-6")
    finally:
        ours.deepspeed.close()
    assert distance(wanted, first) > 0.1, "the case must train"
    for checkpoint in (found, taken_over, given_back):
        print(ranks, stage, dtype, checkpoint.path.name, distance(checkpoint, wanted))
        assert distance(checkpoint, wanted) < tolerance
