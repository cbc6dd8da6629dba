"""Generation by vLLM as far as it goes without vLLM: what is refused before an engine is asked, and what is cleared."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import cast

import pytest
import torch

from npo_core.engine import Engine
from npo_core.interfaces import Generator, Learner, LocalCheckpoint, NearFutureError
from npo_core.policy import Policy
from npo_core.vllm_generator import VllmGenerator
from npo_core.vllm_process import VllmProcess
from schemas.learner import LearnerSection
from schemas.model import ModelSection
from schemas.vllm import VllmSection
from tests.tiny import tiny_model_dir, tiny_policy


def generator(policy: Policy, merges: bool = True) -> VllmGenerator:
    """One whose engine cannot start."""
    engine = VllmProcess(VllmSection(python="nowhere/python"), "float32", "cpu")
    return VllmGenerator(engine, policy, 1.0, 1e-4, in_place=False, merges=merges)


def test_weights_that_are_not_finite_are_named_and_not_the_engine(tmp_path: Path) -> None:
    policy = tiny_policy(tmp_path / "model")
    with torch.no_grad():
        policy.parameters["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    policy.save_weights(tmp_path / "weights")
    with pytest.raises(FloatingPointError, match=r"weights hold NaN or inf, in model\.layers\.1\.mlp\.up_proj\.weight"):
        generator(policy).load(LocalCheckpoint(tmp_path, "0" * 64, 0))


def test_closed_it_leaves_no_weights_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="model.lora needs it")
    model = ModelSection.model_validate({"lora": {"rank": 2, "alpha": 4}})
    policy = Policy(tiny_model_dir(tmp_path / "model"), model, LearnerSection(device="cpu"))
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    beside = generator(policy, merges=False)
    with pytest.raises(NearFutureError, match=r"vllm\.python"):
        beside.take_weights()
    assert list(scratch.iterdir()), "the case must write weights"
    beside.close()
    assert not list(scratch.iterdir())


class Closing:
    """Something that is closed, and may fail at it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.closed, self.error = False, error

    def close(self) -> None:
        self.closed = True
        if self.error:
            raise self.error


def test_a_sampler_that_cannot_be_closed_does_not_keep_the_learner() -> None:
    learner, frozen = Closing(), Closing(OSError("stuck"))
    engine = Engine(cast(Generator, None), cast(Learner, learner), cast(Generator, None), cast(VllmGenerator, frozen))
    with pytest.raises(OSError, match="stuck"):
        engine.close()
    assert learner.closed
