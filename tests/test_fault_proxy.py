"""The proxy that the tests of S3 go through: each fault reaches a client, and without faults everything passes."""

from __future__ import annotations

import http.client
from collections.abc import Iterator

import fsspec
import pytest

from tests.fault_proxy import Fault, FaultProxy
from tests.s3_server import S3Server

pytestmark = pytest.mark.slow

CONTENT = b"0123456789" * 100


@pytest.fixture(scope="module")
def open_server() -> Iterator[S3Server]:
    """A server that takes what is not signed."""
    with S3Server(auth=False) as server:
        server.make_bucket("raw")
        yield server


def ask(
    port: int, method: str, key: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """One request, tried once: status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request(method, f"/raw/{key}", body, headers or {})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("fault", "status", "done"),
    [
        (Fault.ERROR_500, 500, False),
        (Fault.ERROR_500_AFTER, 500, True),
        (Fault.SLOW_DOWN, 503, False),
        (Fault.TIMEOUT, TimeoutError, False),
        (Fault.RESET_BEFORE, ConnectionResetError, False),
        (Fault.RESET_AFTER, ConnectionResetError, True),
        (Fault.DUPLICATE, 200, True),
    ],
)
def test_a_fault_reaches_the_client_and_the_server_has_done_what_its_name_says(
    open_server: S3Server, fault: Fault, status: int | type[Exception], done: bool
) -> None:
    with FaultProxy(open_server.port, rates={fault: 1.0}) as proxy:
        if isinstance(status, int):
            assert ask(proxy.port, "PUT", fault, CONTENT)[0] == status
        else:
            with pytest.raises(status):
                ask(proxy.port, "PUT", fault, CONTENT)
        assert proxy.injected == {fault: 1}
        proxy.paused = True
        assert ask(proxy.port, "GET", fault) == (200, CONTENT) if done else ask(proxy.port, "GET", fault)[0] == 404
        assert (proxy.injected.total(), proxy.requests) == (1, 2)


def test_a_throttled_request_is_told_so_as_aws_does(open_server: S3Server) -> None:
    with FaultProxy(open_server.port, rates={Fault.SLOW_DOWN: 1.0}) as proxy:
        assert b"<Code>SlowDown</Code>" in ask(proxy.port, "GET", "any")[1]
        assert ask(proxy.port, "HEAD", "any") == (503, b"")


def test_half_of_a_reply_comes_although_all_was_promised(open_server: S3Server) -> None:
    assert ask(open_server.port, "PUT", "whole", CONTENT)[0] == 200
    with FaultProxy(open_server.port, rates={Fault.TRUNCATED: 1.0}) as proxy:
        with pytest.raises(http.client.IncompleteRead) as cut:
            ask(proxy.port, "GET", "whole")
        assert len(cut.value.partial) == len(CONTENT) // 2
        assert cut.value.expected == len(CONTENT) // 2
        assert ask(proxy.port, "HEAD", "whole") == (200, b"")
        assert proxy.injected == {Fault.TRUNCATED: 1}


def test_the_second_of_two_deliveries_is_answered(open_server: S3Server) -> None:
    with FaultProxy(open_server.port, rates={Fault.DUPLICATE: 1.0}) as proxy:
        assert ask(proxy.port, "PUT", "once", CONTENT, {"If-None-Match": "*"})[0] == 412


def test_without_conditions_the_last_write_wins(open_server: S3Server) -> None:
    with FaultProxy(open_server.port, without_conditions=True) as proxy:
        for content in (b"first", b"second"):
            assert ask(proxy.port, "PUT", "contested", content, {"If-None-Match": "*"})[0] == 200
        assert ask(proxy.port, "GET", "contested") == (200, b"second")


def test_a_seed_chooses_the_same_requests_again(open_server: S3Server) -> None:
    rates = {Fault.ERROR_500: 0.3, Fault.SLOW_DOWN: 0.3}

    def statuses(seed: int) -> list[int]:
        with FaultProxy(open_server.port, seed, rates) as proxy:
            return [ask(proxy.port, "GET", "nothing")[0] for _ in range(30)]

    first = statuses(1)
    assert first == statuses(1) != statuses(2)
    assert set(first) == {404, 500, 503}


def test_without_faults_a_file_system_works_through_it(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultProxy(s3_server.port, rates=dict.fromkeys(Fault, 0.1)) as proxy:
        proxy.paused = True
        for name, value in {**s3_server.env, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(name, value)
        fs = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
        fs.pipe_file("runs/proxy/small", CONTENT)
        assert fs.cat_file("runs/proxy/small") == CONTENT
        assert fs.cat_file("runs/proxy/small", start=10, end=30) == CONTENT[10:30]
        parts = CONTENT * 12_000
        with fs.open("runs/proxy/large", "wb", block_size=5 << 20) as file:
            file.write(parts)
        assert fs.cat_file("runs/proxy/large") == parts
        assert sorted(fs.ls("runs/proxy", detail=False)) == ["runs/proxy/large", "runs/proxy/small"]
        assert fs.size("runs/proxy/large") == len(parts)
        fs.rm("runs/proxy", recursive=True)
        assert not fs.exists("runs/proxy/small")
        assert proxy.injected.total() == 0
        assert proxy.requests > 8


def test_a_server_that_is_gone_ends_the_connection(open_server: S3Server) -> None:
    with FaultProxy(1) as proxy, pytest.raises(ConnectionResetError):
        ask(proxy.port, "GET", "any")
