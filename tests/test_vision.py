"""Rows with pictures give the same numbers in generation, in training and in a plain forward of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from npo_core.generate import TransformersGenerator
from npo_core.interfaces import ConfigurationError, NearFutureError, Prompt, SamplingParams, StreamKey, TrainBatch
from npo_core.learner import TorchLearner
from npo_core.padding import pad
from npo_core.pictures import PicturedPrompt, PictureEncoder, load_processor, pictures_of
from npo_core.policy import Policy
from npo_core.shapes.families import draw_pictures, make_prompts
from npo_core.shapes.model import END, IMAGE, VOCABULARY, ModelSizes, build_processor, build_tokenizer
from schemas.config import Config
from schemas.learner import LearnerSection
from schemas.model import ModelSection
from tests.tiny import tiny_model_dir
from tests.tiny_vlm import tiny_vlm_dir

IMAGE_ID, STOP_ID = VOCABULARY.index(IMAGE), VOCABULARY.index(END)
SIZES = ModelSizes(hidden=32, layers=2, head_dim=16, mlp=48, vision_hidden=16, vision_mlp=24)
TOKENIZER = build_tokenizer()
POOL = (12, 4, 3, 12, 3)
"""Of `make_prompts`: three pictures of different sizes, each asked about four times, and a held-out one."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL with random weights, spread enough that its distributions are far from uniform."""
    return tiny_vlm_dir(tmp_path_factory.mktemp("vlm"), SIZES, spread=8)


@pytest.fixture(scope="module")
def encode(model_dir: Path) -> Callable[[Prompt], PicturedPrompt]:
    encoder = PictureEncoder(load_processor(model_dir), dict(draw_pictures(*POOL)).__getitem__)
    return lambda prompt: encoder.encode(TOKENIZER, prompt)


def policy_of(model_dir: Path, dtype: str = "float64", **learner: object) -> Policy:
    section = LearnerSection.model_validate({"device": "cpu", "micro_batch_tokens": 70, **learner})
    return Policy(model_dir, ModelSection.model_validate({"dtype": dtype}), section)


@pytest.fixture(scope="module")
def policy(model_dir: Path) -> Policy:
    return policy_of(model_dir)


@pytest.fixture(scope="module")
def prompts(encode: Callable[[Prompt], PicturedPrompt]) -> list[np.ndarray]:
    """Pictures of several sizes, two pictures in one prompt, and none."""
    train, _ = make_prompts(*POOL)
    several = [encode(train[n]) for n in (0, 5, 10)]
    two = Prompt(
        "two",
        "",
        ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "K="}, {"type": "image"}]},),
        "",
        (train[0].image_refs[0], train[4].image_refs[0]),
    )
    return [*several, encode(two), np.array(TOKENIZER.encode("Nr=<<=c"), np.int32)]


COMPLETIONS = [
    np.array(TOKENIZER.encode(text), np.int32) for text in ("cst#", "rgbrgb#", "0", "<=>" + IMAGE + "c#", "12345678")
]
"""One of them holds the placeholder token, which a policy may sample."""


def plain_logps(model_dir: Path, prompt: np.ndarray, completion: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities of one row without padding, by the model's own `forward`, which computes its positions."""
    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float64)
    ids_1L = torch.from_numpy(np.concatenate([np.asarray(prompt), completion]).astype(np.int64))[None]
    pictures = pictures_of(prompt)
    seen = {}
    if pictures:
        seen = {
            "pixel_values": torch.from_numpy(np.concatenate([picture.patches() for picture in pictures])).double(),
            "image_grid_thw": torch.tensor([picture.grid for picture in pictures]),
            "mm_token_type_ids": (ids_1L == IMAGE_ID).int(),
        }
    with torch.no_grad():
        logps_LV = torch.log_softmax(model(input_ids=ids_1L, **seen).logits[0] / temperature, dim=-1)
    places = torch.arange(len(prompt), ids_1L.shape[1])
    return logps_LV[places - 1, ids_1L[0, places]].numpy()


def test_placeholders_are_those_of_the_processor(encode: Callable[[Prompt], PicturedPrompt]) -> None:
    for prompt in make_prompts(*POOL)[0][::4]:
        ids = encode(prompt)
        (picture,) = pictures_of(ids)
        text = TOKENIZER.apply_chat_template([dict(m) for m in prompt.messages], tokenize=False)
        processor = SimpleNamespace(image_processor=build_processor(), image_token=IMAGE)
        made = {"image_grid_thw": np.array([picture.grid])}
        expanded = text.replace(IMAGE, Qwen3VLProcessor.replace_image_token(processor, made, 0))
        assert ids.tolist() == TOKENIZER.encode(expanded)
        assert (np.asarray(ids) == IMAGE_ID).sum() == len(prompt.answer), "a token a cell"


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_the_models_own_on_both_sides(policy: Policy, prompts: list[np.ndarray], side: str) -> None:
    assert policy.vision is not None
    ids_BL, mask_BL = pad(prompts, side, torch.device("cpu"))  # type: ignore[arg-type]
    grids = [picture.grid for prompt in prompts for picture in pictures_of(prompt)]
    theirs_3BL, deltas_B1 = policy.model.base_model.get_rope_index(
        ids_BL, (ids_BL == IMAGE_ID).int(), torch.tensor(grids), attention_mask=mask_BL
    )
    places = policy.vision.place(prompts, mask_BL)
    torch.testing.assert_close(places.positions_3BL, theirs_3BL)
    assert torch.equal(places.shown_BL, ids_BL == IMAGE_ID)
    assert torch.equal(places.next_B, mask_BL.sum(1) + deltas_B1[:, 0])
    assert deltas_B1[1:4].max() < 0, "a picture takes fewer positions than tokens"


