"""What AutoNPO remembers from step to step: moving averages of reward and entropy, and the mistake pool B
(NPO, arXiv 2604.20733, section 3.3). It is part of every checkpoint, and is rewound with it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from schemas.decisions import Mistake, MonitorState, Observation
from schemas.future import AutoNPOSection

MONITOR_FILE = "monitor.json"
"""Where a checkpoint's directory holds the state."""


def observe(
    state: MonitorState,
    step: int,
    reward: float,
    entropy: float,
    groups: Iterable[tuple[str, float]],
    settings: AutoNPOSection,
) -> MonitorState:
    """The state after one more step.

    The averages begin at the first finite value and then move by `ema_weight`; a value that is not finite is noted as
    None and moves nothing.

    Args:
        state: after the steps before `step`.
        step: the step that was trained.
        reward: mean reward of its on-policy rollouts, before any replacement.
        entropy: their mean token entropy, in nats.
        groups: (prompt_id, group accuracy) of its groups, before any replacement.
    """
    before = state.observations[-1] if state.observations else None
    seen = Observation(
        step,
        _finite(reward),
        _finite(entropy),
        _moved(before.reward_ema if before else None, _finite(reward), settings.ema_weight),
        _moved(before.entropy_ema if before else None, _finite(entropy), settings.ema_weight),
    )
    failed = sorted(
        Mistake(prompt_id, step, accuracy) for prompt_id, accuracy in groups if accuracy <= settings.mistake_threshold
    )
    kept = [mistake for mistake in state.pool if mistake.step > step - settings.lookback]
    span = max(settings.patience + 1, settings.trend_steps)
    # Made of valid parts: validating thousands of mistakes again would take longer than all else here.
    return MonitorState.model_construct(
        observations=(*state.observations, seen)[-span:],
        pool=tuple((*kept, *failed)[-settings.pool_capacity :]),
    )


def recent_mistakes(pool: Iterable[Mistake], step: int, lookahead: int) -> tuple[Mistake, ...]:
    """B_Δ: the newest mistake of each prompt that failed in steps [step − Δ, step), by prompt."""
    newest = {mistake.prompt_id: mistake for mistake in pool if step - lookahead <= mistake.step < step}
    return tuple(newest[prompt_id] for prompt_id in sorted(newest))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _moved(average: float | None, value: float | None, weight: float) -> float | None:
    if value is None or average is None:
        return average if value is None else value
    return average + weight * (value - average)
