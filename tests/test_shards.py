"""A guide that is sampled in shards: the same bits, found again after a failure, swept once the guide is committed."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

from npo_core.artifacts import RunArtifacts, open_run
from npo_core.gc import plan_gc
from npo_core.interfaces import NearFutureError
from npo_core.shards import deal, gpus_of_threads
from npo_core.verify import verify_run
from npo_core.workspace import Workspace
from schemas.config import Config
from schemas.records import GuideManifest
from tasks import policies, workspaces
from tasks.again import do_again
from tests.copies import folder_of
from tests.test_stages import checkpoint, open_leg, small, train_segment, warm_start

WINDOW = 4
STEP = 2


def wide(store: Path, **sharding: Any) -> Config:
    """A run whose window holds 160 prompts: blocks of 64, 64 and 32."""
    return small(
        store,
        data={"prompts": 160, "held_out": 4},
        rollout={"prompts_per_step": 40, "group_size": 2},
        future={"k": 4},
        sharding=sharding,
    )


def guide(run: str) -> GuideManifest:
    return policies.make_guide(run, checkpoint(run, STEP), 0, WINDOW)


def bits(made: GuideManifest) -> tuple[Any, ...]:
    """What may not depend on who sampled: the very bytes of its rows, and its counts."""
    return [entry.sha256 for entry in made.files], made.solved, made.tokens_guide


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GuideManifest]:
    """The store of a run without a guide, and the guide that it gets unsharded."""
    store = tmp_path_factory.mktemp("trained")
    run = workspaces.begin_run.fn(wide(store))
    train_segment(run, open_leg(run, "main", warm_start(run)), 0, STEP)
    shutil.copytree(store, beside := tmp_path_factory.mktemp("whole") / "runs")
    unsharded = workspaces.begin_run.fn(wide(beside))
    return store, policies.make_guide.fn(unsharded, checkpoint(unsharded, STEP), 0, WINDOW)


@pytest.fixture
def sharded(whole: tuple[Path, GuideManifest], tmp_path: Path, prefect_server: dict[str, str]) -> Iterator[str]:
    """The run, with its guide still to be made by two threads."""
    shutil.copytree(whole[0], tmp_path / "runs")
    with at_server(prefect_server):
        yield workspaces.begin_run.fn(wide(tmp_path / "runs", shards=2))


@contextmanager
def at_server(server: dict[str, str]) -> Iterator[None]:
    """Within the block, tasks of this process report to the server."""
    settings = {PREFECT_API_URL: server["PREFECT_API_URL"], PREFECT_LOGGING_TO_API_ENABLED: False}
    with temporary_settings(settings):
        yield
        # Or this process would wait for the server when it ends, and the server will be gone.
        EventsWorker.drain_all(timeout=10)


@given(st.integers(0, 300), st.integers(1, 9), st.integers(1, 40))
def test_prompts_are_dealt_in_whole_blocks_once_each(prompts: int, shards: int, block: int) -> None:
    names = [f"{i:03d}" for i in range(prompts)]
    parts = deal(names, shards, block)
    assert sorted(name for part in parts for name in part) == names
    assert len(parts) == min(shards, -(-prompts // block))
    blocks = {tuple(names[i : i + block]) for i in range(0, prompts, block)}
    assert {part[i : i + block] for part in parts for i in range(0, len(part), block)} == blocks
    sizes = [-(-len(part) // block) for part in parts]
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


def test_threads_take_one_gpu_after_the_other_unless_one_is_named() -> None:
    assert gpus_of_threads("auto", 3, gpus=2) == [0, 1, 0]
    assert gpus_of_threads("cuda", 2, gpus=8) == [0, 1]
    assert gpus_of_threads("cuda:1", 2, gpus=2) == [None, None]
    assert gpus_of_threads("auto", 2, gpus=1) == [None, None]
    assert gpus_of_threads("cpu", 2, gpus=2) == [None, None]


@pytest.mark.slow
def test_threads_make_the_guide_that_one_worker_makes(whole: tuple[Path, GuideManifest], sharded: str) -> None:
    made = guide(sharded)
    assert bits(made) == bits(whole[1])
    assert sorted(shard.asked for shard in open_run(sharded).shards()) == [64, 96]
    # Done again without shards, beside it.
    do_again(sharded, made, lambda: guide(sharded))
    assert workspaces.workspace(sharded).config.sharding.shards == 2


@pytest.mark.slow
def test_a_shard_that_a_device_fails_once_is_sampled_again_and_no_other(
    whole: tuple[Path, GuideManifest], sharded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = failing(monkeypatch, OSError(errno.EIO, "the device is gone"), times=1)
    assert bits(guide(sharded)) == bits(whole[1])
    assert sorted(calls.values()) == [1, 2]


@pytest.mark.slow
def test_a_shard_that_fails_for_good_fails_the_guide_and_the_next_attempt_samples_only_it(
    whole: tuple[Path, GuideManifest], sharded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, ValueError("no such luck"), times=9)
        with pytest.raises(NearFutureError, match=r"shard 1 of 2 of guide .* failed \(no such luck\).* the 1 shards"):
            guide(sharded)
    run = open_run(sharded)
    assert run.guides() == []
    (kept,) = run.shards()
    assert bits(guide(sharded)) == bits(whole[1])
    assert kept in run.shards()
    assert len(run.shards()) == 2


@pytest.mark.slow
def test_shards_are_verified_and_stay_until_their_guide_is_committed(
    sharded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, ValueError("no such luck"), times=9)
        with pytest.raises(NearFutureError):
            guide(sharded)
    unfinished = at_rest(sharded, tmp_path / "unfinished")
    assert swept(unfinished) == set()
    assert faults(unfinished) == []

    guide(sharded)
    run = at_rest(sharded, tmp_path / "finished")
    files = {shard.files[0].key for shard in run.shards()}
    assert faults(run) == []
    manifests = {f"{key.rpartition('/')[0]}/manifest.json" for key in files}
    assert swept(run) == files | manifests
    # A live process may still read them.
    workspaces.workspace(sharded)
    assert swept(open_run(sharded)) == set()
    damaged = sorted(files)[0]
    (folder_of(run) / damaged).write_bytes(b"PAR1")
    assert [fault.key for fault in faults(run)] == [damaged]


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> Counter[int]:
    """Has the larger shard's commit fail so many times; counts all attempts by the prompts of their shard."""
    real, calls = RunArtifacts.commit_shard, Counter[int]()

    def commit(self: RunArtifacts, guide_id: str, spec: Any, *rest: Any) -> Any:
        asked = len(spec.prompt_ids)
        calls[asked] += 1
        if asked == 96 and calls[asked] <= times:
            raise error
        return real(self, guide_id, spec, *rest)

    monkeypatch.setattr(RunArtifacts, "commit_shard", commit)
    return calls


def at_rest(run: str, target: Path) -> RunArtifacts:
    """A copy of a run that nobody has open, written an hour ago."""
    shutil.copytree(folder_of(open_run(run)), target / "demo", ignore=shutil.ignore_patterns("leases"))
    then = time.time() - 3600
    for path in target.rglob("*"):
        os.utime(path, (then, then))
    return open_run(str(target / "demo"))


def swept(run: RunArtifacts) -> set[str]:
    """What a gc would remove of the guides."""
    config = Config.model_validate(run.record().config)
    config = config.model_copy(update={"retention": config.retention.model_copy(update={"grace_hours": 0.0})})
    return {removal.key for removal in plan_gc(run, config).removed if removal.key.startswith("guides/")}


def faults(run: RunArtifacts) -> list[Any]:
    opened = Workspace.of(run)
    return verify_run(run, opened.verifier, opened.decode)
