"""A configuration says what is wrong with it: the field, its value, and what is allowed instead."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import annotated_types
import pytest
import yaml
from pydantic import BaseModel

from npo_core.config_file import load_config
from npo_core.interfaces import ConfigurationError
from schemas.config import NOT_RECIPE, Config
from schemas.digest import digest_json
from schemas.future import Intervention
from schemas.sharding import ShardingSection
from schemas.vllm import VllmSection
from tests.command import ROOT

CONFIGS = sorted((ROOT / "deploy" / "configs").glob("*.yaml"))
BASE: dict[str, Any] = {
    "run": {"name": "demo", "total_steps": 40},
    "algorithm": {"method": "npo"},
    "future": {"interventions": [{"start": 0, "lookahead": 10}, {"start": 20, "lookahead": 10, "window": 20}]},
}
NO_RECIPE = (
    {
        f"run.{name}"
        for name in ("name", "store", "total_steps", "segment_steps", "trackers", "tracker_dir", "single_writer")
    }
    | {"run.public_url"}
    | {f"{section}.{field}" for section, fields in NOT_RECIPE.items() for field in fields}
    | {"evaluation.every", "evaluation.greedy", "evaluation.samples"}
    | {f"deepspeed.{field}" for field in Config.model_fields["deepspeed"].default.__class__.model_fields}
    | {"retention.keep_last", "retention.keep_every", "retention.grace_hours"}
    | {f"vllm.{name}" for name in VllmSection.model_fields}
    | {f"sharding.{name}" for name in ShardingSection.model_fields}
)
"""What does not change the numbers that training computes, but for rounding."""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load(values: Any = BASE, *overrides: str) -> Config:
        path = tmp_path / "config.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return load_config(path, overrides)

    return load


def refusal(load: Any, *overrides: str, values: Any = BASE) -> str:
    """What a user is told; it must be readable."""
    with pytest.raises(ConfigurationError) as raised:
        load(values, *overrides)
    message = str(raised.value)
    for noise in ("Value error", "pydantic", "http", "Traceback", "type="):
        assert noise not in message
    return message


def sections(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section with the dotted path to it, `Intervention` among them."""
    yield prefix, model
    for name, field in model.model_fields.items():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                index = "0." if get_origin(field.annotation) is tuple else ""
                yield from sections(part, f"{prefix}{name}.{index}")


