"""Lineage: pure functions on the records of a run, which is a tree of legs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from npo_core.interfaces import NearFutureError
from schemas.decisions import DecisionRecord
from schemas.digest import digest_json, short
from schemas.records import (
    BenchmarkSpec,
    CheckpointRef,
    GuideManifest,
    GuideSpec,
    Head,
    LegKind,
    LegRecord,
    RunRecord,
    SegmentManifest,
    SignalSpec,
)

LegStatus = Literal["head", "main-line", "cut", "abandoned", "scout"]
"""`head`: the tip of the main line; `main-line`: on it with all its steps; `cut`: on it, and a later leg replaced its
last steps; `abandoned`: off it, a scout apart."""


def leg_id(recipe_digest: str, parent: CheckpointRef | None, kind: LegKind, start: int, guide_id: str | None) -> str:
    """Identity of a leg: the same work asked for twice is the same leg."""
    origin = None if parent is None else [parent.leg_id, parent.step, parent.digest]
    return short(digest_json([recipe_digest, origin, kind, start, guide_id]))


def guide_id(spec: GuideSpec) -> str:
    """Identity of a guide, by its inputs: a retry finds the first committed one."""
    # Younger fields count where they say something new, so that guides from before them keep their identity.
    fields = GuideSpec.model_fields
    silent = {name for name in ("source", "answers") if getattr(spec, name) == fields[name].default}
    return short(digest_json(spec.model_dump(mode="json", exclude=silent)))


def shard_id(guide_id: str, prompt_ids: Sequence[str]) -> str:
    """Identity of a shard of a guide, by the prompts that it asks."""
    return short(digest_json([guide_id, *prompt_ids]))


def eval_id(
    checkpoint: CheckpointRef,
    samples_per_prompt: int,
    run: RunRecord,
    greedy: bool = False,
    benchmark: BenchmarkSpec | None = None,
) -> str:
    """Identity of an evaluation. Prompts, verifier, seed and sampling are in the run's recipe, but for a benchmark's.

    Args:
        greedy: whether it asks at temperature 0 too.
        benchmark: None: the run's held-out prompts.
    """
    parts: list[object] = [run.recipe_digest, [checkpoint.leg_id, checkpoint.step, checkpoint.digest]]
    parts.append(samples_per_prompt)
    if greedy or benchmark is not None:
        # What is younger counts where it says something new, so that older evaluations keep their identity.
        parts.append([greedy, None if benchmark is None else benchmark.model_dump(mode="json")])
    return short(digest_json(parts))


def signal_id(spec: SignalSpec) -> str:
    """Identity of a study of Q, V and S, by its inputs."""
    return short(digest_json(spec.model_dump(mode="json")))


@dataclass(frozen=True)
class Stretch:
    """The steps of one leg that lie on the main line."""

    leg: LegRecord
    start: int
    stop: int | None
    """First step after them; None: the leg is the head and goes as far as it has segments."""

    def holds(self, step: int) -> bool:
        """Whether the leg's `step` lies on the main line."""
        return self.start <= step and (self.stop is None or step < self.stop)

    def saves(self, step: int) -> bool:
        """Whether the leg's checkpoint at `step` lies on the main line: that at the stretch's stop too, for the next
        leg starts from it."""
        return self.start <= step and (self.stop is None or step <= self.stop)


def main_line(legs: Iterable[LegRecord], head: Head | None) -> list[Stretch]:
    """The legs from the root to the head's leg. A child that starts at s cuts its parent's steps ≥ s.

    Raises:
        NearFutureError: a leg is missing, or legs are each other's ancestors.
    """
    if head is None:
        return []
    by_id = {leg.leg_id: leg for leg in legs}
    line: list[Stretch] = []
    wanted: str | None = head.leg_id
    stop: int | None = None
    while wanted is not None:
        leg = by_id.pop(wanted, None)
        if leg is None:
            seen = any(stretch.leg.leg_id == wanted for stretch in line)
            problem = "is its own ancestor" if seen else "is missing"
            raise NearFutureError(f"leg {wanted} of the main line {problem}; restore its leg.json from a copy")
        line.append(Stretch(leg, leg.start, stop))
        wanted, stop = (leg.parent.leg_id, leg.parent.step) if leg.parent else (None, None)
    return line[::-1]


def ancestors(legs: Iterable[LegRecord], leg_id: str) -> set[str]:
    """The legs that a leg descends from, itself included."""
    return {stretch.leg.leg_id for stretch in main_line(legs, Head(leg_id=leg_id, epoch=0))}


def status(leg: LegRecord, line: Sequence[Stretch], segments: Sequence[SegmentManifest]) -> LegStatus:
    """What became of a leg, by the main line and by the leg's own segments."""
    stretch = next((stretch for stretch in line if stretch.leg.leg_id == leg.leg_id), None)
    if stretch is None:
        return "scout" if leg.kind == "scout" else "abandoned"
    if stretch.stop is None:
        return "head"
    return "cut" if any(segment.stop > stretch.stop for segment in segments) else "main-line"


