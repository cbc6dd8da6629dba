"""What a run's start and its stages want of data, context, verifier, packages and store, looked at beforehand."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npo_core.checks import Notes
from npo_core.interfaces import ConfigurationError, NearFutureError, Prompt
from schemas.config import Config
from schemas.data import GENERATED

if TYPE_CHECKING:  # it loads transformers
    from npo_core.artifacts import RunArtifacts
    from npo_core.model_check import FoundModel
    from npo_core.sources.load import Tokens


@dataclass(frozen=True)
class FoundData:
    """The prompts."""

    train: list[Prompt]
    held_out: list[Prompt]
    pictures: Mapping[str, bytes]
    """Files of the pictures that they show, by their SHA-256."""
    longest: int | None
    """Tokens of the longest one, where they were counted."""

    @property
    def pictured(self) -> bool:
        """Whether any prompt shows a picture."""
        return any(prompt.image_refs for prompt in (*self.train, *self.held_out))


def check_data(config: Config, model: FoundModel | None, notes: Notes) -> FoundData | None:
    """Loads the prompts, and counts them and what becomes of the rows. Nothing is downloaded.

    Raises:
        ConfigurationError: see `load`.
    """
    from npo_core.sources.load import load
    from npo_core.sources.told import told

    data = config.data
    if data.path is not None:
        notes.at("data.path", data.path)
    if data.source == "hf" and not Path(data.path or "").expanduser().is_dir():
        notes.unchecked(f"{data.path} is a name on the hub; the run downloads it, and then looks at its rows")
        return None
    loaded = load(config, None if data.source in GENERATED or model is None else _counter(config, model))
    if loaded.report is None:
        notes.ok(f"{len(loaded.train):,} prompts to train on, {len(loaded.held_out):,} held out")
    else:
        first, *others = (line.removeprefix("data: ") for line in told(loaded.report))
        notes.ok(first)
        for line in others:
            notes.warn(line)
    longest = None if loaded.report is None else loaded.report.longest
    return FoundData(loaded.train, loaded.held_out, loaded.pictures, longest)


def _counter(config: Config, model: FoundModel) -> Tokens | None:
    """Counts tokens; None: there is nothing to count them with, which other checks tell."""
    from npo_core.pictures import pictured_counter
    from npo_core.prompts import counter

    if model.tokenizer is None:
        return None
    if (processor := model.pictures) is not None:
        return pictured_counter(model.tokenizer, config.chat, lambda: processor)
    if config.data.columns.images is not None:
        return None
    count = counter(model.tokenizer, config.chat)
    return lambda prompt, pictures: count(prompt)


def check_pictures(config: Config, model: FoundModel | None, data: FoundData, notes: Notes) -> None:
    """Whether the pictures of the prompts can be shown to the model.

    Raises:
        ConfigurationError: an engine takes none, or the model sees none.
    """
    from npo_core.pictures import require_sight, require_supported

    require_supported(config)
    shown = {ref for prompt in (*data.train, *data.held_out) for ref in prompt.image_refs}
    if model is None:
        notes.unchecked(f"{len(shown):,} pictures: the model is not known")
        return
    require_sight(model.config, f"{len(shown):,} pictures")
    if model.pictures is None:
        notes.unchecked(f"{len(shown):,} pictures: there is no image processor to cut them with")
    else:
        notes.ok(f"{len(shown):,} pictures, each stored once, for a model that sees")


def check_context(config: Config, model: FoundModel | None, data: FoundData | None, notes: Notes) -> int | None:
    """Whether the longest prompt and the longest answer fit the model, and vLLM. Returns that prompt's tokens."""
    answer = config.rollout.max_new_tokens
    longest = None
    if model is None or model.tokenizer is None:
        notes.unchecked("the longest prompt in tokens: there is no tokenizer to count them with")
    elif data is None:
        notes.unchecked("the longest prompt in tokens: there are no prompts")
    else:
        longest = data.longest or _longest(config, model, data)
        if longest is None:
            notes.unchecked("the longest prompt in tokens: there is no image processor to count its pictures with")
    prompt = longest or 1
    limits = [("the model's positions", None if model is None else model.positions)]
    if config.vllm.samples:
        limits.append(("vllm.max_model_len", config.vllm.max_model_len))
    room = True
    for name, limit in limits:
        if limit is not None and prompt + answer > limit:
            room = False
            said = "a prompt" if longest is None else f"the longest prompt, {longest} tokens,"
            notes.fail(
                f"{said} and rollout.max_new_tokens {answer} exceed {name}, {limit}; lower rollout.max_new_tokens"
            )
    if room and longest is not None:
        known = ", ".join(f"{name} {limit:,}" for name, limit in limits if limit is not None)
        notes.ok(f"longest prompt {longest:,} and answer {answer:,} tokens fit {known or 'a model without a limit'}")
    return longest


def _longest(config: Config, model: FoundModel, data: FoundData) -> int | None:
    tokens = _counter(config, model)
    if tokens is None:
        return None
    try:
        return max(tokens(prompt, data.pictures) for prompt in (*data.train, *data.held_out))
    except ValueError as error:
        raise ConfigurationError(
            f"the model's chat template cannot be used ({error}); give a model that has one"
        ) from error


def check_verifier(config: Config, data: FoundData | None, notes: Notes) -> str:
    """Loads the verifier and asks it for a verdict, as a stage would. Returns its name."""
    from npo_core.prompts import ASKED
    from npo_core.verifiers.kinds import load_verifier, resolved

    section = resolved(config).model_copy(update={"workers": 1})
    prompt = data.train[0] if data else ASKED
    with closing(load_verifier(config.model_copy(update={"verifier": section}))) as verifier:
        verdict = verifier.verify(prompt, prompt.answer)
    if verdict.failure is None or data is None:
        notes.ok(f"{verifier.name} judges")
    else:
        notes.warn(f"{verifier.name} gives no verdict on the first prompt's own answer: {verdict.reason}")
    return verifier.name


def check_packages(config: Config, notes: Notes) -> None:
    """What the configuration needs beside the core, on this machine."""
    for need in _needs(config):
        notes.at(need.field, need.value)
        if importlib.util.find_spec(need.package) is None:
            notes.fail(
                f"{need.field} {need.value} needs {need.package}, which is not installed; `{need.remedy}`, or choose "
                "another value"
            )
        else:
            notes.ok(f"{need.package} is installed")
    if config.learner.engine == "deepspeed" and config.deepspeed.hostfile is not None:
        from npo_core.launch import hosts

        notes.at("deepspeed.hostfile", config.deepspeed.hostfile)
        try:
            notes.ok(f"hosts: {', '.join(hosts(config.deepspeed))}")
        except ConfigurationError as error:
            notes.fail(str(error))
    if config.vllm.samples:
        _check_vllm(config, notes)
    if not notes.noted("packages"):
        notes.at("learner.engine", config.learner.engine)
        notes.ok(f"Python {sys.version.split()[0]}; nothing beside the core is needed")


@dataclass(frozen=True)
class _Need:
    """A package that a value of a field needs."""

    field: str
    value: str
    package: str
    remedy: str


def _needs(config: Config) -> Iterator[_Need]:
    if config.learner.engine == "deepspeed":
        yield _Need("learner.engine", "deepspeed", "deepspeed", "make setup-engines")
    if config.sharding.ray_address is not None:
        remedy = "pip install 'near-future[ray]'"
        yield _Need("sharding.ray_address", config.sharding.ray_address, "prefect_ray", remedy)
    if config.model.attention == "flash_attention_2":
        yield _Need("model.attention", "flash_attention_2", "flash_attn", "pip install flash-attn")
    for tracker in config.run.trackers:
        yield _Need("run.trackers", tracker, tracker, "pip install 'near-future[trackers]'")


def _check_vllm(config: Config, notes: Notes) -> None:
    from npo_core.vllm_version import sampler_name

    settings = config.vllm
    if settings.url is not None:
        notes.at("vllm.url", settings.url)
        notes.unchecked("the server is asked when a stage samples")
        return
    notes.at("vllm.python", settings.python)
    try:
        name = sampler_name(settings)
    except ConfigurationError as error:
        notes.fail(str(error))
        return
    if name.endswith("unknown"):
        notes.fail(f"vllm.python {settings.python} has no vLLM; `make setup-vllm` makes an environment that does")
    else:
        notes.ok(f"{name} in {settings.python}")


def check_store(config: Config, verifier: str | None, whole: bool, notes: Notes) -> None:
    """Whether the store can be read, and holds no run of this name or one that this configuration continues.

    Args:
        verifier: name of the configuration's.
        whole: whether all sections are right, so that there is a recipe to compare.
    """
    from npo_core.artifacts import RunArtifacts
    from npo_core.begin import require_same_recipe
    from npo_core.store import open_store

    store = open_store(config.run.store)
    run = RunArtifacts(store, config.run.name)
    if store.root.startswith("file:"):
        folder = existing(Path(store.path))
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            why = "may not be written" if folder.is_dir() else "is a file"
            notes.fail(f"run.store {config.run.store}: {folder} {why}; choose another folder, or its permissions")
            return
    record = run.find_record()
    if record is None:
        # A bucket that is not there answers a listing, not a read of one key.
        store.list("")
        notes.ok(f"{run.uri} does not exist yet")
        if not store.root.startswith("file:"):
            notes.unchecked(f"whether {store.root} may be written: nothing is written here")
        return
    notes.at("run.name", config.run.name)
    if not whole:
        notes.unchecked(
            f"{run.uri} exists; whether this configuration continues it is seen when all sections are right"
        )
        return
    require_same_recipe(run, record, config)
    if verifier is not None and verifier != record.verifier:
        raise NearFutureError(
            f"run {run.uri} is verified by {record.verifier}, this configuration has {verifier}; restore that one, or "
            "give the run another run.name"
        )
    notes.ok(f"{run.uri} exists{_progress(run)}: the run goes on with it")


def _progress(run: RunArtifacts) -> str:
    from npo_core.tip import main_line_step

    return f", its main line at step {main_line_step(run)[0]}" if run.head() is not None else ""


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return path if path.exists() else existing(path.parent)
