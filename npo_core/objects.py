"""How a protocol reads and writes whole objects, conditionally; and that on a POSIX file system."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

CHUNK_BYTES = 1 << 20


class Objects(Protocol):
    """Whole objects under the paths of one protocol. Errors are those of its client library."""

    single_writer: bool
    """The user's word that no second process writes: where a store knows no conditions, reading first must do."""
    errors: tuple[type[Exception], ...]
    """What its client library raises."""

    def is_absent(self, error: Exception) -> bool:
        """Whether an error says that an object or a folder is not there, but the store is."""

    def remedy(self, error: Exception) -> str | None:
        """What a user can do about an error, if anything special."""

    def read(self, path: str) -> bytes | None:
        """An object's bytes; None if there is none."""

    def publish(self, path: str, source: bytes | Path) -> None:
        """Writes an object; readers see all of it or nothing."""

    def create(self, path: str, data: bytes) -> bool:
        """Writes an object if there is none. False if there is one."""

    def swap(self, path: str, expected: bytes | None, new: bytes) -> bool:
        """Writes an object if the present bytes are `expected` (None: absent). False if they are not."""


class LocalObjects:
    """Files of a POSIX file system. Temporary files begin with a dot and lie beside their target."""

    single_writer = False
    errors: tuple[type[Exception], ...] = (OSError,)

    def is_absent(self, error: Exception) -> bool:
        """See `Objects.is_absent`."""
        return isinstance(error, (FileNotFoundError, NotADirectoryError))

    def remedy(self, error: Exception) -> str | None:
        """See `Objects.remedy`."""
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return "free some space"
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            return "give this user the permission or choose another run.store,"
        if code in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            return "check that run.store is a directory that can be made,"
        return None

    def read(self, path: str) -> bytes | None:
        """See `Objects.read`."""
        try:
            return Path(path).read_bytes()
        except OSError as error:
            if self.is_absent(error):
                return None
            raise

    def publish(self, path: str, source: bytes | Path) -> None:
        """See `Objects.publish`."""
        with self._staged(path, source) as temporary:
            os.replace(temporary, path)
        _sync_folder(os.path.dirname(path))

    def create(self, path: str, data: bytes) -> bool:
        """See `Objects.create`."""
        with self._staged(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
        _sync_folder(os.path.dirname(path))
        return True

    def swap(self, path: str, expected: bytes | None, new: bytes) -> bool:
        """See `Objects.swap`. The kernel frees the lock of a process that dies."""
        folder, name = os.path.split(path)
        _make_folder(folder)
        with open(f"{folder}/.{name}.lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.read(path) != expected:
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
