"""A guide that is sampled on a Ray cluster of two nodes: the same bits, from processes of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from npo_core.artifacts import open_run
from npo_core.interfaces import ConfigurationError
from schemas.records import GuideManifest
from tasks import workspaces
from tests.command import ROOT
from tests.test_shards import at_server, bits, checkpoint, guide, whole, wide

pytestmark = pytest.mark.engines

__all__ = ["whole"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a Ray cluster of two nodes, of one CPU core and one GPU by name each."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=node)
    nodes.add_node(num_cpus=1, num_gpus=1, object_store_memory=80 << 20)
    yield nodes.address
    nodes.shutdown()


def sharded(store: Path, target: Path, **sharding: Any) -> str:
    """A copy of the run, with its guide still to be made in two shards."""
    shutil.copytree(store, target)
    return workspaces.begin_run.fn(wide(target, shards=2, **sharding))


def test_two_nodes_make_the_guide_that_one_worker_makes(
    whole: tuple[Path, GuideManifest], cluster: str, tmp_path: Path, prefect_server: dict[str, str]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with at_server(prefect_server):
        run = sharded(whole[0], tmp_path / "runs", ray_address=cluster, ray_gpus=1)
        assert bits(guide(run)) == bits(whole[1])
    # One GPU a node: neither node can have had both.
    workers = {shard.environment["pid"] for shard in open_run(run).shards()}
    assert len(workers) == 2
    assert str(os.getpid()) not in workers
    assert signal.getsignal(signal.SIGTERM) is handler


def test_nobody_at_the_address_is_said_before_anything_is_sampled(
    whole: tuple[Path, GuideManifest], tmp_path: Path, prefect_server: dict[str, str]
) -> None:
    with at_server(prefect_server):
        run = sharded(whole[0], tmp_path / "runs", ray_address="127.0.0.1:9")
        with pytest.raises(ConfigurationError, match=r"no Ray cluster answers at sharding\.ray_address 127\.0\.0\.1:9"):
            guide(run)


def test_a_killed_stage_leaves_no_process_that_samples(
    whole: tuple[Path, GuideManifest], cluster: str, tmp_path: Path, prefect_server: dict[str, str]
) -> None:
    run = sharded(whole[0], tmp_path / "runs", ray_address=cluster)
    ref = checkpoint(run, 2)
    at = ("--leg", ref.leg_id, "--step", str(ref.step))
    stage = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "stage", "guide", run, *at, "--start", "0", "--stop", "4"],
        cwd=ROOT,
        env={**os.environ, **prefect_server, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        sampling = waited_for(samplers)
    finally:
        stage.kill()
        stage.wait()
    assert sampling
    waited_for(lambda: not samplers())


def samplers() -> list[int]:
    """Ray's processes that are at a shard."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [""])[0].startswith("ray::sample shard"):
            found.append(process.pid)
    return found


def waited_for(what: Any, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.1)
    return value
