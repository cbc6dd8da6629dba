"""What judges answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from schemas.section import Section

VerifierKind = Literal["auto", "testbed", "exact", "numeric", "choice", "math-verify", "reasoning-gym", "python"]
Extract = Literal["auto", "boxed", "answer", "last-number", "text"]


class ToleranceSection(Section):
    """How far a number may be from the reference: by the larger of both bounds."""

    relative: float = Field(1e-9, ge=0, lt=1)
    """Share of the reference's magnitude."""
    absolute: float = Field(0.0, ge=0)
    """In the answer's own unit."""


class VerifierSection(Section):
    """What judges answers. But for the testbed's, each verdict is reached in a process that can be killed."""

    kind: VerifierKind = "auto"
    """`auto`: `testbed`, the whole working, for prompts of testbed and shapes, `reasoning-gym` for its own, and for all
    others `math-verify`. `exact`: equal but for white space. `numeric`: one number, within `tolerance`. `choice`: one
    letter. `python`: `function`."""
    timeout_s: float = Field(10.0, gt=0, le=3600)
    """Limit of one verdict: CPU seconds, which a busy machine does not use up. What waits instead of computing is ended
    after ten times as long by the clock."""
    memory_mib: int = Field(2048, ge=16)
    """Memory that verdicts may take, MiB a process, beside what it held when it had started."""
    workers: int = Field(2, ge=1, le=1024)
    """Processes. They start with the first verdict."""
    tolerance: ToleranceSection = ToleranceSection()
    """Of `numeric`."""
    function: str | None = Field(None, pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")
    """`package.module:function` of kind `python`, installed or in the working directory. Called as `function(answer=…,
    text=…, prompt=[{role, content}, …], metadata=dict or None)`; returns a bool, a float (correct from 1 on), or a dict
    with `reward`, and `correct` and `reason` where it wants."""
    extract: Extract = "auto"
    """Which part of a text is its answer, of what follows the last `</think>`. `boxed`: the last `\\boxed{…}`.
    `answer`: the last `<answer>…</answer>`, `Answer: …`, `The answer is …` or `#### …`. `last-number`. `text`: all of
    it. `auto`: the first of boxed, answer and text that is there; for `numeric` the last number instead of the text."""

    @model_validator(mode="after")
    def _fields_agree(self) -> VerifierSection:
        if self.kind == "python" and self.function is None:
            raise ValueError("kind python needs function: package.module:function")
        if self.kind != "python" and self.function is not None:
            raise ValueError(f"kind {self.kind} calls no function, but function is {self.function}; set kind to python")
        if self.kind == "python" and self.extract != "auto":
            raise ValueError(f"kind python is given the whole text; remove extract {self.extract}")
        return self
