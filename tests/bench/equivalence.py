"""GRPO of ours equals TRL's: mean training reward over the same steps from the same checkpoint, seed by seed.

A seed decides the order of the prompts, which both sides share, and the sampling, which they cannot share. Exit code 1
if the 95 % interval of the mean difference does not lie within the tolerance.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from tests.bench.intervals import bootstrap_mean, paired_t
from tests.bench.output import arguments, markdown, write_json
from tests.bench.work import small_work

TOLERANCE = 0.03
CURVE_STEPS = 10


def rewards(side: str, seed: int, steps: int, learning_rate: float) -> list[float]:
    """Mean training reward of each step."""
    work = small_work(seed, learning_rate)
    if side == "ours":
        from tests.bench.ours import OurTrainer

        records = OurTrainer(work).train(steps)
    else:
        from tests.bench.trl_runner import train_trl

        records = train_trl(work, steps)
    print(f"{side}, seed {seed}: done", file=sys.stderr)
    return [record.reward for record in records]


def compare(ours_SN: np.ndarray, theirs_SN: np.ndarray) -> dict[str, Any]:
    """Differences of the mean reward, ours − TRL's, and both curves.

    Args:
        ours_SN: rewards by seed and step.
        theirs_SN: likewise.
    """
    differences = (ours_SN - theirs_SN).mean(axis=1).tolist()
    interval, resampled = paired_t(differences), bootstrap_mean(differences)
    bounds = (interval.low, interval.high, resampled.low, resampled.high)
    return {
        "differences": differences,
        "paired_t": interval,
        "bootstrap": resampled,
        "tolerance": TOLERANCE,
        "equal": max(map(abs, bounds)) <= TOLERANCE,
        "curves": {"ours": curve(ours_SN), "trl": curve(theirs_SN)},
    }


def curve(rewards_SN: np.ndarray) -> list[float]:
    """Mean over seeds and over each ten steps."""
    steps = range(0, rewards_SN.shape[1], CURVE_STEPS)
    return [float(rewards_SN[:, first : first + CURVE_STEPS].mean()) for first in steps]


def show(result: dict[str, Any], seeds: Sequence[int]) -> str:
    """The result for people."""
    curves = result["curves"]
    ends = [str(CURVE_STEPS * (n + 1)) for n in range(len(curves["ours"]))]
    verdict = "lies" if result["equal"] else "does NOT lie"
    return "\n\n".join(
        [
            markdown(("mean reward to step", *ends), [("ours", *curves["ours"]), ("TRL", *curves["trl"])]),
            markdown(("seed", "ours − TRL"), list(zip(seeds, result["differences"], strict=True))),
            f"Mean difference {result['paired_t']} (paired t), {result['bootstrap']} (bootstrap over seeds): it "
            f"{verdict} within ±{TOLERANCE}.",
        ]
    )


def main() -> None:
    """Trains both sides on every seed."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--parallel", type=int, default=2, help="processes, each on one thread")
    args = parser.parse_args()
    if len(set(args.seeds)) < 2:
        parser.error("--seeds: an interval needs at least two different seeds")
    with ProcessPoolExecutor(args.parallel, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {
            (side, seed): pool.submit(rewards, side, seed, args.steps, args.learning_rate)
            for seed in args.seeds
            for side in ("trl", "ours")
        }
        done = {key: future.result() for key, future in futures.items()}
    ours_SN, theirs_SN = (np.array([done[side, seed] for seed in args.seeds]) for side in ("ours", "trl"))
    result = compare(ours_SN, theirs_SN)
    print(show(result, args.seeds))
    write_json(args.json, {"seeds": args.seeds, "steps": args.steps, "learning_rate": args.learning_rate, **result})
    sys.exit(0 if result["equal"] else 1)


if __name__ == "__main__":
    main()
