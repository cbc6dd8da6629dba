"""A run as its stages see it: configuration, artifacts, prompts, verifier, and the engine that holds a policy."""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import transformers

from npo_core import lineage
from npo_core.artifacts import RunArtifacts
from npo_core.engine import Engine
from npo_core.guide import GuideTrajectories, GuideTrajectory, by_prompt, read_guide
from npo_core.interfaces import Generator, LocalCheckpoint, NearFutureError, Prompt, Verdict, Verifier
from npo_core.pictures import PictureEncoder, load_processor, pictured_counter, require_supported
from npo_core.policy import Policy
from npo_core.prompts import PromptTable, encode
from npo_core.rows import EVERY_ROW, Where, read_rows
from npo_core.run_config import configure
from npo_core.segment import LegContext
from npo_core.shards import sampling_config
from npo_core.sources.load import Tokens
from npo_core.stops import Stops
from npo_core.verifiers.kinds import load_verifier
from schemas import tables
from schemas.config import Config
from schemas.decisions import MonitorState
from schemas.records import CheckpointRef, GuideManifest, LegKind, LegRecord, RunRecord
from schemas.sharding import ShardingSection

logger = logging.getLogger("npo")


class Workspace:
    """One run, open in this process.

    Args:
        config: the configuration; its recipe is the run's.
        run: the run's artifacts.
        record: the run's record.
    """

    def __init__(self, config: Config, run: RunArtifacts, record: RunRecord) -> None:
        self.config, self.run, self.record = config, run, record
        self._scratch = tempfile.TemporaryDirectory(prefix="near-future-")
        self._engine: Engine | None = None
        self._holds: tuple[str, float | None] | None = None
        # Checkpoint and learning rate; no rate: weights alone.
        self._frozen_holds: str | None = None

    @classmethod
    def of(cls, run: RunArtifacts) -> Workspace:
        """The run with the configuration that it was last opened with.

        Raises:
            NearFutureError: there is no such run, or it holds no configuration of this version.
        """
        record = run.record()
        return cls(configure(run), run, record)

    def over(self, run: RunArtifacts) -> Workspace:
        """This workspace over other artifacts of the run, with the same engine. Trackers hear nothing of it, and no
        other worker, which would open the run itself."""
        twin = copy.copy(self)
        twin.run = run
        quiet = {"run": self.config.run.model_copy(update={"trackers": ()}), "sharding": ShardingSection()}
        twin.config = self.config.model_copy(update=quiet)
        return twin

    def sampler(self, gpu: int | None = None) -> Workspace:
        """The same run with an engine of its own, which only samples; see `sampling_config`. Close it."""
        return Workspace(sampling_config(self.config, gpu), self.run, self.record)

    def close(self) -> None:
        """Ends what engine and verifier have started, and removes the scratch directory."""
        if self._engine is not None:
            self._engine.close()
        if "verifier" in self.__dict__:
            self.verifier.close()
        self._scratch.cleanup()

    @property
    def scratch(self) -> Path:
        """A directory of this process."""
        return Path(self._scratch.name)

    @cached_property
    def prompts(self) -> PromptTable:
        """The run's prompts, as they were frozen when it began."""
        return PromptTable(self.run.prompts(), self.config.run.seed, self.config.rollout.prompts_per_step)

    @cached_property
    def verifier(self) -> Verifier:
        """The run's verifier.

        Raises:
            NearFutureError: it is another one than the run began with.
        """
        verifier = load_verifier(self.config)
        if verifier.name != self.record.verifier:
            raise NearFutureError(
                f"run {self.run.uri} was verified by {self.record.verifier}, this installation has {verifier.name}; "
                "use the version that began the run"
            )
        return verifier

    @cached_property
    def model_dir(self) -> Path:
        """The run's model configuration and tokenizer, without weights."""
        return self.run.checkout_model(self.scratch / "model")

    @cached_property
    def model_config(self) -> Any:
        """transformers' configuration of the run's model."""
        return transformers.AutoConfig.from_pretrained(self.model_dir, local_files_only=True)

    @cached_property
    def tokenizer(self) -> Any:
        """The run's tokenizer."""
        return transformers.AutoTokenizer.from_pretrained(self.model_dir, local_files_only=True)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: the tokenizer's end token and the model's."""
        ids = {self.tokenizer.eos_token_id}
        with contextlib.suppress(OSError):
            eos = transformers.GenerationConfig.from_pretrained(self.model_dir, local_files_only=True).eos_token_id
            ids |= set(eos) if isinstance(eos, list) else {eos}
        return tuple(sorted(i for i in ids if i is not None))

    @cached_property
    def stops(self) -> Stops | None:
        """Texts that end a completion too."""
        return Stops.of(self.config.chat.stop, self.tokenizer)

    @cached_property
    def pictures(self) -> PictureEncoder:
        """Encodes prompts that show pictures of the run.

        Raises:
            ConfigurationError: the run's model sees none.
        """
        return PictureEncoder(load_processor(self.model_dir), self.run.picture)

    def encode(self, prompt: Prompt) -> np.ndarray:
        """Token ids of a prompt, int32 [L], with its pictures."""
        if prompt.image_refs:
            return self.pictures.encode(self.tokenizer, prompt, self.config.chat)
        return encode(self.tokenizer, prompt, self.config.chat)

    @cached_property
    def tokens(self) -> Tokens:
        """Counts the tokens of a prompt; see `pictured_counter`."""
        return pictured_counter(self.tokenizer, self.config.chat, lambda: load_processor(self.model_dir))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a completion without the token that ended it; a verifier sees all other special tokens."""
        return self.tokenizer.decode(ids[:-1] if len(ids) and ids[-1] in self.stop_ids else ids)

    def judge(self, answers: Sequence[tuple[str, Sequence[int]]]) -> list[Verdict]:
        """Verdicts on (prompt_id, token ids of a completion)."""
        return self.verifier.judge([(self.prompts.get(prompt_id), self.decode(ids)) for prompt_id, ids in answers])

    def token_text(self, token: int) -> str:
        """Text of one token, special ones included."""
        return self.tokenizer.decode([token])

    def leg_config(self, kind: LegKind) -> Config:
        """The configuration that a leg of this kind trains under."""
        return self.config.scout() if kind == "scout" else self.config

    def holding(self, ref: CheckpointRef, optimizer: bool, kind: LegKind = "main") -> Engine:
        """The engine, holding this checkpoint; its optimizer and state too if asked for, as a leg of this kind wants
        them.

        Raises:
            NearFutureError: the checkpoint is missing or damaged.
        """
        rate = self.leg_config(kind).learner.learning_rate
        if self._engine and self._holds and self._holds[0] == ref.digest and (not optimizer or self._holds[1] == rate):
            return self._engine
        self._holds = None
        with self._checked_out(ref, weights_only=not optimizer) as local:
            engine = self._engine = self._engine or self._build(local.weights)
            if optimizer:
                engine.learner.load(local, rate)
            else:
                engine.generator.load(local)
        self._holds = (ref.digest, rate if optimizer else None)
        return engine

    def sampling(self, work: Literal["guide", "evaluation"], ref: CheckpointRef) -> Generator:
        """What samples this work, holding this checkpoint.

        Raises:
            NearFutureError: the checkpoint is missing or damaged, or vLLM does not hold it.
        """
        engine = self.holding(ref, optimizer=False)
        if work not in self.config.vllm.samples:
            return engine.generator
        if self._frozen_holds != ref.digest:
            self._frozen_holds = None
            with self._checked_out(ref, weights_only=True) as local:
                engine.frozen.load(local)
            self._frozen_holds = ref.digest
        return engine.frozen

    def trained(self) -> None:
        """Forgets which checkpoints the engine holds: its weights are changing."""
        self._holds = self._frozen_holds = None

    def now_holds(self, ref: CheckpointRef, kind: LegKind) -> None:
        """The engine's weights, optimizer and state are those of this checkpoint, which a leg of this kind has just
        saved."""
        self._holds = (ref.digest, self.leg_config(kind).learner.learning_rate)

    def context(
        self,
        leg_id: str,
        weights_digest: str,
        guide: GuideTrajectories | None = None,
        monitor: MonitorState | None = None,
        kind: LegKind = "main",
    ) -> LegContext:
        """What the steps of a leg of this kind need to know; `guide` is what is mixed into them, `monitor` AutoNPO's
        state there."""
        return LegContext(
            run_id=self.run.run_id,
            leg_id=leg_id,
            config=self.leg_config(kind),
            prompts=self.prompts,
            verifier=self.verifier,
            encode=self.encode,
            decode=self.decode,
            stop_ids=self.stop_ids,
            guide=guide,
            weights_digest=weights_digest,
            monitor=monitor or MonitorState(),
            stops=self.stops,
        )

    def guide(self, guide_id: str, prompts: Collection[str]) -> GuideTrajectories | None:
        """A guide's trajectories for some prompts; None if it has none for any prompt. Of a large guide only what is
        asked for stays in memory.

        Raises:
            NearFutureError: see `guide_trajectories`.
        """
        found = by_prompt(self.guide_trajectories(guide_id, Where(prompts=prompts)))
        return found if found or self.run.require_guide(guide_id).solved else None

    def guide_trajectories(self, guide_id: str, where: Where = EVERY_ROW) -> Iterator[GuideTrajectory]:
        """A guide's trajectories one by one, each verified again.

        Raises:
            NearFutureError: there is no such guide, it was made under another tokenizer, template or verifier, or an
                answer does not hold.
        """
        manifest = self.run.require_guide(guide_id)
        require_same_terms(manifest, self.record)
        return read_guide(
            read_rows(self.run, [manifest], "trajectories", tables.TRAJECTORIES.names, where),
            self.judge,
            lambda prompt_id: self.encode(self.prompts.get(prompt_id)),
        )

    @contextlib.contextmanager
    def _checked_out(self, ref: CheckpointRef, weights_only: bool) -> Iterator[LocalCheckpoint]:
        with tempfile.TemporaryDirectory(dir=self.scratch) as directory:
            yield self.run.checkout(ref, Path(directory), weights_only=weights_only)

    def _build(self, model_dir: Path) -> Engine:
        if self.prompts.pictured:
            require_supported(self.config)
        engine = Engine.build(self.config, model_dir, self._starting_policy, self.model_dir)
        # What runs in a process of its own, on a GPU perhaps, ends with the workspace.
        weakref.finalize(self, engine.close)
        return engine

    def _starting_policy(self, load: Callable[[Path], Policy]) -> Policy:
        """Loads the starting policy, which the KL term refers to."""
        warm = new_leg(self.record, "warm", None, 0)
        manifest = self.run.require_checkpoint(warm.leg_id, 0)
        with self._checked_out(manifest.ref, weights_only=True) as local:
            return load(local.weights)