def leaves(value: BaseModel | dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value:
        if isinstance(inner, BaseModel):
            yield from leaves(inner, f"{prefix}{name}.")
        elif isinstance(inner, tuple) and inner and isinstance(inner[0], BaseModel):
            for i, element in enumerate(inner):
                yield from leaves(element, f"{prefix}{name}.{i}.")
        else:
            yield f"{prefix}{name}", inner


def numbers(annotation: Any, bounds: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The bounds of each number in an annotation."""
    if annotation in (int, float):
        yield bounds
    elif get_origin(annotation) is Annotated:
        inner, *own = get_args(annotation)
        yield from numbers(inner, tuple(part for piece in own for part in getattr(piece, "metadata", [piece])))
    elif get_origin(annotation) in (tuple, Union, UnionType):
        for part in get_args(annotation):
            if part is not NoneType:
                yield from numbers(part, bounds)


# ---- the fields


def test_every_field_says_what_it_is() -> None:
    for prefix, model in sections():
        for name, field in model.model_fields.items():
            assert field.description, f"{prefix}{name} has no docstring"


def test_every_number_is_bounded_from_below() -> None:
    seen = 0
    for prefix, model in sections():
        for name, field in model.model_fields.items():
            for bounds in numbers(field.annotation, tuple(field.metadata)):
                seen += 1
                assert any(isinstance(b, annotated_types.Ge | annotated_types.Gt) for b in bounds), f"{prefix}{name}"
    assert seen > 30


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert load_config(path, []).run.name


def test_there_are_the_shipped_configurations() -> None:
    assert {"testbed-grpo", "testbed-npo", "testbed-late"} <= {path.stem for path in CONFIGS}


# ---- what is refused


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learner.learning_rat=1e-4", "learner.learning_rat: unknown key; did you mean learning_rate?"),
        ("lerner.learning_rate=1e-4", "lerner: unknown key; did you mean learner?"),
        ("run.total_step=1", "run.total_step: unknown key; did you mean total_steps?"),
        ("future.interventions.1.strat=3", "future.interventions.1.strat: unknown key; did you mean start?"),
        ("future.intervention=[]", "future.intervention: unknown key; did you mean interventions?"),
        ("evaluation.zzz=1", "evaluation.zzz: unknown key; known keys: every, samples"),
        ("future.interventions.0.zzz=1", "future.interventions.0.zzz: unknown key; known keys: start, lookahead, win"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(load: Any, override: str, said: str) -> None:
    assert said in refusal(load, override)


def test_every_section_refuses_an_unknown_key_and_suggests_its_own(load: Any) -> None:
    data = {"source": "reasoning-gym", "tasks": [{"name": "chain_sum", "size": 64}]}
    for prefix, model in sections():
        name = next(iter(model.model_fields))
        said = refusal(load, f"{prefix}{name}x=1", values=copy.deepcopy({**BASE, "data": data}))
        assert f"{prefix}{name}x: unknown key; did you mean {name}?" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.name=Bad/Name", r"run\.name = 'Bad/Name': .*pattern"),
        ("run.name=", r"run\.name = None: .*string"),
        ("run.total_steps=many", r"run\.total_steps = 'many': .*integer"),
        ("run.total_steps=1.5", r"run\.total_steps = 1\.5: .*integer"),
        ("run.total_steps=0", r"run\.total_steps = 0: .*greater than or equal to 1"),
        ("run.trackers=[wandb, tensorbord]", r"run\.trackers\.1 = 'tensorbord': .*'tensorboard' or 'wandb'"),
        ("rollout.temperature=0", r"rollout\.temperature = 0: .*greater than 0"),
        ("rollout.temperature=.nan", r"rollout\.temperature = nan: .*finite"),
        ("learner.learning_rate=2", r"learner\.learning_rate = 2: .*less than or equal to 1"),
        ("learner.betas=[0.9, 1.0]", r"learner\.betas\.1 = 1\.0: .*less than 1"),
        ("learner.device=gpu", r"learner\.device = 'gpu': .*cpu"),
        ("learner.gradient_checkpointing=perhaps", r"learner\.gradient_checkpointing = 'perhaps': .*boolean"),
        ("algorithm.method=ppo", r"algorithm\.method = 'ppo': .*'grpo', 'npo' or 'autonpo'"),
        ("algorithm.gate=1.2", r"algorithm\.gate = 1\.2: .*less than or equal to 1"),
        ("data.max_length=13", r"data\.max_length = 13: .*less than or equal to 12"),
        (
            "future.interventions.0.lookahead=0",
            r"future\.interventions\.0\.lookahead = 0: .*greater than or equal to 1",
        ),
        ("learner=3", r"learner = 3: "),
    ],
)
def test_a_wrong_value_names_the_field_the_value_and_what_is_allowed(load: Any, override: str, said: str) -> None:
    assert re.search(said, refusal(load, override))


def test_every_fault_is_told_at_once(load: Any) -> None:
    message = refusal(load, "run.seed=-1", "rollout.k=3", "algorithm.slot=first")
    assert all(field in message for field in ("run.seed", "rollout.k", "algorithm.slot"))


def test_a_required_key_is_named(load: Any) -> None:
    assert "run: is required" in refusal(load, values={"learner": {}})
    assert "run.name: is required" in refusal(load, values={"run": {}})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["evaluation.every=15"], "evaluation.every 15 is not a multiple of run.segment_steps 10"),
        (["data.prompts=8"], "rollout.prompts_per_step 32 exceeds data.prompts 8"),
        (["data.min_length=9", "data.max_length=5"], "data: min_length 9 exceeds max_length 5"),
        (["data.source=jsonl"], "data: source jsonl needs path: where the rows are"),
        (["data.path=rows.jsonl"], "path belongs to source jsonl or parquet or hf, but source is testbed; remove path"),
        (["data.source=jsonl", "data.path=x", "data.split=test"], "split belongs to source hf, but source is jsonl"),
        (
            ["data.source=jsonl", "data.path=x", "data.max_length=9"],
            "max_length belongs to source testbed or shapes, but source",
        ),
        (["data.source=reasoning-gym"], "data: source reasoning-gym needs tasks: [{name: chain_sum, size: 500}], say"),
        (["data.held_out=0.5"], "data: held_out 0.5 is not a whole number of prompts"),
        (
            ["data.source=hf", "data.path=x", "data.held_out=1.5"],
            "is not a whole number of prompts, or a share below 1",
        ),
        (["data.source=hf", "data.path=x", "data.over_long=skip"], "over_long skip needs max_prompt_tokens"),
        (["data.columns.answer_is=letter"], "answer_is letter needs choices: the columns that hold them"),
        (["chat.stop=[' end']"], "chat.stop: ' end' is empty or begins with a space"),
        (["future.interventions=[]"], "algorithm.method npo needs at least one entry in future.interventions"),
        (["algorithm.method=grpo"], "set algorithm.method to npo or remove the interventions"),
        (["future.interventions.0.window=21"], "starts inside the window [0, 21) of the one before it"),
        (["run.total_steps=39"], "the window [20, 40) ends after run.total_steps 39; raise run.total_steps"),
        (
            ["model.dtype=float64", "vllm.samples=[guide]"],
            "model.dtype float64 is none of vLLM's, and vllm.samples holds guide; set vllm.dtype to float32",
        ),
    ],
)
def test_sections_that_disagree_are_told_with_both_values(load: Any, overrides: list[str], said: str) -> None:
    assert said in refusal(load, *overrides)


def test_float64_is_sampled_by_vllm_in_another_type(load: Any) -> None:
    assert load(BASE, "model.dtype=float64", "vllm.samples=[guide]", "vllm.dtype=float32").vllm.samples == ("guide",)


def test_all_disagreements_are_told_at_once(load: Any) -> None:
    message = refusal(load, "evaluation.every=15", "data.prompts=8", "run.total_steps=39")
    for said in ("evaluation.every 15", "rollout.prompts_per_step 32", "the window [20, 40)"):
        assert f"\n  {said}" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: [", "is not YAML"),
        ("- run\n", "holds no sections"),
        ("just words", "holds no sections"),
        ("", "run: is required"),
    ],
)
def test_a_file_that_is_no_configuration_is_told_so(load: Any, text: str, said: str) -> None:
    assert said in refusal(load, values=text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, said in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory"), (binary, "UTF-8")):
        with pytest.raises(ConfigurationError, match=said) as raised:
            load_config(path, [])
        assert str(path) in str(raised.value)


# ---- overrides


def test_overrides_reach_every_depth(load: Any) -> None:
    config = load(
        BASE,
        "learner.learning_rate=1e-4",
        "future.interventions.1.start=12",
        "future.interventions.0.window=null",
        "run.trackers=[wandb]",
        "model.start_from=null",
        "learner.betas=[0.8, 0.9]",
        "evaluation.every=0",
        "run.store=file:///data/a=b",
    )
    assert config.learner.learning_rate == 1e-4
    assert config.future.interventions[1] == Intervention(start=12, lookahead=10, window=20)
    assert config.future.interventions[0].stop == 10
    assert config.run.trackers == ("wandb",)
    assert config.model.start_from is None
    assert config.learner.betas == (0.8, 0.9)
    assert config.evaluation.every == 0
    assert config.run.store == "file:///data/a=b"


@pytest.mark.parametrize(
    "override",
    [
        "learner.learning_rate",
        "=3",
        ".x=3",
        "run..name=x",
        "run.name.x=1",
        "future.interventions.7.start=1",
        "future.interventions.x.start=1",
        "run.name=[",
    ],
)
def test_a_malformed_override_is_quoted(load: Any, override: str) -> None:
    assert repr(override) in refusal(load, override)


# ---- the recipe


def changed(config: BaseModel, path: str, value: Any) -> Any:
    """The configuration with another value at a leaf, whether or not it would be accepted."""
    name, _, rest = path.partition(".")
    inner = getattr(config, name)
    if isinstance(inner, BaseModel):
        value = changed(inner, rest, value)
    elif rest:
        index, _, rest = rest.partition(".")
        value = tuple(changed(e, rest, value) if i == int(index) else e for i, e in enumerate(inner))
    return config.model_copy(update={name: value})


def another(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value}x"
        case tuple():
            return value[:-1] or ("wandb",)
        case None:
            return 1
    raise AssertionError(f"no other value for {value!r}")


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_only_what_changes_the_numbers_is_in_the_recipe(load: Any) -> None:
    config = load()
    recipe = config.recipe()
    paths = dict(leaves(config))
    assert paths.keys() > NO_RECIPE
    for path, value in paths.items():
        same = changed(config, path, another(value)).recipe() == recipe
        assert same == (path in NO_RECIPE), path


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("testbed-autonpo", "5b697e25feced8dd"),
        ("testbed-grpo", "672b17083d803da1"),
        ("testbed-late", "a71eeda30fd90f3e"),
        ("testbed-npo", "72809ef842ad6a73"),
    ],
)
def test_the_recipe_of_a_testbed_run_is_what_it_was_before_there_were_other_sources(name: str, digest: str) -> None:
    recipe = load_config(ROOT / "deploy" / "configs" / f"{name}.yaml", []).recipe()
    assert digest_json(recipe).startswith(digest)


def test_a_configuration_of_rows_is_the_same_after_it_was_kept_as_json(load: Any) -> None:
    data = {"source": "jsonl", "path": "rows.jsonl", "columns": {"prompt": "question"}, "max_prompt_tokens": 100}
    config = load({**BASE, "data": data, "chat": {"stop": ["</answer>"]}})
    assert config.data.held_out == 0.1
    assert config.data.prompts is None
    kept = Config.model_validate(config.model_dump(mode="json"))
    assert kept == config
    assert kept.recipe() == config.recipe()
    assert config.recipe()["data"]["columns"] == {"prompt": "question"}


@pytest.mark.parametrize("field", ["run.public_url", "vllm.url"])
@pytest.mark.parametrize("url", ["https://runs.example/store", "http://127.0.0.1:8080"])
def test_a_servers_url_is_a_plain_address(load: Any, field: str, url: str) -> None:
    assert dict(leaves(load(BASE, f"{field}={url}")))[field] == url


@pytest.mark.parametrize("field", ["run.public_url", "vllm.url"])
@pytest.mark.parametrize(
    "url", ["s3://bucket", "runs.example", "https://me:secret@runs.example", "https://runs.example/?token=secret"]
)
def test_any_other_url_of_a_server_is_refused(load: Any, field: str, url: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"{re.escape(field)}.*give http\(s\)://HOST/PATH without user"
    ) as refused:
        load(BASE, f"{field}={url}")
    assert "secret" not in str(refused.value)
