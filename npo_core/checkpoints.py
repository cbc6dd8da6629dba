"""A run's checkpoints, and the model files that they share. Loading never unpickles: only safetensors and plain text
get in or out."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePosixPath

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from npo_core import lineage
from npo_core.faults import fault_point
from npo_core.interfaces import ADAPTER, LocalCheckpoint, NearFutureError
from npo_core.monitor import MONITOR_FILE
from npo_core.run_files import Environment, RunFiles, origin
from npo_core.store import StoreError
from npo_core.tombstones import big_files, removals
from schemas import layout
from schemas.decisions import MonitorState
from schemas.digest import digest_json
from schemas.records import CheckpointManifest, CheckpointRef, FileEntry, Manifest, RunRecord, SegmentRows, Tombstone

logger = logging.getLogger("npo")

ALLOWED_SUFFIXES = (".safetensors", ".json", ".txt", ".jinja", ".model")
POLICY = ("weights", "adapter")
"""Roles of a policy's files: a checkpoint has either, and an adapter's weights are the starting policy's."""
_FOLDERS = {
    "weights": "weights",
    "adapter": f"weights/{ADAPTER}",
    "model": "weights",
    "optimizer": "optimizer",
    "state": ".",
    "monitor": ".",
}
"""Where a file lies in a checkpoint's directory, by its role (see `LocalCheckpoint`)."""


