"""The same NPO run by two sets of engines: transformers + torch, and vLLM (guide, evaluation) + DeepSpeed (updates).

Their samples differ, as those of two seeds do: the curves are to agree within that noise. Runs are paired by seed, for
data order and rollouts up to rounding are the same. Run it again and it goes on where it was.

    python -m tests.bench.engine_runs MODEL --store runs/engines --seeds 0 1 2
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npo_core.compare import curve
from tests.bench.arms import Arm
from tests.bench.intervals import paired_t
from tests.bench.output import arguments, markdown, write_json
from tests.bench.paired import Curves
from tests.bench.runs import jobs_of, read, run_all

PLAIN, ENGINES = "transformers + torch", "vLLM + DeepSpeed"


def arms(model: Path, ranks: int) -> list[Arm]:
    """Both, on a policy that vLLM has kernels for (`python -m tests.bench.engines model`)."""
    plain = Arm(PLAIN, "npo", (f"model.path={model}", "evaluation.every=20", "vllm.max_model_len=64"))
    other = plain.under("vllm.samples=[guide, evaluation]", "learner.engine=deepspeed", f"deepspeed.ranks={ranks}")
    return [plain, Arm(ENGINES, "npo", other.overrides)]


def compared(curves: dict[str, Curves]) -> tuple[str, dict[str, Any]]:
    """Accuracies by step, mean and standard deviation over seeds, and the paired difference with its interval."""
    seeds = list(curves[PLAIN])
    lines, rows = [], []
    steps = curves[PLAIN][seeds[0]]["step"].to_list()
    # [arm, seed, evaluation]
    values = np.array([[curves[arm][seed]["accuracy"].to_list() for seed in seeds] for arm in (PLAIN, ENGINES)])
    for n, step in enumerate(steps):
        one, other = values[:, :, n]
        difference = paired_t(other - one)
        rows.append({"step": step, PLAIN: list(one), ENGINES: list(other), "difference": difference})
        lines.append((step, *(f"{v.mean():.3f} ± {v.std(ddof=1):.3f}" for v in (one, other)), str(difference)))
    means = values.mean(axis=2)
    whole = paired_t(means[1] - means[0])
    lines.append(("all", *(f"{v.mean():.3f} ± {v.std(ddof=1):.3f}" for v in means), str(whole)))
    text = markdown(("step", PLAIN, ENGINES, "difference, 95 % (paired t)"), lines)
    return text, {"seeds": seeds, "rows": rows, "mean_difference": whole}


def main(words: Sequence[str] | None = None) -> None:
    """Runs both on every seed and prints their held-out accuracies."""
    parser = arguments(__doc__)
    parser.add_argument("model", type=Path, help="directory of the policy")
    parser.add_argument("--store", default="runs/engines", help="directory of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2, help="of DeepSpeed")
    chosen = parser.parse_args(words)
    store = f"file://{Path(chosen.store).absolute()}"
    jobs = jobs_of(arms(chosen.model.absolute(), chosen.ranks), chosen.seeds)
    run_all(jobs, store, parallel=1)
    text, result = compared(read(jobs, store, curve))
    print(text)
    write_json(chosen.json, result)


if __name__ == "__main__":
    main()
