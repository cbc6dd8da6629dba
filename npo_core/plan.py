"""What a run will do, from its configuration alone: its stages in order, and what they generate and store at most.

Counts are bounds: every completion reaches its limit, no scout stops early, and AutoNPO rolls back as often and as far
as it may. A run that is there already finds what it has, and does the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Literal

from schemas.config import Config

StageKind = Literal["warm-start", "main", "scout", "guide", "replay", "probe"]
LEGS = ("main", "scout", "replay")
"""Stages that train, each a leg of its own."""
MAIN_LINE = ("main", "replay")


@dataclass(frozen=True)
class Sizes:
    """How many prompts there are."""

    train: int
    held_out: int


@dataclass(frozen=True)
class Stage:
    """One stage. Its counts are those of all the `times` together."""

    kind: StageKind
    start: int | None
    """Its first step, of a guide the window's; None where AutoNPO decides it."""
    stop: int | None
    """The step after its last one."""
    steps: int = 0
    """Steps that it trains."""
    times: int = 1
    """How often it is run, at most."""
    prompts: int = 0
    """Prompts that it asks; one that comes again counts again."""
    rollouts: int = 0
    tokens: int = 0
    """Completion tokens that it generates."""
    rows: int = 0
    """Trajectories that it stores, evaluations' apart."""
    checkpoints: int = 0
    """Checkpoints that it saves."""
    evaluations: int = 0
    """Checkpoints of these that are evaluated."""


@dataclass(frozen=True)
class Plan:
    """The whole run."""

    method: str
    stages: tuple[Stage, ...]
    evaluations: int
    evaluation_rollouts: int
    """Of all evaluations."""
    evaluation_tokens: int
    kept_checkpoints: int
    """Most that `npo gc` leaves when the run is done."""

    @property
    def checkpoints(self) -> int:
        """All that are saved, the starting policy's included."""
        return sum(stage.checkpoints for stage in self.stages)

    @property
    def trained_steps(self) -> int:
        """Of all legs."""
        return sum(stage.steps for stage in self.stages)

    @property
    def rows(self) -> int:
        """Trajectories that are stored."""
        return sum(stage.rows for stage in self.stages) + self.evaluation_rollouts

    @property
    def tokens(self) -> dict[str, int]:
        """Completion tokens by what they are for."""
        works = {"main_line": MAIN_LINE, "scouts": ("scout",), "guides": ("guide",), "probes": ("probe",)}
        found = {name: sum(s.tokens for s in self.stages if s.kind in kinds) for name, kinds in works.items()}
        found["evaluations"] = self.evaluation_tokens
        return {**found, "total": sum(found.values())}


def make_plan(config: Config, sizes: Sizes) -> Plan:
    """The plan of a run that begins."""
    stages = (
        _begin(),
        *(_autonpo(config, sizes) if config.algorithm.method == "autonpo" else _scheduled(config, sizes)),
    )
    end, every = config.run.total_steps, config.evaluation.every
    # The end is evaluated in any case; within its leg if it is a multiple.
    evaluations = sum(stage.evaluations for stage in stages) + (every == 0 or end % every != 0)
    answers = sizes.held_out * (config.evaluation.samples + config.evaluation.greedy)
    return Plan(
        method=config.algorithm.method,
        stages=stages,
        evaluations=evaluations,
        evaluation_rollouts=evaluations * answers,
        evaluation_tokens=evaluations * answers * config.rollout.max_new_tokens,
        kept_checkpoints=_kept(stages, config),
    )


