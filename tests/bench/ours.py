"""Our side: `run_segment` in process, without a store and without Prefect."""

from __future__ import annotations

import time

import polars as pl
import torch
import transformers

from npo_core.engine import Engine
from npo_core.prompts import encode
from npo_core.segment import LegContext, run_segment
from tests.bench.work import StepRecord, Work


class OurTrainer:
    """Trains on from where it is."""

    def __init__(self, work: Work) -> None:
        torch.set_num_threads(work.config.learner.threads)
        tokenizer = transformers.AutoTokenizer.from_pretrained(work.model_dir, local_files_only=True)
        self.step = 0
        # Nothing is asked for as the starting policy: without a KL term no reference is loaded.
        self.engine = Engine.build(work.config, work.model_dir, lambda load: load(work.model_dir))
        self.context = LegContext(
            run_id="bench",
            leg_id="bench",
            config=work.config,
            prompts=work.prompts,
            verifier=work.verifier,
            encode=lambda prompt: encode(tokenizer, prompt),
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            stop_ids=(tokenizer.eos_token_id,),
            guide={},
            weights_digest="",
        )

    def train(self, steps: int) -> list[StepRecord]:
        """Trains so many steps, as one segment, under the deterministic kernels that the product asks for."""
        began = time.perf_counter()
        torch.use_deterministic_algorithms(True)
        try:
            tables = run_segment(
                self.context,
                self.engine.generator,
                self.engine.learner,
                self.step,
                self.step + steps,
                lambda *_: None,
            )
        finally:
            torch.use_deterministic_algorithms(False)
        wall_s = time.perf_counter() - began
        self.step += steps
        telemetry = tables.telemetry.to_pylist()
        parts_s = sum(t["generate_time"] + t["verify_time"] + t["update_time"] for t in telemetry)
        rollouts = pl.DataFrame(tables.rollouts)
        return [
            StepRecord(
                step=metrics["step"],
                prompt_ids=tuple(rollouts.filter(pl.col("step") == metrics["step"])["prompt_id"]),
                reward=metrics["reward"],
                tokens=int(metrics["tokens/policy"]),
                trained_tokens=int(metrics["tokens/trained"]),
                generate_s=times["generate_time"],
                verify_s=times["verify_time"],
                update_s=times["update_time"],
                # The rows of trajectories, and a step's share of the segment's tables.
                rest_s=(wall_s - parts_s) / steps,
            )
            for metrics, times in zip(tables.metrics.to_pylist(), telemetry, strict=True)
        ]
