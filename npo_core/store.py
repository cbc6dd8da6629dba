"""The store: objects under keys on any fsspec file system that has conditional writes.

Data files carry their content's hash in the key, records are created only if absent, and one record, the head, moves
by compare-and-swap. Listings and large files go through fsspec; how a protocol reads and writes whole objects is an
`Objects` of its own.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.core import split_protocol
from pydantic import ValidationError

from npo_core.interfaces import ConfigurationError, ManifestT, NearFutureError, RecordT, StoredObject
from npo_core.objects import CHUNK_BYTES, LocalObjects, Objects
from schemas import layout
from schemas.digest import canonical_json, digest_bytes
from schemas.records import SCHEMA_VERSION, FileEntry, Record
from schemas.urls import without_credentials

READERS = 16
"""Records that are read at one time: an object store answers each in milliseconds, and all together no slower."""


class StoreError(NearFutureError):
    """The store cannot be written or read, or holds something else than it should. Names the key and the remedy."""


def safe_url(url: str) -> str:
    """The URL of a store or of a run in it, which messages may repeat.

    Raises:
        ConfigurationError: it holds credentials.
    """
    try:
        return without_credentials(url)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def open_store(url: str) -> FsspecStore:
    """The store at a URL (`file://PATH` or a path, `s3://BUCKET/PREFIX`); nothing is created before the first write.

    Raises:
        ConfigurationError: the protocol has no conditional writes here, or the URL holds credentials.
    """
    protocol = split_protocol(safe_url(url))[0] or "file"
    if protocol == "s3":
        from npo_core import s3  # a third of a second, which a local run need not wait for

        fs, path = s3.connect(url)
        return FsspecStore(fs, path, s3.S3Objects(fs))
    if protocol in ("file", "local"):
        fs, path = fsspec.url_to_fs(url)
        return FsspecStore(fs, path.rstrip("/"), LocalObjects())
    raise ConfigurationError(
        f"run.store {url!r}: protocol {protocol!r} has no conditional writes here; use file://PATH or s3://BUCKET/PREFIX"
    )


class FsspecStore:
    """See `npo_core.interfaces.Store`."""

    def __init__(self, fs: Any, path: str, objects: Objects) -> None:
        self.fs = fs
        self.path = path
        self.objects = objects
        self.root: str = fs.unstrip_protocol(path)

    def declare_single_writer(self) -> None:
        """See `Store.declare_single_writer`."""
        self.objects.single_writer = True

    def within(self, folder: str) -> FsspecStore:
        """See `Store.within`."""
        return FsspecStore(self.fs, self._path(folder), self.objects)

    def put_data(self, folder: str, name: str, role: str, source: bytes | Path, rows: int | None = None) -> FileEntry:
        """See `Store.put_data`."""
        with self._explained(source if isinstance(source, Path) else name):
            size, sha256 = _size_and_sha256(source)
        key = layout.data_file(folder, name, sha256)
        with self._explained(self._name(key)):
            # Written also if it is there: it may be an earlier attempt's, about to be swept as old debris.
            self.objects.publish(self._path(key), source)
        return FileEntry(role=role, name=name, key=key, bytes=size, sha256=sha256, rows=rows)

    def create(self, key: str, record: RecordT) -> RecordT:
        """See `Store.create`."""
        self.create_bytes(key, _encode(record))
        present = self.read(key, type(record))
        if present is None:
            raise StoreError(f"{self._name(key)} was removed while it was written; run again")
        return present

    def create_bytes(self, key: str, data: bytes) -> bytes:
        """See `Store.create_bytes`."""
        with self._explained(self._name(key)):
            return data if self.objects.create(self._path(key), data) else self.objects.read(self._path(key)) or b""

    def commit(self, folder: str, manifest: ManifestT) -> ManifestT:
        """See `Store.commit`."""
        return self.create(layout.manifest(folder), manifest)

    def read(self, key: str, kind: type[RecordT]) -> RecordT | None:
        """See `Store.read`."""
        data = self.read_bytes(key)
        return None if data is None else self._decode(key, kind, data)

    def read_all(self, keys: Sequence[str], kind: type[RecordT]) -> list[RecordT | None]:
        """See `Store.read_all`."""
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(lambda key: self.read(key, kind), keys))

    def read_bytes(self, key: str) -> bytes | None:
        """See `Store.read_bytes`."""
        with self._explained(self._name(key)):
            return self.objects.read(self._path(key))

    def read_data(self, entry: FileEntry) -> bytes:
        """See `Store.read_data`."""
        return b"".join(self._chunks(entry))

    def fetch(self, entry: FileEntry, target: Path) -> None:
        """See `Store.fetch`."""
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
        try:
            with self._explained(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("xb") as file:
                    for chunk in self._chunks(entry):
                        file.write(chunk)
                temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def check(self, entry: FileEntry) -> None:
        """See `Store.check`."""
        for _ in self._chunks(entry):
            pass

    def swap(self, key: str, expected: Record | None, new: Record) -> bool:
        """See `Store.swap`."""
        data = self.read_bytes(key)
        present = None if data is None else self._decode(key, type(new), data)
        if present != expected:
            return False
        with self._explained(self._name(key)):
            return self.objects.swap(self._path(key), data, _encode(new))

    def walk(self, folder: str) -> list[StoredObject]:
        """See `Store.walk`."""
        with self._explained(self._name(folder)):
            found = self.fs.find(self._path(folder), detail=True)
            return [
                StoredObject(path[len(self.path) + 1 :], info["size"], _modified(info))
                for path, info in found.items()
                if info["type"] == "file"
            ]

    def list(self, folder: str) -> list[str]:
        """See `Store.list`."""
        with self._explained(self._name(folder)):
            try:
                found = [str(path).rstrip("/") for path in self.fs.ls(self._path(folder), detail=False)]
            except self.objects.errors as error:
                if self.objects.is_absent(error):
                    return []
                raise
        # SeaweedFS lists an emptied folder as its own entry.
        names = (path.rpartition("/")[2] for path in found if path != self._path(folder))
        return sorted(name for name in names if not name.startswith("."))

    def remove(self, key: str) -> None:
        """See `Store.remove`."""
        with self._explained(self._name(key)), suppress(FileNotFoundError):
            self.fs.rm_file(self._path(key))

    @contextmanager
    def open(self, entry: FileEntry) -> Iterator[BinaryIO]:
        """See `Store.open`."""
        name = self._name(entry.key)
        with self._explained(name):
            try:
                # Parquet readers ask for what they want; reading ahead would fetch what they skip.
                file = self.fs.open(self._path(entry.key), "rb", cache_type="none")
            except FileNotFoundError as error:
                raise StoreError(f"{name} is missing; restore it from a copy") from error
            with file:
                read = file.read

                def explained(size: int = -1) -> bytes:
                    # At once: who reads Parquet would take a network's error for a damaged file.
                    with self._explained(name):
                        return read(size)

                file.read = explained
                if file.size != entry.bytes:
                    raise StoreError(
                        f"{name} has {file.size} bytes, its manifest says {entry.bytes}; restore it from a copy"
                    )
                yield file

    def _name(self, key: str) -> str:
        """An object's address, for messages."""
        base = self.path if self.root.startswith("file:") else self.root
        return f"{base}/{key}" if key else base

    @contextmanager
    def _explained(self, subject: object) -> Iterator[None]:
        """Turns a client library's error into one message: what, why and what to do."""
        try:
            yield
        except self.objects.errors as error:
            raise StoreError(f"{subject}: {_said(error)}; {self._remedy(error)}") from error

    def _remedy(self, error: Exception) -> str:
        return f"{self.objects.remedy(error) or 'mend this'} and run again; nothing that was committed is lost"

    def _path(self, key: str) -> str:
        return f"{self.path}/{key}" if key else self.path

    def _decode(self, key: str, kind: type[RecordT], data: bytes) -> RecordT:
        try:
            value = json.loads(data)
            version = value.get("schema_version")
            if version != SCHEMA_VERSION:
                raise StoreError(
                    f"{self._name(key)} has schema version {version}, this program reads version {SCHEMA_VERSION}; "
                    "use the program that wrote it"
                )
            return kind.model_validate_json(data)
        except (ValueError, AttributeError, ValidationError) as error:
            raise StoreError(
                f"{self._name(key)} is no {kind.__name__} ({str(error).splitlines()[0]}); restore it from a copy"
            ) from error

    def _chunks(self, entry: FileEntry) -> Iterator[bytes]:
        """The content; after the last chunk size and hash are checked."""
        name, size, digest = self._name(entry.key), 0, hashlib.sha256()
        try:
            with self.fs.open(self._path(entry.key), "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    size += len(chunk)
                    digest.update(chunk)
                    yield chunk
        except FileNotFoundError as error:
            raise StoreError(f"{name} is missing; restore it from a copy") from error
        except self.objects.errors as error:
            raise StoreError(f"{name} cannot be read: {_said(error)}; {self._remedy(error)}") from error
        if size != entry.bytes:
            raise StoreError(f"{name} has {size} bytes, its manifest says {entry.bytes}; restore it from a copy")
        if digest.hexdigest() != entry.sha256:
            raise StoreError(f"{name} was altered: its SHA-256 is not the manifest's; restore it from a copy")


def _said(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".") or type(error).__name__


def _modified(info: dict[str, Any]) -> datetime:
    """When an object was last written: S3 says it as a date, a local file system in seconds."""
    when = info["LastModified"] if "LastModified" in info else info["mtime"]
    return when.astimezone(UTC) if isinstance(when, datetime) else datetime.fromtimestamp(when, UTC)


def _encode(record: Record) -> bytes:
    return canonical_json(record.model_dump(mode="json"))


def _size_and_sha256(source: bytes | Path) -> tuple[int, str]:
    if isinstance(source, bytes):
        return len(source), digest_bytes(source)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest
