"""vLLM itself samples for prompts that show pictures, from the policy that the trainer holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from npo_core.interfaces import LocalCheckpoint, NearFutureError, Prompt, SamplingParams, StreamKey
from npo_core.pictures import PicturedPrompt, PictureEncoder, load_processor, pictures_of
from npo_core.policy import Policy
from npo_core.shapes.families import draw_pictures, make_prompts
from npo_core.shapes.model import END, VOCABULARY, ModelSizes, build_tokenizer
from npo_core.vllm_generator import VllmGenerator
from npo_core.vllm_process import VllmProcess
from npo_core.weight_sync import compare
from schemas.learner import LearnerSection
from schemas.model import ModelSection
from schemas.vllm import VllmSection
from tests.command import ROOT
from tests.tiny_vlm import tiny_vlm_dir

pytestmark = [pytest.mark.engines, pytest.mark.slow]

SETTINGS = VllmSection(python=str(ROOT / ".venv-vllm" / "bin" / "python"), max_model_len=64)
SIZES = ModelSizes(
    hidden=32, layers=2, heads=2, head_dim=32, mlp=48, mrope_section=(8, 4, 4), vision_hidden=64, vision_depth=2
)
"""vLLM's attention on CPUs wants heads of at least 32, the tower's too."""
TOKENIZER = build_tokenizer()
PARAMS = SamplingParams(0.9, 10, (VOCABULARY.index(END),))
TOLERANCE = 1e-4
POOL = (12, 4, 3, 12, 3)
"""Of `make_prompts`: three pictures of different sizes, each asked about four times."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a Qwen3-VL with random weights, spread enough that what it sees matters."""
    path = tmp_path_factory.mktemp("vlm")
    tiny_vlm_dir(path / "weights", SIZES, spread=3, processor_dir=path / "processor")
    return path


@pytest.fixture(scope="module")
def started(model_dir: Path) -> Iterator[VllmGenerator]:
    """A generator that holds the model, whose weights lie apart from its processor."""
    policy = Policy(model_dir / "weights", ModelSection(), LearnerSection(device="cpu"))
    engine = VllmProcess(SETTINGS, "float32", "cpu", model_dir / "processor")
    generator = VllmGenerator(engine, policy, PARAMS.temperature, TOLERANCE, in_place=True)
    generator.load(LocalCheckpoint(model_dir, "digest", 0))
    yield generator
    generator.close()


@pytest.fixture(scope="module")
def prompts(model_dir: Path) -> list[np.ndarray]:
    """One picture, another, two in one prompt, and none."""
    encoder = PictureEncoder(load_processor(model_dir / "processor"), dict(draw_pictures(*POOL)).__getitem__)
    train, _ = make_prompts(*POOL)
    content = [{"type": "image"}, {"type": "text", "text": "K="}, {"type": "image"}]
    two = Prompt(
        "two", "", ({"role": "user", "content": content},), "", (train[0].image_refs[0], train[4].image_refs[0])
    )
    shown = [encoder.encode(TOKENIZER, prompt) for prompt in (train[0], train[5], two)]
    return [*shown, np.array(TOKENIZER.encode("Nr=<<=c"), np.int32)]


def keys(prompts: int, n: int) -> list[StreamKey]:
    return [StreamKey(3, "guide", 5, f"p{p}", slot) for p in range(prompts) for slot in range(n)]


def test_its_log_probabilities_are_those_of_the_trainer(started: VllmGenerator, prompts: list[np.ndarray]) -> None:
    assert [len(pictures_of(prompt)) for prompt in prompts] == [1, 1, 2, 0]
    rollouts = started.sample(prompts, 8, PARAMS, keys(4, 8))
    rows = [prompt for prompt in prompts for _ in range(8)]
    agreement = compare(rollouts.logprobs, started.score(rows, rollouts.completion_ids, PARAMS.temperature))
    print(f"vLLM against transformers, with pictures: {agreement}")
    assert agreement.mean < TOLERANCE
    assert agreement.largest < 10 * TOLERANCE


def test_it_looks_at_the_pictures(started: VllmGenerator, prompts: list[np.ndarray]) -> None:
    """The same tokens and seeds with another picture: where the trainer's log-probabilities move, so do vLLM's."""
    (own,) = pictures_of(prompts[0])
    dark = type(own)("dark", own.grid, lambda: -np.ones_like(own.patches()))
    both = [prompts[0], PicturedPrompt.of(prompts[0], [dark])]
    # Of one token each: the second's would follow others.
    rollouts = started.sample(both, 64, SamplingParams(PARAMS.temperature, 1, ()), keys(1, 64) * 2)
    seen, unseen = (
        {
            int(ids[0]): float(logp[0])
            for ids, logp in zip(rollouts.completion_ids[at], rollouts.logprobs[at], strict=True)
        }
        for at in (slice(64), slice(64, 128))
    )
    moved = [abs(seen[token] - unseen[token]) for token in seen.keys() & unseen.keys()]
    assert max(moved) > 100 * TOLERANCE, moved


def test_the_probe_tells_a_stale_tower(started: VllmGenerator) -> None:
    """Nothing but a picture shows that the tower's weights are others than the engine's."""
    policy = started.policy
    assert started.probe().mean < TOLERANCE
    tower = [parameter for name, parameter in policy.model.named_parameters() if ".visual." in name]
    before = [parameter.detach().clone() for parameter in tower]
    assert tower
    with torch.no_grad():
        for parameter in tower:
            parameter.mul_(1.5)
        stale = started.probe()
        for parameter, value in zip(tower, before, strict=True):
            parameter.copy_(value)
    assert stale.mean > TOLERANCE


def test_a_prompt_whose_placeholders_its_picture_does_not_fill_is_refused(
    started: VllmGenerator, prompts: list[np.ndarray]
) -> None:
    (own,) = pictures_of(prompts[0])
    frames, rows, columns = own.grid
    less = type(own)("less", (frames, rows - 2, columns), lambda: own.patches()[: -2 * columns])
    wrong = PicturedPrompt.of(prompts[0], [less])
    with pytest.raises(NearFutureError, match=r"a prompt has \d+ placeholders for pictures of \d+ tokens"):
        started.sample([wrong], 1, PARAMS, keys(1, 1))
    # The engine is none the worse for it.
    assert len(started.sample(prompts[:1], 1, PARAMS, keys(1, 1)).completion_ids) == 1


def test_after_an_update_in_place_it_sees_with_the_new_tower(started: VllmGenerator, tmp_path: Path) -> None:
    """What the old tower made of a picture is not kept. On CPUs it is an embedding that an update in place reaches."""
    embedding = started.policy.model.base_model.visual.pos_embed.weight
    before = embedding.detach().clone()
    assert started.probe().mean < TOLERANCE
    with torch.no_grad():
        embedding.mul_(-2)
        moved = started.probe()
        started.policy.save_weights(tmp_path)
        started.engine.reload(tmp_path)
        agreement = started.probe()
        embedding.copy_(before)
    assert moved.mean > TOLERANCE, "the picture does not tell"
    assert agreement.mean < TOLERANCE, agreement
