"""AutoNPO's controller, a pure state machine (NPO, arXiv 2604.20733, section 3.3): warning, then, from one probe of the
policy, the distance. It knows no store, no scheduler and no model.

1. Warning (`check`): the reward EMA has not risen by `min_gain` over `patience` steps and the entropy EMA has fallen
   over the same steps. Ours: the trend of the raw rewards must also exclude a rise, for the difference of two averages
   over a few steps is mostly noise, and fires on runs that still improve.
2. Confirmation: the policy answers a sample of the mistake pool (`npo_core.probe`).
3. Distance (`choose`): Δ* = argmax Q̂(Δ)/V̂(Δ) over the distances to saved checkpoints.

Cooldown and budget run on a clock of trained steps which never goes back (`trained_clock`): on the step of the main
line, which a rollback rewinds, the same trigger would fire for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from npo_core.monitor import recent_mistakes
from schemas.decisions import Candidate, DecisionCode, DecisionRecord, MonitorState
from schemas.future import AutoNPOSection
from schemas.records import CheckpointRef


@dataclass(frozen=True)
class Verdict:
    """What the controller says."""

    code: DecisionCode
    reason: str
    """In words, with the numbers that decided."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    chosen: Candidate | None = None
    """The distance, iff `code` is `intervene`."""


def trained_clock(decisions: Iterable[DecisionRecord], step: int) -> int:
    """Trained steps of a run whose main line stands at `step`, the steps that rollbacks abandoned included.

    Args:
        decisions: those made before, of which the ones that rolled back count.
    """
    last = max((d for d in decisions if d.intervene and d.clock is not None), key=lambda d: d.clock or 0, default=None)
    if last is None or last.clock is None or last.start is None:
        return step
    return last.clock + step - last.start


def check(
    state: MonitorState,
    step: int,
    decisions: Sequence[DecisionRecord],
    settings: AutoNPOSection,
    replaying: bool = False,
) -> Verdict:
    """Whether training gives reason to probe: code `warning`, or why not.

    Args:
        state: after `step` steps of the main line.
        step: t.
        decisions: the run's earlier ones. A user's rollbacks count for clock and cooldown, not for the budget.
        replaying: whether a guide is being mixed in.
    """
    clock = trained_clock(decisions, step)
    numbers: dict[str, float] = {"clock": float(clock)}

    def verdict(code: DecisionCode, reason: str) -> Verdict:
        return Verdict(code, reason, numbers)

    if replaying:
        return verdict(DecisionCode.REPLAYING, "a guide is being replayed; nothing is checked before its window ends")
    if clock < settings.first_check:
        return verdict(DecisionCode.TOO_EARLY, f"{clock} trained steps, the first check is at {settings.first_check}")
    spent = sum(decision.intervene for decision in decisions if decision.source == "autonpo")
    if spent >= settings.max_interventions:
        return verdict(DecisionCode.BUDGET_SPENT, f"all {settings.max_interventions} interventions are spent")
    free_from = max((_cooled_down(decision, settings) for decision in decisions), default=0)
    if clock < free_from:
        return verdict(DecisionCode.COOLDOWN, f"{clock} trained steps, the cooldown ends at {free_from}")
    span = max(settings.patience + 1, settings.trend_steps)
    seen = state.observations[-span:]
    if len(seen) < span:
        return verdict(DecisionCode.TOO_SHORT, f"{len(seen)} steps seen, the trigger looks back over {span}")
    window = seen[-settings.patience - 1 :]
    rewards = [o.reward for o in seen if o.reward is not None]
    ends = (window[0].reward_ema, window[-1].reward_ema, window[0].entropy_ema, window[-1].entropy_ema)
    if len(rewards) < span or any(o.entropy is None for o in seen) or None in ends:
        lost = sum(o.reward is None or o.entropy is None for o in seen)
        return verdict(DecisionCode.NOT_FINITE, f"reward or entropy were not finite in {lost} of the last {span} steps")
    reward_before, reward_now, entropy_before, entropy_now = (float(value or 0.0) for value in ends)
    gain, bound = trend(rewards[-settings.trend_steps :], settings.patience, settings.trend_z)
    numbers |= {
        "reward_ema": reward_now,
        "reward_gain": reward_now - reward_before,
        "trend_gain": gain,
        "trend_bound": bound,
        "entropy_ema": entropy_now,
        "entropy_gain": entropy_now - entropy_before,
    }
    rise = f"over {settings.patience} steps"
    if reward_now - reward_before >= settings.min_gain:
        text = f"the reward EMA moved by {reward_now - reward_before:+.3f} {rise}, {settings.min_gain:g} or more"
        return verdict(DecisionCode.REWARD_RISES, text)
    if bound >= settings.min_gain:
        text = (
            f"the reward EMA moved by {reward_now - reward_before:+.3f} {rise}, but the trend of the last "
            f"{settings.trend_steps} steps is {gain:+.3f}, and up to {bound:+.3f} with {settings.trend_z:g} standard "
            f"errors: a rise of {settings.min_gain:g} is not excluded"
        )
        return verdict(DecisionCode.TREND_RISES, text)
    if entropy_now >= entropy_before:
        text = f"the reward stalls, but the entropy EMA rose from {entropy_before:.3f} to {entropy_now:.3f} {rise}"
        return verdict(DecisionCode.ENTROPY_HOLDS, text)
    return verdict(
        DecisionCode.WARNING,
        f"the reward EMA moved by {reward_now - reward_before:+.3f} {rise} (trend at most {bound:+.3f}), less than "
        f"{settings.min_gain:g}, and the entropy EMA fell from {entropy_before:.3f} to {entropy_now:.3f}",
    )


