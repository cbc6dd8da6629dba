"""The store on the real file system: races, full disks, missing permissions, damage."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from npo_core.artifacts import open_run
from npo_core.interfaces import ConfigurationError
from npo_core.interfaces import Store as StoreProtocol
from npo_core.store import StoreError, open_store
from schemas.config import Config
from schemas.records import SCHEMA_VERSION, FileEntry, Head, Manifest

RACERS = 20
_fork = multiprocessing.get_context("fork")


def in_processes(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(0) … work(count - 1)` return, each in a process of its own, let go at the same moment."""
    barrier, results = _fork.Barrier(count), _fork.SimpleQueue()

    def racer(index: int) -> None:
        barrier.wait()
        try:
            results.put(work(index))
        except Exception as error:
            results.put(error)

    processes = [_fork.Process(target=racer, args=(index,)) for index in range(count)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def manifest(nonce: str) -> Manifest:
    return Manifest(kind="test", files=(), nonce=nonce, created_at="2026-01-01T00:00:00+00:00")


def test_a_store_satisfies_the_protocol(tmp_path: Path) -> None:
    assert isinstance(open_store(str(tmp_path)), StoreProtocol)


@pytest.mark.parametrize("url", ["memory://runs", "gs://bucket/runs", "https://example.org/runs"])
def test_a_protocol_without_conditional_writes_is_refused_by_name(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"has no conditional writes here; use file://PATH") as raised:
        open_store(url)
    assert url in str(raised.value)


def test_paths_and_file_urls_name_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    roots = {
        open_store(url).root for url in (str(tmp_path / "runs"), f"file://{tmp_path}/runs/", "file://./runs", "runs")
    }
    assert roots == {f"file://{tmp_path}/runs"}


@pytest.mark.slow
def test_of_twenty_racers_to_one_key_one_wins_and_all_others_adopt(tmp_path: Path) -> None:
    for attempt in range(5):
        folder = f"a/{attempt}"
        adopted = in_processes(
            RACERS, lambda index, folder=folder: open_store(str(tmp_path)).commit(folder, manifest(f"n{index}")).nonce
        )
        assert len(set(adopted)) == 1
        assert (tmp_path / folder / "manifest.json").read_text().count(adopted[0]) == 1
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["manifest.json"]


@pytest.mark.slow
def test_swaps_that_race_are_never_lost(tmp_path: Path) -> None:
    open_store(str(tmp_path)).swap("head.json", None, Head(leg_id="start", epoch=0))

    def swap_ten_times(index: int) -> int:
        store, refused = open_store(str(tmp_path)), 0
        for _ in range(10):
            while True:
                present = store.read("head.json", Head)
                assert present is not None
                if store.swap("head.json", present, Head(leg_id=f"leg{index}", epoch=present.epoch + 1)):
                    break
                refused += 1
        return refused

    refused = in_processes(8, swap_ten_times)
    assert open_store(str(tmp_path)).read("head.json", Head).epoch == 80
    assert sum(refused) > 0, "the swaps did not race"


@pytest.mark.parametrize(
    "url",
    [
        "s3://alice:swordfish@bucket/prefix",
        "s3://alice:sword/fish@bucket/prefix",
        "s3://alice@bucket",
        "simplecache::s3://alice:swordfish@bucket/prefix",
        "https://alice:swordfish@example.org/runs",
    ],
)
def test_a_url_with_credentials_is_refused_and_not_repeated(url: str) -> None:
    def run_section() -> object:
        return Config.model_validate({"run": {"name": "r", "store": url}})

    for use in (lambda: open_store(url), lambda: open_run(f"{url}/run"), lambda: open_run(url)):
        with pytest.raises(ConfigurationError, match="holds credentials") as raised:
            use()
        assert "alice" not in str(raised.value)
        assert "sword" not in str(raised.value)
    with pytest.raises(ValidationError, match="the URL holds credentials"):
        run_section()


@pytest.mark.parametrize("url", ["s3://bucket", "s3://arn:aws:s3:eu-west-1:1:accesspoint/a/runs", "file:///a:b@c/runs"])
def test_a_url_without_credentials_is_taken(url: str) -> None:
    assert Config.model_validate({"run": {"name": "r", "store": url}}).run.store == url


def test_a_bucket_is_no_run() -> None:
    with pytest.raises(ConfigurationError, match="names no run; give STORE/RUN"):
        open_run("s3://bucket")


def test_a_swap_of_what_is_not_there_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    first, second = Head(leg_id="a", epoch=0), Head(leg_id="b", epoch=1)
    assert not store.swap("head.json", first, second)
    assert store.swap("head.json", None, first)
    assert not store.swap("head.json", None, second)
    assert not store.swap("head.json", second, second)
    assert store.swap("head.json", first, second)
    assert store.read("head.json", Head) == second


def test_data_lie_under_their_hash_and_are_as_young_as_their_last_attempt(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    source = tmp_path / "source.bin"
    source.write_bytes(b"x" * 3_000_000)
    entry = store.put_data("a/b", "weights.bin", "weights", source)
    path = tmp_path / entry.key
    assert entry.sha256[:16] in path.name
    assert path.read_bytes() == source.read_bytes()
    before = path.stat()
    assert store.put_data("a/b", "weights.bin", "weights", source.read_bytes()) == entry
    assert path.stat().st_mtime_ns > before.st_mtime_ns
    path.write_bytes(b"x")
    store.put_data("a/b", "weights.bin", "weights", source)
    assert store.read_data(entry) == source.read_bytes()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "was altered"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 99 bytes, its manifest says 100"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_damaged_data_are_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    store = open_store(str(tmp_path))
    entry = store.put_data("a", "data.bin", "state", b"y" * 100)
    damage(tmp_path / entry.key)
    for read in (store.read_data, store.check, lambda entry: store.fetch(entry, tmp_path / "out" / "data.bin")):
        with pytest.raises(StoreError, match=message) as raised:
            read(entry)
        assert entry.key in str(raised.value)
    assert not any((tmp_path / "out").glob("*")), "a damaged file was left in the target"


def test_listings_show_what_others_wrote_meanwhile_and_no_temporary_files(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert store.list("legs") == []
    for name in ("b", "a", ".head.json.lock", ".x.1f.tmp"):
        (tmp_path / "legs" / name).mkdir(parents=True)
        assert store.list("legs") == sorted(
            path.name for path in (tmp_path / "legs").iterdir() if not path.name.startswith(".")
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no Head"),
        ("[]", "is no Head"),
        (f'{{"leg_id": "a", "schema_version": {SCHEMA_VERSION}}}', "is no Head"),
        (f'{{"leg_id": "a", "epoch": 1, "more": 1, "schema_version": {SCHEMA_VERSION}}}', "is no Head"),
        (f'{{"leg_id": "a", "epoch": 1, "schema_version": {SCHEMA_VERSION + 1}}}', "schema version"),
    ],
)
def test_a_damaged_or_newer_record_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "head.json").write_text(text)
    with pytest.raises(StoreError, match=message) as raised:
        open_store(str(tmp_path)).read("head.json", Head)
    assert f"{tmp_path}/head.json" in str(raised.value)


def test_a_record_that_is_there_is_returned_and_not_replaced(tmp_path: Path) -> None:
    store = open_store(str(tmp_path)).within("run")
    assert store.create("leg.json", Head(leg_id="first", epoch=0)).leg_id == "first"
    assert store.create("leg.json", Head(leg_id="second", epoch=0)).leg_id == "first"
    assert store.create_bytes("prompts", b"one") == b"one"
    assert store.create_bytes("prompts", b"two") == b"one"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["leg.json", "prompts"]


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_with_one_clear_message_and_loses_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        store = open_store(str(disk))
        kept = store.put_data("a", "small.bin", "state", b"z" * 1000)
        store.commit("a", manifest("first"))
        store.swap("head.json", None, Head(leg_id="a", epoch=0))
        with pytest.raises(StoreError, match="No space left on device; free some space and run again") as raised:
            store.put_data("b", "large.bin", "weights", os.urandom(1_000_000))
        assert "b/large-" in str(raised.value)
        (disk / "filler").write_bytes(b"0" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize))
        with pytest.raises(StoreError, match="nothing that was committed is lost"):
            store.commit("c", manifest("second"))
        with pytest.raises(StoreError, match=r"head\.json: No space left"):
            store.swap("head.json", Head(leg_id="a", epoch=0), Head(leg_id="b", epoch=1))
        assert not list(disk.rglob("*.tmp")), "temporary files fill the disk"
        assert store.read_data(kept) == b"z" * 1000
        assert store.read("a/manifest.json", Manifest) == manifest("first")
        assert store.read("head.json", Head) == Head(leg_id="a", epoch=0)
        assert store.read("c/manifest.json", Manifest) is None
        (disk / "filler").unlink()
        assert store.commit("c", manifest("third")).nonce == "third"


