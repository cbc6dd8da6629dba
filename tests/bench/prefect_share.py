"""Prefect's share of a leg's wall time, beyond the start-up of its flow.

The same leg is trained twice on fresh runs, in turn: as the flow `main` inside a parent flow, and as the very same
function with the bare functions of its tasks in the tasks' places. Within the flow, what lies between the functions of
the tasks is Prefect's: that difference is free of the machine's noise, while the ratio of the two legs is not, but
includes what Prefect does in the background.
"""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil  # type: ignore[import-untyped]

from npo_core.memory import peak_rss_bytes
from tests.bench.output import MIB, arguments, markdown, write_json
from tests.bench.server import deployments_server, shared_server

TASKS = ("open_leg", "train_segment", "evaluate_policy")
"""What the flow of a leg calls in `flows.stages`."""


@dataclass(frozen=True)
class Span:
    """When a function ran, by `time.perf_counter`."""

    began: float
    ended: float

    @property
    def seconds(self) -> float:
        """How long."""
        return self.ended - self.began


@dataclass(frozen=True)
class FlowTimes:
    """One leg as a flow, in seconds."""

    start_up: float
    """From the call of the flow to its first line."""
    body: float
    """The function of the flow."""
    functions: float
    """Of it, inside the functions of its tasks."""
    end: float
    """From its last line to the caller."""
    tasks: int

    @property
    def share(self) -> float:
        """Prefect's share beyond the start-up: what lies between the functions of the tasks."""
        return (self.body - self.functions) / self.body

    @property
    def share_with_end(self) -> float:
        """The same with the end of the flow, which costs the same however long the leg is."""
        return (self.body - self.functions + self.end) / (self.body + self.end)


def fresh_run(store: Path, name: str, segment_steps: int, evaluate: bool) -> str:
    """Begins a run of GRPO on the testbed and commits its starting policy. Returns its URI."""
    from schemas.config import Config
    from tasks.policies import commit_warm_start
    from tasks.workspaces import begin_run

    run = {"name": name, "store": f"file://{store}", "segment_steps": segment_steps}
    uri: str = begin_run.fn(
        Config.model_validate({"run": run, "evaluation": {"every": segment_steps if evaluate else 0}})
    )
    commit_warm_start.fn(uri)
    return uri


def leg_as_flow(uri: str, steps: int) -> FlowTimes:
    """Trains the leg by its flow, inside a parent flow as `npo run` does."""
    from prefect import flow

    from flows import stages

    functions: list[Span] = []
    body: list[Span] = []
    outer: list[Span] = []

    @flow(name="prefect-share")
    def parent() -> None:
        timed(stages.main, outer)(uri, steps)

    with ExitStack() as patches:
        for name in TASKS:
            task = getattr(stages, name)
            patches.enter_context(patch.object(task, "fn", timed(task.fn, functions)))
        patches.enter_context(patch.object(stages.main, "fn", timed(stages.main.fn, body)))
        parent()
    return FlowTimes(
        start_up=body[0].began - outer[0].began,
        body=body[0].seconds,
        functions=sum(span.seconds for span in functions),
        end=outer[0].ended - body[0].ended,
        tasks=len(functions),
    )


def leg_bare(uri: str, steps: int) -> float:
    """Trains the leg by the same functions without Prefect. Returns seconds."""
    from flows import stages

    spans: list[Span] = []
    with bare_tasks():
        timed(stages.main.fn, spans)(uri, steps)
    return spans[0].seconds


@contextmanager
def bare_tasks() -> Iterator[None]:
    """In `flows.stages`, the functions of the tasks instead of the tasks."""
    from flows import stages

    with ExitStack() as patches:
        for name in TASKS:
            patches.enter_context(patch.object(stages, name, getattr(stages, name).fn))
        yield


