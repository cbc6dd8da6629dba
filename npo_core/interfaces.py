"""The interfaces that models, engines, data, verifiers and stores plug into, and the types which cross them.

Shapes: see the legend in `npo_core`. Ragged data are lists of one numpy array a row, so that no padding crosses an
interface. Rows are prompt-major: row p·n + g is rollout g of prompt p.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from npo_core.stops import Stops
from schemas.records import FileEntry, Manifest, Record

FinishReason = Literal["stop", "length"]
Purpose = Literal["rollout", "guide", "probe", "eval"]
RecordT = TypeVar("RecordT", bound=Record)
ManifestT = TypeVar("ManifestT", bound=Manifest)


class NearFutureError(Exception):
    """Something that a user can cause and mend. Its text names the thing, the value and the remedy."""


class ConfigurationError(NearFutureError):
    """Bad usage or configuration: exit code 2."""


def first_line(error: Exception) -> str:
    """What an error of a library's says first, or its name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Prompt:
    """A prompt row."""

    prompt_id: str
    task: str
    """Task family, for scores by family."""
    messages: tuple[Mapping[str, Any], ...]
    """Chat messages with `role` and `content`: a text, or parts of type text and image (see `npo_core.pictures`)."""
    answer: str
    """What the verifier compares with."""
    image_refs: tuple[str, ...] = ()
    """Its pictures, in the order of its image parts: SHA-256 of their files, hexadecimal."""
    metadata: str | None = None
    """What the verifier may need beside the answer: a JSON object, or nothing."""


@dataclass(frozen=True)
class Verdict:
    """A verifier's judgement of one answer."""

    reward: float
    """May be fractional."""
    correct: bool
    """Explicit: a guide trajectory must be correct, whatever its reward."""
    reason: str
    """In words, for people."""
    failure: Literal["timeout", "error"] | None = None
    """Why there is no judgement, only reward 0 and not correct: it took too long, or the verifier failed."""


@dataclass(frozen=True)
class StreamKey:
    """Names the random stream of one row. Equal keys give equal numbers, whoever shares the batch."""

    seed: int
    purpose: Purpose
    step: int
    prompt_id: str
    slot: int


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Plain distribution at a temperature: no top-p or top-k, whose log-probs a learner cannot match."""

    temperature: float
    """0: the likeliest token each time. Its distribution is a point: log-probabilities and entropies are 0."""
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    """Tokens which end a completion; the end token belongs to it."""
    stops: Stops | None = None
    """Texts which end it too; they belong to it."""


@dataclass(frozen=True)
class Rollouts:
    """Sampled completions; every list has one entry a row."""

    completion_ids: list[np.ndarray]
    """int32 [T]; ends with the stop token, or the tokens of a stop text, if it ended by itself."""
    logprobs: list[np.ndarray]
    """float32 [T]: log-probabilities under the distribution that the tokens were sampled from."""
    entropies: list[np.ndarray]
    """float32 [T]: exact entropy of that distribution at each token, in nats."""
    finish_reasons: list[FinishReason]


ADAPTER = "adapter"
"""Folder of a model directory that holds an adapter of its weights, in peft's files."""


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint in a local directory: `weights/` is a transformers model directory (safetensors, configuration,
    tokenizer; with LoRA the run's starting one, and the adapter in its folder `adapter/`),
    `optimizer/optimizer.safetensors` and `state.json` are absent where only a policy is given;
    `monitor.json` (`schemas.decisions.MonitorState`) is the run's, no engine reads it."""

    path: Path
    digest: str
    step: int

    @property
    def weights(self) -> Path:
        """The model directory, which `from_pretrained` and vLLM load."""
        return self.path / "weights"


@dataclass(frozen=True)
class TrainBatch:
    """The rows of one step's update, after mixing. Displaced rollouts are not in it.

    Raises:
        ValueError: lists of unequal length.
    """

    step: int
    prompt_ids: list[np.ndarray]
    """int32 [L] a row; with pictures a `npo_core.pictures.PicturedPrompt`."""
    completion_ids: list[np.ndarray]
    """int32 [T] a row."""
    advantages_B: np.ndarray
    """float64, over the modified groups."""
    guide_B: np.ndarray
    """bool: which rows are guide trajectories."""
    guide_logprobs: list[np.ndarray | None] = field(default_factory=list)
    """float32 [T] under the guide policy for guide rows, None for the policy's own."""
    behavior_logprobs: list[np.ndarray | None] | None = None
    """float32 [T] by the engine that sampled them for the policy's own rows, None for guide rows. None altogether where
    the trainer itself sampled and nothing is to be corrected."""

    def __post_init__(self) -> None:
        rows = len(self.prompt_ids)
        for name in ("completion_ids", "advantages_B", "guide_B", "guide_logprobs", "behavior_logprobs"):
            values = getattr(self, name)
            if values is not None and len(values) != rows:
                raise ValueError(f"{name} has {len(values)} rows, prompt_ids has {rows}")


class Generator(Protocol):
    """Samples from a policy."""

    def load(self, checkpoint: LocalCheckpoint) -> None:
        """Takes the weights of `checkpoint`."""

    def sample(
        self, prompts: Sequence[np.ndarray], n: int, params: SamplingParams, streams: Sequence[StreamKey]
    ) -> Rollouts:
        """Samples n completions a prompt.

        Args:
            prompts: token ids, int32 [L] each; with pictures a `npo_core.pictures.PicturedPrompt`.
            n: completions a prompt.
            params: temperature, limit and stop tokens.
            streams: one a row, prompt-major, len(prompts)·n of them.

        Raises:
            FloatingPointError: the policy gave a distribution that is not finite.
        """

    def score(
        self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray], temperature: float
    ) -> list[np.ndarray]:
        """Log-probabilities of given completions, float32 [T] a row, at this temperature."""

    def close(self) -> None:
        """Frees what the generator holds."""


class Learner(Protocol):
    """Updates a policy."""

    def load(self, checkpoint: LocalCheckpoint, learning_rate: float) -> None:
        """Takes weights, optimizer and state; a checkpoint without an optimizer starts a fresh one.

        Args:
            learning_rate: peak rate from here on, whatever it was before: a scout may have one of its own.
        """

    def log_probs(
        self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(log-probabilities, entropies), float32 [T] a row, at the rollout temperature."""

    def step(self, batch: TrainBatch) -> dict[str, float]:
        """One step's update; returns the metrics `loss`, `kl`, `grad_norm`, `learning_rate`, `clip_ratio/*`,
        `npo/guide_ratio_mean`, `npo/guide_kl`, `tokens/trained`, `sampling/*`. An undefined one is absent.

        Raises:
            FloatingPointError: a log-probability, the loss or the gradient is not finite; names the step.
        """

    def save(self, target: Path) -> None:
        """Writes `weights/`, `optimizer/` and `state.json` into the directory `target` (see `LocalCheckpoint`); of the
        weights with LoRA the adapter alone."""

    def close(self) -> None:
        """Ends the processes that the learner started."""


class Verifier(Protocol):
    """Judges answers. Deterministic: a guide's stored answer is verified again when it is read."""

    name: str
    """`name/version`, recorded in every row."""
    can_fail: bool = False
    """Whether a verdict may have a `failure`; these are counted then."""

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """Judges `text` as an answer to `prompt`. Never raises because of what `text` holds."""

    def judge(self, items: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """`verify` for many answers, in order."""
        return [self.verify(prompt, text) for prompt, text in items]

    def close(self) -> None:
        """Ends what the verifier has started. By default it has started nothing."""
        return


class PromptSource(Protocol):
    """Prompts by stable identifier; the batch of a step is a function of (seed, step) alone."""

    def get(self, prompt_id: str) -> Prompt:
        """The prompt.

        Raises:
            KeyError: there is none.
        """

    def batch(self, step: int) -> list[Prompt]:
        """The distinct training prompts of `step`, in order."""

    def batch_ids(self, step: int) -> list[str]:
        """The identifiers of `batch`, without the prompts."""

    def held_out(self) -> list[Prompt]:
        """The prompts of the evaluation."""


@dataclass(frozen=True)
class StoredObject:
    """Something that lies in a store, committed or not."""

    key: str
    bytes: int
    modified: datetime
    """When it was last written, UTC."""


@runtime_checkable
class Store(Protocol):
    """Objects under keys. Data are written under keys that hold their content's hash; a record is created only if it
    is absent, and is never overwritten; only `swap` replaces anything."""

    root: str
    """URL that keys are relative to."""

    def within(self, folder: str) -> Store:
        """The same store with keys relative to `folder`."""

    def declare_single_writer(self) -> None:
        """Takes the user's word that no second process writes: a store without conditional writes is not refused."""

    def put_data(self, folder: str, name: str, role: str, source: bytes | Path, rows: int | None = None) -> FileEntry:
        """Writes a data file under `layout.data_file(folder, name, sha256)`; safe to repeat.

        Raises:
            StoreError: the store cannot be written (permissions, full disk); names the key and the remedy.
        """

    def create(self, key: str, record: RecordT) -> RecordT:
        """Creates a record if the key is absent, and returns the record that the key holds: ours, or that of the
        writer who came first."""

    def create_bytes(self, key: str, data: bytes) -> bytes:
        """`create` for an object that is no record: returns the bytes that the key holds, ours or the first ones."""

    def commit(self, folder: str, manifest: ManifestT) -> ManifestT:
        """`create` at the folder's manifest key: commits the artifact."""

    def read(self, key: str, kind: type[RecordT]) -> RecordT | None:
        """The record, or None if the key is absent.

        Raises:
            StoreError: the bytes are no such record; names the key.
        """

    def read_all(self, keys: Sequence[str], kind: type[RecordT]) -> list[RecordT | None]:
        """`read` of many records at once, in order."""

    def read_bytes(self, key: str) -> bytes | None:
        """The bytes of an object, unchecked, or None if the key is absent."""

    def read_data(self, entry: FileEntry) -> bytes:
        """The bytes of a data file, checked against the manifest's size and hash.

        Raises:
            StoreError: missing, truncated or altered; names the key.
        """

    def fetch(self, entry: FileEntry, target: Path) -> None:
        """`read_data` into a local file, in chunks; the file appears complete and checked, or not at all."""

    def check(self, entry: FileEntry) -> None:
        """`read_data` without keeping the bytes."""

    def open(self, entry: FileEntry) -> AbstractContextManager[BinaryIO]:
        """A data file, to read parts of: its size is checked, its hash is not (see `npo_core.parquet`).

        Raises:
            StoreError: missing or truncated; names the key.
        """

    def swap(self, key: str, expected: Record | None, new: Record) -> bool:
        """Compare-and-swap: writes `new` if the key holds `expected` (None: is absent). False if it does not."""

    def walk(self, folder: str) -> list[StoredObject]:
        """Everything below `folder`, committed or not, hidden temporary files too."""

    def list(self, folder: str) -> list[str]:
        """Names of the entries directly below `folder`, sorted; empty if there is none. Never cached."""

    def remove(self, key: str) -> None:
        """Removes an object; nothing happens if it is missing."""