def test_a_file_size_limit_ends_with_one_clear_message(tmp_path: Path) -> None:
    def write_under_limit(_: int) -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            open_store(str(tmp_path)).put_data("a", "large.bin", "weights", b"z" * 20_000)
        except StoreError as error:
            return str(error)
        return "written"

    (message,) = in_processes(1, write_under_limit)
    assert "a/large-" in message
    assert "free some space and run again; nothing that was committed is lost" in message


@pytest.mark.parametrize("write", ["put_data", "commit", "swap"])
def test_a_store_that_cannot_be_written_says_so(tmp_path: Path, write: str) -> None:
    root = tmp_path / "readonly"
    root.mkdir()
    root.chmod(0o555)
    os.chmod(tmp_path, 0o755)

    def try_to_write(_: int) -> str:
        if os.getuid() == 0:  # root may write anywhere: be nobody, once inside the directory
            os.chdir(root)
            os.setuid(65534)
        store = open_store("file://.")
        try:
            if write == "put_data":
                store.put_data("a", "x.bin", "state", b"x")
            elif write == "commit":
                store.commit("a", manifest("x"))
            else:
                store.swap("head.json", None, Head(leg_id="a", epoch=0))
        except StoreError as error:
            return str(error)
        return "written"

    (message,) = in_processes(1, try_to_write) if os.getuid() == 0 else (try_to_write(0),)
    assert "Permission denied; give this user the permission or choose another run.store" in message, message
    assert str(root) in message


def test_a_store_below_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = open_store(str(tmp_path / "file" / "runs"))
    with pytest.raises(StoreError, match=r"check that run\.store is a directory that can be made"):
        store.put_data("a", "x.bin", "state", b"x")
    assert store.list("") == []


def test_an_entry_names_what_was_written(tmp_path: Path) -> None:
    entry = open_store(str(tmp_path)).put_data("f", "t.parquet", "metrics", b"abc", rows=3)
    assert entry == FileEntry(
        role="metrics", name="t.parquet", key=f"f/t-{entry.sha256[:16]}.parquet", bytes=3, sha256=entry.sha256, rows=3
    )
