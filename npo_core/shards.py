"""A guide cut into shards, which give the same rows as the whole: prompts are sampled in the same blocks, so that every
pass of the model holds the same rows."""

from __future__ import annotations

from collections.abc import Sequence

from npo_core.guide_sources import PROMPTS_AT_ONCE
from schemas.config import Config
from schemas.sharding import ShardingSection


def deal(prompts: Sequence[str], shards: int, block: int = PROMPTS_AT_ONCE) -> list[tuple[str, ...]]:
    """Deals prompts to at most so many shards, whole blocks in turn; a shard without a block is left out."""
    blocks = [tuple(prompts[first : first + block]) for first in range(0, len(prompts), block)]
    return [sum(blocks[shard::shards], ()) for shard in range(min(shards, len(blocks)))]


def sampling_config(config: Config, gpu: int | None = None) -> Config:
    """The configuration of a worker that samples and never trains: without the reference policy of the KL term and
    without learner processes.

    Args:
        config: the run's.
        gpu: the GPU that it takes; by default the one that `learner.device` says.
    """
    learner = {"engine": "torch"} | ({} if gpu is None else {"device": f"cuda:{gpu}"})
    return config.model_copy(
        update={
            "learner": config.learner.model_copy(update=learner),
            "algorithm": config.algorithm.model_copy(update={"kl_beta": 0.0}),
            "sharding": ShardingSection(),
        }
    )


def gpus_of_threads(device: str, threads: int, gpus: int) -> list[int | None]:
    """The GPU of each thread: one after the other where there are several, unless `learner.device` names one."""
    spread = gpus > 1 and device in ("auto", "cuda")
    return [thread % gpus if spread else None for thread in range(threads)]
