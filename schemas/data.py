"""The prompts of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from schemas.section import Section

Source = Literal["testbed", "shapes", "jsonl", "parquet", "hf", "reasoning-gym"]
HELD_OUT_SHARE = 0.1
"""Of the rows, where a source that is not generated names no held-out set."""
GENERATED: tuple[Source, ...] = ("testbed", "shapes")
"""Sources whose prompts are ours, drawn from a seed."""

_ROWS: tuple[Source, ...] = ("jsonl", "parquet", "hf")
_ELSEWHERE: tuple[Source, ...] = (*_ROWS, "reasoning-gym")
BELONGS: dict[str, tuple[Source, ...]] = {
    "min_length": GENERATED,
    "max_length": GENERATED,
    "pool_seed": GENERATED,
    "path": _ROWS,
    "columns": _ROWS,
    "template": _ROWS,
    "held_out_path": ("jsonl", "parquet"),
    "split": ("hf",),
    "subset": ("hf",),
    "revision": ("hf",),
    "held_out_split": ("hf",),
    "tasks": ("reasoning-gym",),
    "bad_rows": _ELSEWHERE,
    "over_long": _ELSEWHERE,
    "max_prompt_tokens": _ELSEWHERE,
}
"""The sources that a field belongs to; the others refuse it."""


class ColumnsSection(Section):
    """What the columns of your rows are. A dot goes into a nested one: `reward_model.ground_truth`."""

    prompt: str = Field("prompt", min_length=1)
    """The question: a text, or a conversation `[{role, content}, …]` that ends with the user's message."""
    answer: str | None = Field("answer", min_length=1)
    """The reference that the verifier compares with: a text or a number. None: the rows have none, and a verifier of
    yours does without."""
    answer_after: str | None = Field(None, min_length=1)
    """The reference is what follows the last of these marks in the column: `####` of GSM8K, say."""
    answer_is: Literal["text", "letter", "index", "choice-text"] = "text"
    """With `choices` how the answer names one of them: by its letter, by its number from 0, or by its text. It becomes
    the letter, as verifier.kind `choice` wants it; a row without choices keeps its text."""
    choices: str | tuple[str, ...] | None = None
    """What there is to choose from: a column with a list (or a list written as text), or one column a choice. Below the
    question they are lettered lines, `A. …`; an empty last one, and in columns `nan`, counts as absent."""
    images: str | tuple[str, ...] | None = None
    """The row's pictures: a column, or several in order, with a picture or a list of them: a path, from the data file's
    folder or absolute; bytes; or `{bytes, path}`, as Hugging Face writes them. Null is none. A picture stands where the
    user's message has `<image>` (the next one) or `<image 2>` (the second), before its text where it has neither."""
    id: str | None = Field(None, min_length=1)
    """The row's own name, unique. None: a digest of the prompt."""
    task: str | None = Field(None, min_length=1)
    """Task family, by which scores are shown. None: all are `prompts`."""
    metadata: tuple[str, ...] = ()
    """Columns that a verifier of yours is given beside the answer."""

    @model_validator(mode="after")
    def _choices_are_named(self) -> ColumnsSection:
        if self.answer_is != "text" and self.choices is None:
            raise ValueError(f"answer_is {self.answer_is} needs choices: the columns that hold them")
        return self


class GymTask(Section):
    """A task of reasoning-gym."""

    name: str = Field(min_length=1)
    """Its name there: `chain_sum`, say."""
    size: int = Field(ge=1)
    """Questions to generate."""
    seed: int = Field(0, ge=0)
    """Of the questions."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """What the task takes beside these two: `min_terms: 2`, say."""


class DataSection(Section):
    """The prompts. They are read once, when the run begins, and frozen with it."""

    source: Source = "testbed"
    """Where the prompts come from: the embedded testbed, questions about drawn `shapes`, rows of yours in JSON Lines or
    Parquet files or in a data set of the Hugging Face hub, or questions that reasoning-gym generates."""
    path: str | None = Field(None, min_length=1)
    """A file, a pattern such as `data/*.jsonl`, or a directory with such files; of `hf` a name on the hub or a
    directory. Relative to the working directory."""
    split: str = Field("train", min_length=1)
    """Split of the data set to train on (hf)."""
    subset: str | None = Field(None, min_length=1)
    """The data set's configuration on the hub (hf)."""
    revision: str | None = Field(None, min_length=1)
    """Commit or tag of the data set on the hub (hf)."""
    columns: ColumnsSection = ColumnsSection()
    """What the columns are (jsonl, parquet, hf)."""
    template: str | None = Field(None, min_length=1)
    """The user's message as a Jinja template over the row's columns, `{{ question }}` say; `{{ prompt }}` and
    `{{ choices }}` are what `columns` names so. None: the prompt, and below it the choices (jsonl, parquet, hf)."""
    tasks: tuple[GymTask, ...] = ()
    """What to generate (reasoning-gym)."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What becomes of rows that cannot be used: no run begins, or one without them, which are counted and named."""
    over_long: Literal["refuse", "skip"] = "refuse"
    """The same of prompts of more than `max_prompt_tokens`."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Longest prompt, in tokens, chat template included. None: what the model has room for beside
    `rollout.max_new_tokens`."""
    prompts: int | None = Field(None, ge=1)
    """Size of the training pool, in prompts: 512 of the testbed and the shapes; by default all of other sources, else a
    sample by the prompts' hashes."""
    held_out: int | float | None = Field(None, gt=0)
    """The held-out set for evaluation, disjoint from the pool: a number of prompts, 192 of the testbed and the shapes,
    or below 1 a share, a tenth of other sources. It is chosen by the prompts' hashes: under a share no row changes
    sides when others are added. With `held_out_path` or `held_out_split` by default all that is there."""
    held_out_path: str | None = Field(None, min_length=1)
    """Files of the held-out set, as `path` names the others (jsonl, parquet)."""
    held_out_split: str | None = Field(None, min_length=1)
    """Split of the held-out set (hf)."""
    min_length: int = Field(4, ge=1, le=12)
    """Shortest task input, in symbols (testbed) or cells of the picture (shapes)."""
    max_length: int = Field(12, ge=1, le=12)
    """Longest task input, in symbols (testbed) or cells of the picture (shapes)."""
    pool_seed: int = Field(0, ge=0)
    """Seed of the pool and the held-out set (testbed, shapes). Not `run.seed`, so that paired seeds share their
    prompts."""

    @model_validator(mode="before")
    @classmethod
    def _sizes_of_the_source(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if values.get("source", "testbed") in GENERATED:
            sizes: dict[str, int | float] = {"prompts": 512, "held_out": 192}
        elif values.get("held_out_path") is None and values.get("held_out_split") is None:
            sizes = {"held_out": HELD_OUT_SHARE}
        else:
            sizes = {}
        return values | {name: size for name, size in sizes.items() if values.get(name) is None}

    @model_validator(mode="after")
    def _fields_agree(self) -> DataSection:
        faults = list(self._disagreements())
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _disagreements(self) -> Iterator[str]:
        for name, sources in BELONGS.items():
            if self.source not in sources and getattr(self, name) != type(self).model_fields[name].default:
                yield f"{name} belongs to source {' or '.join(sources)}, but source is {self.source}; remove {name}"
        if self.min_length > self.max_length:
            yield f"min_length {self.min_length} exceeds max_length {self.max_length}; lower min_length"
        if self.source in BELONGS["path"] and self.path is None:
            yield f"source {self.source} needs path: where the rows are"
        if self.source == "reasoning-gym" and not self.tasks:
            yield "source reasoning-gym needs tasks: [{name: chain_sum, size: 500}], say"
        if isinstance(self.held_out, float) and (self.held_out >= 1 or self.source in GENERATED):
            wanted = "a whole number of prompts" + ("" if self.source in GENERATED else ", or a share below 1")
            yield f"held_out {self.held_out} is not {wanted}"
        if self.over_long == "skip" and self.max_prompt_tokens is None:
            yield "over_long skip needs max_prompt_tokens: what is too long"