class Checkpoints(RunFiles):
    """The checkpoints of one run."""

    def put_model(self, *directories: Path, environment: Environment | None = None) -> Manifest:
        """Stores, once a run, what model directories hold beside weights: configuration, tokenizer, chat template.
        Where two hold a file of one name, the later directory's counts.

        Raises:
            NearFutureError: there is no config.json.
        """
        chosen = {path.name: path for directory in directories for path in sorted(directory.iterdir())}
        files = tuple(
            self.store.put_data(layout.MODEL, name, "model", path)
            for name, path in sorted(chosen.items())
            if path.is_file() and name.endswith(ALLOWED_SUFFIXES) and not _is_weights(name)
        )
        if not any(entry.name == "config.json" for entry in files):
            raise NearFutureError(f"{directories[0]} holds no config.json; give a transformers model directory")
        return self.store.commit(layout.MODEL, Manifest(kind="model", files=files, **origin(environment or {})))

    def model(self) -> Manifest | None:
        """What `put_model` committed."""
        return self.store.read(layout.manifest(layout.MODEL), Manifest)

    def checkout_model(self, directory: Path) -> Path:
        """Copies the model files into a directory, every hash checked, and returns it."""
        manifest = self.model()
        if manifest is None:
            raise StoreError(f"{self.uri}/{layout.MODEL} holds no model files; restore them from a copy")
        for entry in manifest.files:
            self._fetch(entry, directory / entry.name)
        return directory

    def checkpoint(self, leg_id: str, step: int) -> CheckpointManifest | None:
        """A leg's checkpoint at a step."""
        return self.store.read(layout.manifest(layout.checkpoint(leg_id, step)), CheckpointManifest)

    def checkpoints(self, leg_id: str) -> list[CheckpointManifest]:
        """A leg's checkpoints by step."""
        steps = sorted(int(name) for name in self.store.list(layout.checkpoints(leg_id)) if name.isdigit())
        return [found for step in steps if (found := self.checkpoint(leg_id, step)) is not None]

    def require_checkpoint(self, leg_id: str, step: int) -> CheckpointManifest:
        """A leg's checkpoint at a step.

        Raises:
            NearFutureError: there is none; names the steps that there are.
        """
        found = self.checkpoint(leg_id, step)
        if found is None:
            present = ", ".join(str(manifest.step) for manifest in self.checkpoints(leg_id)) or "none"
            raise NearFutureError(
                f"leg {leg_id} of {self.uri} has no checkpoint at step {step} (it has: {present}); choose one that is "
                "there, or, if it was lost, restore it from a copy: `npo verify` says how"
            )
        return found

    def commit_checkpoint(
        self, leg_id: str, step: int, directory: Path, environment: Environment, rows: SegmentRows | None = None
    ) -> tuple[CheckpointManifest, bool]:
        """Commits a checkpoint from a directory that is laid out as `LocalCheckpoint`.

        Args:
            rows: of the segment that led to it, if one did.

        Returns:
            The committed manifest, and whether it holds the same files as the directory: an earlier attempt's may
            differ, where bits are not promised to be equal.

        Raises:
            NearFutureError: no weights, or a file that could hold a pickle.
        """
        folder = layout.checkpoint(leg_id, step)
        files = tuple(self.store.put_data(folder, path.name, role, path) for role, path in _checkpoint_files(directory))
        manifest = CheckpointManifest(
            files=files,
            leg_id=leg_id,
            step=step,
            digest=files_digest(files),
            weights_digest=files_digest(policy_files(files)),
            segment=rows,
            **origin(environment),
        )
        fault_point("checkpoint-data")
        committed = self.store.commit(folder, manifest)
        fault_point("checkpoint-manifest")
        same = committed.digest == manifest.digest
        if not same:
            logger.warning("%s was committed before, by an attempt with other bits; it is the one that counts", folder)
        return committed, same

    def checkout(self, ref: CheckpointRef, directory: Path, weights_only: bool = False) -> LocalCheckpoint:
        """Copies a checkpoint into a local directory, every hash checked.

        Args:
            weights_only: leave optimizer and state out.

        Raises:
            NearFutureError: there is no such checkpoint, it is another one than `ref` says, it was removed by
                `npo gc`, or it holds a file that could hold a pickle.
        """
        manifest = self.require_checkpoint(ref.leg_id, ref.step)
        if manifest.digest != ref.digest:
            raise StoreError(
                f"the checkpoint of leg {ref.leg_id} at step {ref.step} has digest {manifest.digest[:12]}, not "
                f"{ref.digest[:12]} as it is referred to; restore it from a copy"
            )
        self.require_present(manifest)
        files = list(policy_files(manifest.files) if weights_only else manifest.files)
        if any(entry.role == "adapter" for entry in files):
            files += policy_files(self.starting_policy().files)
        for entry in files:
            self._fetch(entry, directory / _FOLDERS[entry.role] / entry.name)
        self.checkout_model(directory / _FOLDERS["model"])
        return LocalCheckpoint(directory, manifest.digest, manifest.step)

    def starting_policy(self) -> CheckpointManifest:
        """The warm leg's checkpoint, whose weights the adapters of a LoRA run belong to.

        Raises:
            NearFutureError: it is missing.
        """
        record = self.store.read(layout.RUN, RunRecord)
        if record is None:
            raise StoreError(f"{self.uri}/{layout.RUN} is missing; restore it from a copy")
        return self.require_checkpoint(lineage.leg_id(record.recipe_digest, None, "warm", 0, None), 0)

    def monitor_state(self, ref: CheckpointRef) -> MonitorState:
        """AutoNPO's state at a checkpoint; empty where none was saved, as in a starting policy's.

        Raises:
            StoreError: it is damaged.
        """
        manifest = self.require_checkpoint(ref.leg_id, ref.step)
        for entry in manifest.files:
            if entry.role == "monitor":
                try:
                    return MonitorState.model_validate_json(self.store.read_data(entry))
                except ValidationError as error:
                    raise StoreError(
                        f"{self.uri}/{entry.key} holds no monitor state; restore it from a copy"
                    ) from error
        return MonitorState()

    def tombstones(self) -> list[Tombstone]:
        """What `npo gc` removed, by time."""
        for name in self.store.list(layout.TOMBSTONES):
            # They never change, and each checkout asks for all of them.
            if name not in self._tombstones and name.endswith(".json"):
                found = self.store.read(f"{layout.TOMBSTONES}/{name}", Tombstone)
                if found is not None:
                    self._tombstones[name] = found
        return [self._tombstones[name] for name in sorted(self._tombstones)]

    def bury(self, checkpoints: Sequence[CheckpointManifest], reason: str) -> Tombstone:
        """Commits that the big files of these checkpoints go; removing them is the caller's part."""
        tombstone = Tombstone(
            checkpoints=tuple(manifest.ref for manifest in checkpoints),
            files=tuple(entry.key for manifest in checkpoints for entry in big_files(manifest)),
            reason=reason,
            created_at=datetime.now(UTC).isoformat(),
            nonce=secrets.token_hex(16),
        )
        return self.store.create(layout.tombstone(tombstone.created_at, tombstone.nonce), tombstone)

    def require_present(self, manifest: CheckpointManifest) -> None:
        """Refuses a checkpoint that `npo gc` removed.

        Raises:
            NearFutureError: says when and why, and which steps of the leg are there.
        """
        removed = removals(self.tombstones())
        removal = removed.get(manifest.ref)
        if removal is None:
            return
        kept = [other.step for other in self.checkpoints(manifest.leg_id) if other.ref not in removed]
        raise NearFutureError(
            f"the checkpoint of leg {manifest.leg_id} of {self.uri} at step {manifest.step} was removed by `npo gc` on "
            f"{removal.created_at[:16].replace('T', ' ')} UTC ({removal.reason}); choose a step that the leg still has "
            f"({', '.join(map(str, kept)) or 'none'}); raise retention.keep_last or set retention.keep_every to keep "
            "such ones"
        )

    @cached_property
    def _tombstones(self) -> dict[str, Tombstone]:
        """Those read so far, by name."""
        return {}

    def _fetch(self, entry: FileEntry, target: Path) -> None:
        require_safe_name(entry.name)
        self.store.fetch(entry, target)
        _require_safetensors(target)


