"""Why AutoNPO did what it did: the controller, run again over a run's stored metrics, beside what was decided then."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from npo_core.artifacts import RunArtifacts
from npo_core.controller import Verdict, check, choose
from npo_core.markdown import text
from npo_core.monitor import observe
from npo_core.rows import Where, frame
from schemas.decisions import Candidate, DecisionCode, DecisionRecord, Estimate, MonitorState
from schemas.future import AutoNPOSection
from schemas.records import LegRecord

UNKNOWN = "what follows is unknown"


@dataclass(frozen=True)
class Moment:
    """A segment's end, where the monitor looks."""

    leg: LegRecord
    step: int
    state: MonitorState
    earlier: tuple[DecisionRecord, ...]
    """The run's decisions before it."""
    made: DecisionRecord | None
    """What was decided here, after a warning."""
    replaying: bool

    def check(self, settings: AutoNPOSection) -> Verdict:
        """What the controller says here."""
        return check(self.state, self.step, self.earlier, settings, self.replaying)


def moments(run: RunArtifacts, settings: AutoNPOSection) -> Iterator[Moment]:
    """Every moment of the run's main lines, abandoned ones included, in the order of training. The states are made
    again from the stored metrics and rollouts, under these settings."""
    legs, decisions = run.legs(), run.decisions()
    order = {leg.leg_id: n for n, leg in enumerate(legs)}
    states: dict[tuple[str, int], MonitorState] = {}
    for n, leg in enumerate(legs):
        if leg.kind not in ("main", "replay") or leg.parent is None:
            continue
        segments = run.segments(leg.leg_id)
        seen = frame(run, segments, "metrics", ("step", "reward", "entropy"))
        metrics = {step: (reward, entropy) for step, reward, entropy in seen.iter_rows()}
        groups = _groups(run, leg)
        state = states.get((leg.parent.leg_id, leg.parent.step), MonitorState())
        window = run.require_guide(leg.guide_id).spec.stop if leg.guide_id else leg.start
        for segment in segments:
            for step in range(segment.start, segment.stop):
                reward, entropy = (float("nan") if value is None else value for value in metrics[step])
                state = observe(state, step, reward, entropy, groups.get(step, ()), settings)
            states[leg.leg_id, segment.stop] = state
            yield Moment(
                leg=leg,
                step=segment.stop,
                state=state,
                earlier=tuple(d for d in decisions if (order.get(d.leg_id, n), d.step) < (n, segment.stop)),
                made=next((d for d in decisions if _is_about(d, leg, segment.stop)), None),
                replaying=segment.stop < window,
            )


def explain(run: RunArtifacts, then: AutoNPOSection, now: AutoNPOSection) -> list[dict[str, Any]]:
    """One row a moment: `leg_id`, `step`, `clock`, `intervene`, `code`, `reason`, `numbers` (what the trigger read),
    and after a probe `lookahead` and `candidates`. `differs` says that the settings `now` decide otherwise than the run
    did; such a row is the last, for what follows is unknown.

    Args:
        then: the run's own settings.
        now: the settings to explain with.
    """
    rows = []
    for moment in moments(run, now):
        verdict, candidates = _verdict(moment, then, now)
        differs = not _same(moment, verdict)
        reason = verdict.reason
        if differs:
            would = "have probed" if verdict.code is DecisionCode.WARNING else f"have decided {verdict.code}"
            reason = f"would {would} here ({reason}); {UNKNOWN}"
        elif moment.made is not None and then == now:
            reason = moment.made.reason
        rows.append(
            {
                "leg_id": moment.leg.leg_id,
                "step": moment.step,
                "clock": int(verdict.numbers["clock"]),
                "intervene": verdict.code is DecisionCode.INTERVENE,
                "code": str(verdict.code),
                "reason": reason,
                "numbers": {name: value for name, value in verdict.numbers.items() if name != "clock"},
                "lookahead": verdict.chosen.lookahead if verdict.chosen else None,
                "candidates": [candidate.model_dump(mode="json") for candidate in candidates],
                "differs": differs,
            }
        )
        if differs:
            break
    return rows


@dataclass(frozen=True)
class Period:
    """Moments of one leg that follow each other with the same outcome, for people."""

    steps: str
    clock: str
    code: str
    reason: str
    """Of the last one."""


