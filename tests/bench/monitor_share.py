"""What AutoNPO's controller adds to a segment when it does not intervene: keeping its state in the steps and the
checkpoint, and the look between two segments.

    python -m tests.bench.monitor_share
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from npo_core import segment
from npo_core.config_file import load_config
from tasks import legs, monitor, policies, workspaces
from tests.bench.intervals import bootstrap_mean
from tests.bench.output import arguments, markdown, write_json


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    """Adds the seconds that the block takes."""
    began = time.perf_counter()
    yield
    into.append(time.perf_counter() - began)


def measure(segments: int) -> dict[str, list[float]]:
    """Seconds of each segment, of the observing in its steps, and of the look after it."""
    seconds: dict[str, list[float]] = {"segment": [], "observe": [], "look": []}
    observing: list[float] = []
    observe = segment.observe

    def timed_observe(*args: object) -> object:
        with timed(observing):
            return observe(*args)  # type: ignore[arg-type]

    segment.observe = timed_observe  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as store:
        config = load_config("deploy/configs/testbed-autonpo.yaml", [f"run.store=file://{store}"])
        run = workspaces.begin_run.fn(config)
        leg = legs.open_leg.fn(run, "main", policies.commit_warm_start.fn(run))
        size = config.run.segment_steps
        for start in range(0, segments * size, size):
            observing.clear()
            with timed(seconds["segment"]):
                legs.train_segment.fn(run, leg, start, start + size)
            with timed(seconds["look"]):
                decision = monitor.look(run, leg, start + size)
            assert not decision.intervene
            seconds["observe"].append(sum(observing))
    segment.observe = observe
    return seconds


def main() -> None:
    """Measures and prints the table."""
    parser = arguments(__doc__)
    parser.add_argument("--segments", type=int, default=20, help="segments, of 10 steps each")
    args = parser.parse_args()
    seconds = {name: values[1:] for name, values in measure(args.segments).items()}  # the first one warms up
    share = np.add(seconds["look"], seconds["observe"]) / np.array(seconds["segment"])
    rows = [(name, bootstrap_mean(np.array(values) * 1000)) for name, values in seconds.items()]
    print(markdown(("part", "milliseconds a segment [95 %]"), rows))
    print(
        f"\nThe controller's share of a segment: {100 * float(share.mean()):.2f} %, at most {100 * share.max():.2f} %"
    )
    write_json(args.json, json.loads(json.dumps({"seconds": seconds, "share": float(share.mean())})))


if __name__ == "__main__":
    main()
