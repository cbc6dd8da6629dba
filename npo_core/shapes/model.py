"""A small Qwen3-VL of the real classes: its untrained form, its tokenizer and its image processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from npo_core.shapes.families import FAMILIES
from npo_core.shapes.scene import CELL

PAD = "<pad>"
END = "#"
"""Ends a working; the stop token."""
VISION_START, IMAGE, VISION_END, VIDEO = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"
SYMBOLS = sorted({symbol for family in FAMILIES for symbol in family.tag + family.symbols} | {"="})
VOCABULARY = (PAD, END, VISION_START, IMAGE, VISION_END, VIDEO, *SYMBOLS)
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    f"{VISION_START}{IMAGE}{VISION_END}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
MERGE = 2
"""Patches along each side of what one token of the language model sees: a cell of the grid."""


@dataclass(frozen=True)
class ModelSizes:
    """What the model is built of."""

    hidden: int = 64
    layers: int = 3
    heads: int = 4
    head_dim: int = 16
    mlp: int = 160
    rope_theta: float = 10_000.0
    mrope_section: tuple[int, int, int] = (4, 2, 2)
    """Frequencies of frame, row and column; half of `head_dim` in all."""
    max_positions: int = 64
    vision_hidden: int = 32
    vision_depth: int = 1
    vision_heads: int = 2
    vision_mlp: int = 64
    initializer_range: float = 0.08
    """Standard deviation of initial weights; transformers' own, 0.02, is meant for wider layers."""


def build_model(sizes: ModelSizes) -> Qwen3VLForConditionalGeneration:
    """The untrained model, float32; initial weights come from torch's global generator."""
    text = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": sizes.max_positions,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": sizes.rope_theta,
            "mrope_section": list(sizes.mrope_section),
            "mrope_interleaved": True,
        },
        "pad_token_id": VOCABULARY.index(PAD),
        "eos_token_id": VOCABULARY.index(END),
        "bos_token_id": None,
        "tie_word_embeddings": True,
        "initializer_range": sizes.initializer_range,
    }
    vision = {
        "depth": sizes.vision_depth,
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_mlp,
        "num_heads": sizes.vision_heads,
        "patch_size": CELL // MERGE,
        "temporal_patch_size": 2,
        "spatial_merge_size": MERGE,
        "out_hidden_size": sizes.hidden,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
        "initializer_range": sizes.initializer_range,
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=VOCABULARY.index(IMAGE),
        video_token_id=VOCABULARY.index(VIDEO),
        vision_start_token_id=VOCABULARY.index(VISION_START),
        vision_end_token_id=VOCABULARY.index(VISION_END),
        tie_word_embeddings=True,
        dtype="float32",
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = VOCABULARY.index(END)
    model.generation_config.pad_token_id = VOCABULARY.index(PAD)
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: one token a symbol, and one for each mark of a picture. Another character is an error."""
    tokenizer = Tokenizer(models.WordLevel({symbol: n for n, symbol in enumerate(VOCABULARY)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[VISION_START, IMAGE, VISION_END, VIDEO],
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )


def build_processor() -> Any:
    """The image processor, which leaves pictures of whole cells at their size."""
    return Qwen2VLImageProcessorPil(
        patch_size=CELL // MERGE,
        temporal_patch_size=2,
        merge_size=MERGE,
        size={"shortest_edge": CELL * CELL, "longest_edge": 64 * CELL * CELL},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
