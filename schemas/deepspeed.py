"""How DeepSpeed spreads the learner, read iff `learner.engine` is `deepspeed`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from schemas.section import Section


class DeepSpeedSection(Section):
    """Processes of the learner and what each of them holds. Not part of the run's identity: results differ by
    rounding only, and a run may go on under another one, or under `learner.engine: torch`."""

    ranks: int = Field(1, ge=1)
    """Learner processes on this machine, or on each of `hostfile`'s; on GPUs one a GPU."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What the ranks split: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights."""
    offload_optimizer: bool = False
    """Optimizer state and its step on the CPU; needs `zero_stage` 1 or more."""
    offload_param: bool = False
    """Weights on the CPU while no layer computes with them; needs `zero_stage` 3."""
    hostfile: str | None = None
    """File of `HOST slots=N` lines, this machine first: the learner runs on all of them, started over ssh."""

    @model_validator(mode="after")
    def _offload_fits_the_stage(self) -> DeepSpeedSection:
        for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
            if getattr(self, name) and self.zero_stage < least:
                raise ValueError(
                    f"{name} needs zero_stage {least} or more, and zero_stage is {self.zero_stage}; raise it or set "
                    f"{name} to false"
                )
        return self
