"""Benchmarks: other prompts than a run's own, which its checkpoints are asked as those of the held-out set are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from npo_core.artifacts import prompts_digest
from npo_core.interfaces import ConfigurationError, Prompt, Verifier
from npo_core.pictures import require_supported
from npo_core.prompts import load_pictures, load_source, to_arrow
from npo_core.segment import LegContext
from npo_core.verifiers.kinds import load_verifier
from schemas.benchmark import BenchmarkFile
from schemas.config import Config
from schemas.records import BenchmarkSpec


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, ready to be asked of a run's checkpoints."""

    spec: BenchmarkSpec
    samples: int
    """Answers a prompt."""
    prompts: list[Prompt]
    table: pa.Table
    """The prompts by `schemas.tables.PROMPTS`."""
    verifier: Verifier
    pictures: Mapping[str, bytes]
    """Files of the pictures that its prompts show, by their SHA-256."""

    def context(self, leg: LegContext) -> LegContext:
        """A leg's context under the benchmark's sampling and verifier."""
        sampling = {"temperature": self.spec.temperature, "max_new_tokens": self.spec.max_new_tokens}
        rollout = leg.config.rollout.model_copy(update=sampling)
        return replace(leg, config=leg.config.model_copy(update={"rollout": rollout}), verifier=self.verifier)


def open_benchmark(file: BenchmarkFile, config: Config) -> Benchmark:
    """Loads the prompts and the verifier of a benchmark.

    Args:
        file: the benchmark.
        config: of the run, which gives what the file leaves out.

    Raises:
        ConfigurationError: its prompts cannot be had, two share an identifier, or they show pictures to an engine that
            takes none.
    """
    config = config.model_copy(update={"data": file.data, "verifier": file.verifier})
    train, held_out = load_source(config)
    pictures = load_pictures(config)
    if pictures:
        require_supported(config)
    prompts, verifier, table = [*train, *held_out], load_verifier(config), to_arrow(train, held_out)
    if len({prompt.prompt_id for prompt in prompts}) < len(prompts):
        raise ConfigurationError(f"benchmark {file.name}: two prompts share a prompt_id; give each its own")
    spec = BenchmarkSpec(
        name=file.name,
        prompts_digest=prompts_digest(table),
        verifier=verifier.name,
        temperature=config.rollout.temperature if file.temperature is None else file.temperature,
        max_new_tokens=file.max_new_tokens or config.rollout.max_new_tokens,
    )
    samples = file.samples or config.evaluation.samples
    return Benchmark(spec, samples, prompts, table, verifier, pictures)
