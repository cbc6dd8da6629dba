"""A report of rows in words."""

from __future__ import annotations

from schemas.records import DataReport


def told(report: DataReport) -> list[str]:
    """A report in words, one fact a line."""
    left_out = {
        "bad": report.bad,
        "empty": report.empty,
        "duplicate": report.duplicates,
        "over-long": report.over_long,
        "also held out": report.shared,
        "unused": report.unused,
    }
    out = ", ".join(f"{count:,} {what}" for what, count in left_out.items() if count)
    longest = "" if report.longest is None else f", {report.longest:,} tokens the longest"
    # A benchmark holds none out.
    sides = f" to train on, {report.held_out:,} held out" if report.held_out else ""
    lines = [f"data: {report.rows:,} rows of {report.origin}: {report.train:,} prompts{sides}{longest}"]
    if out:
        lines.append(f"data: left out: {out}")
    return lines + [f"data: {fault.where}: {fault.reason}" for fault in report.faults]