def trend(rewards: Sequence[float], steps: int, z: float) -> tuple[float, float]:
    """Rise over `steps` steps by a least-squares line through the rewards, and its upper bound, z standard errors of
    the slope above it. Steps are taken as independent, which on-policy batches of distinct prompts nearly are."""
    y = np.asarray(rewards, dtype=np.float64)
    x = np.arange(len(y)) - (len(y) - 1) / 2
    slope = float(x @ y / (x @ x))
    residuals = y - y.mean() - slope * x
    error = float(np.sqrt(residuals @ residuals / (len(y) - 2) / (x @ x)))
    return slope * steps, (slope + z * error) * steps


def distances(
    state: MonitorState, step: int, saved: Mapping[int, CheckpointRef], settings: AutoNPOSection
) -> list[Candidate]:
    """The distances that training could roll back by, nearest first, with the size of B_Δ.

    Args:
        saved: checkpoints of the main line by step.
    """
    near = sorted(
        (step - at, ref) for at, ref in saved.items() if 0 < step - at <= settings.lookback and ref.step == at
    )
    return [
        Candidate(lookahead=far, parent=ref, pool=len(recent_mistakes(state.pool, step, far)), prompts=0, samples=0)
        for far, ref in near
    ]


def confirmable(candidates: Sequence[Candidate], settings: AutoNPOSection) -> Verdict | None:
    """Why a probe cannot confirm a warning; None if it can."""
    if not candidates:
        text = f"no checkpoint of the main line is saved within the last {settings.lookback} steps"
        return Verdict(DecisionCode.NO_CHECKPOINT, text)
    largest = max(candidate.pool for candidate in candidates)
    if largest < settings.min_pool:
        text = f"the mistakes hold {largest} distinct prompts, fewer than {settings.min_pool}"
        return Verdict(DecisionCode.POOL_TOO_SMALL, text)
    return None


def choose(candidates: Sequence[Candidate], settings: AutoNPOSection) -> Verdict:
    """Δ* = argmax Q̂(Δ)/V̂(Δ) over the candidates that the probe has measured and whose Q̂ reaches `min_quality`, the
    nearest among equals."""
    refused = confirmable(candidates, settings)
    if refused is not None:
        return refused
    name = settings.variance
    measured = [
        (c, c.quality.value, c.variance[name].value, c.signal[name].value)
        for c in candidates
        if c.pool >= settings.min_pool and c.quality is not None and name in c.signal
    ]
    if not measured:
        return Verdict(DecisionCode.POOL_TOO_SMALL, "the probe asked no prompt of a distance with enough mistakes")
    able = [found for found in measured if found[1] >= settings.min_quality]
    if not able:
        best, quality, _, _ = max(measured, key=lambda found: (found[1], -found[0].lookahead))
        text = f"the largest Q̂ of {len(measured)} distances, {quality:.2f} at Δ = {best.lookahead}, is under"
        return Verdict(DecisionCode.LOW_QUALITY, f"{text} {settings.min_quality:g}")
    best, quality, variance, signal = max(able, key=lambda found: (found[3], -found[0].lookahead))
    text = (
        f"Q̂ {quality:.2f} / V̂ {variance:.2f} = Ŝ {signal:.2f} at Δ = {best.lookahead} is the best of {len(able)} "
        f"distances; today's policy guides the {best.pool} prompts that failed in the last {best.lookahead} steps"
    )
    return Verdict(DecisionCode.INTERVENE, text, chosen=best)


def _cooled_down(decision: DecisionRecord, settings: AutoNPOSection) -> int:
    """The clock at which a decision's cooldown ends: counted from its replay's end, or from a probe in vain."""
    replay = decision.window or 0 if decision.intervene else 0
    return (decision.clock or 0) + replay + settings.cooldown
