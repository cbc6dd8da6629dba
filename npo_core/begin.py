"""Begins a run, or finds it: freezes the recipe, the prompts and the starting policy."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open

from npo_core import shapes, testbed
from npo_core.artifacts import RunArtifacts, main_line_checkpoint, open_run, prompts_digest
from npo_core.environment import environment
from npo_core.interfaces import ConfigurationError, NearFutureError, first_line
from npo_core.lora import has_adapter, merge
from npo_core.pictures import PROCESSOR_FILES, load_processor, pictured_counter, require_supported
from npo_core.prompts import to_arrow
from npo_core.room import require_room
from npo_core.run_config import keep_config
from npo_core.sources.load import Loaded, load
from npo_core.sources.told import told
from npo_core.store import open_store
from npo_core.verifiers.kinds import load_verifier
from npo_core.workspace import Workspace, new_leg, now
from schemas.config import Config
from schemas.digest import digest_bytes, digest_json
from schemas.records import CheckpointRef, RunRecord

logger = logging.getLogger("npo")

_AT_STEP = re.compile(r"(.+)@(\d+)")


def begin(config: Config) -> Workspace:
    """Opens the run that the configuration names, and creates it if there is none. Safe to repeat.

    Raises:
        ConfigurationError: the run was begun with another recipe (names the fields), or the model cannot be found.
    """
    store = open_store(config.run.store)
    if config.run.single_writer:
        store.declare_single_writer()
    run = RunArtifacts(store, config.run.name)
    record = run.find_record()
    if record is None or not run.is_frozen():
        # A run killed while it began has a record, but not all that the record speaks of.
        with tempfile.TemporaryDirectory(prefix="near-future-") as scratch:
            record = _freeze(config, run, Path(scratch))
    require_same_recipe(run, record, config)
    keep_config(run, record, config)
    return Workspace(config, run, record)


def warm_start(workspace: Workspace) -> CheckpointRef:
    """The `warm` leg's checkpoint: the starting policy, step 0, without an optimizer. The head begins there."""
    run = workspace.run
    leg = run.open_leg(new_leg(workspace.record, "warm", None, 0))
    manifest = run.checkpoint(leg.leg_id, 0)
    if manifest is None:
        with tempfile.TemporaryDirectory(dir=workspace.scratch) as directory:
            target = Path(directory)
            source = starting_model(workspace.config, target / "source")
            _copy_weights(source, target / "weights")
            if weights_digest(source) != workspace.record.model_digest:
                raise NearFutureError(
                    f"{_source(workspace.config)} no longer holds the weights that run {run.uri} began with; restore "
                    "them, or begin another run"
                )
            manifest, _ = run.commit_checkpoint(leg.leg_id, 0, target, environment(workspace.config, "rollout"))
    if run.head() is None:
        run.move_head(None, leg.leg_id)
    return manifest.ref


