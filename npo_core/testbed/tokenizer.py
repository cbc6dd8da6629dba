"""The testbed's tokenizer: one token a character, no spaces, no unknown token."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from npo_core.testbed.families import FAMILIES

PAD = "<pad>"
END = "#"
"""Ends a working; the stop token."""
VOCABULARY = (PAD, END, "=", ":", *"0123456789", *(family.tag for family in FAMILIES))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer. Its chat template renders the messages' contents verbatim. A character that is not in the
    vocabulary is an error, not a token."""
    tokenizer = Tokenizer(models.WordLevel({symbol: n for n, symbol in enumerate(VOCABULARY)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )
