"""The store: objects under keys on any fsspec file system that has conditional writes.

Data files carry their content's hash in the key, records are created only if absent, and one record, the head, moves
by compare-and-swap. Reads, sizes and listings go through fsspec; how a protocol writes is a `Writes` of its own.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import fsspec
from fsspec.core import split_protocol
from pydantic import ValidationError

from npo_core.interfaces import ConfigurationError, ManifestT, NearFutureError, RecordT
from schemas import layout
from schemas.digest import canonical_json, digest_bytes
from schemas.records import SCHEMA_VERSION, FileEntry, Record

CHUNK_BYTES = 1 << 20
_LOST_NOTHING = "nothing that was committed is lost"


class StoreError(NearFutureError):
    """The store cannot be written or read, or holds something else than it should. Names the key and the remedy."""


class Writes(Protocol):
    """How one protocol writes: whole objects, conditionally. Errors are OSErrors."""

    def publish(self, path: str, source: bytes | Path) -> None:
        """Writes an object; readers see all of it or nothing."""

    def create(self, path: str, data: bytes) -> bool:
        """Writes an object if there is none. False if there is one."""

    def swap(self, path: str, expected: bytes | None, new: bytes) -> bool:
        """Writes an object if the present bytes are `expected` (None: absent). False if they are not."""


class LocalWrites:
    """Conditional writes on a POSIX file system. Temporary files begin with a dot and lie beside their target."""

    def publish(self, path: str, source: bytes | Path) -> None:
        """See `Writes.publish`."""
        with self._staged(path, source) as temporary:
            os.replace(temporary, path)
        _sync_folder(os.path.dirname(path))

    def create(self, path: str, data: bytes) -> bool:
        """See `Writes.create`."""
        with self._staged(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
        _sync_folder(os.path.dirname(path))
        return True

    def swap(self, path: str, expected: bytes | None, new: bytes) -> bool:
        """See `Writes.swap`. The kernel frees the lock of a process that dies."""
        folder, name = os.path.split(path)
        _make_folder(folder)
        with open(f"{folder}/.{name}.lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            present = Path(path).read_bytes() if os.path.exists(path) else None
            if present != expected:
                return False
            self.publish(path, new)
            return True

    @contextmanager
    def _staged(self, path: str, source: bytes | Path) -> Iterator[str]:
        """A temporary file with the whole content, on disk; removed afterwards if it is still there."""
        folder, name = os.path.split(path)
        _make_folder(folder)
        temporary = f"{folder}/.{name}.{secrets.token_hex(8)}.tmp"
        try:
            with open(temporary, "xb") as file:
                if isinstance(source, bytes):
                    file.write(source)
                else:
                    with source.open("rb") as original:
                        shutil.copyfileobj(original, file, CHUNK_BYTES)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            Path(temporary).unlink(missing_ok=True)


WRITES: dict[str, type[Writes]] = {"file": LocalWrites, "local": LocalWrites}


def open_store(url: str) -> FsspecStore:
    """The store at a URL (`file://PATH` or a path); nothing is created before the first write.

    Raises:
        ConfigurationError: the protocol has no conditional writes here.
    """
    protocol = split_protocol(url)[0] or "file"
    if protocol not in WRITES:
        raise ConfigurationError(
            f"run.store {url!r}: protocol {protocol!r} has no conditional writes here; use file://PATH"
        )
    # Listings must show what other writers did; s3fs, for one, caches them for ever by default.
    fs, path = fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    return FsspecStore(fs, path.rstrip("/"), WRITES[protocol]())


class FsspecStore:
    """See `npo_core.interfaces.Store`."""

    def __init__(self, fs: Any, path: str, writes: Writes) -> None:
        self.fs = fs
        self.path = path
        self.writes = writes
        self.root: str = fs.unstrip_protocol(path)

    def within(self, folder: str) -> FsspecStore:
        """See `Store.within`."""
        return FsspecStore(self.fs, self._path(folder), self.writes)

    def put_data(self, folder: str, name: str, role: str, source: bytes | Path, rows: int | None = None) -> FileEntry:
        """See `Store.put_data`."""
        with _explained(source if isinstance(source, Path) else name):
            size, sha256 = _size_and_sha256(source)
        key = layout.data_file(folder, name, sha256)
        with _explained(self._path(key)):
            # The hash in the name says which content it is; a file gets that name only when it is complete.
            if not self.fs.exists(self._path(key)) or self.fs.size(self._path(key)) != size:
                self.writes.publish(self._path(key), source)
        return FileEntry(role=role, name=name, key=key, bytes=size, sha256=sha256, rows=rows)

    def create(self, key: str, record: RecordT) -> RecordT:
        """See `Store.create`."""
        self.create_bytes(key, _encode(record))
        present = self.read(key, type(record))
        if present is None:
            raise StoreError(f"{self._path(key)} was removed while it was written; run again")
        return present

    def create_bytes(self, key: str, data: bytes) -> bytes:
        """See `Store.create_bytes`."""
        with _explained(self._path(key)):
            return data if self.writes.create(self._path(key), data) else self.fs.cat_file(self._path(key))

    def commit(self, folder: str, manifest: ManifestT) -> ManifestT:
        """See `Store.commit`."""
        return self.create(layout.manifest(folder), manifest)

    def read(self, key: str, kind: type[RecordT]) -> RecordT | None:
        """See `Store.read`."""
        data = self.read_bytes(key)
        return None if data is None else self._decode(key, kind, data)

    def read_bytes(self, key: str) -> bytes | None:
        """See `Store.read_bytes`."""
        with _explained(self._path(key)):
            try:
                return self.fs.cat_file(self._path(key))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read_data(self, entry: FileEntry) -> bytes:
        """See `Store.read_data`."""
        return b"".join(self._chunks(entry))

    def fetch(self, entry: FileEntry, target: Path) -> None:
        """See `Store.fetch`."""
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
        try:
            with _explained(target):
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
        with _explained(self._path(key)):
            return self.writes.swap(self._path(key), data, _encode(new))

    def list(self, folder: str) -> list[str]:
        """See `Store.list`."""
        with _explained(self._path(folder)):
            try:
                found = self.fs.ls(self._path(folder), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        names = (str(path).rstrip("/").rpartition("/")[2] for path in found)
        return sorted(name for name in names if not name.startswith("."))

    def _path(self, key: str) -> str:
        return f"{self.path}/{key}" if key else self.path

    def _decode(self, key: str, kind: type[RecordT], data: bytes) -> RecordT:
        try:
            value = json.loads(data)
            version = value.get("schema_version")
            if version != SCHEMA_VERSION:
                raise StoreError(
                    f"{self._path(key)} has schema version {version}, this program reads version {SCHEMA_VERSION}; "
                    "use the program that wrote it"
                )
            return kind.model_validate_json(data)
        except (ValueError, AttributeError, ValidationError) as error:
            raise StoreError(
                f"{self._path(key)} is no {kind.__name__} ({str(error).splitlines()[0]}); restore it from a copy"
            ) from error

    def _chunks(self, entry: FileEntry) -> Iterator[bytes]:
        """The content; after the last chunk size and hash are checked."""
        path, size, digest = self._path(entry.key), 0, hashlib.sha256()
        try:
            with self.fs.open(path, "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    size += len(chunk)
                    digest.update(chunk)
                    yield chunk
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing; restore it from a copy") from error
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror or error}; {_remedy(error)}") from error
        if size != entry.bytes:
            raise StoreError(f"{path} has {size} bytes, its manifest says {entry.bytes}; restore it from a copy")
        if digest.hexdigest() != entry.sha256:
            raise StoreError(f"{path} was altered: its SHA-256 is not the manifest's; restore it from a copy")


@contextmanager
def _explained(subject: object) -> Iterator[None]:
    """Turns an OSError into one message: what, why and what to do."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{subject}: {error.strerror or error}; {_remedy(error)}") from error


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"free some space and run again; {_LOST_NOTHING}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"give this user the permission or choose another run.store, and run again; {_LOST_NOTHING}"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return f"check that run.store is a directory that can be made, and run again; {_LOST_NOTHING}"
    return f"mend this and run again; {_LOST_NOTHING}"


def _encode(record: Record) -> bytes:
    return canonical_json(record.model_dump(mode="json"))


def _size_and_sha256(source: bytes | Path) -> tuple[int, str]:
    if isinstance(source, bytes):
        return len(source), digest_bytes(source)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _make_folder(folder: str) -> None:
    """Makes a folder and its parents, each durably."""
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _make_folder(parent)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise
    _sync_folder(parent)


def _sync_folder(folder: str) -> None:
    """Makes a new name in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
