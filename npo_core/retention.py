"""Which checkpoints stay, and why: pure, from a run's records. One rule a reason; what no rule names can go.

A run goes on while `npo gc` reads it. That is safe, for what a run can come to need only shrinks: it trains on from a
leg's last segment, rolls back at most as far as its decisions still allow, and evaluates what it has just saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from npo_core import lineage
from npo_core.inventory import Inventory
from schemas.config import Config
from schemas.records import CheckpointManifest, CheckpointRef

Reason = tuple[CheckpointRef, str]


@dataclass(frozen=True)
class Kept:
    """A checkpoint that stays."""

    leg_id: str
    step: int
    why: str


@dataclass(frozen=True)
class Retention:
    """What becomes of the checkpoints that are there."""

    kept: tuple[Kept, ...]
    removable: tuple[CheckpointManifest, ...]


@dataclass(frozen=True)
class Question:
    """What the rules look at."""

    found: Inventory
    config: Config


def retain(found: Inventory, config: Config) -> Retention:
    """Decides about every checkpoint that is there; the first rule that keeps one gives the reason.

    Args:
        found: the run.
        config: its configuration; `retention` says how generous to be.
    """
    question = Question(found, config)
    reasons: dict[CheckpointRef, str] = {}
    for rule in RULES:
        for ref, why in rule(question):
            reasons.setdefault(ref, why)
    present = found.present
    return Retention(
        tuple(Kept(c.leg_id, c.step, reasons[c.ref]) for c in present if c.ref in reasons),
        tuple(c for c in present if c.ref not in reasons),
    )


def starting_policy(question: Question) -> Iterator[Reason]:
    """Where the run began: the reference of the KL term, and of every comparison."""
    roots = {leg.leg_id for leg in question.found.legs if leg.parent is None}
    yield from ((c.ref, "the starting policy") for c in question.found.checkpoints if c.leg_id in roots)


def tip(question: Question) -> Iterator[Reason]:
    """Where the main line goes on."""
    if line := question.found.line:
        yield line[max(line)].ref, "the tip of the main line"


def last_of_each_leg(question: Question) -> Iterator[Reason]:
    """Where a leg goes on, and a little more. A checkpoint whose segment was not committed yet does not count among
    them, and stays: whoever trains that segment again finds it."""
    count = question.config.retention.keep_last
    why = "the last of its leg" if count == 1 else f"among the last {count} of its leg"
    for leg in question.found.legs:
        own = [c for c in question.found.present if c.leg_id == leg.leg_id]
        ends = {segment.stop for segment in question.found.segments[leg.leg_id]}
        yield from ((c.ref, "its segment is not committed") for c in own if c.step not in ends)
        yield from ((c.ref, why) for c in [c for c in own if c.step in ends][-count:])


def parents(question: Question) -> Iterator[Reason]:
    """Where legs begin."""
    for leg in question.found.legs:
        if leg.parent is not None:
            yield leg.parent, f"leg {leg.leg_id} starts from it"


def guides(question: Question) -> Iterator[Reason]:
    """The policies of guides, and where a guide that no leg has replayed yet will roll back to."""
    replayed = {leg.guide_id for leg in question.found.legs}
    line = question.found.line
    for guide in question.found.guides:
        yield guide.spec.checkpoint, f"guide {guide.guide_id} comes from it"
        if guide.guide_id not in replayed and guide.spec.start in line:
            yield line[guide.spec.start].ref, f"guide {guide.guide_id} is not replayed from it yet"


def interventions(question: Question) -> Iterator[Reason]:
    """Where the configuration rolls back to."""
    line = question.found.line
    if question.config.algorithm.method == "npo":
        for intervention in question.config.future.interventions:
            if intervention.start in line:
                yield line[intervention.start].ref, "an intervention of the configuration starts from it"


def decided_rollbacks(question: Question) -> Iterator[Reason]:
    """What a decision to roll back needs until its replay is a leg of its own."""
    for decision in question.found.decisions:
        if decision.intervene and decision.parent is not None:
            yield decision.parent, f"the decision at step {decision.step} rolls back to it"
        if decision.intervene and decision.guide is not None:
            yield decision.guide, f"the decision at step {decision.step} makes it the guide"


def possible_rollbacks(question: Question) -> Iterator[Reason]:
    """Where AutoNPO may still roll back to. Each rollback is replayed to where it was decided before the next one is
    thought of, so none ever starts from before today's tip, or goes farther than `lookback` from it."""
    settings, line = question.config.autonpo, question.found.line
    if question.config.algorithm.method != "autonpo" or not line:
        return
    spent = sum(decision.intervene for decision in question.found.decisions if decision.source == "autonpo")
    if spent < settings.max_interventions:
        first = max(line) - settings.lookback
        yield from ((c.ref, "AutoNPO may roll back to it") for step, c in line.items() if step >= first)


def best(question: Question) -> Iterator[Reason]:
    """The main line's best evaluated checkpoint, the latest among equals."""
    present = {checkpoint.ref for checkpoint in question.found.present}
    line = {checkpoint.ref for checkpoint in question.found.line.values()} & present
    scored = [e for e in question.found.evaluations if e.checkpoint in line and e.benchmark is None]
    if scored:
        top = max(scored, key=lambda evaluation: (evaluation.accuracy, evaluation.checkpoint.step))
        yield top.checkpoint, f"the main line's best, accuracy {top.accuracy:.3f}"


def due_evaluations(question: Question) -> Iterator[Reason]:
    """What the configuration wants evaluated and nobody has."""
    evaluation, record = question.config.evaluation, question.found.record
    done = {found.eval_id for found in question.found.evaluations}
    for step, checkpoint in question.found.line.items():
        due = evaluation.every and step % evaluation.every == 0
        if due and lineage.eval_id(checkpoint.ref, evaluation.samples, record, evaluation.greedy) not in done:
            yield checkpoint.ref, "its evaluation is due"


def multiples(question: Question) -> Iterator[Reason]:
    """Every so many steps of the main line."""
    every = question.config.retention.keep_every
    if every:
        kept = (c for step, c in question.found.line.items() if step % every == 0)
        yield from ((c.ref, f"a multiple of {every} steps of the main line") for c in kept)


RULES: tuple[Callable[[Question], Iterator[Reason]], ...] = (
    starting_policy,
    tip,
    parents,
    guides,
    interventions,
    decided_rollbacks,
    possible_rollbacks,
    best,
    due_evaluations,
    last_of_each_leg,
    multiples,
)
"""In the order in which they give the reason: what a run needs comes before what it may keep."""
