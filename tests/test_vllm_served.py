"""What is said of a server at `vllm.url` that is none of vLLM's, or breaks off."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npo_core.interfaces import NearFutureError, SamplingParams
from npo_core.vllm_served import VllmServed
from npo_core.vllm_version import sampler_name
from schemas.vllm import VllmSection

MODELS: dict[str, Any] = {"data": [{"id": "m"}]}
COMPLETION: dict[str, Any] = {"choices": [{"token_ids": [3, 1], "logprobs": {"token_logprobs": [-0.5, -1.0]}}]}
REMEDY = "start `vllm serve` there, or leave vllm.url out"


@contextmanager
def answering(reply: bytes, models: bytes = json.dumps(MODELS).encode()) -> Iterator[str]:
    """The address of a server that gives these bytes as they are, head and all, to all but a question for its models,
    which it answers properly."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self.wfile.write(http(models))
            else:
                self.wfile.write(reply)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(reply)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def http(body: bytes, length: int | None = None) -> bytes:
    return b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(body) if length is None else length) + body


def sampled(url: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    served = VllmServed(url)
    served.fresh(Path())
    return served.sample([np.array([5, 6], np.int32)], SamplingParams(1.0, 4, (1,)), [7])


def test_what_vllm_answers_is_read() -> None:
    with answering(http(json.dumps(COMPLETION).encode())) as url:
        ids, logprobs = sampled(url)
    assert [row.tolist() for row in ids] == [[3, 1]]
    assert [row.tolist() for row in logprobs] == [[-0.5, -1.0]]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"", "does not answer \\(Remote end closed connection"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not answer \\(SSH-2.0"),
        (http(b'{"choices": [', 4000), "does not answer \\(IncompleteRead"),
        (http(b"<html>"), "answers what vLLM would not .*: <html>"),
        (http(b"[]"), "answers what vLLM would not \\(TypeError"),
        (http(b"{}"), "answers what vLLM would not \\(KeyError: 'choices'"),
        (http(b'{"choices": []}'), "answers what vLLM would not \\(IndexError"),
        (http(b'{"choices": [{"token_ids": [1]}]}'), "answers what vLLM would not \\(KeyError: 'logprobs'"),
        (
            http(b'{"choices": [{"token_ids": [1, 2], "logprobs": {"token_logprobs": [-1.0]}}]}'),
            "answers what vLLM would not .*2,.* token ids",
        ),
        (b"HTTP/1.0 503 Busy\r\n\r\nloading", "answers 503: loading"),
    ],
)
def test_a_server_that_answers_nonsense_or_breaks_off_is_named_with_the_remedy(reply: bytes, said: str) -> None:
    with (
        answering(reply) as url,
        pytest.raises(NearFutureError, match=rf"vllm\.url {url}/v1/completions {said}") as raised,
    ):
        sampled(url)
    assert str(raised.value).endswith(REMEDY)
    assert raised.value.__cause__ is not None


def test_a_server_without_models_is_named() -> None:
    with answering(b"", b'{"data": []}') as url, pytest.raises(NearFutureError, match=rf"{url}/v1/models answers what"):
        VllmServed(url).fresh(Path())


def test_a_server_that_does_not_tell_its_version_is_unknown() -> None:
    with answering(b"") as url:
        assert sampler_name(VllmSection(url=url)) == "vllm unknown"
    with answering(http(b"[]")) as url:
        assert sampler_name(VllmSection(url=url)) == "vllm unknown"


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(NearFutureError, match=rf"vllm\.url {url}/v1/models does not answer \(\[Errno"):
            VllmServed(url).fresh(Path())
