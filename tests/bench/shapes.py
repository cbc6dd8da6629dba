"""Whether a policy sees drawn shapes, and learns to answer questions about them, under GRPO and under NPO.

`warm-start` makes the starting policy again, a few minutes on one thread. `sight` asks a policy held-out questions with
their own pictures and with swapped ones of the same size: what answers without looking does as well with either.
`curves` trains by deploy/configs/shapes-grpo.yaml and shapes-npo.yaml on the same seeds, and prints the held-out
accuracy by main-line step; run it again and it goes on where it was.

    python -m tests.bench.shapes warm-start /tmp/shapes
    python -m tests.bench.shapes sight
    python -m tests.bench.shapes sight --model /tmp/shapes
    python -m tests.bench.shapes curves --store runs/shapes --seeds 0 1 --plot shapes.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from npo_core import shapes
from npo_core.compare import curve
from npo_core.progress import progress_bar
from npo_core.shapes.warm_start import WarmStartRecipe, train
from tests.bench.arms import Arm
from tests.bench.intervals import paired_t
from tests.bench.output import arguments, markdown, write_json
from tests.bench.runs import Ending, ending, jobs_of, read, run_all
from tests.bench.sight import Sight, measure

ARMS = (Arm("GRPO", "shapes-grpo"), Arm("NPO", "shapes-npo"))
PROMPTS, SAMPLES = 320, 4
"""Held-out questions of `sight`, and answers to each at temperature 1."""


def warm_start(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Makes the policy, and compares its digest with the shipped one's."""
    recipe = WarmStartRecipe()
    with progress_bar("warm start", recipe.steps) as bar:
        digest = train(recipe, options.target, lambda step, loss: bar(step + 1, {"loss": loss}))
    shipped = json.loads((shapes.model_dir() / "recipe.json").read_text())["sha256"]
    said = "equal to the shipped one" if digest == shipped else f"the shipped one is {shipped}"
    return f"{options.target}: {digest}, {said}", {"digest": digest, "shipped": shipped}


def sight(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Accuracies at temperature 0 and 1."""
    found = {
        "greedy": measure(options.model, PROMPTS, 1, 0.0),
        "sampled": measure(options.model, PROMPTS, SAMPLES, 1.0),
    }
    return sight_table(found), {name: asdict(seen) for name, seen in found.items()}


def sight_table(found: Mapping[str, Sight]) -> str:
    """Rows: all questions, each family, each size; columns: the right and the swapped picture, by way of answering."""
    names = list(found)
    columns = ["questions", *(f"{name}, {which}" for name in names for which in ("own picture", "swapped"))]
    rows: list[list[object]] = [
        ["all", *(value for name in names for value in (found[name].right, found[name].swapped))]
    ]
    for family in found[names[0]].tasks:
        rows.append([family, *(value for name in names for value in found[name].tasks[family])])
    for cells in sorted(found[names[0]].cells):
        rows.append([f"{cells} cells", *(value for name in names for value in found[name].cells[cells])])
    return markdown(columns, rows)


def curves(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Trains what is not trained yet."""
    jobs = jobs_of([arm.under(*options.overrides) for arm in ARMS], options.seeds)
    run_all(jobs, options.store, options.parallel)
    found, ended = read(jobs, options.store, curve), read(jobs, options.store, ending)
    if options.plot:
        plot(found, options.plot)
    result = {arm: {seed: line.to_dicts() for seed, line in seeds.items()} for arm, seeds in found.items()}
    return "\n\n".join((curves_table(found), gains_table(found), costs_table(ended))), {
        "curves": result,
        "endings": ended,
    }


def curves_table(found: Mapping[str, Mapping[int, pl.DataFrame]]) -> str:
    """Held-out accuracy by main-line step: the mean over seeds, and each seed."""
    columns = ["step", *(f"{arm}{of}" for arm, seeds in found.items() for of in (" (mean)", *(f" {s}" for s in seeds)))]
    lines = {
        arm: {s: dict(line.select("step", "accuracy").iter_rows()) for s, line in seeds.items()}
        for arm, seeds in found.items()
    }
    steps = sorted(next(iter(next(iter(lines.values())).values())))
    rows = []
    for step in steps:
        values = [[accuracies[step] for accuracies in seeds.values()] for seeds in lines.values()]
        rows.append([step, *(cell for own in values for cell in (sum(own) / len(own), *own))])
    return markdown(columns, rows)


def gains_table(found: Mapping[str, Mapping[int, pl.DataFrame]]) -> str:
    """What NPO is ahead of GRPO at a main-line step, paired by seed: the mean and its 95 % interval (paired t)."""
    columns = ["step", "NPO − GRPO, 95 %"]
    if len(next(iter(found.values()))) < 2:
        return markdown(columns, [])
    paired = [
        npo.join(found["GRPO"][seed], on="step", suffix="_grpo").select(
            "step", gain=pl.col("accuracy") - pl.col("accuracy_grpo")
        )
        for seed, npo in found["NPO"].items()
    ]
    gains = pl.concat(paired).group_by("step").agg("gain").sort("step")
    return markdown(columns, [[step, str(paired_t(np.array(gain)))] for step, gain in gains.iter_rows()])


def plot(found: Mapping[str, Mapping[int, pl.DataFrame]], target: Path) -> None:
    """Draws held-out accuracy by main-line step: each seed thin, their mean thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (arm, seeds) in enumerate(found.items()):
        lines = [line.sort("step") for line in seeds.values()]
        for line in lines:
            axes.plot(line["step"], line["accuracy"], color=f"C{number}", alpha=0.3, linewidth=0.8)
        mean = pl.concat(lines).group_by("step").agg(pl.col("accuracy").mean()).sort("step")
        axes.plot(mean["step"], mean["accuracy"], color=f"C{number}", linewidth=2, label=f"{arm}, {len(lines)} seeds")
    axes.set(xlabel="main-line step", ylabel="held-out accuracy", ylim=(0, None))
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(target, dpi=110)


def costs_table(ended: Mapping[str, Mapping[int, Ending]]) -> str:
    """What the arms took in all: the main line counts main steps alone."""
    rows = [
        [arm, seed, end.main_steps, end.trained_steps, end.total_tokens]
        for arm, seeds in ended.items()
        for seed, end in seeds.items()
    ]
    return markdown(["arm", "seed", "main steps", "trained steps", "generated tokens"], rows)


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("warm-start")
    one.add_argument("target", type=Path)
    one.set_defaults(command=warm_start)
    two = commands.add_parser("sight")
    two.add_argument("--model", type=Path, default=shapes.model_dir())
    two.set_defaults(command=sight)
    three = commands.add_parser("curves")
    three.add_argument("--store", default="runs/shapes")
    three.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    three.add_argument("--plot", type=Path, help="picture of the curves, PNG or SVG")
    three.add_argument("--parallel", type=int, default=1)
    three.add_argument("-s", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")
    three.set_defaults(command=curves)
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Runs one command, prints its table and writes its figures."""
    options = _parser().parse_args(words)
    text, result = options.command(options)
    print(text)
    write_json(options.json, result)


if __name__ == "__main__":
    main()
