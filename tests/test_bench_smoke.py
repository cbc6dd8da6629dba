"""The benchmarks compare equal work: the same prompts in the same order, as many rollouts, one update a step."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from tests.bench import study
from tests.bench.ours import OurTrainer
from tests.bench.trl_runner import Recorder, check, train_trl
from tests.bench.work import StepRecord, small_work


@pytest.mark.slow
def test_both_sides_roll_out_the_same_prompts_in_the_same_order() -> None:
    work = small_work(seed=3, learning_rate=1e-4)

    theirs, ours = train_trl(work, 2), OurTrainer(work).train(2)

    for step in range(2):
        expected = [p.prompt_id for p in work.prompts.batch(step) for _ in range(8)]
        assert len(expected) == 256
        for side in (theirs, ours):
            assert list(side[step].prompt_ids) == expected
            assert side[step].step == step
            assert math.isfinite(side[step].reward)
            assert 256 <= side[step].tokens <= 256 * 14
    assert theirs[0].prompt_ids != theirs[1].prompt_ids
    # One policy, not two: the means of 512 rollouts of the warm start differ by sampling alone.
    rewards = [np.mean([record.reward for record in side]) for side in (theirs, ours)]
    assert abs(rewards[0] - rewards[1]) < 0.08


@pytest.mark.parametrize(
    ("fault", "message"),
    [("order", "another order"), ("generations", "one generation"), ("updates", "one update"), ("reward", "reward")],
)
def test_other_work_by_trl_is_refused(fault: str, message: str) -> None:
    work = small_work(seed=0, learning_rate=1e-4)
    recorder = Recorder(work, lambda _: None)
    rows = work.row_prompts(0)
    recorder.records = [StepRecord(0, rows, 0.25, 2048, 2048, 0.1, 0.1, 0.1)]
    recorder.generations, recorder.optimizer_steps = [1], [1]
    logged = {"reward": 0.25, "learning_rate": 1e-4, "completions/mean_length": 8.0, "grad_norm": 0.5}
    check(work, recorder, [logged], 1)

    if fault == "order":
        recorder.records = [replace(recorder.records[0], prompt_ids=rows[::-1])]
    elif fault == "generations":
        recorder.generations = [2]
    elif fault == "updates":
        recorder.optimizer_steps = [4]
    else:
        logged["reward"] = 0.5
    with pytest.raises(RuntimeError, match=message):
        check(work, recorder, [logged], 1)


def evaluations(accuracies: list[float], extra_steps: int) -> pl.DataFrame:
    """A main line evaluated every ten steps, 100 tokens a step, after `extra_steps` of scouting."""
    steps = [10 * n for n in range(len(accuracies))]
    spent = [step + extra_steps if step else 0 for step in steps]
    return pl.DataFrame(
        {"step": steps, "trained_steps": spent, "total_tokens": [100 * s for s in spent], "accuracy": accuracies}
    )


def test_the_study_charges_the_scout_and_says_what_is_censored() -> None:
    grpo = evaluations([0.1 * n for n in range(11)], 0)
    fast = evaluations([min(1.0, 0.2 * n) for n in range(11)], 40)
    never = evaluations([0.1] * 11, 40)

    result = study.reported({0: grpo, 1: grpo}, {0: fast, 1: never})

    first, second = result["pairs"]
    assert first["target"] == pytest.approx(0.5), "mean of the evaluations at steps 40, 50 and 60 of 100"
    assert first["cost"] == {
        "grpo": {"main_steps": 60, "trained_steps": 60, "total_tokens": 6000},
        "npo": {"main_steps": 40, "trained_steps": 80, "total_tokens": 8000},
    }
    assert first["ratio"]["main_steps"] == pytest.approx(1.5)
    assert first["ratio"]["total_tokens"] == pytest.approx(0.75)
    assert result["censored"] == [1]
    assert second["ratio"]["main_steps"] == pytest.approx(0.6), "counted as reached at its end, step 100"
    assert result["speedup"]["main_steps"].value == pytest.approx(math.sqrt(1.5 * 0.6))
    assert result["final_accuracy"]["grpo"].value == pytest.approx(0.9)
    at_40 = next(r for r in result["equal_cost"]["trained_steps"] if r["grpo_step"] == 40)
    assert at_40["npo"] == pytest.approx(0.05), "the scout alone took 40 steps: what was evaluated is the start"
