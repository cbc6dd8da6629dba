"""Reads a configuration (YAML and overrides) or a benchmark; says in one message what is wrong and what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from npo_core.interfaces import ConfigurationError
from schemas.benchmark import BenchmarkFile
from schemas.config import Config, RunSection

FileT = TypeVar("FileT", bound=BaseModel)


def load_config(path: str | Path, overrides: Sequence[str]) -> Config:
    """The configuration in a YAML file, with overrides such as `learner.learning_rate=3e-4` applied.

    Raises:
        ConfigurationError: the file cannot be read, or a key, type or value is wrong; names each, one a line.
    """
    origin = f"configuration {path}"
    return _validated(Config, read_yaml(path, origin, "sections (run:, data:, …)"), overrides, origin)


@dataclass(frozen=True)
class Draft:
    """What can be read of a configuration file, right or wrong."""

    config: Config
    """With defaults in place of the wrong sections; not valid as a whole if there are faults."""
    faults: tuple[tuple[str | None, str], ...]
    """All that is wrong: its field, None where sections disagree, and a message with the value and the remedy."""
    wrong: frozenset[str]
    """The sections that are wrong by themselves."""


def draft_config(path: str | Path, overrides: Sequence[str]) -> Draft:
    """The same as `load_config`, going on where something is wrong: the other sections can be checked yet.

    Raises:
        ConfigurationError: the file cannot be read, or an override sets nothing.
    """
    values = read_yaml(path, f"configuration {path}", "sections (run:, data:, …)")
    for override in overrides:
        _apply(values, override)
    try:
        return Draft(Config.model_validate(values), (), frozenset())
    except ValidationError as error:
        wrong = {str(fault["loc"][0]) for fault in error.errors() if fault["loc"]} & set(Config.model_fields)
        faults = tuple(
            (".".join(map(str, fault["loc"])) or None, said)
            for fault, message in zip(error.errors(), _messages(error, Config), strict=True)
            for said in message.split("\n  ")
        )
    sections: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        if name in values and name not in wrong:
            section: Any = field.annotation
            sections[name] = TypeAdapter(section).validate_python(values[name])
    sections.setdefault("run", RunSection(name="unnamed"))
    return Draft(Config.model_construct(**sections), faults, frozenset(wrong))


def load_benchmark(path: str | Path) -> BenchmarkFile:
    """The benchmark in a YAML file.

    Raises:
        ConfigurationError: see `load_config`.
    """
    origin = f"benchmark {path}"
    return _validated(BenchmarkFile, read_yaml(path, origin, "keys (name:, data:, …)"), (), origin)


def read_yaml(path: str | Path, origin: str, holds: str) -> dict[str, Any]:
    """What a YAML file holds.

    Args:
        path: of the file.
        origin: the file in an error's words.
        holds: what is missing from a file that is no mapping.

    Raises:
        ConfigurationError: the file cannot be read, or is no mapping in YAML.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{origin} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{origin} is no text in UTF-8; give a YAML file") from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{origin} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{origin} holds no {holds}")
    return values


def overridden(config: Config, overrides: Sequence[str], section: str) -> Config:
    """A configuration with other values in one section.

    Raises:
        ConfigurationError: an override is of another section, or wrong.
    """
    for override in overrides:
        if not override.startswith(f"{section}."):
            raise ConfigurationError(f"override {override!r} changes nothing here; only {section}.… can be set")
    return _validated(Config, config.model_dump(mode="json"), overrides, "the configuration")


def _validated(kind: type[FileT], values: dict[str, Any], overrides: Sequence[str], origin: str) -> FileT:
    for override in overrides:
        _apply(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        faults = "\n  ".join(_messages(error, kind))
        raise ConfigurationError(f"{origin} is wrong:\n  {faults}") from error


def _apply(values: dict[str, Any], override: str) -> None:
    """Sets a dotted key; a number in it indexes a list."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigurationError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"override {override!r}: the value is not YAML") from error
    *parents, last = key.split(".")
    node: Any = values
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"override {override!r}: there is no {key} to set") from error


def _messages(error: ValidationError, kind: type[BaseModel]) -> Iterator[str]:
    for fault in error.errors():
        where = ".".join(map(str, fault["loc"]))
        match fault["type"]:
            case "extra_forbidden":
                yield f"{where}: unknown key{_nearest(fault['loc'], kind)}"
            case "missing":
                yield f"{where}: is required"
            case "value_error":
                yield f"{where + ': ' if where else ''}{fault['ctx']['error']}"
            case _:
                given = fault["input"]
                shown = repr(given) if not isinstance(given, dict) else "a section"
                yield f"{where} = {shown}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _nearest(location: tuple[int | str, ...], kind: type[BaseModel]) -> str:
    """`; did you mean …?` with the closest known keys of the section that `location` is in."""
    model = kind
    for part in location[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            model = _section(model.model_fields[part].annotation, kind)
    close = difflib.get_close_matches(str(location[-1]), model.model_fields, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(model.model_fields)}"


def _section(annotation: Any, otherwise: type[BaseModel]) -> type[BaseModel]:
    """The model that a field holds, or holds a list of."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return otherwise
