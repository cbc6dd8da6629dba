"""Records of a run: what each JSON file of the store says. Every one is small, frozen and versioned."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

SCHEMA_VERSION = 1

LegKind = Literal["warm", "scout", "main", "replay"]
MAIN_LINE_KINDS: tuple[LegKind, ...] = ("warm", "main", "replay")


class Record(BaseModel):
    """Base of every record: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    schema_version: int = SCHEMA_VERSION
    """Version of the record's fields."""


class CheckpointRef(Record):
    """Names one committed checkpoint."""

    leg_id: str
    """Leg that saved it."""
    step: int = Field(ge=0)
    """Optimizer steps of the main line that it has behind it."""
    digest: str
    """SHA-256 over weights, optimizer and state (`CheckpointManifest.digest`)."""


class RowFault(Record):
    """A row of the user's that cannot be used."""

    where: str
    """File and number, from 1."""
    reason: str
    """In words."""


class DataReport(Record):
    """What became of the rows that a run's prompts were made of."""

    origin: str
    """The source and what it read, in words."""
    rows: int = Field(ge=0)
    """Rows that were read, the held-out set's included."""
    bad: int = Field(ge=0)
    """Of these, that cannot be used: damaged, without a column, with an answer of another kind."""
    empty: int = Field(ge=0)
    """Without a prompt or an answer."""
    duplicates: int = Field(ge=0)
    """With the prompt and the answer of an earlier row of the same set; the first counts."""
    shared: int = Field(ge=0)
    """Training rows whose prompt is in the held-out set too, and which are left out of training."""
    over_long: int = Field(ge=0)
    """Of more than `data.max_prompt_tokens`."""
    unused: int = Field(ge=0)
    """Beyond `data.prompts` and `data.held_out`."""
    train: int = Field(ge=0)
    """Prompts of the training pool."""
    held_out: int = Field(ge=0)
    """Prompts of the held-out set."""
    longest: int | None = Field(ge=0)
    """Tokens of the longest prompt, chat template included; None: not counted."""
    faults: tuple[RowFault, ...] = ()
    """The first of the rows that are bad, empty or over-long."""


