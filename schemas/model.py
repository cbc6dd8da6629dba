"""The policy that a run starts from."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from schemas.section import Section
from schemas.urls import without_credentials


class ModelSection(Section):
    """The policy that training starts from."""

    path: str = "testbed"
    """`testbed` for the embedded model, or a local directory or hub name of a transformers causal language model."""
    start_from: str | None = None
    """`STORE/RUN` or `STORE/RUN@STEP`: take the weights of that checkpoint of a run's main line instead of `path`'s."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the weights in memory."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation that transformers loads."""

    @field_validator("start_from")
    @classmethod
    def _no_credentials(cls, value: str | None) -> str | None:
        return value if value is None else without_credentials(value)
