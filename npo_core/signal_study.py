"""Q(Δ), V(Δ) and S(Δ) of a finished run, measured on its own checkpoints (NPO, arXiv 2604.20733, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from npo_core.confirm import Asked, ask
from npo_core.interfaces import ConfigurationError, Generator, NearFutureError
from npo_core.segment import LegContext
from npo_core.signal import Band, compare_policies, coverage, estimate
from npo_core.streams import philox
from schemas import tables
from schemas.decisions import Estimate
from schemas.records import CheckpointRef, SignalSpec

DISTANCES = 8
"""Most distances of a step where none are asked for."""


@dataclass(frozen=True)
class Study:
    """What `measure_signal` returns: rows by `schemas.tables.SIGNAL`, and the tokens that they cost."""

    table: pa.Table
    tokens: int


def grid(
    saved: Mapping[int, CheckpointRef], steps: Sequence[int], lookaheads: Sequence[int]
) -> tuple[tuple[CheckpointRef, CheckpointRef], ...]:
    """The points (π(t), π(t+Δ)) of a study, by t and Δ.

    Args:
        saved: checkpoints of the main line, by step.
        steps: the steps t; empty: the first one, and the one nearest to the middle.
        lookaheads: the distances; empty: at most `DISTANCES` of those that there are, spread evenly.

    Raises:
        NearFutureError: there are no two checkpoints to compare.
        ConfigurationError: a step has no checkpoint, or no distance leads to one; names those that there are.
    """
    at = sorted(saved)
    if len(at) < 2:
        raise NearFutureError(
            f"a study compares checkpoints of the main line, and it has {len(at)}; train on with `npo run`"
        )
    # In order and once each: however it is asked for, the same grid is the same study.
    chosen = sorted(set(steps) or {at[0], min(at, key=lambda step: abs(step - at[-1] / 2))})
    if absent := [step for step in chosen if step not in saved]:
        raise ConfigurationError(f"--step {absent[0]}: the main line has no checkpoint there; its steps: {_words(at)}")
    points = []
    for step in chosen:
        ahead = [other - step for other in at if other > step]
        wanted = [far for far in ahead if far in lookaheads] if lookaheads else _spread(ahead)
        points += [(saved[step], saved[step + far]) for far in wanted]
    if not points:
        option = f"--lookahead {_words(lookaheads)}" if lookaheads else f"--step {_words(chosen)}"
        far = "so far " if lookaheads else ""
        raise ConfigurationError(
            f"{option}: no checkpoint lies {far}ahead of step {_words(chosen)}; the main line's steps: {_words(at)}"
        )
    return tuple(points)


def measure_signal(
    spec: SignalSpec,
    context: LegContext,
    holding: Callable[[CheckpointRef], Generator],
    pool: Sequence[str],
    on_points: Callable[[int], None],
) -> Study:
    """For each step t: π(t) answers a draw of training prompts, and fails those whose group accuracy is at most the
    threshold. It answers these once more, since prompts selected for failure regress to the mean (`baseline`); then
    each π(t+Δ) answers them (Q), and π(t) scores its answers (V, from KL(π(t+Δ) ‖ π(t)) sampled from π(t+Δ)).

    Each of these samplings has random streams of its own: the future policies share theirs, so that distances are
    compared under equal random numbers.

    Args:
        context: of the run; its guide and monitor are not read.
        holding: the generator, holding a checkpoint's policy.
        pool: prompt_ids of the training pool.
        on_points: called with the number of points done.
    """
    rows: list[dict[str, Any]] = []
    tokens = 0
    for now in dict.fromkeys(now for now, _ in spec.points):
        order = philox("signal", spec.seed, now.step).permutation(len(pool))[: spec.prompts]
        prompts = [pool[n] for n in order]
        first = ask(context, holding(now), now.step, prompts, spec.samples)
        failing = first.correct_PG.mean(axis=1) <= spec.mistake_threshold
        failed = [prompt for prompt, fails in zip(prompts, failing, strict=True) if fails]
        bands = [Band(len(failed), tuple(range(len(failed))))]
        again = ask(context, holding(now), now.step, failed, spec.samples, first_slot=spec.samples) if failed else None
        tokens += first.tokens + (again.tokens if again else 0)
        for _, ahead in (point for point in spec.points if point[0] == now):
            row: dict[str, Any] = {
                "step": now.step,
                "lookahead": ahead.step - now.step,
                "prompts": len(prompts),
                "failed": len(failed),
                "samples": len(failed) * spec.samples,
            }
            if again is not None:
                future = ask(context, holding(ahead), now.step, failed, spec.samples, first_slot=2 * spec.samples)
                tokens += future.tokens
                row |= _estimates(spec, context, future, again, holding(now), bands)
            rows.append(row)
            on_points(len(rows))
    return Study(pa.Table.from_pylist(rows, tables.SIGNAL), tokens)


def _estimates(
    spec: SignalSpec, context: LegContext, future: Asked, again: Asked, now: Generator, bands: Sequence[Band]
) -> dict[str, float]:
    past_logps = now.score(future.prompt_ids, future.completion_ids, context.sampling.temperature)
    found = estimate(compare_policies(future.correct_PG, future.logprobs, past_logps), bands, 1, spec.kappa, spec.seed)
    parts: dict[str, Estimate | None] = {
        "quality": found.quality,
        "baseline": coverage(again.correct_PG, bands, 1, spec.seed),
        "pass_rate": found.pass_rate,
        "kl_per_token": found.kl_per_token,
        "relative_ess": found.relative_ess,
        **found.variance,
        **{f"signal_{name}": value for name, value in found.signal.items()},
    }
    return {
        f"{name}{bound}": getattr(part, field)
        for name, part in parts.items()
        if part is not None
        for bound, field in (("", "value"), ("_low", "low"), ("_high", "high"))
    }


def _spread(values: Sequence[int]) -> list[int]:
    """At most `DISTANCES` of the values, from the first to the last."""
    if len(values) <= DISTANCES:
        return list(values)
    return sorted({values[round(n * (len(values) - 1) / (DISTANCES - 1))] for n in range(DISTANCES)})


def _words(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
