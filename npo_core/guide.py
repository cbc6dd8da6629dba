"""Guide trajectories: verified-correct answers of the near future, and how they are read back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from npo_core.interfaces import NearFutureError, Verdict

ROWS_AT_ONCE = 256
"""Rows that are Python objects at one time."""


@dataclass(frozen=True)
class GuideTrajectory:
    """A verified-correct response of the near future (o'_x), token by token."""

    prompt_id: str
    completion_ids: np.ndarray
    """int32 [T], its end token included."""
    logprobs: np.ndarray
    """float32 [T], under the policy that sampled it."""
    reward: float
    verdict: str
    entropy: float | None
    """Mean token entropy under that policy, in nats."""
    text: str
    step: int
    """Step of the guide's checkpoint."""
    behavior_step: int
    """Steps behind the policy that sampled it: the checkpoint's, or fewer for a rollout of the steps that led to it."""
    weights_digest: str | None
    """Of that policy; None: no checkpoint holds it."""

    def serves(self, step: int) -> bool:
        """Whether it may be mixed into a step's groups. A rollout serves earlier steps only: at its own one, where the
        replay may repeat it, it would be in the group twice, and at a later one it would be the past, not the future.
        """
        return self.behavior_step == self.step or step < self.behavior_step

    def row(self) -> dict[str, Any]:
        """The columns of a trajectory row that it determines."""
        return {
            "source": "guide",
            "behavior_step": self.behavior_step,
            "behavior_digest": self.weights_digest,
            "completion_ids": self.completion_ids,
            "behavior_logprobs": self.logprobs,
            "reward": self.reward,
            "correct": True,
            "verdict": self.verdict,
            "finish_reason": "stop",
            "displaced": False,
            "entropy": self.entropy,
            "text": self.text,
        }


GuideTrajectories = Mapping[str, tuple[GuideTrajectory, ...]]
"""By prompt, at least one each, in sampling order."""


def read_guide(
    tables: Iterable[pa.Table],
    judge: Callable[[Sequence[tuple[str, Sequence[int]]]], Sequence[Verdict]],
    encode: Callable[[str], np.ndarray],
) -> Iterator[GuideTrajectory]:
    """A guide's trajectories, each verified again as it comes: nothing unverified is ever replayed.

    Args:
        tables: rows by `schemas.tables.TRAJECTORIES`, of each prompt in sampling order.
        judge: judges some (prompt_id, completion_ids).
        encode: prompt_id to the token ids that the run gives to its policy.

    Raises:
        NearFutureError: an answer is not correct, is truncated, or its prompt has other token ids in this run.
    """
    batches = chain.from_iterable(table.to_batches(max_chunksize=ROWS_AT_ONCE) for table in tables)
    for row, verdict in chain.from_iterable(_judged(batch.to_pylist(), judge) for batch in batches):
        prompt_id = row["prompt_id"]
        if verdict.failure is not None:
            raise NearFutureError(
                f"guide {row['leg_id']}: the stored answer to prompt {prompt_id} could not be verified again "
                f"({verdict.reason}); run again when the verifier works"
            )
        if not verdict.correct or row["finish_reason"] != "stop":
            raise NearFutureError(
                f"guide {row['leg_id']}: the stored answer to prompt {prompt_id} is not a verified-correct one "
                f"({verdict.reason}, finish_reason {row['finish_reason']}); make the guide again"
            )
        if row["prompt_ids"] != encode(prompt_id).tolist():
            raise NearFutureError(
                f"guide {row['leg_id']}: prompt {prompt_id} was encoded with another tokenizer or template; "
                "make the guide again under this run's"
            )
        yield GuideTrajectory(
            prompt_id,
            np.array(row["completion_ids"], np.int32),
            np.array(row["behavior_logprobs"], np.float32),
            verdict.reward,
            verdict.reason,
            row["entropy"],
            row["text"],
            row["step"],
            row["behavior_step"],
            row["behavior_digest"],
        )


def _judged(
    rows: list[dict[str, Any]], judge: Callable[[Sequence[tuple[str, Sequence[int]]]], Sequence[Verdict]]
) -> Iterator[tuple[dict[str, Any], Verdict]]:
    """Each row with its verdict."""
    return zip(rows, judge([(row["prompt_id"], row["completion_ids"]) for row in rows]), strict=True)


def by_prompt(trajectories: Iterable[GuideTrajectory]) -> GuideTrajectories:
    """Trajectories by their prompts, in the order in which they come."""
    guide: dict[str, tuple[GuideTrajectory, ...]] = {}
    for trajectory in trajectories:
        guide[trajectory.prompt_id] = (*guide.get(trajectory.prompt_id, ()), trajectory)
    return guide
