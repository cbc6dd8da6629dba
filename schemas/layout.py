"""Layout of the store: pure functions from names to keys. A key is relative to the run's root `{store}/{run_id}`."""

from __future__ import annotations

RUN = "run.json"
PROMPTS = "prompts.parquet"
HEAD = "head.json"
CONFIG = "config.json"
LEGS = "legs"
GUIDES = "guides"
EVALS = "evals"
DECISIONS = "decisions"
REQUESTS = "requests"
REPORTS = "reports"
PICTURES = "pictures"
SIGNALS = "signals"
TOMBSTONES = "tombstones"
LEASES = "leases"
MODEL = "model"
"""The model directory without its weights: configuration, tokenizer, chat template."""
MANIFEST = "manifest.json"


def leg(leg_id: str) -> str:
    """The leg's record."""
    return f"{LEGS}/{leg_id}/leg.json"


def segments(leg_id: str) -> str:
    """Folder of a leg's segments."""
    return f"{LEGS}/{leg_id}/segments"


def segment(leg_id: str, start: int, stop: int) -> str:
    """Folder of steps [start, stop) of a leg."""
    return f"{segments(leg_id)}/{start:06d}-{stop:06d}"


def checkpoints(leg_id: str) -> str:
    """Folder of a leg's checkpoints."""
    return f"{LEGS}/{leg_id}/checkpoints"


def checkpoint(leg_id: str, step: int) -> str:
    """Folder of the checkpoint at `step`."""
    return f"{checkpoints(leg_id)}/{step:06d}"


def guide(guide_id: str) -> str:
    """Folder of a guide."""
    return f"{GUIDES}/{guide_id}"


def shards(guide_id: str) -> str:
    """Folder of a guide's shards."""
    return f"{guide(guide_id)}/shards"


def shard(guide_id: str, shard_id: str) -> str:
    """Folder of a shard of a guide."""
    return f"{shards(guide_id)}/{shard_id}"


def evaluation(eval_id: str) -> str:
    """Folder of an evaluation."""
    return f"{EVALS}/{eval_id}"


def signal(signal_id: str) -> str:
    """Folder of a study of Q, V and S."""
    return f"{SIGNALS}/{signal_id}"


def decision(leg_id: str, step: int, guide_id: str | None) -> str:
    """The decision record of (leg, step), and of the guide if there is one already."""
    suffix = "" if guide_id is None else f"-{guide_id}"
    return f"{DECISIONS}/{leg_id}-{step:06d}{suffix}.json"


def request(leg_id: str, step: int, by: str) -> str:
    """The request for an intervention at (leg, step), one for each way to see a warning."""
    return f"{REQUESTS}/{leg_id}-{step:06d}-{by}.json"


def tombstone(created_at: str, nonce: str) -> str:
    """Key of the tombstone of one removal: by time, where they are listed."""
    moment = created_at[:19].replace("-", "").replace(":", "")
    return f"{TOMBSTONES}/{moment}-{nonce}.json"


def lease(writer: str) -> str:
    """Key of a writer's lease."""
    return f"{LEASES}/{writer}.json"


def picture(sha256: str) -> str:
    """Key of a picture that prompts show: its content's hash, so that equal pictures are stored once."""
    return f"{PICTURES}/{sha256}"


def data_file(folder: str, name: str, sha256: str) -> str:
    """Key of a data file: its name with the content's hash before the extension, so no other content has it."""
    stem, dot, extension = name.rpartition(".")
    return f"{folder}/{stem}-{sha256[:16]}{dot}{extension}"


def manifest(folder: str) -> str:
    """Key of the manifest which commits what lies in `folder`."""
    return f"{folder}/{MANIFEST}"
