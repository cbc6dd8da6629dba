"""Pictures in prompts: files named by their content, cut into patches by the model's own image processor.

A message's content may be a list of parts, `{"type": "text", "text": …}` and `{"type": "image"}`; the prompt's n-th
image part is its n-th `image_refs`. The chat template writes one placeholder token for each; the encoder repeats it
for every token that the picture becomes, as the model's processor does.
"""

from __future__ import annotations

import functools
import io
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image

from npo_core.interfaces import ConfigurationError, NearFutureError, Prompt, first_line
from npo_core.prompts import PLAIN, counter, encode
from schemas.chat import ChatSection
from schemas.config import Config

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files of a model directory that its processor reads, beside the tokenizer's."""
PATCH_BYTES = 256 * 2**20
"""Memory that cut pictures may take between the steps that need them."""

Grid = tuple[int, int, int]
"""Patches of a picture: frames, rows and columns."""


@dataclass(frozen=True)
class Picture:
    """A picture of a prompt."""

    ref: str
    """SHA-256 of its file, hexadecimal."""
    grid: Grid
    patches: Callable[[], np.ndarray]
    """Cuts it, or finds it cut: float32 [patches, values a patch]."""


class PicturedPrompt(np.ndarray):
    """Token ids of a prompt, int32 [L], that its pictures travel with, wherever a row goes. A slice or a copy of it has
    none: tokens without their pictures are another prompt."""

    pictures: tuple[Picture, ...] = ()

    @classmethod
    def of(cls, ids: np.ndarray, pictures: Sequence[Picture]) -> PicturedPrompt:
        """These ids with these pictures, in the order of their placeholders."""
        prompt = np.asarray(ids, np.int32).view(cls)
        prompt.pictures = tuple(pictures)
        return prompt


def pictures_of(prompt: np.ndarray) -> tuple[Picture, ...]:
    """A prompt's pictures; none if it is plain token ids."""
    return prompt.pictures if isinstance(prompt, PicturedPrompt) else ()


@dataclass(frozen=True)
class PictureProcessor:
    """The part of a model's processor that pictures need."""

    images: Any
    """transformers' image processor."""
    token: int
    """Id of the placeholder token."""


