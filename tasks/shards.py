"""The guide's prompts, sampled in one place or in several: threads of this process, or workers of a Ray cluster.

A shard is a function of the run's URI and plain arguments. It commits its rows to the store and returns their manifest,
so that a guide which was killed goes on with the shards that it finds.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from prefect import task, unmapped
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from npo_core.interfaces import ConfigurationError, NearFutureError
from schemas.records import GuideSpec, ShardManifest
from schemas.sharding import ShardingSection
from tasks.artifacts import stage_progress
from tasks.options import OPTIONS

if TYPE_CHECKING:
    import pyarrow as pa

    from npo_core.workspace import Workspace

logger = logging.getLogger("npo")

CONNECT_S = 10.0
"""Time for a Ray cluster to take a connection."""

_threads: dict[tuple[str, int], Workspace] = {}
"""Workspaces of this process's shards, by run and number. Their engines are loaded before the first thread samples:
transformers changes settings of the whole process while it loads a model."""
_interrupted = threading.Event()
"""Threads end after the block that they are at."""


def sample_guide(opened: Workspace, spec: GuideSpec, guide_id: str, asked: Sequence[str]) -> tuple[pa.Table, int]:
    """The guide policy's answers to prompts, and the tokens that they took; it is loaded only if there are any."""
    from schemas.tables import TRAJECTORIES

    if not asked:
        return TRAJECTORIES.empty_table(), 0
    with stage_progress(opened.run.uri, f"guide {spec.start}-{spec.stop}", len(asked)) as bar:

        def tell(done: int, solved: int) -> None:
            bar(done, {"solved": solved})

        if opened.config.sharding.shards == 1:
            return _answers(opened, spec, guide_id, asked, tell)
        return _gather(opened, _map(opened, spec, guide_id, asked, tell))


@task(name="sample shard", task_run_name="guide {guide_id}, shard {number} of {of}", **OPTIONS)
def sample_shard(run: str, guide_id: str, spec: GuideSpec, number: int, of: int) -> ShardManifest:
    """Samples answers to some of a guide's prompts and commits them. Found if they are committed.

    Args:
        run: URI of the run.
        guide_id: the guide.
        spec: the guide's, with the prompts of this shard.
        number: the shard's, from 1.
        of: how many there are.
    """
    from npo_core.environment import environment
    from npo_core.lineage import shard_id

    with _worker(run, number) as opened:
        committed = opened.run.shard(guide_id, shard_id(guide_id, spec.prompt_ids))
        if committed is not None:
            return committed
        rows, tokens = _answers(opened, spec, guide_id, spec.prompt_ids, _end_if_interrupted)
        worker = {"host": socket.gethostname(), "pid": str(os.getpid())}
        return opened.run.commit_shard(guide_id, spec, rows, tokens, environment(opened.config, "guide") | worker)


def _answers(
    opened: Workspace, spec: GuideSpec, guide_id: str, asked: Sequence[str], on_prompts: Callable[[int, int], None]
) -> tuple[pa.Table, int]:
    from npo_core.guide_sources import sample_answers
    from npo_core.interfaces import SamplingParams

    generator = opened.sampling("guide", spec.checkpoint)
    return sample_answers(
        spec,
        guide_id,
        opened.run.run_id,
        [opened.prompts.get(prompt_id) for prompt_id in asked],
        generator,
        SamplingParams(spec.temperature, spec.max_new_tokens, opened.stop_ids, opened.stops),
        opened.verifier,
        opened.encode,
        opened.decode,
        on_prompts,
    )


def _map(
    opened: Workspace, spec: GuideSpec, guide_id: str, asked: Sequence[str], tell: Callable[[int, int], None]
) -> list[ShardManifest]:
    """Maps the shard task over the shards.

    Raises:
        NearFutureError: a shard failed, for good; the others were let finish, and are found the next time.
    """
    from npo_core.shards import deal

    settings, run = opened.config.sharding, opened.run.uri
    parts = [spec.model_copy(update={"prompt_ids": part}) for part in deal(asked, settings.shards)]
    made: list[ShardManifest] = []
    failures: dict[int, Exception] = {}
    with ExitStack() as stack:
        if settings.ray_address is None:
            stack.enter_context(_thread_workers(opened, parts, guide_id))
        runner = stack.enter_context(_runner(settings, len(parts)))
        numbers = list(range(1, len(parts) + 1))
        arguments = {"run": unmapped(run), "guide_id": unmapped(guide_id), "spec": parts, "number": numbers}
        mapped: Any = sample_shard  # the type of `map` has async tasks in mind
        futures = runner.map(mapped, arguments | {"of": unmapped(len(parts))})
        for number, future in zip(numbers, futures, strict=True):
            try:
                made.append(future.result())
            except Exception as error:
                failures[number] = error
            tell(sum(shard.asked for shard in made), sum(shard.solved for shard in made))
    if failures:
        number, reason = next(iter(failures.items()))
        raise NearFutureError(
            f"shard {number} of {len(parts)} of guide {guide_id} failed ({reason}); mend this and run again: the "
            f"{len(made)} shards that are done stay, and are found"
        ) from reason
    return made


def _gather(opened: Workspace, shards: Sequence[ShardManifest]) -> tuple[pa.Table, int]:
    """The rows of all shards, and the tokens that they took."""
    import pyarrow as pa

    tables = [opened.run.table(shard, "trajectories") for shard in shards]
    return pa.concat_tables(tables), sum(shard.tokens_guide for shard in shards)


@contextmanager
def _worker(run: str, number: int) -> Iterator[Workspace]:
    """The workspace that a shard's thread has been given; in a process of Ray's one of its own."""
    if (ready := _threads.get((run, number))) is not None:
        yield ready
        return
    from npo_core.artifacts import open_run
    from npo_core.workspace import Workspace

    opened = Workspace.of(open_run(run)).sampler()
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def _thread_workers(opened: Workspace, parts: Sequence[GuideSpec], guide_id: str) -> Iterator[None]:
    """Readies a workspace for each shard; those that have something to sample hold the guide policy."""
    import torch

    from npo_core.lineage import shard_id
    from npo_core.shards import gpus_of_threads

    run = opened.run.uri
    gpus = gpus_of_threads(opened.config.learner.device, len(parts), torch.cuda.device_count())
    _interrupted.clear()
    try:
        for number, (part, gpu) in enumerate(zip(parts, gpus, strict=True), 1):
            worker = _threads[run, number] = opened.sampler(gpu)
            if opened.run.shard(guide_id, shard_id(guide_id, part.prompt_ids)) is None:
                worker.sampling("guide", part.checkpoint)
        yield
    finally:
        for number in range(1, len(parts) + 1):
            if (done := _threads.pop((run, number), None)) is not None:
                done.close()


@contextmanager
def _runner(settings: ShardingSection, shards: int) -> Iterator[TaskRunner[Any]]:
    if settings.ray_address is not None:
        with _ray(settings.ray_address, {"num_cpus": settings.ray_cpus, "num_gpus": settings.ray_gpus}) as runner:
            yield runner
        return
    threads: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=shards)
    with threads:
        try:
            yield threads
        except BaseException:
            _interrupted.set()
            raise


def _end_if_interrupted(done: int, solved: int) -> None:
    if _interrupted.is_set():
        raise NearFutureError(f"the guide was interrupted after {done} prompts of this shard; run again")


@contextmanager
def _ray(address: str, resources: Mapping[str, float]) -> Iterator[TaskRunner[Any]]:
    """A task runner on a Ray cluster.

    Raises:
        ConfigurationError: Ray is not installed, or nothing answers at the address.
    """
    if importlib.util.find_spec("prefect_ray") is None:
        raise ConfigurationError(
            "sharding.ray_address needs prefect-ray, which is not installed; `pip install 'near-future[ray]'`, or "
            "leave it empty to sample in threads"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as error:
        raise ConfigurationError(
            f"no Ray cluster answers at sharding.ray_address {address} ({error}); start one (`ray start --head`), or "
            "leave it empty to sample in threads"
        ) from error
    from prefect_ray import RayTaskRunner
    from prefect_ray.context import remote_options

    handler = signal.getsignal(signal.SIGTERM)
    with RayTaskRunner(address, {"logging_level": logging.WARNING}) as runner, remote_options(**resources):
        if threading.current_thread() is threading.main_thread():
            # Ray takes the signal that a Prefect worker ends a flow run with.
            signal.signal(signal.SIGTERM, handler)
        yield runner
