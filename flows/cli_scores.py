"""How evaluations are shown: pass@1 with its interval and the rest without, so that a terminal's 80 columns hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from flows.cli_output import cell, table
from schemas.records import EvalManifest

if TYPE_CHECKING:  # it loads NumPy
    from npo_core.scores import Scores


def scores_table(made: EvalManifest, scores: Scores) -> Table:
    """An evaluation's scores: a row a task, the macro average and all prompts."""
    shown = scores.as_json()
    ks = [k for k in shown["overall"]["pass_at"] if k != "1"]
    greedy = shown["overall"]["greedy"] is not None
    rows = [*shown["tasks"].items(), ("macro average", shown["macro"]), ("all prompts", shown["overall"])]
    lines = [
        [
            name,
            one["prompts"],
            estimate(one["pass_at"]["1"]),
            *(one["pass_at"][k]["value"] for k in ks),
            *([one["greedy"]["value"]] if greedy else []),
        ]
        for name, one in rows
    ]
    heads = ("task", "prompts", "pass@1", *(f"pass@{k}" for k in ks), *(["greedy"] if greedy else []))
    asked = "held-out prompts" if made.benchmark is None else f"benchmark {made.benchmark.name}"
    at = f"leg {made.checkpoint.leg_id} at step {made.checkpoint.step}"
    title = f"{asked}, {at}, accuracy {made.accuracy:.3f} of {scores.samples} samples a prompt [95 % interval]"
    return _dense(table(heads, lines, title))


def benchmarks_table(found: list[dict[str, Any]]) -> Table:
    """A row an evaluation on a benchmark (`evaluated.benchmarks`), over all its prompts."""
    lines = []
    for one in found:
        pass_at, greedy = one["scores"]["overall"]["pass_at"], one["scores"]["overall"]["greedy"]
        most = max(pass_at, key=int)
        last = f"@{most} {cell(pass_at[most]['value'])}" if most != "1" else None
        lines.append(
            [
                one["benchmark"],
                one["step"],
                one["leg_id"],
                one["prompts"],
                estimate(pass_at["1"]),
                last,
                None if greedy is None else greedy["value"],
            ]
        )
    heads = ("benchmark", "step", "leg", "prompts", "pass@1", "pass@k", "greedy")
    return _dense(table(heads, lines, "Benchmarks [95 % interval]"))


def estimate(of: Mapping[str, float]) -> str:
    """`0.512 [0.467, 0.561]`."""
    return f"{cell(of['value'])} [{cell(of['low'])}, {cell(of['high'])}]"


def _dense(made: Table) -> Table:
    made.box, made.padding = box.SIMPLE_HEAD, (0, 1, 0, 0)
    return made