class PictureEncoder:
    """Encodes prompts that show pictures.

    Args:
        processor: the model's.
        read: the bytes of a picture by its reference.
    """

    def __init__(self, processor: PictureProcessor, read: Callable[[str], bytes]) -> None:
        self._processor, self._read = processor, read
        self._grids: dict[str, Grid] = {}
        self._cut: OrderedDict[str, np.ndarray] = OrderedDict()

    def encode(self, tokenizer: Any, prompt: Prompt, chat: ChatSection = PLAIN) -> PicturedPrompt:
        """Token ids of a prompt with its pictures; see `npo_core.prompts.encode`.

        Raises:
            NearFutureError: the template writes not one placeholder a picture, or a picture cannot be read.
        """
        ids, places = self._placed(tokenizer, prompt, chat)
        repeats = np.ones(len(ids), np.int64)
        repeats[places] = [self._tokens(ref) for ref in prompt.image_refs]
        return PicturedPrompt.of(np.repeat(ids, repeats), [self._picture(ref) for ref in prompt.image_refs])

    def length(self, tokenizer: Any, prompt: Prompt, chat: ChatSection = PLAIN) -> int:
        """Tokens of `encode`, which the sizes of its pictures, taken to be readable, tell without cutting them.

        Raises:
            NearFutureError: the template writes not one placeholder a picture.
            ValueError: a picture is too narrow for the processor.
        """
        ids, _ = self._placed(tokenizer, prompt, chat)
        images = self._processor.images
        length = len(ids)
        for ref in prompt.image_refs:
            width, height = Image.open(io.BytesIO(self._read(ref))).size
            length += images.get_number_of_image_patches(height, width) // images.merge_size**2 - 1
        return length

    def _placed(self, tokenizer: Any, prompt: Prompt, chat: ChatSection) -> tuple[np.ndarray, np.ndarray]:
        """Token ids with one placeholder a picture, int32 [L], and where these are, bool [L]."""
        ids = encode(tokenizer, prompt, chat)
        places = ids == self._processor.token
        if places.sum() != len(prompt.image_refs):
            raise NearFutureError(
                f"prompt {prompt.prompt_id} has {len(prompt.image_refs)} pictures, but the chat template writes "
                f"{int(places.sum())} placeholders for it; give it one part of type image for each picture, and no "
                "text that spells the placeholder"
            )
        return ids, places

    def _picture(self, ref: str) -> Picture:
        return Picture(ref, self._grids[ref], lambda: self._patches(ref))

    def _tokens(self, ref: str) -> int:
        """Tokens that the language model reads for a picture."""
        if ref not in self._grids:
            self._patches(ref)
        frames, rows, columns = self._grids[ref]
        return int(frames * rows * columns // self._processor.images.merge_size**2)

    def _patches(self, ref: str) -> np.ndarray:
        """The picture, cut; from memory while it is there."""
        if ref in self._cut:
            self._cut.move_to_end(ref)
            return self._cut[ref]
        picture = open_picture(ref, self._read(ref))
        made = self._processor.images(images=[picture], return_tensors="np")
        frames, rows, columns = (int(size) for size in made["image_grid_thw"][0])
        self._grids[ref] = frames, rows, columns
        cut = self._cut[ref] = np.asarray(made["pixel_values"], np.float32)
        while len(self._cut) > 1 and sum(kept.nbytes for kept in self._cut.values()) > PATCH_BYTES:
            self._cut.popitem(last=False)
        return cut


def pictured_counter(
    tokenizer: Any, chat: ChatSection, processor: Callable[[], PictureProcessor]
) -> Callable[[Prompt, Mapping[str, bytes]], int]:
    """Counts a prompt's tokens, with its pictures, whose files are given by their SHA-256; raises ValueError for a
    prompt that the chat template refuses.

    Args:
        processor: the model's; asked when the first prompt with pictures comes.

    Raises:
        ConfigurationError: see `counter`; the count raises it too, where the model sees no pictures.
    """
    count = counter(tokenizer, chat)
    loaded = functools.cache(processor)

    def tokens(prompt: Prompt, pictures: Mapping[str, bytes]) -> int:
        if not prompt.image_refs:
            return count(prompt)
        encoder = PictureEncoder(loaded(), pictures.__getitem__)
        try:
            return encoder.length(tokenizer, prompt, chat)
        except Exception as error:  # a template raises what it likes
            raise ValueError(first_line(error)) from error

    return tokens


def open_picture(ref: str, data: bytes) -> Image.Image:
    """A picture of a file's bytes, as RGB.

    Raises:
        NearFutureError: it is none; names it.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except Exception as error:  # Pillow raises what its decoders raise
        raise NearFutureError(
            f"picture {ref[:12]}, {len(data)} bytes, cannot be read as one ({error}); give PNG, JPEG or another format "
            "that Pillow reads"
        ) from error


def load_processor(model_dir: Path) -> PictureProcessor:
    """The image processor of a model directory.

    Its Pillow form, wherever torchvision's would run too: one picture is to give the same numbers on every machine.

    Raises:
        ConfigurationError: the model sees no pictures, or the processor cannot be loaded or is of another kind.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:  # transformers raises what its parsers raise
        raise ConfigurationError(
            f"model.path {model_dir}: its config.json cannot be used ({first_line(error)}); give a complete "
            "transformers model directory"
        ) from error
    require_sight(config)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(model_dir, backend="pil", local_files_only=True)
        merge_size = processor.merge_size
    except Exception as error:  # transformers raises what its parsers raise
        raise ConfigurationError(
            f"model.path: the image processor of the {config.model_type} model cannot be used ({first_line(error)}); "
            "give a complete model directory of the Qwen-VL family, with preprocessor_config.json"
        ) from error
    if merge_size != config.vision_config.spatial_merge_size:
        raise ConfigurationError(
            f"model.path: the image processor merges {merge_size}×{merge_size} patches into a token, the model "
            f"{config.vision_config.spatial_merge_size}×{config.vision_config.spatial_merge_size}; restore the "
            "processor's configuration that belongs to the model"
        )
    return PictureProcessor(processor, config.image_token_id)


def require_supported(config: Config) -> None:
    """Refuses what cannot take prompts with pictures.

    Raises:
        ConfigurationError: names the field, its value and the remedy.
    """
    faults = []
    if config.vllm.samples and config.vllm.url:
        faults.append(
            f"vllm.url {config.vllm.url} is given token ids alone; leave it out, so that vLLM runs in a process of ours"
        )
    if config.model.lora is not None:
        faults.append("model.lora trains language models alone; remove the section model.lora")
    if faults:
        raise ConfigurationError(f"data.source {config.data.source} holds pictures: {'. '.join(faults)}")


def require_sight(config: Any, shown: str = "pictures") -> None:
    """Refuses a transformers configuration of a model that sees no pictures.

    Args:
        shown: what the data hold, in words.

    Raises:
        ConfigurationError: names the kind of the model.
    """
    if not sees_pictures(config) or getattr(config, "image_token_id", None) is None:
        raise ConfigurationError(
            f"the data hold {shown}, but model.path names a {config.model_type} model, which sees none; choose a "
            "vision-language model (Qwen3-VL), or data without pictures"
        )


def sees_pictures(config: Any) -> bool:
    """Whether a transformers configuration is that of a vision-language model."""
    return getattr(config, "vision_config", None) is not None
