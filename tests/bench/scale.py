"""How reading grows with a run: made-up runs of any size, and what each command takes of them in a fresh process.

    python -m tests.bench.scale generate STORE --rows 1000000       # 500 steps; goes on where it ended
    python -m tests.bench.scale guide STORE --prompts 100000        # a guide, for the look-up of a segment
    python -m tests.bench.scale measure STORE/RUN --out RUN.json
    python -m tests.bench.scale table SMALL.json LARGE.json ...

Nothing is evicted from the page cache: files that were read or written before come from memory.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.bench.output import MIB, markdown, write_json

ROOT = Path(__file__).parent.parent.parent
MOST_ROWS_VERIFIED = 1_000_000
SAMPLE_ROWS = 2000
"""Rows of which JSON lines are written for comparison."""
LOOKUP_STEPS = 10
"""Steps of the segment whose guide trajectories are looked up."""
_LAUNCHER = """
import json, os, sys, time
out = (os.POSIX_SPAWN_OPEN, 1, sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
began = time.perf_counter()
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ, file_actions=[out])
_, status, usage = os.wait4(pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), time.perf_counter() - began, usage.ru_maxrss * 1024]))
"""
"""Starts a command and says what it took. A process counts its parent's memory as its own until it has replaced it, so
the parent must be small: this one imports nothing."""


def timed(command: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Exit code, seconds and peak memory of a command in a process of its own, and what it printed."""
    with tempfile.NamedTemporaryFile() as out:
        launched = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, out.name, *command], cwd=ROOT, capture_output=True, text=True
        )
        if launched.returncode:
            raise RuntimeError(f"{command} was not started: {launched.stderr}")
        code, seconds, peak = json.loads(launched.stdout)
        printed = Path(out.name).read_text()
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {code}: {(printed + launched.stderr)[-2000:]}")
    return {"seconds": seconds, "peak_bytes": peak, "printed_bytes": len(printed)}, printed


