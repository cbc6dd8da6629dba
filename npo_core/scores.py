"""What an evaluation's verdicts say: pass@1, pass@k and greedy accuracy, with bootstrap intervals over prompts.

All prompts have equally many samples n, so what matters of a prompt is its number c of correct ones, and of a task how
many prompts have each c. A resample of P prompts with all their samples is then one multinomial draw of these numbers:
the same distribution as drawing prompts, at a cost that does not grow with them. Where all prompts have equal values,
the interval is a point: resampling cannot show what no prompt does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from npo_core.streams import philox
from schemas.decisions import Estimate

RESAMPLES = 2000
COVERAGE = 0.95


@dataclass(frozen=True)
class Score:
    """The result of some prompts."""

    prompts: int
    pass_at: dict[int, Estimate]
    """By k, from 1 on."""
    greedy: Estimate | None = None
    """Share of the prompts whose answer at temperature 0 is correct; None: none was asked for."""


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation."""

    samples: int
    """Answers a prompt (n)."""
    tasks: dict[str, Score]
    macro: Score
    """Mean over tasks, each weighing the same; resamples draw prompts within tasks."""
    overall: Score
    """Mean over prompts; resamples draw from all of them."""

    def as_json(self) -> dict[str, Any]:
        """`samples`, `tasks` {task: score}, `macro`, `overall`; a score is `prompts`, `pass_at` {"k": estimate} and
        `greedy`, an estimate `value`, `low`, `high`."""
        plain = asdict(self, dict_factory=lambda pairs: {str(key): _plain(value) for key, value in pairs})
        return dict(plain)


def pass_at_k(n: int, k: int) -> np.ndarray:
    """Unbiased pass@k of a prompt by its number of correct samples c = 0 … n, float64 [n + 1].

    1 − C(n − c, k) / C(n, k): the share of the k-subsets of the samples that hold a correct one (Chen et al. 2021,
    arXiv 2107.03374, eq. 1). Integers until the division, so that it is exact to rounding.

    Raises:
        ValueError: k is not between 1 and n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k {k} is not between 1 and the {n} samples")
    subsets = math.comb(n, k)
    return np.array([(subsets - math.comb(n - c, k)) / subsets for c in range(n + 1)])


def tries(n: int) -> list[int]:
    """The k that are reported of n samples: 1, 2, 4, … up to n."""
    return [1 << power for power in range(n.bit_length())]


def score(
    correct: Mapping[str, np.ndarray], n: int, greedy: Mapping[str, np.ndarray] | None = None, seed: int = 0
) -> Scores:
    """Scores by task, their macro average, and over all prompts.

    Args:
        correct: number of correct samples of each prompt of a task, int [P].
        n: samples a prompt.
        greedy: whether the answer at temperature 0 is correct, bool [P].
        seed: of the resamples; each task has a stream of its own, by its name.

    Raises:
        ValueError: there is no prompt, or a count is not between 0 and n.
    """
    ks = tries(n)
    curve_CK = np.stack([pass_at_k(n, k) for k in ks], axis=1)
    measures = {"pass": (correct, n, curve_CK)}
    if greedy is not None:
        measures["greedy"] = (greedy, 1, np.array([[0.0], [1.0]]))
    made = {name: _estimates(*measure, (seed, name)) for name, measure in measures.items()}

    def one(task: str, prompts: int) -> Score:
        bold = made["greedy"][task][0] if "greedy" in made else None
        return Score(prompts, dict(zip(ks, made["pass"][task], strict=True)), bold)

    sizes = {task: len(counts) for task, counts in sorted(correct.items())}
    everything = sum(sizes.values())
    tasks = {task: one(f"task {task}", size) for task, size in sizes.items()}
    return Scores(n, tasks, one("macro", everything), one("overall", everything))


def _estimates(
    counts: Mapping[str, np.ndarray], n: int, curve_CK: np.ndarray, key: tuple[object, ...]
) -> dict[str, list[Estimate]]:
    """Estimates of each column of `curve_CK`, by `task NAME`, `macro` and `overall`.

    Args:
        counts: of each prompt of a task, 0 … n.
        curve_CK: value of a prompt by its count.
        key: of the random streams.
    """
    histograms = {task: _histogram(task, counts[task], n) for task in sorted(counts)}
    if not histograms:
        raise ValueError("there is no task to score")
    resampled = {task: _resample(h, curve_CK, (*key, "task", task)) for task, h in histograms.items()}
    points = {task: h @ curve_CK / h.sum() for task, h in histograms.items()}
    total_C = np.sum(list(histograms.values()), axis=0)
    found = {f"task {task}": (points[task], resampled[task]) for task in histograms}
    found["macro"] = np.mean(list(points.values()), axis=0), np.mean(list(resampled.values()), axis=0)
    found["overall"] = total_C @ curve_CK / total_C.sum(), _resample(total_C, curve_CK, (*key, "overall"))
    return {name: _intervals(*pair) for name, pair in found.items()}


def _histogram(task: str, counts_P: np.ndarray, n: int) -> np.ndarray:
    """How many prompts have each count, int [n + 1]."""
    counts_P = np.asarray(counts_P, dtype=np.int64)
    if not len(counts_P) or counts_P.min() < 0 or counts_P.max() > n:
        raise ValueError(f"task {task}: needs at least one prompt, and numbers of correct answers between 0 and {n}")
    return np.bincount(counts_P, minlength=n + 1)


def _resample(histogram_C: np.ndarray, curve_CK: np.ndarray, key: tuple[object, ...]) -> np.ndarray:
    """Means over resampled prompts, float64 [RESAMPLES, K]."""
    prompts = int(histogram_C.sum())
    drawn_RC = philox("scores", *key).multinomial(prompts, histogram_C / prompts, size=RESAMPLES)
    return drawn_RC @ curve_CK / prompts


def _intervals(point_K: np.ndarray, resampled_RK: np.ndarray) -> list[Estimate]:
    """Points with the percentile interval of their resamples."""
    tail = (1 - COVERAGE) / 2
    low_K, high_K = np.quantile(resampled_RK, (tail, 1 - tail), axis=0)
    triples = zip(point_K, low_K, high_K, strict=True)
    return [Estimate(value=float(value), low=float(low), high=float(high)) for value, low, high in triples]


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.model_dump(exclude={"schema_version"})
    return {str(key): _plain(one) for key, one in value.items()} if isinstance(value, dict) else value
