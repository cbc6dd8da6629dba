"""A run in Markdown, for people who read it in Prefect's UI. Its texts stay text there: never markup, never a link."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

from schemas.decisions import DecisionRecord
from schemas.records import EvalManifest

_MARKUP = re.compile(r"[\\`*_\[\]|~!#$]")
_ADDRESS_LIKE = re.compile(r"(?=://)|(?=@)|(?<=www)(?=\.)", re.IGNORECASE)
"""Where a word joiner, which nobody sees, keeps a renderer from making links of bare addresses: it does so after it has
taken all escapes away."""


_ADDRESS = "%:/?#[]@!$&'*+,;=~"
"""What stays as it is in an address; parentheses would end it."""


def text(value: object) -> str:
    """A value as plain text, on one line."""
    words = _ADDRESS_LIKE.sub("\u2060", " ".join(str(value).split()))
    return _MARKUP.sub(r"\\\g<0>", html.escape(words, quote=False))


def code(value: object) -> str:
    """A value as code, on one line: an address in it is no link."""
    words = " ".join(str(value).split())
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", words)), default=0))
    gap = " " if "`" in words else ""
    return f"{fence}{gap}{words}{gap}{fence}"


def link(words: str, url: str) -> str:
    """A link to an http(s) address."""
    return f"[{text(words)}]({quote(url, safe=_ADDRESS)})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def address(uri: str, run_uri: str, public_url: str | None) -> str | None:
    """Where a browser reads a file of a run; None if nobody said.

    Args:
        uri: of the file, below `run_uri`.
        run_uri: `STORE/RUN`.
        public_url: `run.public_url`.
    """
    if public_url is None:
        return None
    store = run_uri.rpartition("/")[0]
    return quote(public_url.rstrip("/") + uri.removeprefix(store), safe=_ADDRESS)


def summary(
    shown: dict[str, Any],
    scores: Sequence[EvalManifest],
    decisions: Sequence[DecisionRecord],
    report: str | None,
    curves: str | None,
    public_url: str | None,
) -> str:
    """What a run has come to.

    Args:
        shown: `views.show`.
        scores: `views.main_evaluations`.
        decisions: of the run.
        report: URI of the report.
        curves: URI of the picture of its curves.
        public_url: `run.public_url`.
    """
    run = shown["run"]
    places = [f"- run {code(run)}"]
    if report is not None:
        readable = address(report, run, public_url)
        places.append(f"- report {code(report) if readable is None else link(report.rpartition('/')[2], readable)}")
    picture = None if curves is None else address(curves, run, public_url)
    if public_url is None:
        places.append(
            "- curves and links appear here once `run.public_url` is the http(s) address at which a browser reads the "
            "store"
        )
    parts = [_facts(shown, scores), "\n".join(places)]
    if picture is not None:
        parts.append(f"![reward, entropy, accuracy and replaced slots]({picture})")
    if shown["guides"]:
        rows = ([_leg(g), f"{g['start']}–{g['stop']}", _share(g["solved"], g["prompts"])] for g in shown["guides"])
        parts.append("### Guides\n\n" + table(["checkpoint", "steps", "prompts solved"], rows))
    if decisions:
        head = ["at step", "by", "outcome", "reason"]
        parts.append("### Decisions\n\n" + table(head, map(_decision, decisions)))
    if scores:
        made = ([str(e.checkpoint.step), f"{e.accuracy:.3f}", f"{e.entropy:.3f}"] for e in scores)
        parts.append("### Held-out prompts\n\n" + table(["step", "accuracy", "entropy"], made))
    return "\n\n".join(parts)


def _facts(shown: dict[str, Any], scores: Sequence[EvalManifest]) -> str:
    head, tokens = shown["head"], shown["tokens"]
    rows = [["head", "none yet" if head is None else f"step {head['step']}, leg {code(head['leg_id'])}"]]
    if scores:
        first, last = scores[0], scores[-1]
        change = f"{first.accuracy:.3f} at step {first.checkpoint.step} → **{last.accuracy:.3f}** at step "
        rows.append(["held-out accuracy", f"{change}{last.checkpoint.step}"])
    names = {"policy": "main line", "guide": "guides and probes", "discarded": "scouts and abandoned steps"}
    counts = "; ".join(f"{label} {tokens[name]:,}" for name, label in names.items())
    rows.append(["generated tokens", counts])
    return table(["", ""], rows)


def _leg(guide: dict[str, Any]) -> str:
    return f"step {guide['step']} of leg {code(guide['leg_id'])}"


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({100 * part / whole:.0f} %)" if whole else "")


def _decision(decision: DecisionRecord) -> list[str]:
    outcome = f"back to step {decision.start}, Δ = {decision.lookahead}" if decision.intervene else "goes on"
    return [str(decision.step), text(decision.source), outcome, text(decision.reason)]
