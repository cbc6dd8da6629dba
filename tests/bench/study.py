"""The study: GRPO, NPO and AutoNPO by a protocol that was fixed before anything was measured.

`tune` trains GRPO at each learning rate of a declared grid on the tuning seeds and picks the best by GRPO's own final
accuracy. The others train the arms of `tests.bench.arms` on the report seeds, paired by seed with GRPO, and say what
GRPO's accuracy at 60 % of its budget cost each and where each ended (`tests.bench.paired`): `report` GRPO and NPO;
`ablation` NPO with one setting changed at a time; `futures` cheaper futures; `late` a regime that is long enough for a
plateau. `alarms` asks of GRPO's runs of that regime when AutoNPO would have warned. Beside the main line's steps stand
trained steps (the scout's included) and generated tokens (scout's and guide's included; evaluation is no training).
Run it again and it goes on where it was.

    python -m tests.bench.study tune --store runs/study
    python -m tests.bench.study report --store runs/study -s learner.learning_rate=1e-4
    python -m tests.bench.study ablation --seeds 0 1 2 --arm "gate 0" future.k=4 --json ablation.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from npo_core.artifacts import open_run
from npo_core.compare import curve
from npo_core.config_file import load_config
from npo_core.interfaces import NearFutureError
from tests.bench import alarms, arms, paired, tables
from tests.bench.arms import Arm
from tests.bench.output import arguments, write_json
from tests.bench.runs import Ending, Job, ending, jobs_of, read, run_all


def tune(jobs: list[Job], store: str) -> tuple[str, dict[str, Any]]:
    """Tables and figures of finished runs, as of all that follow."""
    result = paired.tuned(read(jobs, store, curve))
    return tables.tuning(result), result


def report(jobs: list[Job], store: str) -> tuple[str, dict[str, Any]]:
    """The first arm and the second."""
    curves = read(jobs, store, curve)
    baseline, other = curves
    result = paired.compared(curves, [baseline])
    result["equal_cost"] = paired.equal_cost(curves, baseline)
    parts = (
        tables.summary(result),
        tables.by_seed(result, other),
        tables.at_equal_cost(result["equal_cost"], baseline, "of the last evaluation, mean over seeds"),
    )
    return "\n\n".join(parts), result


def survey(jobs: list[Job], store: str) -> tuple[str, dict[str, Any]]:
    """Many arms, compared with the first two."""
    curves = read(jobs, store, curve)
    result = paired.compared(curves, list(curves)[:2])
    return tables.summary(result), result


def late(jobs: list[Job], store: str) -> tuple[str, dict[str, Any]]:
    """Where long runs ended, beside GRPO as it is and GRPO with more steps."""
    curves, ended = read(jobs, store, curve), read(jobs, store, ending)
    baseline = next(iter(curves))
    result = paired.compared(curves, [baseline, arms.LONGER])
    steadied = {arm: paired.steadied(seeds) for arm, seeds in curves.items()}
    result |= {"endings": ended, "equal_cost": paired.equal_cost(steadied, arms.LONGER)}
    parts = (
        tables.endings(result, ended),
        tables.families(ended, baseline),
        tables.at_equal_cost(result["equal_cost"], arms.LONGER, "mean of the last three evaluations and over seeds"),
    )
    return "\n\n".join(parts), result


def longer(ended: Mapping[int, Ending], baseline: Arm) -> list[Job]:
    """The baseline for as many steps as runs of another arm trained in all, seed by seed, up to an evaluation."""
    config = load_config(arms.CONFIGS[baseline.method], baseline.overrides)
    unit = config.evaluation.every or config.run.segment_steps
    return [
        Job(Arm(arms.LONGER, baseline.method).under(*baseline.overrides, f"run.total_steps={steps}"), seed)
        for seed, end in ended.items()
        for steps in [-(-end.trained_steps // unit) * unit]
    ]


def false_alarms(jobs: list[Job], store: str) -> tuple[str, dict[str, Any]]:
    """Each trigger over the same runs."""
    (curves,) = read(jobs, store, curve).values()
    found = {}
    for trigger in alarms.TRIGGERS:
        warned = {job.seed: alarms.looks(open_run(f"{store}/{job.name}"), trigger) for job in jobs}
        found[trigger.name] = alarms.judged(warned, curves)
    return alarms.table(found), {"triggers": found}


Reader = Callable[[list[Job], str], tuple[str, dict[str, Any]]]
STUDIES: Mapping[str, tuple[Sequence[Arm], Sequence[int], Reader, str]] = {
    "tune": (arms.TUNING, arms.TUNING_SEEDS, tune, "GRPO over the grid of learning rates"),
    "report": (arms.REPORT, arms.REPORT_SEEDS, report, "GRPO and NPO"),
    "ablation": (arms.ABLATION, arms.REPORT_SEEDS, survey, "NPO with one setting changed at a time"),
    "futures": (arms.FUTURES, arms.REPORT_SEEDS, survey, "NPO with cheaper futures"),
    "late": (arms.LATE, arms.REPORT_SEEDS, late, "GRPO, NPO and AutoNPO over a long run"),
    "alarms": (arms.LATE[:1], arms.REPORT_SEEDS, false_alarms, "when AutoNPO would have warned in GRPO's runs"),
}


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, seeds, _, text) in STUDIES.items():
        own = commands.add_parser(name, parents=[arguments(None)], conflict_handler="resolve", help=text)
        own.add_argument("--seeds", type=int, nargs="+", default=[*seeds])
        own.add_argument("--store", default="runs/study", help="directory of the runs")
        own.add_argument("--parallel", type=int, default=2, help="runs at a time, each on one thread")
        own.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="override in every arm")
        own.add_argument(
            "--arm", nargs=2, action="append", default=[], metavar=("ARM", "KEY=VALUE"), help="override in one arm"
        )
    args = parser.parse_args()

    store = f"file://{Path(args.store).resolve()}"
    of_study, _, read_out, _ = STUDIES[args.command]
    chosen = arms.changed(of_study, args.set, args.arm)
    jobs = jobs_of(chosen, args.seeds)
    run_all(jobs, store, args.parallel)
    if args.command == "late":
        more = longer(read([job for job in jobs if job.arm is chosen[-1]], store, ending)[chosen[-1].name], chosen[0])
        run_all(more, store, args.parallel)
        jobs += more
    shown, result = read_out(jobs, store)
    print(shown)
    write_json(args.json, {"study": args.command, "settings": chosen, "jobs": [job.name for job in jobs], **result})


if __name__ == "__main__":
    try:
        main()
    except NearFutureError as error:
        sys.exit(f"study: {error}")
