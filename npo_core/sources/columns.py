"""The user's columns as prompts: which column is what, and why a row cannot be used."""

from __future__ import annotations

import ast
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from npo_core.interfaces import ConfigurationError, Prompt
from npo_core.sources.row_pictures import pictures_of_row, placed
from npo_core.sources.rows import EmptyRowError, Row, UnusableRowError, require_columns, value_of
from schemas.data import DataSection
from schemas.digest import canonical_json, digest_json, short

TASK = "prompts"
"""Task family of rows that name none."""
_ROLES = ("system", "user", "assistant")
_MADE = ("prompt", "choices")
"""What a template can name beside the row's columns."""


@dataclass(frozen=True)
class Mapped:
    """A row as a prompt."""

    where: str
    prompt: Prompt
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """Files of the pictures that it shows, by their SHA-256."""


class ColumnMap:
    """Maps rows by the section `data`.

    Raises:
        ConfigurationError: the template is none, or it would show the answer.
    """

    def __init__(self, data: DataSection) -> None:
        self.columns = data.columns
        self._environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        self._template = None
        self._named: set[str] = set()
        if data.template is not None:
            try:
                self._named = meta.find_undeclared_variables(self._environment.parse(data.template))
                self._template = self._environment.from_string(data.template)
            except TemplateError as error:
                raise ConfigurationError(f"data.template is no Jinja template ({error}); correct it") from error
            answer = self.columns.answer
            if answer is not None and answer.partition(".")[0] in self._named - {self.columns.prompt}:
                raise ConfigurationError(
                    f"data.template shows the answer, column {answer}; remove it from the template"
                )

    def needed(self) -> dict[str, str]:
        """Column by the field that names it."""
        columns = self.columns
        needed = {"columns.prompt": columns.prompt}
        for name in ("answer", "id", "task"):
            if (column := getattr(columns, name)) is not None:
                needed[f"columns.{name}"] = column
        for name in ("choices", "images", "metadata"):
            if isinstance(named := getattr(columns, name), str):
                needed[f"columns.{name}"] = named
            else:
                needed |= {f"columns.{name}.{i}": column for i, column in enumerate(named or ())}
        return needed | {f"template {name}": name for name in sorted(self._named - {*_MADE})}

    def wants(self, column: str) -> bool:
        """Whether a column, or one inside it, is needed."""
        return any(column in (need, need.partition(".")[0]) for need in self.needed().values())

    def require(self, names: Sequence[str], where: str) -> None:
        """See `require_columns`."""
        require_columns(names, self.needed(), where)

    def prompt(self, row: Row) -> Mapped:
        """The prompt that a row is.

        Raises:
            UnusableRowError: see there.
        """
        if row.fault is not None:
            raise UnusableRowError(row.fault)
        values, columns = row.values, self.columns
        choices = self._choices(values)
        messages = self._messages(values, choices)
        image_refs: tuple[str, ...] = ()
        files: list[tuple[str, bytes]] = []
        if columns.images is not None:
            files = pictures_of_row(row, _several(columns.images))
            messages, image_refs = placed(messages, [ref for ref, _ in files])
        answer = "" if columns.answer is None else self._answer(values, columns.answer, choices)
        given = {name: _get(values, name) for name in columns.metadata}
        try:
            metadata = canonical_json(given).decode() if given else None
        except (TypeError, ValueError) as error:
            raise UnusableRowError(f"columns.metadata cannot be written as JSON ({error})") from error
        own = None if columns.id is None else _get(values, columns.id)
        task = None if columns.task is None else _get(values, columns.task)
        return Mapped(
            row.where,
            Prompt(
                prompt_id=_digest(messages, image_refs) if own is None else _text(own, columns.id or ""),
                task=TASK if task is None else _text(task, columns.task or ""),
                messages=messages,
                answer=answer,
                image_refs=image_refs,
                metadata=metadata,
            ),
            dict(files),
        )

    def _messages(self, values: Mapping[str, Any], choices: Sequence[str]) -> tuple[Mapping[str, Any], ...]:
        prompt = _get(values, self.columns.prompt)
        if isinstance(prompt, list):
            if self._template is not None or choices:
                raise UnusableRowError("its prompt is a conversation, which takes no data.template and no choices")
            return _conversation(prompt)
        prompt = "" if prompt is None else _text(prompt, self.columns.prompt)
        if not prompt.strip():
            raise EmptyRowError(f"its prompt, column {self.columns.prompt}, is empty")
        shown = "\n".join(
            f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False)
        )
        if self._template is None:
            text = f"{prompt}\n{shown}" if shown else prompt
        else:
            try:
                text = self._template.render({**values, "prompt": prompt, "choices": shown})
            except Exception as error:  # whatever an expression over the user's values may raise
                raise UnusableRowError(f"data.template cannot be filled in ({error})") from error
            if not text.strip():
                raise EmptyRowError("data.template makes an empty message of it")
        return ({"role": "user", "content": text},)

    def _choices(self, values: Mapping[str, Any]) -> list[str]:
        """What there is to choose from, in order."""
        named = self.columns.choices
        if named is None:
            return []
        if isinstance(named, str):
            given = _get(values, named)
            if isinstance(given, str):
                given = _listed(given, named)
        else:
            # What tables of such columns have where there is no choice.
            given = [None if (value := values.get(name)) == "nan" else value for name in named]
        if given is None:
            return []
        if not isinstance(given, list):
            raise UnusableRowError(f"its choices, column {named}, are {type(given).__name__}, not a list")
        texts = ["" if choice is None else _text(choice, str(named)) for choice in given]
        while texts and not texts[-1].strip():
            texts.pop()
        if any(not text.strip() for text in texts):
            raise UnusableRowError(f"a choice before the last, of {named}, is empty")
        if len(texts) > len(string.ascii_uppercase):
            raise UnusableRowError(f"it has {len(texts)} choices, more than there are letters")
        return texts

    def _answer(self, values: Mapping[str, Any], column: str, choices: Sequence[str]) -> str:
        given = _get(values, column)
        text = "" if given is None else _text(given, column)
        mark = self.columns.answer_after
        if mark is not None:
            _, found, text = text.rpartition(mark)
            if not found:
                raise UnusableRowError(f"its answer, column {column}, has no {mark!r} (columns.answer_after)")
        text = text.strip()
        if not text:
            raise EmptyRowError(f"its answer, column {column}, is empty")
        return _letter(text, self.columns.answer_is, choices) if choices else text


