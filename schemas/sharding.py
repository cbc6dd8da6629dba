"""How the guide's prompts are spread over workers."""

from __future__ import annotations

from pydantic import Field

from schemas.section import Section


class ShardingSection(Section):
    """Shards of the guide, each sampled by a worker of its own. Not part of the run's identity: on CPUs the guide has
    the same bits for any number of shards."""

    shards: int = Field(1, ge=1)
    """Parts that the guide's prompts are dealt to, 64 prompts at a time."""
    ray_address: str | None = Field(None, pattern=r"^(ray://)?[^\s/:@]+:\d+$")
    """Ray cluster whose workers sample: `HOST:PORT` from one of its machines, `ray://HOST:PORT` from elsewhere. By
    default threads of the stage's process do, with a model each; where there are several GPUs, one after the other."""
    ray_cpus: float = Field(1, ge=0)
    """CPU cores that a shard asks of the Ray cluster."""
    ray_gpus: float = Field(0, ge=0)
    """GPUs that a shard asks of the Ray cluster."""
