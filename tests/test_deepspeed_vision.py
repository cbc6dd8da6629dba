"""DeepSpeed trains on prompts with pictures as the torch learner does, whichever rank's rows show any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from npo_core import frames, shapes
from npo_core.deepspeed_learner import DeepSpeedLearner
from npo_core.deepspeed_messages import row_arrays, rows_of
from npo_core.interfaces import LocalCheckpoint, TrainBatch
from npo_core.learner import TorchLearner
from npo_core.padding import rank_batches
from npo_core.pictures import PictureEncoder, load_processor, pictures_of
from npo_core.policy import Policy
from npo_core.shapes.model import build_tokenizer
from schemas.config import Config
from tests.test_deepspeed_learner import TOLERANCE
from tests.test_learner import RATE, config

POOL = (12, 4, 3, 12, 3)
"""Of `make_prompts`: three pictures of different sizes, each asked about four times."""
TOKENIZER = build_tokenizer()
STEPS = 3


def settings(ranks: int, stage: int) -> Config:
    return config(
        learner={"engine": "deepspeed", "micro_batch_tokens": 40, "warmup_steps": 4, "max_grad_norm": 0.1},
        deepspeed={"ranks": ranks, "zero_stage": stage},
    )


def policy(settings_: Config) -> Policy:
    return Policy(shapes.model_dir(), settings_.model, settings_.learner)


def rows() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two answers to each question about three pictures, right and wrong, and to two that show none."""
    encoder = PictureEncoder(load_processor(shapes.model_dir()), dict(shapes.draw_pictures(*POOL)).__getitem__)
    prompts: list[np.ndarray] = []
    answers: list[np.ndarray] = []
    for prompt in shapes.make_prompts(*POOL)[0]:
        right = TOKENIZER.encode(prompt.answer + "#")
        prompts += [encoder.encode(TOKENIZER, prompt)] * 2
        answers += [np.array(right, np.int32), np.array([*right[:-1][::-1], right[0]], np.int32)]
    for text in ("Nr=<<=crgb", "K="):
        prompts += [np.array(TOKENIZER.encode(text), np.int32)] * 2
        answers += [np.array(TOKENIZER.encode(answer), np.int32) for answer in ("cst#", "rgbrgbrgbrgb#")]
    return prompts, answers


def batch(step: int) -> TrainBatch:
    """The first and the last show pictures in most rows, the second in none that has a gradient."""
    prompts, answers = rows()
    advantages = np.random.default_rng(step).normal(size=len(prompts))
    if step == 1:
        advantages[[bool(pictures_of(prompt)) for prompt in prompts]] = 0
    return TrainBatch(step, prompts, answers, advantages, np.zeros(len(prompts), bool), [None] * len(prompts))


def distances(one: Path, other: Path) -> dict[str, float]:
    """Relative L2 distances of two checkpoints' weights: all of them, and the tower's."""
    a, b = (load_file(path / "weights" / "model.safetensors") for path in (one, other))
    assert a.keys() == b.keys()
    parts = {"all": list(b), "tower": [name for name in b if ".visual." in name]}
    return {
        part: float(_flat(a, names).sub(_flat(b, names)).norm() / _flat(b, names).norm())
        for part, names in parts.items()
    }


def _flat(weights: dict[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    return torch.cat([weights[name].double().flatten() for name in names])


def test_each_picture_is_sent_once_and_arrives_with_its_prompts() -> None:
    prompts, answers = rows()
    _, arrays = frames.unpack(frames.pack({}, row_arrays(prompts, answers)))
    assert len(arrays["refs"]) == 3
    distinct = {picture.ref: picture for prompt in prompts for picture in pictures_of(prompt)}
    assert len(arrays["patches"]) == sum(len(picture.patches()) for picture in distinct.values())
    found, completions = rows_of(arrays)
    for theirs, ours in zip((*found, *completions), (*prompts, *answers), strict=True):
        assert theirs.tolist() == ours.tolist()
        assert [p.ref for p in pictures_of(theirs)] == [p.ref for p in pictures_of(ours)]
        for one, other in zip(pictures_of(theirs), pictures_of(ours), strict=True):
            assert one.grid == other.grid
            np.testing.assert_array_equal(one.patches(), other.patches())


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_it_computes_what_torch_does(tmp_path: Path, ranks: int, stage: int) -> None:
    settings_ = settings(ranks, stage)
    prompts, answers = rows()
    passes = rank_batches([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)], ranks, 40)
    shows = [[any(pictures_of(prompts[i]) for i in micro) for micro in own] for own in passes]
    assert ranks == 1 or any(one != other for one, other in zip(*shows, strict=True)), "only some ranks must see"
    alone = TorchLearner(policy(settings_), settings_)
    alone.save(tmp_path / "start")
    first = LocalCheckpoint(tmp_path / "start", "0" * 64, 0)
    alone.load(first, RATE)
    wanted = [alone.step(batch(step)) for step in range(STEPS)]
    alone.save(tmp_path / "torch")
    ours = DeepSpeedLearner(policy(settings_), settings_)
    try:
        ours.load(first, RATE)
        found = [ours.step(batch(step)) for step in range(STEPS)]
        ours.save(tmp_path / "deepspeed")
        logps = ours.log_probs(prompts, answers)
    finally:
        ours.close()
    moved = distances(tmp_path / "torch", tmp_path / "start")
    measured = distances(tmp_path / "deepspeed", tmp_path / "torch")
    print(ranks, stage, measured, moved)
    assert min(moved.values()) > 1e-3, "the case must train"
    assert max(measured.values()) < TOLERANCE
    for ours_, theirs in zip(found, wanted, strict=True):
        assert ours_ == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for one, other in zip(logps, alone.log_probs(prompts, answers), strict=True):
        assert np.concatenate(one) == pytest.approx(np.concatenate(other), rel=1e-4, abs=1e-4)