class RunRecord(Record):
    """`run.json`: the frozen recipe, and digests of everything that it refers to by name."""

    run_id: str
    """The run's name."""
    recipe: dict[str, Any]
    """`Config.recipe()` as it was when the run began."""
    config: dict[str, Any] = {}
    """The whole configuration as first used. `config.json` holds a newer one."""
    model_digest: str
    """SHA-256 of the starting weights and of the model's configuration."""
    tokenizer_digest: str
    """SHA-256 of the tokenizer and its chat template."""
    prompts_digest: str
    """SHA-256 of the prompts, training and held-out."""
    verifier: str
    """Identifier and version of the verifier, `name/version`."""
    recipe_digest: str
    """SHA-256 of `recipe` without `future` and `algorithm.method` (they shape the tree of legs, not a leg) and of the
    four digests above: what a leg's identity depends on."""
    data: DataReport | None = None
    """What became of the user's rows; None: the prompts are the testbed's."""
    created_at: str
    """UTC, ISO 8601."""

    @model_serializer(mode="wrap")
    def _as_before_there_were_rows(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        if values.get("data") is None:
            values.pop("data", None)
        return values


class ConfigRecord(Record):
    """`config.json`: the configuration that the run was last opened with, where it is another one than the first. It
    changes by compare-and-swap."""

    config: dict[str, Any]
    """The whole configuration; its recipe is the run's."""


class Head(Record):
    """`head.json`: which leg the main line is in. It moves by compare-and-swap."""

    leg_id: str
    """Tip of the main line."""
    epoch: int = Field(ge=0)
    """Grows by 1 with each move; a segment of the main line commits only under the epoch that it began in."""


class LegRecord(Record):
    """`leg.json`: a contiguous stretch of optimizer steps that starts from one checkpoint."""

    leg_id: str
    """Short digest of the recipe, the parent's digest, kind, start and guide."""
    kind: LegKind
    """`warm` is the starting policy, `scout` a future leg, `main` on-policy training, `replay` with a guide."""
    parent: CheckpointRef | None
    """Checkpoint that it starts from; none for `warm`."""
    start: int = Field(ge=0)
    """Its first step."""
    guide_id: str | None = None
    """Guide whose trajectories are mixed in (`replay` only)."""
    recipe_digest: str
    """`RunRecord.recipe_digest`."""
    created_at: str
    """UTC, ISO 8601."""


class FileEntry(Record):
    """One data file of an artifact."""

    role: str
    """What it is: `rollouts`, `metrics`, `telemetry`, `weights`, `adapter`, `optimizer`, `state`, `trajectories`,
    `window`, `samples`, `monitor`, `signal`."""
    name: str
    """Its name where a reader expects one, say `model.safetensors`."""
    key: str
    """Its key, relative to the run's root. Has the content's hash in it."""
    bytes: int = Field(ge=0)
    """Its size."""
    sha256: str
    """SHA-256 of its bytes."""
    rows: int | None = Field(None, ge=0)
    """Rows of a Parquet file."""
    footer_sha256: str | None = None
    """SHA-256 of a Parquet file's footer: who reads parts of the file checks this, and the pages by their checksums.
    Files of version 0.2 and earlier have none, and are read whole."""


class Manifest(Record):
    """Commits an artifact: written last, created only if absent. What no manifest names does not exist."""

    kind: str
    """Kind of artifact; fixed by each subclass."""
    files: tuple[FileEntry, ...]
    """Every data file."""
    nonce: str
    """Random, one a writer: tells our own commit whose reply was lost from another writer's."""
    created_at: str
    """UTC, ISO 8601."""
    environment: dict[str, str] = {}
    """Versions, device and thread count of the writer. A change is shown, not refused."""

    @property
    def named(self) -> tuple[FileEntry, ...]:
        """Every file that exists because this manifest does."""
        return self.files

    def file(self, role: str) -> FileEntry:
        """The one file with this role.

        Raises:
            KeyError: there is none, or more than one.
        """
        found = [entry for entry in self.files if entry.role == role]
        if len(found) != 1:
            raise KeyError(f"{len(found)} files with role {role!r} in a {self.kind} manifest")
        return found[0]


class SegmentRows(Record):
    """What steps [start, stop) of a leg left beside the checkpoint after them, written before that is committed."""

    start: int = Field(ge=0)
    stop: int = Field(ge=1)
    files: tuple[FileEntry, ...]
    """Rollouts, metrics and telemetry."""
    logical_digest: str
    """See `SegmentManifest.logical_digest`."""
    tokens_policy: int = Field(ge=0)
    """See `SegmentManifest.tokens_policy`."""


class CheckpointManifest(Manifest):
    """A checkpoint: weights, optimizer and state after `step` steps."""

    kind: Literal["checkpoint"] = "checkpoint"
    leg_id: str
    step: int = Field(ge=0)
    digest: str
    """SHA-256 over (role, name, sha256) of every file, sorted: the checkpoint's identity."""
    weights_digest: str
    """The same over the weights alone: which policy this is."""
    segment: SegmentRows | None = None
    """The rows that led to it. Who finds it committed and the segment not, commits the segment from these: where bits
    are not promised to be equal, another attempt's rows would belong to other weights."""

    @property
    def named(self) -> tuple[FileEntry, ...]:
        """See `Manifest.named`: the rows too, of which the segment may yet be committed."""
        return self.files + (self.segment.files if self.segment else ())

    @property
    def ref(self) -> CheckpointRef:
        """The reference that other records hold."""
        return CheckpointRef(leg_id=self.leg_id, step=self.step, digest=self.digest)


class SegmentManifest(Manifest):
    """Steps [start, stop) of a leg: rollouts, metrics and telemetry, and the checkpoint after them."""

    kind: Literal["segment"] = "segment"
    leg_id: str
    start: int = Field(ge=0)
    stop: int = Field(ge=1)
    """First step after the segment."""
    checkpoint: CheckpointRef
    """Checkpoint at `stop`, committed before this manifest."""
    logical_digest: str
    """SHA-256 of the rollouts and metrics as sorted rows: equal for equal training, whatever the file encoding."""
    tokens_policy: int = Field(ge=0)
    """Completion tokens that the policy sampled."""


class GuideSpec(Record):
    """The inputs of a guide. Its digest is the `guide_id`, so the same guide asked for twice is found."""

    checkpoint: CheckpointRef
    """The guide policy π(t+Δ)."""
    weights_digest: str
    """Its weights."""
    start: int = Field(ge=0)
    """First step of the window that the guide serves (t)."""
    stop: int = Field(ge=1)
    """First step after the window (t+W)."""
    prompt_ids: tuple[str, ...]
    """Distinct prompts of the window, sorted. In a manifest none: they are in its file of role `window`, so that who
    looks up a few trajectories of a large guide need not read them all."""
    k: int = Field(ge=1)
    """Answers sampled a prompt."""
    temperature: float
    max_new_tokens: int
    seed: int
    tokenizer_digest: str
    verifier: str
    source: Literal["checkpoint", "leg", "both"] = "checkpoint"
    """`checkpoint`: sampled from the guide policy; `leg`: rollouts of the steps that led to it; `both`: these, and what
    they leave open is sampled."""
    answers: int = Field(1, ge=1)
    """Most trajectories kept a prompt."""


class GuideManifest(Manifest):
    """A guide: at most `spec.answers` verified-correct trajectories a prompt (role `trajectories`)."""

    kind: Literal["guide"] = "guide"
    guide_id: str
    spec: GuideSpec
    solved: int = Field(ge=0)
    """Prompts for which at least one trajectory is stored."""
    tokens_guide: int = Field(ge=0)
    """Completion tokens that the guide sampled, wrong answers included."""

    @property
    def window(self) -> FileEntry | None:
        """The file of its prompts; guides of version 0.2 and earlier name them in the spec."""
        return next((entry for entry in self.files if entry.role == "window"), None)

    @property
    def asked(self) -> int:
        """Distinct prompts of its window."""
        return len(self.spec.prompt_ids) if self.window is None else self.window.rows or 0


class ShardManifest(Manifest):
    """A part of a guide that is being made (role `trajectories`). It counts until the guide is committed, which then
    holds its rows."""

    kind: Literal["shard"] = "shard"
    guide_id: str
    shard_id: str
    """Short digest of the guide and of the prompts that the shard asks."""
    asked: int = Field(ge=0)
    """Prompts."""
    solved: int = Field(ge=0)
    """Prompts for which at least one trajectory is stored."""
    tokens_guide: int = Field(ge=0)
    """Completion tokens that were sampled, wrong answers included."""


class TaskScore(Record):
    """Held-out result of one task family."""

    prompts: int = Field(ge=0)
    samples: int = Field(ge=0)
    correct: int = Field(ge=0)

    @property
    def accuracy(self) -> float:
        """pass@1 averaged over samples."""
        return self.correct / self.samples if self.samples else 0.0


class BenchmarkSpec(Record):
    """What an evaluation on other prompts than the run's held-out ones asked, and how."""

    name: str
    """The benchmark's name."""
    prompts_digest: str
    """SHA-256 of its prompts, as `RunRecord.prompts_digest`."""
    verifier: str
    """What judged the answers, `name/version`."""
    temperature: float
    max_new_tokens: int


class EvalManifest(Manifest):
    """An evaluation of one checkpoint on the held-out prompts (role `samples`; `greedy`: those at temperature 0), or on
    a benchmark's (role `prompts`)."""

    kind: Literal["eval"] = "eval"
    eval_id: str
    checkpoint: CheckpointRef
    samples_per_prompt: int = Field(ge=1)
    accuracy: float = Field(ge=0, le=1)
    """pass@1 averaged over samples, over all prompts."""
    tasks: dict[str, TaskScore]
    """By task family."""
    entropy: float
    """Mean token entropy of the sampling distribution, in nats."""
    tokens: int = Field(ge=0)
    """Completion tokens sampled; not counted as training compute."""
    failures: dict[Literal["timeout", "error"], int] | None = None
    """Answers without a verdict, which count as wrong: it took too long, or the verifier failed. None: it cannot."""
    benchmark: BenchmarkSpec | None = None
    """None: the run's held-out prompts, under the run's sampling and verifier."""

    @property
    def greedy(self) -> bool:
        """Whether it holds answers at temperature 0 beside the samples."""
        return any(entry.role == "greedy" for entry in self.files)


class SignalSpec(Record):
    """The inputs of a study of Q, V and S on a run. Its digest is the `signal_id`."""

    points: tuple[tuple[CheckpointRef, CheckpointRef], ...]
    """(π(t), π(t+Δ)) of every point."""
    prompts: int = Field(ge=1)
    """Training prompts drawn at each step t."""
    samples: int = Field(ge=1)
    """Answers a prompt and policy."""
    mistake_threshold: float
    kappa: float
    seed: int


class SignalManifest(Manifest):
    """Q(Δ), V(Δ) and S(Δ) over a grid of steps and distances (role `signal`)."""

    kind: Literal["signal"] = "signal"
    signal_id: str
    spec: SignalSpec
    tokens: int = Field(ge=0)
    """Completion tokens sampled; not counted as training compute."""


class Tombstone(Record):
    """`tombstones/…json`: the big files of checkpoints that `npo gc` removed. Created before the first of them goes, so
    a file that is missing was either removed on purpose, or is lost."""

    checkpoints: tuple[CheckpointRef, ...]
    """Whose files they are. Their manifests stay, so lineage and digests can be checked for ever."""
    files: tuple[str, ...]
    """Keys of the files, relative to the run's root."""
    reason: str
    """In words: the settings under which nothing kept them."""
    created_at: str
    """UTC, ISO 8601."""
    nonce: str
    """Random, one a removal."""


class Lease(Record):
    """`leases/…json`: a process has the run open to write. A hint for `npo gc` and for people, never a lock: what keeps
    two writers apart is that records are created once and the head moves by compare-and-swap."""

    writer: str
    """Random, one a process and run."""
    host: str
    pid: int
    acquired_at: str
    """UTC, ISO 8601."""
    renewed_at: str
    """UTC, ISO 8601."""
    ttl_seconds: int = Field(ge=1)
    """It has expired when it was not renewed for so long."""
