"""The benchmarks compare equal work: the same prompts in the same order, as many rollouts, one update a step."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from npo_core.config_file import load_config
from npo_core.controller import check as look
from npo_core.interfaces import NearFutureError
from npo_core.monitor import observe
from schemas.decisions import DecisionCode, MonitorState
from schemas.future import AutoNPOSection
from tests.bench import alarms, arms, paired, study, tables
from tests.bench.ours import OurTrainer
from tests.bench.runs import Ending, jobs_of
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
    arms = {"GRPO": {0: grpo, 1: grpo}, "NPO": {0: fast, 1: never}}

    result = paired.compared(arms, ["GRPO"])

    assert result["targets"][0] == pytest.approx(0.5), "mean of the evaluations at steps 40, 50 and 60 of 100"
    first, npo = result["arms"]["GRPO"], result["arms"]["NPO"]
    assert first["cost"] == {"main_steps": [60, 60], "trained_steps": [60, 60], "total_tokens": [6000, 6000]}
    assert first["censored"] == []
    assert first["difference"] == {}
    assert npo["cost"] == {"main_steps": [40, 100], "trained_steps": [80, 140], "total_tokens": [8000, 14000]}
    assert npo["censored"] == [1], "counted as reached at its end, step 100"
    assert npo["ratio"]["main_steps"].value == pytest.approx(math.sqrt(1.5 * 0.6))
    assert npo["ratio"]["total_tokens"].value == pytest.approx(math.sqrt(0.75 * 6000 / 14000))
    assert first["final_accuracy"].value == pytest.approx(0.9)
    assert npo["difference"]["GRPO"].value == pytest.approx((0.1 - 0.8) / 2)
    assert npo["difference"]["GRPO"].low == pytest.approx(-0.8), "the worse seed drawn twice"
    at_40 = next(r for r in paired.equal_cost(arms, "GRPO")["trained_steps"] if r["step"] == 40)
    assert at_40["accuracy"]["NPO"] == pytest.approx(0.05), "the scout alone took 40 steps: the start was evaluated"
    shown = tables.summary(result)
    assert "≥ 70" in shown, "mean of 40 and 100 main steps, of which the latter did not suffice"
    assert "1 of 2" in shown


def test_at_equal_cost_an_arm_leaves_the_table_where_one_of_its_runs_has_ended() -> None:
    long, short = evaluations([0.1 * n for n in range(9)], 0), evaluations([0.2] * 5, 0)
    longest = evaluations([0.1 * n for n in range(10)], 0)
    arms = {"short": {0: short, 1: long}, "other": {0: long, 1: long}, "longer": {0: long, 1: longest}}

    rows = paired.equal_cost(arms, "longer")["main_steps"]

    assert [row["step"] for row in rows] == list(range(0, 90, 10)), "up to where the shortest of its seeds ends"
    assert [set(row["difference"]) for row in rows[4:6]] == [{"short", "other"}, {"other"}]
    assert rows[4]["difference"]["short"].value == pytest.approx((0.2 - 0.4) / 2)
    shown = tables.at_equal_cost({"main_steps": rows}, "longer", "means")
    assert "| 50 | 50 | 0.500 | – | 0.500" in shown


def test_steadied_curves_average_three_evaluations() -> None:
    (points,) = paired.steadied({0: evaluations([0.0, 0.3, 0.6, 0.9], 0)}).values()

    assert points["step"].to_list() == [20, 30]
    assert points["accuracy"].to_list() == pytest.approx([0.3, 0.6])


def test_longer_grpo_takes_as_many_steps_as_the_other_arm_trained_in_all() -> None:
    ends = {3: Ending({}, 0.0, 480, 655, 9, 1), 4: Ending({}, 0.0, 480, 480, 9, 0)}

    more = study.longer(ends, arms.LATE[0])

    steps = {job.seed: load_config(arms.CONFIGS[job.arm.method], job.arm.overrides).run.total_steps for job in more}
    assert steps == {3: 660, 4: 480}, "up to the next evaluation, every 10 steps"


@pytest.mark.parametrize("name", study.STUDIES)
def test_the_arms_of_a_study_are_valid_and_each_has_runs_of_its_own(name: str) -> None:
    chosen = study.STUDIES[name][0]

    recipes = [load_config(arms.CONFIGS[arm.method], arm.overrides).recipe() for arm in chosen]

    assert all(one != other for one, other in itertools.combinations(recipes, 2)), "two arms are the same"
    jobs = jobs_of(chosen, [0, 1])
    assert len({job.name for job in jobs}) == len(jobs) == 2 * len(chosen)
    assert len({arm.name for arm in chosen}) == len(chosen)


def test_an_override_of_an_unknown_arm_is_refused() -> None:
    with pytest.raises(NearFutureError, match="no arm 'npo'; the arms are 'GRPO', 'NPO'"):
        arms.changed(arms.REPORT, [], [("npo", "future.k=4")])
    changed = arms.changed(arms.REPORT, ["run.total_steps=200"], [("NPO", "future.k=4")])
    assert [arm.overrides for arm in changed] == [("run.total_steps=200",), ("run.total_steps=200", "future.k=4")]


def test_a_warning_is_false_while_held_out_accuracy_still_rises() -> None:
    # Rises until step 100 and is flat from there to step 200.
    points = evaluations([min(n, 10) * 0.05 for n in range(21)], 0)

    assert alarms.still_improves(points, 60) is True
    assert alarms.still_improves(points, 100) is True, "what came before it was lower on average"
    assert alarms.still_improves(points, 140) is False, "+0.0125: 90 and 100 to 140 against 150 to 200, all flat"
    assert alarms.still_improves(points, 150) is None, "the run ends before step 210"


def test_alarms_count_first_warnings_and_all() -> None:
    points = evaluations([min(n, 10) * 0.05 for n in range(21)], 0)
    looks = range(40, 201, 20)
    early = {at: at in (60, 140) for at in looks}
    late = {at: at >= 180 for at in looks}
    quiet = dict.fromkeys(looks, False)

    found = alarms.judged({0: early, 1: late, 2: quiet}, dict.fromkeys((0, 1, 2), points))

    assert (found["runs"], found["alarmed"], found["first"]) == (3, 2, 120.0)
    assert (found["first_false"], found["known"]) == (1, 2), "the first warning of seed 1 is too late to judge"
    assert (found["false"], found["judged"]) == (1, 2)
    assert (found["improving"], found["looks"]) == (3 * 5, 3 * 6), "looks at 40, …, 120 of 40, …, 140"


@pytest.mark.parametrize(
    ("reward_gain", "entropy_gain", "trend_bound", "averages", "with_trend"),
    [
        (0.0, -0.1, 0.01, True, True),
        (0.0, -0.1, 0.02, True, False),
        (0.0, 0.1, 0.01, False, False),
        (0.02, -0.1, 0.01, False, False),
    ],
)
def test_a_trigger_with_and_without_the_trend(
    reward_gain: float, entropy_gain: float, trend_bound: float, averages: bool, with_trend: bool
) -> None:
    seen = {"reward_gain": reward_gain, "entropy_gain": entropy_gain, "trend_bound": trend_bound}
    settings = AutoNPOSection(min_gain=0.015)

    assert alarms.Trigger("", averages_only=True).warns(seen, settings) is averages
    assert alarms.Trigger("").warns(seen, settings) is with_trend


def test_the_trigger_with_the_trend_is_the_controllers() -> None:
    rng = np.random.default_rng(0)
    settings = AutoNPOSection(patience=5, trend_steps=10)
    state, codes = MonitorState(), set()
    for step in range(200):
        state = observe(state, step, 0.5 + 0.1 * rng.normal(), 1.0 + 0.1 * rng.normal(), (), settings)
        verdict = look(state, step + 1, (), settings)
        if "reward_gain" in verdict.numbers:
            codes.add(verdict.code)
            assert alarms.Trigger("").warns(verdict.numbers, settings) is (verdict.code is DecisionCode.WARNING)
    assert codes == {
        DecisionCode.WARNING,
        DecisionCode.TREND_RISES,
        DecisionCode.ENTROPY_HOLDS,
        DecisionCode.REWARD_RISES,
    }