def segments(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """The segments of steps [start, stop): boundaries lie at multiples of `size`, wherever a leg starts."""
    bounds = [start, *range((start // size + 1) * size, stop, size), stop]
    return list(itertools.pairwise(bounds))


def _begin() -> Stage:
    return Stage("warm-start", 0, 0, checkpoints=1, evaluations=1)


def _scheduled(config: Config, sizes: Sizes) -> Iterator[Stage]:
    """GRPO's and NPO's stages."""
    reached = 0
    for intervention in config.future.interventions:
        if reached < intervention.start:
            yield _leg("main", reached, intervention.start, config)
        ahead = intervention.start + intervention.lookahead
        yield _leg("scout", intervention.start, ahead, config.scout())
        yield _guide(intervention.start, intervention.stop, config, sizes)
        yield _leg("replay", intervention.start, intervention.stop, config)
        reached = intervention.stop
    if reached < config.run.total_steps:
        yield _leg("main", reached, config.run.total_steps, config)


def _leg(kind: Literal["main", "scout", "replay"], start: int, stop: int, config: Config) -> Stage:
    steps, every = stop - start, config.evaluation.every
    own = segments(start, stop, config.run.segment_steps)
    due = kind in MAIN_LINE and every
    evaluated = sum(end % every == 0 for _, end in own) if due else 0
    return Stage(
        kind, start, stop, steps, 1, **_sampled(kind, steps, config), checkpoints=len(own), evaluations=evaluated
    )


def _sampled(kind: str, steps: int, config: Config) -> dict[str, int]:
    """Prompts, rollouts, tokens and rows of trained steps. A replay's groups store the guide's rows beside theirs."""
    rollout = config.rollout
    prompts = steps * rollout.prompts_per_step
    rollouts = prompts * rollout.group_size
    mixed = prompts * config.algorithm.guide_slots if kind == "replay" else 0
    tokens = rollouts * rollout.max_new_tokens
    return {"prompts": prompts, "rollouts": rollouts, "tokens": tokens, "rows": rollouts + mixed}


def _guide(start: int, stop: int, config: Config, sizes: Sizes) -> Stage:
    prompts = min(sizes.train, (stop - start) * config.rollout.prompts_per_step)
    return Stage("guide", start, stop, **_answered(prompts, config))


def _answered(prompts: int, config: Config) -> dict[str, int]:
    """What a guide asks for so many prompts, and keeps. Reused rollouts cost nothing more."""
    rollouts = 0 if config.future.source == "leg" else prompts * config.future.k
    tokens, rows = rollouts * config.rollout.max_new_tokens, prompts * config.algorithm.guide_slots
    return {"prompts": prompts, "rollouts": rollouts, "tokens": tokens, "rows": rows}


def _autonpo(config: Config, sizes: Sizes) -> Iterator[Stage]:
    """The main line, and what each rollback that AutoNPO may decide on adds."""
    settings, end, size = config.autonpo, config.run.total_steps, config.run.segment_steps
    line = _leg("main", 0, end, config)
    yield line
    times = settings.max_interventions
    # Training rolls back to checkpoints at multiples of the segment's size.
    back = min(settings.lookback, end) // size * size
    if not times or not back:
        return
    warnings = line.checkpoints + times
    asked = warnings * 2 * settings.probe_prompts  # today's policy, and the past one again
    rollouts = asked * settings.probe_samples
    tokens = rollouts * config.rollout.max_new_tokens
    yield Stage("probe", None, None, times=warnings, prompts=asked, rollouts=rollouts, tokens=tokens)
    prompts = min(sizes.train, settings.pool_capacity, back * config.rollout.prompts_per_step)
    yield Stage("guide", None, None, times=times, **_answered(times * prompts, config))
    every = config.evaluation.every
    yield Stage(
        "replay",
        None,
        None,
        times * back,
        times,
        **_sampled("replay", times * back, config),
        checkpoints=times * (back // size),
        evaluations=times * ceil(back / every) if every else 0,
    )


def _kept(stages: Iterable[Stage], config: Config) -> int:
    """Checkpoints that stay after the run's last step, by the rules of `npo_core.retention`, counted."""
    legs = [stage for stage in stages if stage.kind in LEGS]
    saved = 1 + sum(leg.checkpoints for leg in legs)
    last, every = config.retention.keep_last, config.retention.keep_every
    best = 1
    if config.algorithm.method == "autonpo":
        times = sum(leg.times for leg in legs if leg.kind == "replay")
        roots = 1 + 2 * times  # the start, and of each rollback where it came from and where it went to
        possible = config.autonpo.lookback // config.run.segment_steps + 1
        multiples = config.run.total_steps // every if every else 0
        return min(saved, roots + last * (2 * times + 1) + possible + multiples + best)
    line = {0: (-1, 0)}
    kept = {line[0]}
    for number, leg in enumerate(legs):
        assert leg.start is not None
        assert leg.stop is not None
        kept.add(line[leg.start])
        own = {stop: (number, stop) for _, stop in segments(leg.start, leg.stop, config.run.segment_steps)}
        kept |= set(list(own.values())[-last:])
        if leg.kind in MAIN_LINE:
            line = {step: name for step, name in line.items() if step <= leg.start} | own
    if every:
        kept |= {name for step, name in line.items() if step % every == 0}
    return min(saved, len(kept) + best)