def line_stop(line: Sequence[Stretch], segments: Mapping[str, Sequence[SegmentManifest]]) -> int:
    """Steps that the main line has behind it: 0 for an empty one."""
    if not line:
        return 0
    tip = line[-1].leg
    return max((segment.stop for segment in segments.get(tip.leg_id, ())), default=tip.start)


@dataclass(frozen=True)
class Tokens:
    """Completion tokens that a run sampled for training. The three are disjoint: their sum is the total."""

    policy: int
    """Rollouts of the main line's steps."""
    guide: int
    """Answers of guides and of AutoNPO's probes, wrong ones included."""
    discarded: int
    """Rollouts of scouts, of abandoned legs and of steps that were cut off."""


def count_tokens(
    line: Sequence[Stretch],
    segments: Mapping[str, Sequence[SegmentManifest]],
    guides: Iterable[GuideManifest],
    decisions: Iterable[DecisionRecord],
) -> Tokens:
    """Token counts of a run. Legs part at segment ends, where checkpoints are.

    Args:
        line: the main line.
        segments: every leg's segments, by leg.
        guides: all guides.
        decisions: all decisions.
    """
    stretches = {stretch.leg.leg_id: stretch for stretch in line}
    policy = discarded = 0
    for segment in (segment for group in segments.values() for segment in group):
        stretch = stretches.get(segment.leg_id)
        if stretch is not None and stretch.holds(segment.start):
            policy += segment.tokens_policy
        else:
            discarded += segment.tokens_policy
    asked = sum(guide.tokens_guide for guide in guides) + sum(decision.tokens_probe for decision in decisions)
    return Tokens(policy, asked, discarded)


@dataclass(frozen=True)
class StepCost:
    """What it took, in all, to have the main line's policy after one of its steps."""

    leg_id: str
    step: int
    total_tokens: int
    """Completion tokens: the line's own, and those of every scout and guide that it depended on, up to here."""
    total_steps: int
    """Trained steps, likewise."""


def line_costs(
    line: Sequence[Stretch],
    legs: Iterable[LegRecord],
    guides: Iterable[GuideManifest],
    policy_tokens: Mapping[str, Mapping[int, int]],
    decisions: Iterable[DecisionRecord],
) -> list[StepCost]:
    """Cumulative costs of the main line's steps, in order. A guide is paid for, with the steps behind its checkpoint,
    where the first leg that uses it begins; a probe with the step before it; nothing is paid for twice. What no step of
    the line depended on is not in it (see `Tokens.discarded`).

    Args:
        line: the main line.
        legs: all legs.
        guides: all guides.
        policy_tokens: completion tokens that the policy sampled, by leg and step; ends where the leg does.
        decisions: all decisions.
    """
    probes = {(d.leg_id, d.step - 1): d.tokens_probe for d in decisions if d.tokens_probe}
    ledger = _Ledger({leg.leg_id: leg for leg in legs}, {g.guide_id: g for g in guides}, policy_tokens, probes)
    costs = []
    for stretch in line:
        own = policy_tokens.get(stretch.leg.leg_id, {})
        for step in sorted(step for step in own if stretch.holds(step)):
            ledger.pay(stretch.leg.leg_id, step + 1)
            costs.append(StepCost(stretch.leg.leg_id, step, ledger.tokens, ledger.steps))
    return costs


class _Ledger:
    """Sums what checkpoints depend on. A leg's paid steps are always a prefix, so one mark a leg is enough."""

    def __init__(
        self,
        legs: Mapping[str, LegRecord],
        guides: Mapping[str, GuideManifest],
        policy_tokens: Mapping[str, Mapping[int, int]],
        probes: Mapping[tuple[str, int], int],
    ) -> None:
        self.legs, self.guides, self.policy_tokens, self.probes = legs, guides, policy_tokens, probes
        self.paid: dict[str, int] = {}
        self.paid_guides: set[str] = set()
        self.tokens = self.steps = 0

    def pay(self, leg_id: str, stop: int) -> None:
        """Adds what the checkpoint (leg, stop) took and is not yet paid."""
        leg = self.legs[leg_id]
        if leg_id not in self.paid:
            self.paid[leg_id] = leg.start
            if leg.parent is not None:
                self.pay(leg.parent.leg_id, leg.parent.step)
            if leg.guide_id is not None and leg.guide_id not in self.paid_guides:
                self.paid_guides.add(leg.guide_id)
                guide = self.guides[leg.guide_id]
                self.pay(guide.spec.checkpoint.leg_id, guide.spec.checkpoint.step)
                self.tokens += guide.tokens_guide
        own = self.policy_tokens.get(leg_id, {})
        for step in range(self.paid[leg_id], stop):
            self.tokens += own[step] + self.probes.get((leg_id, step), 0)
            self.steps += 1
        self.paid[leg_id] = max(self.paid[leg_id], stop)