def periods(rows: Sequence[dict[str, Any]]) -> list[Period]:
    """The rows of `explain`, quiet ones of one kind together."""
    found = []
    for _, part in itertools.groupby(enumerate(rows), key=_kind):
        group = [row for _, row in part]
        first, last = group[0], group[-1]
        steps, clock = (
            str(last[name]) if len(group) == 1 else f"{first[name]}–{last[name]}" for name in ("step", "clock")
        )
        found.append(Period(steps, clock, last["code"], last["reason"]))
    return found


def _kind(numbered: tuple[int, dict[str, Any]]) -> tuple[Any, ...]:
    number, row = numbered
    quiet = not row["differs"] and not DecisionCode(row["code"]).warned
    return (row["leg_id"], row["code"], -1 if quiet else number)


def rescaled(candidate: Candidate, before: AutoNPOSection, after: AutoNPOSection) -> Candidate:
    """A probed distance under another κ. V̂ of the KL estimators is an exponential in κ, so its estimate and bounds are
    exact; the bounds of Ŝ are those of Q̂ and V̂ together, and thus wider than a bootstrap's."""
    quality = candidate.quality
    if before.kappa == after.kappa or quality is None:
        return candidate
    power = after.kappa / before.kappa
    variance, signal = dict(candidate.variance), dict(candidate.signal)
    for name in (name for name in variance if name.startswith("kl")):
        v = Estimate(**{bound: getattr(variance[name], bound) ** power for bound in ("value", "low", "high")})
        variance[name] = v
        signal[name] = Estimate(value=quality.value / v.value, low=quality.low / v.high, high=quality.high / v.low)
    return candidate.model_copy(update={"variance": variance, "signal": signal})


def _verdict(moment: Moment, then: AutoNPOSection, now: AutoNPOSection) -> tuple[Verdict, Sequence[Candidate]]:
    """What `now` says at a moment; after a probe that was made, by what it measured."""
    verdict = moment.check(now)
    made = moment.made
    if verdict.code is not DecisionCode.WARNING or made is None or _asks_otherwise(then, now):
        return verdict, ()
    candidates = [rescaled(candidate, then, now) for candidate in made.candidates]
    chosen = choose(candidates, now)
    return Verdict(chosen.code, chosen.reason, verdict.numbers, chosen.chosen), candidates


def _same(moment: Moment, verdict: Verdict) -> bool:
    """Whether a verdict lets training go on as it did."""
    made = moment.made
    if made is None:
        return not verdict.code.warned and verdict.code is not DecisionCode.WARNING
    if not verdict.code.warned or made.intervene != (verdict.code is DecisionCode.INTERVENE):
        return False
    return verdict.chosen is None or verdict.chosen.lookahead == made.lookahead


def _asks_otherwise(then: AutoNPOSection, now: AutoNPOSection) -> bool:
    """Whether the probe would have asked other prompts."""
    fields = ("mistake_threshold", "lookback", "pool_capacity", "probe_prompts", "probe_samples")
    return any(getattr(then, name) != getattr(now, name) for name in fields)


def _is_about(decision: DecisionRecord, leg: LegRecord, step: int) -> bool:
    return decision.source == "autonpo" and (decision.leg_id, decision.step) == (leg.leg_id, step)


def _groups(run: RunArtifacts, leg: LegRecord) -> dict[int, list[tuple[str, float]]]:
    """(prompt_id, group accuracy) of a leg's groups, by step."""
    columns = ("step", "prompt_id", "group_accuracy", "slot")
    rows = frame(run, run.segments(leg.leg_id), "rollouts", columns, Where(source="policy")).filter(pl.col("slot") == 0)
    groups: dict[int, list[tuple[str, float]]] = {}
    for step, prompt_id, accuracy, _ in rows.iter_rows():
        groups.setdefault(step, []).append((prompt_id, accuracy))
    return groups


def markdown(decision: DecisionRecord) -> str:
    """A decision for people who read it in Prefect."""
    head = f"**{decision.code}** at step {decision.step} of leg `{decision.leg_id}`: {text(decision.reason)}"
    if not decision.candidates:
        return head
    name = decision.variance or ""
    lines = ["| Δ | mistakes | probed | Q̂ | V̂ | Ŝ |", "|---|---|---|---|---|---|"]
    for c in decision.candidates:
        figures = [c.quality, c.variance.get(name), c.signal.get(name)]
        cells = ("–" if e is None else f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]" for e in figures)
        mark = " **chosen**" if decision.intervene and c.lookahead == decision.lookahead else ""
        lines.append(f"| {c.lookahead}{mark} | {c.pool} | {c.prompts} | {' | '.join(cells)} |")
    return "\n".join([head, "", f"V̂ by `{name}`", "", *lines])