def require_same_terms(guide: GuideManifest, record: RunRecord) -> None:
    """Refuses a guide whose token ids or verdicts mean something else in this run.

    Raises:
        NearFutureError: tokenizer, template or verifier differ; names both.
    """
    for name, theirs, ours in (
        ("tokenizer or chat template", guide.spec.tokenizer_digest, record.tokenizer_digest),
        ("verifier", guide.spec.verifier, record.verifier),
    ):
        if theirs != ours:
            raise NearFutureError(
                f"guide {guide.guide_id} was made under another {name} ({theirs[:24]}) than run {record.run_id} uses "
                f"({ours[:24]}); make the guide again in this run"
            )


def now() -> str:
    """This moment, UTC, ISO 8601, as records hold it."""
    return datetime.now(UTC).isoformat()


def new_leg(
    record: RunRecord, kind: Any, parent: CheckpointRef | None, start: int, guide_id: str | None = None
) -> LegRecord:
    """The record of a leg, under the identifier which its inputs give it."""
    leg_id = lineage.leg_id(record.recipe_digest, parent, kind, start, guide_id)
    return LegRecord(
        leg_id=leg_id,
        kind=kind,
        parent=parent,
        start=start,
        guide_id=guide_id,
        recipe_digest=record.recipe_digest,
        created_at=now(),
    )
