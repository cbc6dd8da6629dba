"""The policy that a run starts from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from schemas.section import Section
from schemas.urls import without_credentials


class LoraSection(Section):
    """Low-rank adapters: the model's weights stay as they are, and W·x becomes W·x + (alpha/rank)·B·A·x. No dropout:
    the log-probabilities of sampling and of training are to be one function."""

    rank: int = Field(16, ge=1)
    """Rows of A and columns of B."""
    alpha: float = Field(32, gt=0)
    """Scale of the adapters, divided by the rank."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """`all-linear`, all linear layers but the output embedding, or names of layers, say [q_proj, v_proj]."""


class ModelSection(Section):
    """The policy that training starts from."""

    path: str = "testbed"
    """`testbed` or `shapes` for an embedded model, or a local directory or hub name of a transformers language model,
    or of a vision-language model of the Qwen-VL family."""
    start_from: str | None = None
    """`STORE/RUN` or `STORE/RUN@STEP`: take the weights of that checkpoint of a run's main line instead of `path`'s."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the weights in memory."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation that transformers loads."""
    lora: LoraSection | None = None
    """Train low-rank adapters in place of all weights; needs peft. A checkpoint then holds the adapters alone."""

    @field_validator("start_from")
    @classmethod
    def _no_credentials(cls, value: str | None) -> str | None:
        return value if value is None else without_credentials(value)
