"""Parts of Parquet files: what is asked for, checked, and little else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_core import parquet
from npo_core.rows import Where, frame, read_rows
from npo_core.run_files import RunFiles, origin
from npo_core.store import FsspecStore, StoreError, open_store
from schemas import tables
from schemas.records import FileEntry, Manifest

PROMPTS, STEPS, GROUP = 60, 5, 4
COLUMNS = ("step", "prompt_id", "slot", "source", "reward", "completion_ids", "text")
ORDER = ("step", "prompt_id", "slot", "source")


def rollouts(first: int) -> pa.Table:
    """Trajectories of `STEPS` steps, with a guide row for some groups."""
    rng = np.random.default_rng(first)
    rows = [
        {
            **dict.fromkeys(("run_id", "leg_id", "task", "verdict", "verifier"), "x"),
            "finish_reason": "stop",
            "step": step,
            "prompt_id": f"p{prompt:03d}",
            "slot": slot,
            "source": source,
            "behavior_step": step,
            "prompt_ids": [1, 2, 3],
            "completion_ids": rng.integers(0, 50, 8).tolist(),
            "behavior_logprobs": (-rng.exponential(size=8)).tolist(),
            "reward": float(rng.integers(0, 3) / 2),
            "correct": True,
            "displaced": False,
            "text": f"{step}/{prompt}/{slot}/{source}",
            "image_refs": [],
            "schema_version": 1,
        }
        for step in range(first, first + STEPS)
        for prompt in range(PROMPTS)
        for slot in range(GROUP)
        for source in (("policy", "guide") if slot == 0 and prompt % 3 == 0 else ("policy",))
    ]
    return pa.Table.from_pylist(rows, tables.TRAJECTORIES)


class CountingStore(FsspecStore):
    """Counts the bytes that are read of opened files."""

    count = 0

    @contextmanager
    def open(self, entry: FileEntry) -> Iterator[Any]:
        with super().open(entry) as file:
            read = file.read

            def counted(size: int = -1) -> bytes:
                data = read(size)
                CountingStore.count += len(data)
                return data

            file.read = counted  # type: ignore[method-assign]
            yield file


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunFiles, list[Manifest]]]:
    """Two files of many small row groups each."""
    patch = pytest.MonkeyPatch()
    patch.setattr(parquet, "ROW_GROUP_ROWS", 64)
    run = RunFiles(open_store(str(tmp_path_factory.mktemp("store"))), "run")
    files = [
        Manifest(kind="segment", files=(run.put_table(f"s{first}", "rollouts", rollouts(first)),), **origin({}))
        for first in (0, STEPS)
    ]
    yield run, files
    patch.undo()


def expected(run: RunFiles, files: list[Manifest], where: Where, order: tuple[str, ...], limit: int | None) -> Any:
    """The same by reading everything and a plain filter."""
    found = []
    for file in files:
        rows = pl.DataFrame(run.table(file, "rollouts"))
        if where.step is not None:
            rows = rows.filter(pl.col("step") == where.step)
        if where.prompts is not None:
            rows = rows.filter(pl.col("prompt_id").is_in(list(where.prompts)))
        if where.source is not None:
            rows = rows.filter(pl.col("source") == where.source)
        if where.min_reward is not None:
            rows = rows.filter(pl.col("reward") >= where.min_reward)
        found.append(rows.sort(order) if order else rows)
    return pl.concat(found).select(COLUMNS).rows()[:limit]


conditions = st.builds(
    Where,
    step=st.none() | st.integers(0, 2 * STEPS),
    prompts=st.none() | st.sets(st.integers(0, PROMPTS).map("p{:03d}".format), max_size=4).map(frozenset),
    source=st.none() | st.sampled_from(["policy", "guide"]),
    min_reward=st.none() | st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)


@given(where=conditions, ordered=st.booleans(), limit=st.none() | st.integers(1, 40))
def test_rows_are_those_of_a_plain_filter_over_whole_files(
    stored: tuple[RunFiles, list[Manifest]], where: Where, ordered: bool, limit: int | None
) -> None:
    run, files = stored
    order = ORDER if ordered else ()
    found = [pl.DataFrame(table) for table in read_rows(run, files, "rollouts", COLUMNS, where, order, limit)]
    assert [row for part in found for row in part.rows()] == expected(run, files, where, order, limit)


def test_one_prompt_is_a_small_part_of_what_is_read(stored: tuple[RunFiles, list[Manifest]]) -> None:
    run, files = stored
    counting = RunFiles(run.store, "")
    counting.store = CountingStore(run.store.fs, run.store.path, run.store.objects)  # type: ignore[attr-defined]
    CountingStore.count = 0
    history = frame(counting, files, "rollouts", ("step", "text"), Where(prompts=("p007",)))
    assert history.height == 2 * STEPS * GROUP
    footers = sum(int.from_bytes(_bytes(run, file)[-8:-4], "little") for file in files)
    pages = sum(file.file("rollouts").bytes for file in files) - footers
    assert CountingStore.count - footers < pages / 8


def _bytes(run: RunFiles, manifest: Manifest) -> bytes:
    return run.store.read_data(manifest.file("rollouts"))


@contextmanager
def _flipped(run: RunFiles, manifest: Manifest, place: int) -> Iterator[None]:
    path = Path(run.uri.removeprefix("file://")) / manifest.file("rollouts").key
    whole = path.read_bytes()
    data = bytearray(whole)
    data[place] ^= 1
    path.write_bytes(data)
    yield
    path.write_bytes(whole)


def test_a_flipped_byte_is_noticed_wherever_it_is_read(stored: tuple[RunFiles, list[Manifest]]) -> None:
    run, files = stored
    size = files[0].file("rollouts").bytes
    noticed, whole = [], run.table(files[0], "rollouts")
    # The magic number in front is read by nobody; `npo verify` hashes it.
    places = np.linspace(4, size - 1, 400).astype(int).tolist()
    for place in places:
        with _flipped(run, files[0], place):
            try:
                read = frame(run, files[:1], "rollouts", tables.TRAJECTORIES.names)
            except StoreError as error:
                noticed.append(str(error))
            else:
                # Page headers have no checksum: one that still parses leads to the same rows.
                assert read.equals(pl.DataFrame(whole))
    assert len(noticed) > 0.9 * len(places)
    for message in noticed:
        assert files[0].file("rollouts").key in message
        assert message.endswith("restore it from a copy")


def test_damage_elsewhere_does_not_stop_who_reads_something_else(stored: tuple[RunFiles, list[Manifest]]) -> None:
    run, files = stored
    whole = frame(run, files[:1], "rollouts", ("step",), Where(prompts=("p000",)))
    with _flipped(run, files[0], files[0].file("rollouts").bytes // 2):
        assert frame(run, files[:1], "rollouts", ("step",), Where(prompts=("p000",))).equals(whole)


def test_a_file_of_another_size_or_none_is_named(stored: tuple[RunFiles, list[Manifest]]) -> None:
    run, files = stored
    entry = files[0].file("rollouts")
    path = Path(run.uri.removeprefix("file://")) / entry.key
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(StoreError, match=f"has {entry.bytes - 1} bytes, its manifest says {entry.bytes}"):
        frame(run, files, "rollouts", ("step",))
    path.unlink()
    with pytest.raises(StoreError, match="is missing; restore it from a copy"):
        frame(run, files, "rollouts", ("step",))
    path.write_bytes(whole)


def test_files_without_a_footers_hash_are_read_whole_and_checked(stored: tuple[RunFiles, list[Manifest]]) -> None:
    run, files = stored
    old = [
        file.model_copy(update={"files": (file.file("rollouts").model_copy(update={"footer_sha256": None}),)})
        for file in files
    ]
    where = Where(prompts=("p003", "p059"), min_reward=0.5)
    assert frame(run, old, "rollouts", COLUMNS, where).equals(frame(run, files, "rollouts", COLUMNS, where))
    with _flipped(run, files[0], 100), pytest.raises(StoreError, match="was altered"):
        frame(run, old, "rollouts", ("step",), where)
