"""The prompts of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from schemas.section import Section


class DataSection(Section):
    """The prompts."""

    source: Literal["testbed", "shapes"] = "testbed"
    """Where the prompts come from: the embedded tasks of the `testbed`, or questions about drawn `shapes`."""
    prompts: int = Field(512, ge=1)
    """Size of the training pool, in prompts."""
    held_out: int = Field(192, ge=1)
    """Size of the held-out set for evaluation, in prompts; disjoint from the pool."""
    min_length: int = Field(4, ge=1, le=12)
    """Shortest task input, in symbols (testbed) or cells of the picture (shapes)."""
    max_length: int = Field(12, ge=1, le=12)
    """Longest task input, in symbols (testbed) or cells of the picture (shapes)."""
    pool_seed: int = Field(0, ge=0)
    """Seed of the pool and the held-out set. Not `run.seed`, so that paired seeds share their prompts."""

    @model_validator(mode="after")
    def _lengths_are_ordered(self) -> DataSection:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length {self.min_length} exceeds max_length {self.max_length}; lower min_length")
        return self
