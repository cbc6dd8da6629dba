"""S3 and what speaks its protocol: the client, and conditional writes by ETags.

Credentials come from where every S3 client looks for them: the environment, or the usual AWS files; so does the
endpoint of a compatible store (AWS_ENDPOINT_URL). None of them is ever part of a URL, a record or a message.
"""

from __future__ import annotations

import mimetypes
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from aiohttp import ClientError as HttpError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.parsers import ResponseParserError
from s3fs.core import set_custom_error_handler

from npo_core.interfaces import ConfigurationError

CLIENT = {"retries": {"mode": "standard", "max_attempts": 5}, "connect_timeout": 10, "read_timeout": 20}
"""botocore's own retries with exponential backoff, and `S3FS_ATTEMPTS` of s3fs around them for what breaks while a body
is read: a server that hangs stops a run within minutes. Whoever wants others sets them where fsspec has its settings:
`FSSPEC_S3='{"config_kwargs": {"read_timeout": 120}}'`."""

S3FS_ATTEMPTS = 3

_LOST_RACE = "ConditionalRequestConflict"
"""AWS's answer to one of two conditional writes at the same moment: try again."""


def connect(url: str) -> tuple[Any, str]:
    """The s3fs file system of `s3://BUCKET/PREFIX`, and the path in it.

    Raises:
        ConfigurationError: there is no bucket in the URL.
    """
    set_custom_error_handler(lambda error: _code(error) == _LOST_RACE)
    own = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    fs, path = fsspec.url_to_fs(
        # s3fs caches listings for ever by default; ours must show what other writers did.
        url,
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={**CLIENT, **own},
    )
    fs.retries = S3FS_ATTEMPTS
    path = path.strip("/")
    if not path:
        raise ConfigurationError(f"run.store {url!r} names no bucket; use s3://BUCKET/PREFIX")
    return fs, path


class S3Objects:
    """Objects of S3. Writes are conditional by `If-None-Match` and `If-Match`, as AWS and most compatible stores have
    them.

    Whether this store has them is asked before the first one: a store that ignores a condition answers as if it had
    been met, and two writers would overwrite each other unseen.
    """

    errors: tuple[type[Exception], ...] = (OSError, BotoCoreError, HttpError, ResponseParserError, ValueError)
    """A `ValueError` is an endpoint that is no URL, a `ResponseParserError` one that does not speak S3."""

    def __init__(self, fs: Any) -> None:
        self.fs = fs
        self.single_writer = False
        self._conditional: bool | None = None

    def is_absent(self, error: Exception) -> bool:
        """See `Objects.is_absent`."""
        return isinstance(error, FileNotFoundError) and _code(error.__cause__) != "NoSuchBucket"

    def remedy(self, error: Exception) -> str:
        """See `Objects.remedy`."""
        if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
            return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE,"
        if isinstance(error, ProfileNotFound):
            return "set AWS_PROFILE to a profile of the AWS files,"
        if isinstance(error, PermissionError):
            return "check the credentials, and that they may read, write and list there,"
        if _code(error.__cause__) == "NoSuchBucket":
            return "make the bucket, or choose another run.store,"
        if isinstance(error, ParamValidationError):
            return "check the bucket's name in run.store,"
        return "check the network, the store and AWS_ENDPOINT_URL,"

    def read(self, path: str) -> bytes | None:
        """See `Objects.read`. One request; with more than one at a time s3fs would ask for the size first."""
        try:
            return self.fs.cat_file(path, max_concurrency=1)
        except OSError as error:
            if self.is_absent(error):
                return None
            raise

    def publish(self, path: str, source: bytes | Path) -> None:
        """See `Objects.publish`. Large files go in parts, which become visible together."""
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        try:
            if isinstance(source, bytes):
                # Browsers show a report or a picture only under its type. `put_file` guesses it by itself.
                self.fs.pipe_file(path, source, **_content_type(path))
            else:
                self.fs.put_file(str(source), path)
        except FileNotFoundError as error:
            # The parts were put together, and the reply was lost: a retry finds no upload any more.
            if _code(error.__cause__) != "NoSuchUpload" or self.fs.info(path)["size"] != size:
                raise

    def create(self, path: str, data: bytes) -> bool:
        """See `Objects.create`.

        Raises:
            ConfigurationError: the store ignores conditions, and nobody said that there is one writer only.
        """
        if self._has_conditions(path):
            return self._put(path, data, IfNoneMatch="*")
        return not self.fs.exists(path) and self._put(path, data)

    def swap(self, path: str, expected: bytes | None, new: bytes) -> bool:
        """See `Objects.swap`; raises as `create` does."""
        if expected is None:
            return self.create(path, new)
        present, etag = self._get(path)
        if present != expected:
            return False
        return self._put(path, new, IfMatch=etag) if self._has_conditions(path) else self._put(path, new)

    def _has_conditions(self, path: str) -> bool:
        """Whether this store refuses a write whose condition is not met; asked once, beside the first path."""
        if self._conditional is None:
            folder, _, name = path.rpartition("/")
            probe = f"{folder}/.{name}.{secrets.token_hex(8)}.tmp"
            try:
                self._put(probe, b"{}", IfNoneMatch="*")
                again = self._put(probe, b"{}", IfNoneMatch="*")
                other = self._put(probe, b"{}", IfMatch='"0"')
                self._conditional = not again and not other
            except OSError as error:
                if _code(error.__cause__) != "NotImplemented":
                    raise
                self._conditional = False
            finally:
                # Training needs no permission to delete; `npo gc`, which does, knows it as a temporary file.
                with suppress(*self.errors):
                    self.fs.rm_file(probe)
        if not self._conditional and not self.single_writer:
            raise ConfigurationError(
                f"run.store s3://{path.partition('/')[0]}: this store ignores conditional writes (If-None-Match, "
                "If-Match), so two processes could overwrite each other's work; use a store that has them, or, if no "
                "second process will ever write this run, set run.single_writer to true"
            )
        return self._conditional

    def _put(self, path: str, data: bytes, **condition: str) -> bool:
        """False if the condition is not met: also if a retry finds its own first attempt, whose reply was lost."""
        bucket, key, _ = self.fs.split_path(path)
        try:
            self.fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except OSError as error:
            if condition and _code(error.__cause__) in ("PreconditionFailed", _LOST_RACE):
                return False
            raise
        return True

    def _get(self, path: str) -> tuple[bytes | None, str]:
        """An object's bytes with their ETag."""
        try:
            etag = self.fs.info(path)["ETag"]
        except FileNotFoundError:
            return None, ""
        return self.read(path), etag


def _code(error: object) -> str | None:
    """S3's name of an error."""
    return error.response.get("Error", {}).get("Code") if isinstance(error, ClientError) else None


def _content_type(path: str) -> dict[str, str]:
    """The argument that tells S3 of a file's type, if its name says which."""
    kind, _ = mimetypes.guess_type(path)
    return {} if kind is None else {"ContentType": kind}