def starting_model(config: Config, scratch: Path) -> Path:
    """A local model directory with the starting weights.

    Raises:
        ConfigurationError: `model.path` or `model.start_from` names nothing that is there.
    """
    if config.model.start_from is not None:
        other, ref = starting_checkpoint(config.model.start_from)
        weights = other.checkout(ref, scratch / "other", weights_only=True).weights
        return merge(weights, scratch / "merged") if has_adapter(weights) else weights
    if config.model.path == "testbed":
        return testbed.model_dir()
    if config.model.path == "shapes":
        return shapes.model_dir()
    path = Path(config.model.path).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(config.model.path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigurationError(
            f"model.path {config.model.path!r} is none of testbed, shapes, a directory and a hub name that can be "
            f"downloaded ({type(error).__name__}); check the spelling or download it first"
        ) from error


def starting_checkpoint(source: str) -> tuple[RunArtifacts, CheckpointRef]:
    """The run and the checkpoint that `model.start_from` names.

    Raises:
        ConfigurationError: there is none.
    """
    uri, step = match.groups() if (match := _AT_STEP.fullmatch(source)) else (source, None)
    try:
        run = open_run(uri)
        run.record()  # says what runs there are if there is no such one
        return run, main_line_checkpoint(run, None if step is None else int(step))
    except NearFutureError as error:
        raise ConfigurationError(f"model.start_from {source}: {error}") from error


def weights_digest(model_dir: Path) -> str:
    """SHA-256 over the names and bytes of a model directory's weights and `config.json`."""
    files = [*sorted(model_dir.glob("*.safetensors")), model_dir / "config.json"]
    digests = []
    for file in files:
        with file.open("rb") as content:
            digests.append([file.name, hashlib.file_digest(content, "sha256").hexdigest()])
    return digest_json(digests)


def _freeze(config: Config, run: RunArtifacts, scratch: Path) -> RunRecord:
    """Writes the run's record, and then everything that the record speaks of."""
    fingerprint = environment(config, "rollout")
    model_dir = starting_model(config, scratch / "source")
    model, tokenizer = _usable_parts(model_dir)
    loaded = _prompts(config, model_dir, model, tokenizer)
    tokenizer_dir = scratch / "tokenizer"
    tokenizer.save_pretrained(tokenizer_dir)
    for name in PROCESSOR_FILES:
        if (model_dir / name).exists():
            shutil.copyfile(model_dir / name, tokenizer_dir / name)
    digests = {
        "model_digest": weights_digest(model_dir),
        "tokenizer_digest": digest_json(
            {f.name: digest_bytes(f.read_bytes()) for f in sorted(tokenizer_dir.iterdir())}
        ),
        "verifier": load_verifier(config).name,
    }
    prompts = to_arrow(loaded.train, loaded.held_out)
    digests["prompts_digest"] = prompts_digest(prompts)
    recipe = config.recipe()
    record = run.create_run(
        RunRecord(
            run_id=config.run.name,
            recipe=recipe,
            config=config.model_dump(mode="json"),
            recipe_digest=digest_json([_leg_recipe(recipe), digests]),
            data=loaded.report,
            created_at=now(),
            **digests,
        )
    )
    # Before prompts and model are written: those of a refused configuration would stand in the run's place.
    require_same_recipe(run, record, config)
    run.put_pictures(loaded.pictures)
    run.put_prompts(prompts)
    # These two and no more: a directory may hold notes on how its own weights were made.
    for name in ("config.json", "generation_config.json"):
        if (model_dir / name).exists():
            shutil.copyfile(model_dir / name, tokenizer_dir / name)
    run.put_model(tokenizer_dir, environment=fingerprint)
    return record


def _prompts(config: Config, model_dir: Path, model: Any, tokenizer: Any) -> Loaded:
    """The prompts, which the model has room for, and whose pictures it sees.

    Raises:
        ConfigurationError: see `load`, `pictured_counter`, `require_room`, `require_supported` and `load_processor`.
    """
    tokens = pictured_counter(tokenizer, config.chat, lambda: load_processor(model_dir))
    loaded = load(config, tokens)
    if loaded.pictures:
        require_supported(config)
    if loaded.report is None:
        try:
            tokens(loaded.train[0], loaded.pictures)
        except ValueError as error:
            raise ConfigurationError(
                f"{_source(config)}: its tokenizer and chat template cannot be used ({error}) for data.source "
                f"{config.data.source}; give a complete transformers model directory, with tokenizer and chat template"
            ) from error
    else:
        require_room(config, model, loaded.report)
        for line in told(loaded.report):
            logger.info(line)
    return loaded


def _usable_parts(model_dir: Path) -> tuple[Any, Any]:
    """(configuration, tokenizer) of a model directory, after a look at all that a run needs of it.

    Raises:
        ConfigurationError: weights, configuration or tokenizer are missing or damaged.
    """
    weights = list(model_dir.glob("*.safetensors"))
    if not weights:
        raise ConfigurationError(
            f"model.path {model_dir} holds no .safetensors file, and other formats can hold code; save the model with "
            "save_pretrained, which writes safetensors"
        )
    part = "weights"
    try:
        for file in weights:
            with safe_open(file, framework="numpy"):
                pass
        part = "config.json"
        model = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True)
        part = "tokenizer"
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:  # transformers raises what its parsers raise
        reason = first_line(error)
        raise ConfigurationError(
            f"model.path {model_dir}: its {part} cannot be used ({reason}); give a complete transformers model "
            "directory, with tokenizer and chat template"
        ) from error
    return model, tokenizer


def _leg_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """The part of the recipe that a leg depends on: not which legs there are to be."""
    algorithm = {name: value for name, value in recipe["algorithm"].items() if name != "method"}
    kept = {name: value for name, value in recipe.items() if name not in ("future", "autonpo")}
    return kept | {"algorithm": algorithm}


def _source(config: Config) -> str:
    """Where the starting weights come from, in the configuration's words."""
    origin = config.model.start_from
    return f"model.path {config.model.path}" if origin is None else f"model.start_from {origin}"


def _copy_weights(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in source.glob("*.safetensors"):
        shutil.copyfile(file, target / file.name)
    for name in ("config.json", "model.safetensors.index.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def require_same_recipe(run: RunArtifacts, record: RunRecord, config: Config) -> None:
    """Refuses to go on with a run under another recipe.

    Raises:
        ConfigurationError: names the fields that differ, with both values.
    """
    # A field that is newer than the run had its default's effect when the run began.
    default = Config(run=config.run).recipe()
    differences = list(_differences(_filled(record.recipe, default), config.recipe()))
    if differences:
        raise ConfigurationError(
            f"run {run.uri} was begun with another recipe: {'; '.join(differences)}. "
            "Restore these values, or give the new recipe another run.name"
        )


def _filled(recipe: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with the defaults of what it does not name."""
    filled = {**default, **recipe}
    for key, value in default.items():
        if isinstance(value, Mapping) and isinstance(filled[key], Mapping):
            filled[key] = _filled(filled[key], value)
    return filled


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`field was X, is Y` for every leaf that differs."""
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {old}, is {new}"