def _several(named: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The columns of a field that names one, several or none."""
    return (named,) if isinstance(named, str) else named or ()


def _digest(messages: Sequence[Mapping[str, Any]], image_refs: Sequence[str]) -> str:
    """The name of a prompt whose row has none."""
    asked = list(messages)
    # Without pictures as before there were any.
    return short(digest_json([asked, list(image_refs)] if image_refs else asked))


def _letter(answer: str, names: str, choices: Sequence[str]) -> str:
    """The letter of the choice that the answer names."""
    if names == "text":
        return answer
    letters = string.ascii_uppercase[: len(choices)]
    if names == "letter":
        if len(answer) == 1 and answer.upper() in letters:
            return answer.upper()
        raise UnusableRowError(f"its answer {answer!r} is no letter of its {len(choices)} choices")
    if names == "index":
        if answer.isdecimal() and int(answer) < len(choices):
            return letters[int(answer)]
        raise UnusableRowError(f"its answer {answer!r} is no number of its {len(choices)} choices, from 0")
    places = [i for i, choice in enumerate(choices) if choice.strip() == answer]
    if len(places) != 1:
        raise UnusableRowError(f"its answer {answer!r} is {'none' if not places else 'several'} of its choices")
    return letters[places[0]]


def _listed(text: str, column: str) -> Any:
    """A list that is written as text, as `['a', 'b']`; nothing for an empty text."""
    if not text.strip():
        return None
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise UnusableRowError(f"its choices, column {column}, are a text that is no list") from error


def _conversation(given: Sequence[Any]) -> tuple[Mapping[str, str], ...]:
    if not given:
        raise EmptyRowError("its conversation is empty")
    for message in given:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise UnusableRowError("a message of its conversation has no role and content")
        if message["role"] not in _ROLES or not isinstance(message["content"], str):
            raise UnusableRowError(
                f"a message of its conversation has role {message['role']!r} and content of type "
                f"{type(message['content']).__name__}; roles are {', '.join(_ROLES)}, contents are texts"
            )
    if given[-1]["role"] != "user":
        raise UnusableRowError(f"its conversation ends with a message of role {given[-1]['role']}, not user")
    if not given[-1]["content"].strip():
        raise EmptyRowError("the last message of its conversation is empty")
    return tuple({"role": message["role"], "content": message["content"]} for message in given)


def _get(values: Mapping[str, Any], column: str) -> Any:
    try:
        return value_of(values, column)
    except KeyError as error:
        raise UnusableRowError(f"it has no column {column}") from error


def _text(value: Any, column: str) -> str:
    """A text or number as text.

    Raises:
        UnusableRowError: it is of another type.
    """
    if isinstance(value, list | dict | bytes | set):
        raise UnusableRowError(f"column {column} holds {type(value).__name__}, not a text or a number")
    text = str(value)
    if "\x00" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise UnusableRowError(f"column {column} holds characters that are no text")
    return text