def test_the_learner_s_log_probabilities_are_a_plain_forward_s(
    policy: Policy, model_dir: Path, prompts: list[np.ndarray]
) -> None:
    ours, _ = policy.log_probs(prompts, COMPLETIONS, 0.9)
    assert prompts[3].size != prompts[0].size
    for i, (prompt, completion) in enumerate(zip(prompts, COMPLETIONS, strict=True)):
        if IMAGE_ID in completion:
            continue  # transformers' forward takes it for a picture that is missing
        np.testing.assert_allclose(ours[i], plain_logps(model_dir, prompt, completion, 0.9), atol=1e-10)


def test_the_generator_s_log_probabilities_are_a_plain_forward_s(
    policy: Policy, model_dir: Path, prompts: list[np.ndarray]
) -> None:
    """Left-padded, the pictures read once a prompt; the learner's are the same, and those of a sampled placeholder."""
    n = 6
    streams = [StreamKey(0, "rollout", 0, str(p), slot) for p in range(len(prompts)) for slot in range(n)]
    rollouts = TransformersGenerator(policy, max_rows=64).sample(
        prompts, n, SamplingParams(1.0, 9, (STOP_ID,)), streams
    )
    rows = [prompt for prompt in prompts for _ in range(n)]
    learners, _ = policy.log_probs(rows, rollouts.completion_ids, 1.0)
    for ours, theirs in zip(rollouts.logprobs, learners, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)  # stored as float32
    for i in range(0, len(rows), n):
        completion = rollouts.completion_ids[i]
        if IMAGE_ID not in completion:
            np.testing.assert_allclose(rollouts.logprobs[i], plain_logps(model_dir, rows[i], completion), atol=2e-6)
    assert any(IMAGE_ID in ids for ids in rollouts.completion_ids), "the trap is not tested"


def test_the_picture_changes_the_answer_s_probability(
    policy: Policy, encode: Callable[[Prompt], PicturedPrompt]
) -> None:
    prompt = encode(make_prompts(*POOL)[0][0])
    (picture,) = pictures_of(prompt)
    white = PicturedPrompt.of(prompt, [type(picture)("white", picture.grid, lambda: np.ones_like(picture.patches()))])
    (seen, blind), _ = policy.log_probs([prompt, white], [COMPLETIONS[0]] * 2, 1.0)
    assert np.abs(seen - blind).max() > 0.01


def _gradient(policy: Policy, prompts: Sequence[np.ndarray], tower: str) -> torch.Tensor:
    config = Config.model_validate({"run": {"name": "t"}, "learner": {"device": "cpu", "max_grad_norm": 1e9}})
    learner = TorchLearner(policy, config)
    rows = len(prompts)
    learner.step(
        TrainBatch(0, list(prompts), COMPLETIONS[:rows], np.linspace(-1, 2, rows), np.zeros(rows, bool), [None] * rows)
    )
    return torch.cat([p.grad.flatten() for name, p in policy.parameters.items() if tower in name])  # type: ignore[union-attr]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_tower_and_language_model_is_the_plain_one(
    model_dir: Path, prompts: list[np.ndarray], checkpointing: bool
) -> None:
    """A picture that several rows show goes through the tower once; micro-batches of one row do it anew."""
    rows = [prompts[0], prompts[0], prompts[1], prompts[4]]
    whole = policy_of(model_dir, micro_batch_tokens=10_000, gradient_checkpointing=checkpointing)
    single = policy_of(model_dir, micro_batch_tokens=1)
    for part in ("visual", "language_model"):
        ours, plain = (_gradient(policy, rows, part) for policy in (whole, single))
        assert float(plain.norm()) > 1e-3
        # The first step of either has moved the weights of the second part's comparison alike.
        torch.testing.assert_close(ours, plain, rtol=1e-7, atol=1e-9)


def test_rows_of_a_table_and_slices_hold_the_ids_alone(prompts: list[np.ndarray]) -> None:
    table = pa.Table.from_pylist([{"ids": prompts[0]}], pa.schema([("ids", pa.list_(pa.int32()))]))
    assert table["ids"][0].as_py() == prompts[0].tolist()
    assert pictures_of(prompts[0])
    assert not pictures_of(prompts[0][1:])
    assert not pictures_of(prompts[0].copy())


def test_a_text_that_spells_the_placeholder_is_refused(encode: Callable[[Prompt], PicturedPrompt]) -> None:
    train, _ = make_prompts(*POOL)
    content = [{"type": "image"}, {"type": "text", "text": IMAGE}]
    prompt = Prompt("bad", "", ({"role": "user", "content": content},), "", train[0].image_refs)
    with pytest.raises(NearFutureError, match="prompt bad has 1 pictures, but the chat template writes 2"):
        encode(prompt)


def test_a_file_that_is_no_picture_is_named(model_dir: Path) -> None:
    encoder = PictureEncoder(load_processor(model_dir), lambda ref: b"no picture")
    with pytest.raises(NearFutureError, match=r"picture [0-9a-f]{12}, 10 bytes, cannot be read as one"):
        encoder.encode(TOKENIZER, make_prompts(*POOL)[0][0])


def test_a_model_that_sees_nothing_takes_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"model\.path names a qwen3 model, which sees none"):
        load_processor(tiny_model_dir(tmp_path))


def test_lora_is_refused_for_a_model_that_sees(model_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"model\.lora is not supported for Qwen3VL"):
        Policy(model_dir, ModelSection.model_validate({"lora": {"rank": 2}}), LearnerSection(device="cpu"))
