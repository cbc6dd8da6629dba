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
    lines = [
        f"data: {report.rows:,} rows of {report.origin}: {report.train:,} prompts to train on, "
        f"{report.held_out:,} held out{longest}"
    ]
    if out:
        lines.append(f"data: left out: {out}")
    return lines + [f"data: {fault.where}: {fault.reason}" for fault in report.faults]