def measure(uri: str, repeats: int) -> dict[str, Any]:
    """What each command takes of a run: the median of its seconds, the largest of its peaks."""
    from npo_core.artifacts import open_run

    run = open_run(uri)
    segments = [segment for leg in run.legs() for segment in run.segments(leg.leg_id)]
    rows = sum(segment.file("rollouts").rows or 0 for segment in segments)
    commands: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as nothing:
        commands["imports alone (ls of an empty store)"] = _npo("ls", nothing)
        commands["show --json"] = _npo("show", uri, "--json")
        if segments:
            step = segments[len(segments) // 2].start
            prompt = run.table(segments[0], "rollouts", ["prompt_id"])["prompt_id"][0].as_py()
            commands |= {
                "inspect --prompt --json": _npo("inspect", uri, "--prompt", prompt, "--json"),
                "inspect --step": _npo("inspect", uri, "--step", str(step)),
                "metrics --json": _npo("metrics", uri, "--json"),
                "files": _npo("files", uri),
            }
        if segments and rows <= MOST_ROWS_VERIFIED:
            commands["verify"] = _npo("verify", uri)
        lookup = [sys.executable, "-m", "tests.bench.scale", "lookup", uri]
        if run.guides():
            commands["guide look-up of a segment"] = lookup
        taken = {name: _repeated(command, 1 if name == "verify" else repeats) for name, command in commands.items()}
    found: dict[str, Any] = {
        "run": run.run_id,
        "rows": rows,
        "tokens": sum(segment.tokens_policy for segment in segments),
        "guide_prompts": max((guide.solved for guide in run.guides()), default=0),
        "commands": {name: result for name, (result, _) in taken.items()},
    }
    if run.guides():
        found["lookup"] = json.loads(taken["guide look-up of a segment"][1])
    if segments:
        found["bytes"] = stored_bytes(run, segments)
    return found


def stored_bytes(run: Any, segments: Sequence[Any]) -> dict[str, float]:
    """Bytes a completion token: of the rollouts' Parquet files, and of JSON lines of some of their rows, with floats as
    short as float32 allows, and as `json.dumps` writes a row."""
    stored = sum(segment.file("rollouts").bytes for segment in segments)
    table = run.table(segments[0], "rollouts").slice(0, SAMPLE_ROWS)
    tokens, sample = sum(map(len, table["completion_ids"])), table.to_pylist()
    lines = "".join(f"{json.dumps(_shortest(row), ensure_ascii=False)}\n" for row in sample).encode()
    plain = sum(len(json.dumps(row, ensure_ascii=False).encode()) + 1 for row in sample)
    per_token = stored / sum(segment.tokens_policy for segment in segments)
    return {
        "total": stored,
        "parquet_per_token": per_token,
        "jsonl_per_token": len(lines) / tokens,
        "jsonl_gzip_per_token": len(gzip.compress(lines, 6)) / tokens,
        "jsonl_plain_per_token": plain / tokens,
        "jsonl_to_parquet": len(lines) / tokens / per_token,
        "jsonl_plain_to_parquet": plain / tokens / per_token,
    }


@contextmanager
def _growth_of_memory() -> Iterator[list[int]]:
    """By how many bytes this process is larger, at its largest, than when the block began: the one entry afterwards."""
    process, ended = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    seen: list[int] = [before]
    result: list[int] = []

    def watch() -> None:
        while not ended.wait(0.002):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield result
    ended.set()
    watcher.join()
    result.append(max(seen) - before)


def lookup(uri: str) -> dict[str, Any]:
    """Seconds that a replay takes to have the guide trajectories of its first segment, the prompts' table apart."""
    from npo_core.artifacts import open_run
    from npo_core.workspace import Workspace

    opened = Workspace.of(open_run(uri))
    guide = max(opened.run.guides(), key=lambda guide: guide.solved)
    began = time.perf_counter()
    steps = range(guide.spec.start, min(guide.spec.start + LOOKUP_STEPS, guide.spec.stop))
    prompts = {prompt_id for step in steps for prompt_id in opened.prompts.batch_ids(step)}
    assert opened.verifier
    opened.encode(opened.prompts.get(min(prompts)))  # loads the tokenizer
    loaded = time.perf_counter()
    with _growth_of_memory() as grown:
        found = opened.guide(guide.guide_id, prompts)
    assert found is not None
    return {
        "prompts": len(prompts),
        "found": len(found),
        "seconds": time.perf_counter() - loaded,
        "grown_bytes": grown[0],
        "load_seconds": loaded - began,
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """One row a command, one column a run, and how much the last is of the first."""
    names = list(dict.fromkeys(name for result in results for name in result["commands"]))
    rows: list[tuple[object, ...]] = [
        ("trajectories", *(f"{result['rows']:,}" for result in results), _growth(results, "rows")),
        ("completion tokens", *(f"{result['tokens']:,}" for result in results), _growth(results, "tokens")),
        ("guide's prompts", *(f"{r['guide_prompts']:,}" for r in results), _growth(results, "guide_prompts")),
    ]
    for name in names:
        for unit, key, how in (("seconds", "seconds", _number), ("peak MiB", "peak_bytes", _mib)):
            path = ("commands", name, key)
            rows.append((f"{name}: {unit}", *(_cell(r, how, *path) for r in results), _growth(results, *path)))
    others = (
        ("prompts looked up", ("lookup", "prompts"), str),
        ("look-up itself: seconds", ("lookup", "seconds"), _number),
        ("look-up itself: MiB on top", ("lookup", "grown_bytes"), _mib),
        ("prompts, verifier and tokenizer before it: seconds", ("lookup", "load_seconds"), _number),
        ("rollouts on disk: MiB", ("bytes", "total"), _mib),
        ("bytes a token: Parquet", ("bytes", "parquet_per_token"), _number),
        ("bytes a token: JSON lines, shortest floats", ("bytes", "jsonl_per_token"), _number),
        ("bytes a token: JSON lines of json.dumps", ("bytes", "jsonl_plain_per_token"), _number),
        ("bytes a token: JSON lines, gzip", ("bytes", "jsonl_gzip_per_token"), _number),
        ("JSON lines, shortest floats / Parquet", ("bytes", "jsonl_to_parquet"), _number),
        ("JSON lines of json.dumps / Parquet", ("bytes", "jsonl_plain_to_parquet"), _number),
    )
    rows += [(label, *(_cell(r, how, *path) for r in results), _growth(results, *path)) for label, path, how in others]
    return markdown(("", *(result["run"] for result in results), "last / first"), rows)


def _npo(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "flows.cli", *arguments]


def _repeated(command: Sequence[str], repeats: int) -> tuple[dict[str, Any], str]:
    every = [timed(command) for _ in range(repeats)]
    results = [result for result, _ in every]
    return {
        **results[-1],
        "seconds": statistics.median(result["seconds"] for result in results),
        "peak_bytes": max(result["peak_bytes"] for result in results),
    }, every[-1][1]


def _shortest(row: dict[str, Any]) -> dict[str, Any]:
    """The row with log-probabilities as the shortest decimals that are the same float32."""
    import numpy as np

    return {**row, "behavior_logprobs": [float(str(np.float32(value))) for value in row["behavior_logprobs"]]}


def _at(result: dict[str, Any], *path: str) -> Any:
    for key in path:
        result = result.get(key, {})
    return result or None


def _cell(result: dict[str, Any], how: Any, *path: str) -> str | None:
    value = _at(result, *path)
    return None if value is None else how(value)


def _growth(results: Sequence[dict[str, Any]], *path: str) -> str | None:
    first, last = _at(results[0], *path), _at(results[-1], *path)
    return f"{last / first:.1f}×" if first and last else None


def _number(value: float) -> str:
    return f"{value:.2f}"


def _mib(value: float) -> str:
    return f"{value / MIB:,.0f}"


def main() -> None:
    """Does what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    rows, guide = actions.add_parser("generate", help="a run"), actions.add_parser("guide", help="a guide")
    for action, tokens in ((rows, 200), (guide, 50)):
        action.add_argument("store", help="the store to write it to")
        action.add_argument("--tokens", type=int, default=tokens, help="mean length of a completion")
        action.add_argument("--seed", type=int, default=0)
        action.add_argument("--name", help="the run's name")
    rows.add_argument("--rows", type=int, required=True, help="trajectories, about")
    rows.add_argument("--steps", type=int, default=500)
    rows.add_argument("--segment-steps", type=int, default=10)
    guide.add_argument("--prompts", type=int, required=True)
    measured = actions.add_parser("measure", help="what each command takes of a run")
    measured.add_argument("run", help="STORE/RUN")
    measured.add_argument("--out", type=Path, help="write the result to this file")
    measured.add_argument("--repeats", type=int, default=3)
    actions.add_parser("lookup", help="a guide's trajectories of a segment").add_argument("run")
    actions.add_parser("table", help="results side by side").add_argument("results", type=Path, nargs="+")
    args = parser.parse_args()
    if args.action == "table":
        print(table([json.loads(path.read_text()) for path in args.results]))
    elif args.action == "lookup":
        print(json.dumps(lookup(args.run)))
    elif args.action == "measure":
        result = measure(args.run, args.repeats)
        print(table([result]))
        write_json(args.out, result)
    else:
        from tests.bench import scale_run

        began = time.perf_counter()
        if args.action == "generate":
            name = args.name or f"rows-{args.rows}"
            shape = scale_run.Shape.of_rows(name, args.rows, args.steps, args.segment_steps, args.tokens, args.seed)
            run = scale_run.write_run(args.store, shape)
        else:
            shape = scale_run.Shape.of_guide(args.name or f"guide-{args.prompts}", args.prompts, args.tokens, args.seed)
            run = scale_run.write_guide(args.store, shape)
        print(f"{run.uri}: {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
