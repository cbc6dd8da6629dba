"""A benchmark: prompts that a run's checkpoints are asked beside its own held-out ones."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from schemas.data import DataSection
from schemas.section import Section
from schemas.verifier import VerifierSection


class BenchmarkFile(Section):
    """A benchmark, as `npo stage evaluate --benchmark` reads it from YAML."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    """The benchmark's name: lower-case letters, digits, dot, dash, underscore."""
    data: DataSection
    """Its prompts: all of them are asked. Only the testbed holds some out, which are asked too."""
    verifier: VerifierSection = VerifierSection()
    """What judges the answers; the run's own verifier judges its own prompts alone."""
    samples: int | None = Field(None, ge=1)
    """Answers a prompt; `evaluation.samples` of the run by default."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest answer, in tokens; `rollout.max_new_tokens` of the run by default."""
    temperature: float | None = Field(None, gt=0, le=10)
    """Sampling temperature; `rollout.temperature` of the run by default."""
