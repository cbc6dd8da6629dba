"""Seconds a step and peak memory, ours against TRL's GRPOTrainer: same checkpoint, prompts, batch and threads.

Both train in one process, block by block in turn: after each block of TRL's steps ours takes as many, so that what
else the machine does falls on both. The first pair of blocks warms up and is not counted. Ours is `run_segment` with
its tables of trajectories, under deterministic kernels; TRL's logging is not counted. Peak memory is that of a separate
process for each. Ours leaves rows whose advantage is zero out of the backward pass, where their gradient is exactly
zero; TRL computes it. The share of tokens that ours trains on is printed.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npo_core.memory import peak_rss_bytes
from tests.bench.intervals import Interval, bootstrap
from tests.bench.output import MIB, arguments, markdown, write_json
from tests.bench.work import StepRecord, Work, random_work, small_work


@dataclass(frozen=True)
class Point:
    """A size at which both are measured."""

    name: str
    about: str
    make: Callable[[Path], Work]
    blocks: int
    """Counted pairs of blocks."""
    block_steps: int
    memory_steps: int


POINTS = {
    "testbed": Point(
        "testbed", "0.36M parameters, 32 prompts × 8 rollouts × ≤ 14 tokens", lambda _: small_work(0), 10, 5, 5
    ),
    "large": Point(
        "large",
        "22.9M random parameters, vocabulary 32,768, 2 prompts × 8 rollouts × 256 tokens",
        random_work,
        4,
        1,
        2,
    ),
}


def alternate(work: Work, blocks: int, block_steps: int) -> tuple[list[list[StepRecord]], list[list[StepRecord]]]:
    """(ours, TRL's) blocks of steps, taken in turn; the first pair, which warms up, is left out.

    Raises:
        RuntimeError: the two did not do the same work.
    """
    from tests.bench.ours import OurTrainer
    from tests.bench.trl_runner import train_trl

    trainer = OurTrainer(work)
    ours: list[list[StepRecord]] = []

    def after_step(record: StepRecord) -> None:
        if (record.step + 1) % block_steps == 0:
            ours.append(trainer.train(block_steps))
            print(
                f"{record.step + 1} steps: TRL {record.seconds:.2f} s, ours {ours[-1][-1].seconds:.2f} s",
                file=sys.stderr,
            )

    steps = train_trl(work, (blocks + 1) * block_steps, after_step)
    theirs = [steps[first : first + block_steps] for first in range(0, len(steps), block_steps)]
    for own, other in zip(ours, theirs, strict=True):
        if [r.prompt_ids for r in own] != [r.prompt_ids for r in other]:
            raise RuntimeError("ours and TRL trained on different prompts")
    return ours[1:], theirs[1:]


def peak_memory(side: str, point: str, directory: Path) -> dict[str, float]:
    """Peak memory in MiB of a process that trains one side for a few steps; `imported` is what it held before."""
    work, steps = POINTS[point].make(directory), POINTS[point].memory_steps
    if side == "ours":
        from tests.bench.ours import OurTrainer

        trainer = OurTrainer(work)
        imported = peak_rss_bytes()
        trainer.train(steps)
    else:
        from tests.bench.trl_runner import train_trl

        imported = peak_rss_bytes()
        train_trl(work, steps)
    return {"imported": imported / MIB, "peak": peak_rss_bytes() / MIB}


def measure(point: Point, blocks: int, directory: Path) -> dict[str, Any]:
    """Time and memory of both sides at one point."""
    memory = {}
    for side in ("ours", "trl"):
        # A process for each: a peak cannot be taken back. Spawned, so that it inherits nothing.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            memory[side] = pool.submit(peak_memory, side, point.name, directory / side).result()
    ours, theirs = alternate(point.make(directory / "both"), blocks, point.block_steps)
    return {
        "point": point.name,
        "about": point.about,
        "blocks": blocks,
        "steps": blocks * point.block_steps,
        "seconds": {"ours": medians(ours), "trl": medians(theirs)},
        "speedup": speedup(ours, theirs),
        "tokens_a_step": {"ours": mean_of(ours, "tokens"), "trl": mean_of(theirs, "tokens")},
        "trained_share": mean_of(ours, "trained_tokens") / mean_of(ours, "tokens"),
        "reward": {"ours": mean_of(ours, "reward"), "trl": mean_of(theirs, "reward")},
        "memory_mib": memory,
    }


def medians(blocks: Sequence[Sequence[StepRecord]]) -> dict[str, float]:
    """Median seconds of a step and of its parts."""
    parts = ("generate_s", "verify_s", "update_s", "rest_s", "seconds")
    return {part: float(np.median([getattr(r, part) for block in blocks for r in block])) for part in parts}


def speedup(ours: Sequence[Sequence[StepRecord]], theirs: Sequence[Sequence[StepRecord]]) -> Interval:
    """Ratio of the median seconds a step, TRL's over ours; bootstrap over pairs of neighbouring blocks."""
    seconds = np.array([[[r.seconds for r in block] for block in side] for side in (ours, theirs)])
    return bootstrap(lambda pairs: float(np.median(seconds[1, pairs]) / np.median(seconds[0, pairs])), len(ours))


def mean_of(blocks: Sequence[Sequence[StepRecord]], field: str) -> float:
    """Mean of a field over steps."""
    return float(np.mean([getattr(r, field) for block in blocks for r in block]))


def show(result: dict[str, Any]) -> str:
    """The result for people."""
    rows = []
    for side, name in (("ours", "ours"), ("trl", "TRL GRPOTrainer")):
        s, memory = result["seconds"][side], result["memory_mib"][side]
        times = (s["seconds"], s["generate_s"], s["verify_s"], s["update_s"], s["rest_s"])
        sizes = (f"{memory['peak']:.0f}", f"{memory['peak'] - memory['imported']:.0f}")
        rows.append((name, *times, f"{result['tokens_a_step'][side]:.0f}", result["reward"][side], *sizes))
    columns = (
        "",
        "s/step",
        "generate",
        "verify",
        "update",
        "rest",
        "tokens",
        "reward",
        "peak MiB",
        "of it by training",
    )
    return (
        f"{result['point']}: {result['about']}; {result['steps']} steps each, medians\n\n{markdown(columns, rows)}\n\n"
        f"Ours is {result['speedup']} times as fast. Rows without advantage are left out of our backward pass, where "
        f"their gradient is exactly zero: it saw {result['trained_share']:.0%} of the tokens, TRL's all."
    )


def main() -> None:
    """Measures the chosen points."""
    parser = arguments(__doc__)
    parser.add_argument("--point", choices=[*POINTS, "all"], default="all")
    parser.add_argument("--blocks", type=int, help="counted pairs of blocks instead of the point's own number")
    args = parser.parse_args()
    points = [point for name, point in POINTS.items() if args.point in (name, "all")]
    results = []
    with tempfile.TemporaryDirectory() as directory:
        for point in points:
            results.append(measure(point, args.blocks or point.blocks, Path(directory, point.name)))
            print(show(results[-1]), end="\n\n", flush=True)
    write_json(args.json, {"points": [{**r, "speedup": dataclasses.asdict(r["speedup"])} for r in results]})


if __name__ == "__main__":
    main()
