"""A proxy between an S3 client and its server that does to some requests what networks and servers do to them."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import ItemsView, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from types import TracebackType

HEAD_LIMIT = 1 << 20
CONDITIONS = (b"if-match", b"if-none-match")
_HOP_BY_HOP = (b"connection", b"keep-alive", b"expect", b"transfer-encoding", b"content-length")
_RST_ON_CLOSE = struct.pack("ii", 1, 0)


class Fault(StrEnum):
    """What happens to a request."""

    ERROR_500 = "error-500"  # the server never sees it
    ERROR_500_AFTER = "error-500-after"  # the server has done it, the client is told that it has not
    SLOW_DOWN = "slow-down"  # throttled
    TIMEOUT = "timeout"  # nobody answers
    RESET_BEFORE = "reset-before"  # the server never sees it
    RESET_AFTER = "reset-after"  # the server has done it
    TRUNCATED = "truncated"  # half of the reply's body comes; a reply without one comes whole and does not count
    DUPLICATE = "duplicate"  # the server does it twice, the client sees the second reply


class Once(dict[Fault, float]):
    """Rates of which the next request takes its fault, and none after it."""

    def items(self) -> ItemsView[Fault, float]:
        found = dict(self).items()
        self.clear()
        return found


class _Reset(Exception):  # noqa: N818 - no error of ours: it is what the client is to see
    """The connection ends with a RST."""


@dataclass(frozen=True)
class _Message:
    """A request or a reply: its first line, its headers as they came, its whole body without transfer coding."""

    start: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    @property
    def method(self) -> bytes:
        return self.start.split(b" ")[0]

    @property
    def status(self) -> int:
        return int(self.start.split(b" ")[1])

    def header(self, name: bytes) -> bytes:
        return next((value for key, value in self.headers if key.lower() == name), b"")

    def without(self, *names: bytes) -> _Message:
        return replace(self, headers=tuple(h for h in self.headers if h[0].lower() not in names))

    def encoded(self, body_of_head: bytes = b"") -> bytes:
        """The bytes to send; `body_of_head` is the Content-Length that a reply to HEAD claims."""
        length = body_of_head or str(len(self.body)).encode()
        head = [self.start, *(b": ".join(h) for h in self.without(*_HOP_BY_HOP).headers), b"Content-Length: " + length]
        return b"\r\n".join([*head, b"", self.body])


class FaultProxy:
    """Serves in a thread of its own while the block runs. The Host header passes as it came: signatures are over it.

    Args:
        target_port: the server's, on this machine.
        seed: of the choice among requests.
        rates: how likely each fault is; the rest passes.
        hold_s: how long an unanswered request is held, unless its client gives up before.
        without_conditions: If-Match and If-None-Match never reach the server, as with a store that does not know them.
    """

    def __init__(
        self,
        target_port: int,
        seed: int = 0,
        rates: Mapping[Fault, float] | None = None,
        *,
        hold_s: float = 30.0,
        without_conditions: bool = False,
    ) -> None:
        self.target_port = target_port
        self.rates = dict(rates or {})
        self.hold_s = hold_s
        self.without_conditions = without_conditions
        self.paused = False
        self.only = b""  # part of a request's first line; other requests pass
        self.requests = 0
        self.injected: Counter[Fault] = Counter()
        self.port = 0
        self._choices = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = threading.Event()
        self._stop = asyncio.Event()

    @property
    def endpoint(self) -> str:
        """What AWS_ENDPOINT_URL is to be."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        # What still holds a connection is cancelled with the loop.
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=HEAD_LIMIT)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await _read_request(reader, writer)
                await self._answer(request, reader, writer)
                if request.header(b"connection").lower() == b"close":
                    break
        except _Reset:
            raw = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
            writer.transport.abort()
        except (EOFError, OSError, asyncio.CancelledError):
            pass  # the client, or the test, has gone
        finally:
            writer.close()

    async def _answer(self, request: _Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.requests += 1
        fault = self._choose() if self.only in request.start else None
        if fault == Fault.TIMEOUT:
            self.injected[fault] += 1
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), self.hold_s)
            raise EOFError
        reply = await self._reply(request, fault)
        claimed = reply.header(b"content-length") if request.method == b"HEAD" else b""
        data = reply.encoded(claimed)
        if fault == Fault.TRUNCATED and reply.body:
            self.injected[fault] += 1
            writer.write(data[: len(data) - (len(reply.body) + 1) // 2])
            await writer.drain()
            raise EOFError
        writer.write(data)
        await writer.drain()

    async def _reply(self, request: _Message, fault: Fault | None) -> _Message:
        """What the client is to see, once the server has done as much as it is to do."""
        if fault in (None, Fault.TRUNCATED):
            return await self._deliver(request)
        self.injected[fault] += 1
        for _ in range({Fault.DUPLICATE: 2, Fault.ERROR_500_AFTER: 1, Fault.RESET_AFTER: 1}.get(fault, 0)):
            reply = await self._deliver(request)
        if fault in (Fault.RESET_BEFORE, Fault.RESET_AFTER):
            raise _Reset
        if fault == Fault.DUPLICATE:
            return reply
        return _slow_down(request) if fault == Fault.SLOW_DOWN else _internal_error(request)

    def _choose(self) -> Fault | None:
        if self.paused:
            return None
        drawn = self._choices.random()
        for fault, rate in self.rates.items():
            if drawn < rate:
                return fault
            drawn -= rate
        return None

    async def _deliver(self, request: _Message) -> _Message:
        """The server's reply. On a connection of its own, so that no request waits for another."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.target_port, limit=HEAD_LIMIT)
        except OSError as error:
            raise _Reset from error
        try:
            passed = request.without(*CONDITIONS) if self.without_conditions else request
            writer.write(passed.encoded())
            await writer.drain()
            return await _read_reply(reader, request.method)
        finally:
            writer.close()


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Message:
    head = await _read_head(reader)
    if head.header(b"expect").lower() == b"100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return replace(head, body=await _read_body(head, reader))


async def _read_reply(reader: asyncio.StreamReader, method: bytes) -> _Message:
    head = await _read_head(reader)
    while head.status == 100:
        head = await _read_head(reader)
    if method == b"HEAD" or head.status in (204, 304):
        return head
    # A reply that names no length ends with its connection.
    unbounded = not head.header(b"content-length") and not head.header(b"transfer-encoding")
    return replace(head, body=await (reader.read() if unbounded else _read_body(head, reader)))


async def _read_head(reader: asyncio.StreamReader) -> _Message:
    start, *lines = (await reader.readuntil(b"\r\n\r\n")).removesuffix(b"\r\n\r\n").split(b"\r\n")
    pairs = (line.partition(b":") for line in lines)
    return _Message(start, tuple((name, value.strip()) for name, _, value in pairs), b"")


async def _read_body(head: _Message, reader: asyncio.StreamReader) -> bytes:
    if b"chunked" not in head.header(b"transfer-encoding").lower():
        return await reader.readexactly(int(head.header(b"content-length") or 0))
    parts = []
    while size := int((await reader.readline()).split(b";")[0], 16):
        parts.append(await reader.readexactly(size))
        await reader.readline()
    while (await reader.readline()).strip():
        pass  # trailers
    return b"".join(parts)


def _slow_down(request: _Message) -> _Message:
    return _error(request, b"503 Slow Down", b"SlowDown", b"Please reduce your request rate.")


def _internal_error(request: _Message) -> _Message:
    message = b"We encountered an internal error. Please try again."
    return _error(request, b"500 Internal Server Error", b"InternalError", message)


def _error(request: _Message, status: bytes, code: bytes, message: bytes) -> _Message:
    """An error as AWS writes it; a reply to HEAD has no body."""
    body = (
        b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>%s</Code><Message>%s</Message>'
        b"<RequestId>4442587FB7D0A2F9</RequestId></Error>" % (code, message)
    )
    headers = ((b"Content-Type", b"application/xml"), (b"x-amz-request-id", b"4442587FB7D0A2F9"))
    return _Message(b"HTTP/1.1 " + status, headers, b"" if request.method == b"HEAD" else body)