def require_safe_name(name: str) -> None:
    """Refuses a file that could hold a pickle or leave its directory.

    Raises:
        NearFutureError: names the file and says why.
    """
    if PurePosixPath(name).name != name or not name.endswith(ALLOWED_SUFFIXES):
        raise NearFutureError(
            f"checkpoint file {name!r} is refused: only {', '.join(ALLOWED_SUFFIXES)} files belong into a checkpoint, "
            "for a pickle can run code; save the model as safetensors"
        )


def policy_files(files: Iterable[FileEntry]) -> tuple[FileEntry, ...]:
    """Of a checkpoint's files those that say which policy it is."""
    return tuple(entry for entry in files if entry.role in POLICY)


def files_digest(files: Iterable[FileEntry]) -> str:
    """SHA-256 over (role, name, sha256) of files, sorted: what they hold, wherever they lie."""
    return digest_json(sorted([entry.role, entry.name, entry.sha256] for entry in files))


def _checkpoint_files(directory: Path) -> list[tuple[str, Path]]:
    """(role, path) of the files that a checkpoint stores; a run's model files are not among them."""
    found = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        require_safe_name(path.name)
        _require_safetensors(path)
        folder = path.parent.relative_to(directory).as_posix()
        if folder == "weights" and _is_weights(path.name):
            found.append(("weights", path))
        elif folder == _FOLDERS["adapter"]:
            found.append(("adapter", path))
        elif folder == "optimizer":
            found.append(("optimizer", path))
        elif folder == "." and path.name == "state.json":
            found.append(("state", path))
        elif folder == "." and path.name == MONITOR_FILE:
            found.append(("monitor", path))
    if not any(role in POLICY for role, _ in found):
        raise NearFutureError(f"{directory} holds no weights/*.safetensors; save the policy as safetensors")
    return found


def _is_weights(name: str) -> bool:
    """Whether a file of a model directory is weights or the index of their shards."""
    return name.endswith((".safetensors", ".safetensors.index.json"))


def _require_safetensors(path: Path) -> None:
    if path.suffix != ".safetensors":
        return
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise NearFutureError(
            f"checkpoint file {path.name!r} is refused: it is named as safetensors and is none ({error}); "
            "save the model as safetensors"
        ) from error
