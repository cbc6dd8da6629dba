"""The prompts that a configuration names, and a report of what became of the rows that they were made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from npo_core import shapes, testbed
from npo_core.interfaces import ConfigurationError, Prompt
from npo_core.sources import gym
from npo_core.sources.columns import ColumnMap, Mapped
from npo_core.sources.rows import EmptyRowError, UnusableRowError, columns_of, read_rows
from npo_core.sources.split import apart, question_of, split
from schemas.config import Config
from schemas.data import GENERATED, DataSection
from schemas.records import DataReport, RowFault

FAULTS_SHOWN = 5
"""Rows of a fault that are named."""

Tokens = Callable[[Prompt, Mapping[str, bytes]], int]
"""Tokens of a prompt under the model's chat template, with its pictures, whose files are given by their SHA-256. Raises
ValueError where the template refuses the prompt."""
Mapper = Callable[[], Mapped]
"""A row as a prompt; raises `UnusableRowError`."""


@dataclass(frozen=True)
class Loaded:
    """Prompts."""

    train: list[Prompt]
    held_out: list[Prompt]
    report: DataReport | None
    """None: they are generated."""
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """Files of the pictures that they show, by their SHA-256."""


def load(config: Config, tokens: Tokens | None) -> Loaded:
    """The training pool and the held-out set that the configuration names.

    Args:
        tokens: None: lengths are not looked at.

    Raises:
        ConfigurationError: there are no such rows, not enough of them, or some that cannot be used while
            `data.bad_rows` or `data.over_long` is `refuse`.
    """
    data = config.data
    if data.source in GENERATED:
        return _generated(data)
    reader = _Reader(data, tokens)
    train = reader.usable(_source(data))
    if data.held_out_path is None and data.held_out_split is None:
        assert data.held_out is not None
        held_out, train = split(train, data.held_out)
    else:
        held_out, beyond = apart(reader.usable(_source(data, held_out=True)), data.held_out)
        # Those beyond data.held_out are not trained on either.
        asked = {question_of(prompt) for prompt in (*held_out, *beyond)}
        reader.unused += len(beyond)
        kept = [prompt for prompt in train if question_of(prompt) not in asked]
        reader.shared, train = len(train) - len(kept), kept
    if data.prompts is not None:
        train, rest = apart(train, data.prompts)
        reader.unused += len(rest)
    report = reader.report(len(train), len(held_out))
    _require_unique((*train, *held_out))
    _require_enough(config, report)
    return Loaded(train, held_out, report, reader.shown((*train, *held_out)))


def load_all(config: Config, tokens: Tokens | None) -> Loaded:
    """Every prompt of a source, as `train`: a benchmark's, which holds nothing out. Generated ones in both sets.

    Raises:
        ConfigurationError: see `load`.
    """
    data = config.data
    if data.source in GENERATED:
        return _generated(data)
    reader = _Reader(data, tokens)
    prompts = reader.usable(_source(data))
    if data.prompts is not None:
        prompts, rest = apart(prompts, data.prompts)
        reader.unused += len(rest)
    report = reader.report(len(prompts), 0)
    _require_unique(prompts)
    if not prompts:
        raise ConfigurationError(f"{report.origin} has no row that can be used{_first(report)}")
    return Loaded(prompts, [], report, reader.shown(prompts))


def _generated(data: DataSection) -> Loaded:
    assert isinstance(data.prompts, int)
    assert isinstance(data.held_out, int)
    drawn = data.prompts, data.held_out, data.min_length, data.max_length
    if data.source == "shapes":
        pictures = shapes.draw_pictures(*drawn, seed=data.pool_seed)
        return Loaded(*shapes.make_prompts(*drawn, seed=data.pool_seed), None, pictures)
    return Loaded(*testbed.make_prompts(*drawn, seed=data.pool_seed), None)


@dataclass
class _Reader:
    """Counts what becomes of rows."""

    data: DataSection
    tokens: Tokens | None
    rows: int = 0
    bad: int = 0
    empty: int = 0
    duplicates: int = 0
    over_long: int = 0
    shared: int = 0
    unused: int = 0
    longest: int = 0
    faults: list[RowFault] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)
    """Files of the pictures of all usable prompts, by their SHA-256."""

    def usable(self, rows: Iterable[tuple[str, Mapper]]) -> list[Prompt]:
        """The prompts of one set, each once."""
        found: dict[str, tuple[Mapped, str]] = {}
        kept: list[Prompt] = []
        for where, mapper in rows:
            self.rows += 1
            try:
                mapped = mapper()
                question = question_of(mapped.prompt)
                if question in found:
                    first, answer = found[question]
                    if answer != mapped.prompt.answer:
                        raise UnusableRowError(f"it asks what {first.where} asks, but has another answer")
                    self.duplicates += 1
                    continue
                if not self._fits(where, mapped):
                    continue
            except EmptyRowError as error:
                self.empty += 1
                self._note(where, str(error))
                continue
            except UnusableRowError as error:
                self.bad += 1
                self._note(where, str(error))
                continue
            found[question] = mapped, mapped.prompt.answer
            self.pictures |= mapped.pictures
            kept.append(mapped.prompt)
        return kept

    def shown(self, prompts: Iterable[Prompt]) -> dict[str, bytes]:
        """The pictures that these prompts show."""
        return {ref: self.pictures[ref] for prompt in prompts for ref in prompt.image_refs}

    def _fits(self, where: str, mapped: Mapped) -> bool:
        if self.tokens is None:
            return True
        try:
            count = self.tokens(mapped.prompt, mapped.pictures)
        except ValueError as error:
            raise UnusableRowError(f"the model's chat template cannot render it ({error})") from error
        limit = self.data.max_prompt_tokens
        if limit is not None and count > limit:
            self.over_long += 1
            self._note(where, f"its prompt of {count} tokens is longer than data.max_prompt_tokens {limit}")
            return False
        self.longest = max(self.longest, count)
        return True

    def _note(self, where: str, reason: str) -> None:
        if len(self.faults) < FAULTS_SHOWN:
            self.faults.append(RowFault(where=where, reason=" ".join(reason.split())[:300]))

    def report(self, train: int, held_out: int) -> DataReport:
        """The report.

        Raises:
            ConfigurationError: there are rows that are to be refused.
        """
        data = self.data
        place = ", ".join(f"{task.size} × {task.name}" for task in data.tasks) or data.path
        report = DataReport(
            origin=f"{data.source} {place}",
            rows=self.rows,
            bad=self.bad,
            empty=self.empty,
            duplicates=self.duplicates,
            shared=self.shared,
            over_long=self.over_long,
            unused=self.unused,
            train=train,
            held_out=held_out,
            longest=None if self.tokens is None else self.longest,
            faults=tuple(self.faults),
        )
        unusable = self.bad + self.empty
        if unusable and data.bad_rows == "refuse":
            raise ConfigurationError(
                f"{unusable} of the {self.rows} rows of {report.origin} cannot be used{_first(report)}\n"
                "  Mend them, or set data.bad_rows to skip to leave them out"
            )
        if self.over_long and data.over_long == "refuse":
            raise ConfigurationError(
                f"{self.over_long} of the {self.rows} prompts of {report.origin} are too long{_first(report)}\n"
                "  Raise data.max_prompt_tokens, or set data.over_long to skip to leave them out"
            )
        return report


def _first(report: DataReport) -> str:
    """The first faults, a line each."""
    return "".join(f"\n  {fault.where}: {fault.reason}" for fault in report.faults)


def _source(data: DataSection, held_out: bool = False) -> Iterator[tuple[str, Mapper]]:
    """Where each row is, and what makes a prompt of it."""
    if data.source == "reasoning-gym":
        for task in data.tasks:
            for where, entry in gym.generate(task):
                yield where, partial(gym.question, task, where, entry)
        return
    columns = ColumnMap(data)
    there = None if held_out else columns_of(data)
    origin = f"data.held_out_path {data.held_out_path}" if held_out and data.held_out_path else f"data.path {data.path}"
    if there is not None:
        columns.require(there, origin)
    known: dict[str, None] = {}
    complete = False
    for row in read_rows(data, columns.wants, held_out):
        if not complete:
            # A column that the first rows lack may be in later ones; one that none has is a wrong name.
            known |= dict.fromkeys(row.values)
            complete = all(name in known or name.partition(".")[0] in known for name in columns.needed().values())
        yield row.where, partial(columns.prompt, row)
    if known and not complete:
        columns.require(list(known), origin)


def _require_unique(prompts: Sequence[Prompt]) -> None:
    counts = Counter(prompt.prompt_id for prompt in prompts)
    twice = [prompt_id for prompt_id, count in counts.items() if count > 1]
    if twice:
        raise ConfigurationError(
            f"{len(twice)} ids name more than one prompt, the first {twice[0]!r}; make data.columns.id unique over all "
            "sets, or leave it out"
        )


def _require_enough(config: Config, report: DataReport) -> None:
    """Refuses sets that no run can be made of."""
    data = config.data
    if not report.train + report.held_out:
        raise ConfigurationError(f"{report.origin} has no row that can be used{_first(report)}")
    if not report.held_out:
        raise ConfigurationError(
            f"data.held_out {data.held_out} of {report.train} prompts holds none out; give a number of prompts"
        )
    if isinstance(data.held_out, int) and report.held_out < data.held_out:
        raise ConfigurationError(
            f"data.held_out {data.held_out} exceeds the {report.held_out} prompts that there are; lower it"
        )
    if data.prompts is not None and report.train < data.prompts:
        raise ConfigurationError(
            f"data.prompts {data.prompts} exceeds the {report.train} prompts that {report.origin} leaves to train on; "
            "lower data.prompts or data.held_out"
        )
    if report.train < config.rollout.prompts_per_step:
        raise ConfigurationError(
            f"rollout.prompts_per_step {config.rollout.prompts_per_step} exceeds the {report.train} prompts that "
            f"{report.origin} leaves to train on; lower rollout.prompts_per_step"
        )
