"""Benchmarks: other prompts than a run's own, which its checkpoints are asked as those of the held-out set are."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from npo_core.artifacts import prompts_digest
from npo_core.interfaces import ConfigurationError, Prompt, Verifier
from npo_core.pictures import require_supported
from npo_core.prompts import to_arrow
from npo_core.room import require_room
from npo_core.segment import LegContext
from npo_core.sources.load import Tokens, load_all
from npo_core.sources.told import told
from npo_core.verifiers.kinds import load_verifier
from schemas.benchmark import BenchmarkFile
from schemas.config import Config
from schemas.records import BenchmarkSpec

logger = logging.getLogger("npo")


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


def open_benchmark(
    file: BenchmarkFile, config: Config, tokens: Tokens | None = None, model: Any | None = None
) -> Benchmark:
    """Loads the prompts and the verifier of a benchmark.

    Args:
        file: the benchmark.
        config: of the run, which gives what the file leaves out.
        tokens: see `load`.
        model: transformers' configuration of the run's model; None: its room is not looked at.

    Raises:
        ConfigurationError: its prompts cannot be had, two share an identifier, or they show pictures to an engine that
            takes none.
    """
    rollout = config.rollout.model_copy(
        update={
            "temperature": file.temperature or config.rollout.temperature,
            "max_new_tokens": file.max_new_tokens or config.rollout.max_new_tokens,
        }
    )
    config = config.model_copy(update={"data": file.data, "verifier": file.verifier, "rollout": rollout})
    try:
        loaded = load_all(config, tokens)
        if model is not None and loaded.report is not None:
            require_room(config, model, loaded.report)
    except ConfigurationError as error:
        raise ConfigurationError(f"benchmark {file.name}: {error}") from error
    if loaded.pictures:
        require_supported(config)
    for line in told(loaded.report) if loaded.report else ():
        logger.info("benchmark %s: %s", file.name, line)
    prompts, verifier = [*loaded.train, *loaded.held_out], load_verifier(config)
    table = to_arrow(loaded.train, loaded.held_out)
    if len({prompt.prompt_id for prompt in prompts}) < len(prompts):
        raise ConfigurationError(f"benchmark {file.name}: two prompts share a prompt_id; give each its own")
    spec = BenchmarkSpec(
        name=file.name,
        prompts_digest=prompts_digest(table),
        verifier=verifier.name,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
    )
    samples = file.samples or config.evaluation.samples
    return Benchmark(spec, samples, prompts, table, verifier, loaded.pictures)