def timed(function: Callable[..., Any], spans: list[Span]) -> Callable[..., Any]:
    """The function, which appends a span at each call."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spans.append(Span(began, time.perf_counter()))

    # Prefect would look the names of annotations up in this module.
    wrapper.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return wrapper


def peak_memory(side: str, store: Path, steps: int, segment_steps: int, evaluate: bool) -> float:
    """Peak memory in MiB of a process that trains one leg."""
    uri = fresh_run(store, f"memory-{side}", segment_steps, evaluate)
    if side == "flow":
        leg_as_flow(uri, steps)
    else:
        leg_bare(uri, steps)
    return peak_rss_bytes() / MIB


def measure(store: Path, repeats: int, steps: int, segment_steps: int, evaluate: bool) -> dict[str, Any]:
    """Times of the leg both ways, in turn; medians over repeats, the first of which warms up."""
    flows: list[FlowTimes] = []
    bare: list[float] = []
    for n in range(repeats + 1):
        # Now this one first, now that: what drifts does not favour either.
        for side in ("flow", "bare") if n % 2 else ("bare", "flow"):
            uri = fresh_run(store, f"{side}-{n}", segment_steps, evaluate)
            if side == "flow":
                flows.append(leg_as_flow(uri, steps))
            else:
                bare.append(leg_bare(uri, steps))
    flows, bare = flows[1:], bare[1:]
    memory = {}
    for side in ("flow", "bare"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            memory[side] = pool.submit(peak_memory, side, store, steps, segment_steps, evaluate).result()
    # The server and its supervisor are the only children left.
    server = sum(child.memory_info().rss for child in psutil.Process().children(recursive=True)) / MIB
    return {
        "steps": steps,
        "segment_steps": segment_steps,
        "evaluated": evaluate,
        "flows": flows,
        "bare_seconds": bare,
        "share": {"median": median(f.share for f in flows), "largest": max(f.share for f in flows)},
        "share_with_end": {
            "median": median(f.share_with_end for f in flows),
            "largest": max(f.share_with_end for f in flows),
        },
        "start_up_s": median(f.start_up for f in flows),
        "end_s": median(f.end for f in flows),
        "per_task_ms": 1000 * median((f.body - f.functions) / f.tasks for f in flows),
        "flow_over_bare": median((f.body + f.end) / b for f, b in zip(flows, bare, strict=True)),
        "memory_mib": {**memory, "server": server},
    }


def median(values: Iterator[float]) -> float:
    """The median as a plain number."""
    return float(np.median(list(values)))


def show(result: dict[str, Any]) -> str:
    """The result for people."""
    columns = (
        "start-up s",
        "body s",
        "in tasks' functions s",
        "end s",
        "tasks",
        "Prefect's share",
        "with the end",
        "bare leg s",
    )
    rows = [
        (f.start_up, f.body, f.functions, f.end, f.tasks, f"{f.share:.2%}", f"{f.share_with_end:.2%}", bare)
        for f, bare in zip(result["flows"], result["bare_seconds"], strict=True)
    ]
    memory = result["memory_mib"]
    return "\n\n".join(
        [
            f"A leg of {result['steps']} steps in segments of {result['segment_steps']}, with"
            f"{'' if result['evaluated'] else 'out'} evaluations",
            markdown(columns, rows),
            f"Prefect's share beyond the start-up: {result['share']['median']:.2%} (median), "
            f"{result['share']['largest']:.2%} (largest), {result['per_task_ms']:.0f} ms a task; with the flow's end "
            f"({result['end_s']:.2f} s, once a leg) {result['share_with_end']['median']:.2%} (median), "
            f"{result['share_with_end']['largest']:.2%} (largest). Flow over bare leg without start-up: "
            f"{result['flow_over_bare']:.3f}. Start-up of the leg's flow: "
            f"{result['start_up_s']:.2f} s, of the server: {result['server_start_s']:.1f} s.",
            f"Peak memory: {memory['flow']:.0f} MiB as a flow, {memory['bare']:.0f} MiB bare; the local server holds "
            f"{memory['server']:.0f} MiB.",
        ]
    )


def main() -> None:
    """Measures and prints the table."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--segment-steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=4, help="counted pairs of legs")
    parser.add_argument("--evaluate", action="store_true", help="evaluate after each segment, as the study does")
    parser.add_argument(
        "--deployments", action="store_true", help="on a server as deployments have one, not on the one `npo` starts"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with deployments_server(Path(folder)) if args.deployments else shared_server():
            server_s = time.perf_counter() - began
            result = measure(Path(folder) / "bench", args.repeats, args.steps, args.segment_steps, args.evaluate)
    result["server_start_s"] = server_s
    print(show(result))
    write_json(args.json, result)


if __name__ == "__main__":
    main()
