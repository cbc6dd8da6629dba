"""What lies in a run's folder and belongs to nothing: pure, from names and times. A name that this program would not
have written is nobody's debris."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from npo_core.interfaces import StoredObject
from npo_core.leases import since
from schemas import layout
from schemas.records import Lease

Kind = Literal["record", "data", "temporary", "report", "lease", "unknown"]
"""`record`: prompts, their pictures, and everything that commits, decides or locks, no debris but for a shard's;
`data`: a file that a manifest of its folder may name."""

UNCOMMITTED = "data that was never committed"

MARGIN = timedelta(minutes=5)
"""Nothing younger goes, whatever is asked for: clocks of writers and of the store differ, a process that has just begun
has no lease yet, and one that writes a report takes none."""

_ID = r"[0-9a-f]{12}"
_LEG = rf"{layout.LEGS}/{_ID}"
_SHARD = rf"{layout.GUIDES}/{_ID}/shards/{_ID}"
_ARTIFACT = (
    rf"(?:{_LEG}/segments/\d{{6,}}-\d{{6,}}|{_LEG}/checkpoints/\d{{6,}}|{layout.MODEL}"
    rf"|(?:{layout.GUIDES}|{layout.EVALS}|{layout.SIGNALS})/{_ID}|{_SHARD})"
)
_PLAIN = (
    rf"(?:{_LEG}|{layout.DECISIONS}|{layout.REQUESTS}|{layout.REPORTS}|{layout.TOMBSTONES}|{layout.LEASES}"
    rf"|{layout.PICTURES})"
)
_HASHED = r"[^/.][^/]*-[0-9a-f]{16}\.[A-Za-z0-9]+"

_KINDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    (
        "record",
        re.compile(
            rf"{re.escape(layout.RUN)}|{re.escape(layout.PROMPTS)}|{layout.PICTURES}/[0-9a-f]{{64}}"
            rf"|\.?(?:{re.escape(layout.HEAD)}|{re.escape(layout.CONFIG)})(?:\.lock)?"
        ),
    ),
    ("record", re.compile(rf"{_LEG}/leg\.json|{_ARTIFACT}/{re.escape(layout.MANIFEST)}")),
    ("record", re.compile(rf"{layout.DECISIONS}/{_ID}-\d{{6,}}(?:-{_ID})?\.json")),
    ("record", re.compile(rf"{layout.REQUESTS}/{_ID}-\d{{6,}}-[a-z]+\.json")),
    ("record", re.compile(rf"{layout.TOMBSTONES}/\d{{8}}T\d{{6}}-[0-9a-f]{{32}}\.json")),
    ("lease", re.compile(rf"{layout.LEASES}/(?:[0-9a-f]{{32}}\.json|\.[0-9a-f]{{32}}\.json\.lock)")),
    ("temporary", re.compile(rf"(?:(?:{_ARTIFACT}|{_PLAIN})/)?\.[^/]+\.[0-9a-f]{{16}}\.tmp")),
    ("report", re.compile(rf"{layout.REPORTS}/{_HASHED}")),
    ("data", re.compile(rf"{_ARTIFACT}/{_HASHED}")),
)


@dataclass(frozen=True)
class Removal:
    """An object that goes."""

    key: str
    bytes: int
    why: str


def kind_of(key: str) -> Kind:
    """What an object is, by its name."""
    return next((kind for kind, pattern in _KINDS if pattern.fullmatch(key)), "unknown")


def folder_of(key: str) -> str:
    """The folder that an object lies in: an artifact's, if it is one of its data files."""
    return key.rpartition("/")[0]


def unknown(objects: Sequence[StoredObject]) -> tuple[str, ...]:
    """What nobody here wrote, by name."""
    return tuple(sorted(o.key for o in objects if kind_of(o.key) == "unknown"))


def debris(
    objects: Sequence[StoredObject],
    named: Collection[str],
    committed: Collection[str],
    live: Sequence[Lease],
    now: datetime,
    grace: timedelta,
) -> Iterator[Removal]:
    """What can go, in the order of the objects.

    Args:
        objects: everything in the run's folder.
        named: keys of all data files of manifests, those that a removal took included.
        committed: folders that hold a manifest.
        live: leases of processes that may be writing. While there are any, what was written since the first of them
            began stays, and so does everything in a folder without a manifest: a writer that comes by it again may
            write the same file anew, and commit it.
        now: what ages are counted from.
        grace: what is younger stays.
    """
    newest: dict[str, datetime] = {}
    for o in objects:
        if kind_of(o.key) == "report":
            newest[_subject(o.key)] = max(o.modified, newest.get(_subject(o.key), o.modified))
    cut = now - max(grace, MARGIN)
    if live:
        cut = min(cut, min(map(since, live)) - MARGIN)
    open_leases = {layout.lease(lease.writer) for lease in live}
    for o in objects:
        kind, folder = kind_of(o.key), folder_of(o.key)
        if o.modified > cut:
            continue
        if kind == "temporary":
            yield Removal(o.key, o.bytes, "temporary file of a killed process")
        elif kind == "report" and o.modified < newest[_subject(o.key)]:
            yield Removal(o.key, o.bytes, "older report")
        elif kind == "lease" and o.key.replace("/.", "/").removesuffix(".lock") not in open_leases:
            yield Removal(o.key, o.bytes, "expired lease")
        elif kind in ("record", "data") and not live and _guide_of(folder) in committed:
            yield Removal(o.key, o.bytes, "shard of a guide that is committed")
        elif kind == "data" and o.key not in named and not (live and folder not in committed):
            yield Removal(o.key, o.bytes, UNCOMMITTED)


def _guide_of(folder: str) -> str | None:
    """Folder of the guide that a shard's folder belongs to; None if it is no shard's."""
    return folder.partition("/shards/")[0] if re.fullmatch(_SHARD, folder) else None


def _subject(report: str) -> str:
    """What a report shows, by its name: the whole run, or its curves alone."""
    return report.rpartition("-")[0]
