"""The store on S3 by itself: uploads in parts, networks that fail while a file is read, endpoints that are none."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs.core

from npo_core.interfaces import ConfigurationError
from npo_core.rows import Where, frame
from npo_core.run_files import RunFiles, origin
from npo_core.store import StoreError, open_store
from schemas.records import Head, Manifest
from tests.fault_proxy import Fault, FaultProxy, Once
from tests.s3_server import S3Server
from tests.test_rows import rollouts

pytestmark = pytest.mark.slow

PART_BYTES = 5 << 20


@pytest.fixture(autouse=True)
def credentials(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy that this process's clients go through."""
    with FaultProxy(s3_server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def test_a_large_file_goes_in_parts_and_a_lost_reply_to_the_last_call_loses_nothing(
    proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda size, chunksize=None: PART_BYTES)
    source = tmp_path / "model.safetensors"
    source.write_bytes(bytes(range(256)) * (3 * PART_BYTES // 256))
    store = open_store(f"s3://runs/{tmp_path.name}")
    proxy.only, proxy.rates = b"?uploadId=", Once({Fault.RESET_AFTER: 1.0})
    entry = store.put_data("checkpoint", source.name, "weights", source)
    assert proxy.injected[Fault.RESET_AFTER] == 1
    store.fetch(entry, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_a_network_that_fails_while_rows_are_read_is_no_damaged_file(proxy: FaultProxy, tmp_path: Path) -> None:
    run = RunFiles(open_store(f"s3://runs/{tmp_path.name}"), "run")
    file = Manifest(kind="segment", files=(run.put_table("s", "rollouts", rollouts(0)),), **origin({}))
    assert frame(run, [file], "rollouts", ("step",), Where(prompts=("p001",))).height
    proxy.only, proxy.rates = b"GET", {Fault.ERROR_500: 1.0}
    with pytest.raises(StoreError) as raised:
        frame(run, [file], "rollouts", ("step",), Where(prompts=("p001",)))
    assert "restore" not in str(raised.value)
    assert f"s3://runs/{tmp_path.name}/run/s/rollouts-" in str(raised.value)


class _Page(http.server.BaseHTTPRequestHandler):
    """A web site, where somebody took the wrong port for that of the store."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html><body>Welcome<br></body></html>")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def web_site() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_endpoint_that_is_none_is_told_in_one_line(web_site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in (web_site, web_site.removeprefix("http://")):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(StoreError, match=r"^s3://runs/x: .*AWS_ENDPOINT_URL[^\n]*$"):
            open_store("s3://runs/x").list("")


def test_a_profile_and_a_bucket_that_cannot_be_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match=r"check the bucket's name in run.store[^\n]*$"):
        open_store("s3://no bucket/x").read("head.json", Head)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises((StoreError, ConfigurationError), match="set AWS_PROFILE to a profile"):
        open_store("s3://runs/x").read("head.json", Head)


@pytest.mark.parametrize(("name", "kind"), [("report.html", "text/html"), ("curves.svg", "image/svg+xml")])
def test_what_browsers_read_has_its_type(s3_server: S3Server, tmp_path: Path, name: str, kind: str) -> None:
    entry = open_store(f"s3://runs/{tmp_path.name}").put_data("reports", name, "report", b"<svg/>")
    assert s3_server.client().head_object(Bucket="runs", Key=f"{tmp_path.name}/{entry.key}")["ContentType"] == kind
