"""A run begins with the user's rows and chat model, or says what has to be mended."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from npo_core.begin import begin
from npo_core.benchmarks import open_benchmark
from npo_core.interfaces import ConfigurationError
from npo_core.workspace import Workspace
from schemas.benchmark import BenchmarkFile
from schemas.config import Config
from schemas.records import RunRecord
from tests.chat_model import chat_model_dir
from tests.test_sources import jsonl, sums


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: chat_model_dir(folder / name, name) for name in ("qwen3", "llama")}


def settings(tmp_path: Path, model: Path, rows: list[Any], **sections: Any) -> Config:
    path = jsonl(tmp_path / "rows.jsonl", rows)
    data = {"source": "jsonl", "path": str(path), "held_out": 5, **sections.pop("data", {})}
    return Config.model_validate(
        {
            "run": {"name": "demo", "store": f"file://{tmp_path}/store"},
            "model": {"path": str(model)},
            "data": data,
            "verifier": {"kind": "numeric"},
            "rollout": {"prompts_per_step": 2},
            **sections,
        }
    )


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_a_run_keeps_what_became_of_the_rows_and_says_it(
    tmp_path: Path, models: dict[str, Path], architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*sums(20), {"prompt": "?", "answer": None}]
    config = settings(tmp_path, models[architecture], rows, data={"bad_rows": "skip"})
    with caplog.at_level(logging.INFO, "npo"):
        workspace = begin(config)
    report = workspace.record.data
    assert report is not None
    assert (report.rows, report.empty, report.train, report.held_out) == (21, 1, 15, 5)
    # <user>, five bytes and their spaces, <assistant>.
    assert report.longest == max(len(row["prompt"]) for row in sums(20)) + 2
    said = [record.getMessage() for record in caplog.records]
    assert any("21 rows of jsonl" in line and "15 prompts to train on, 5 held out" in line for line in said)
    assert any(line.endswith("rows.jsonl:21: its answer, column answer, is empty") for line in said)
    assert workspace.verifier.name.startswith("numeric/")
    assert workspace.run.record() == workspace.record
    # What the rows are later does not matter: the run has them.
    jsonl(tmp_path / "rows.jsonl", [])
    again = begin(config)
    assert len(again.prompts.held_out()) == 5


def test_the_run_is_the_same_whatever_happens_to_be_in_its_chat_until_that_is_changed(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    chat = {"system_prompt": "Add.", "stop": ["</answer>"]}
    config = settings(tmp_path, models["qwen3"], sums(20), chat=chat)
    workspace = begin(config)
    ids = workspace.encode(workspace.prompts.held_out()[0])
    assert workspace.tokenizer.decode(ids.tolist()).startswith("<system>Add.<user>")
    assert workspace.stops is not None
    assert workspace.context("leg", "digest").sampling.stops is workspace.stops
    other = config.model_copy(update={"chat": config.chat.model_copy(update={"system_prompt": "Subtract."})})
    with pytest.raises(ConfigurationError, match=r"chat\.system_prompt was Add\., is Subtract\."):
        begin(other)
    moved = config.model_copy(update={"data": config.data.model_copy(update={"path": "elsewhere.jsonl"})})
    with pytest.raises(ConfigurationError, match=r"data\.path was .*rows\.jsonl, is elsewhere\.jsonl"):
        begin(moved)


@pytest.mark.parametrize(
    ("architecture", "sections", "said"),
    [
        ("llama", {"chat": {"system_prompt": "Add."}}, "System role not supported; .* remove chat.system_prompt"),
        ("llama", {"chat": {"enable_thinking": False}}, "no such switch"),
        (
            "qwen3",
            {"rollout": {"prompts_per_step": 2, "max_new_tokens": 250}},
            "longest prompt, 13 tokens, and rollout.max_new_tokens 250 exceed the model's 256 positions; .* at most 6",
        ),
        (
            "qwen3",
            {"data": {"max_prompt_tokens": 250}},
            "data.max_prompt_tokens 250 tokens, and rollout.max_new_tokens",
        ),
        ("qwen3", {"rollout": {"prompts_per_step": 30}}, "prompts_per_step 30 exceeds the 15 prompts"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_and_nothing_begins(
    tmp_path: Path, models: dict[str, Path], architecture: str, sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        begin(settings(tmp_path, models[architecture], sums(20), **sections))
    assert not (tmp_path / "store" / "demo").exists()


def test_a_model_without_a_chat_template_is_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = chat_model_dir(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigurationError, match=r"no chat template.*chat_template\.jinja"):
        begin(settings(tmp_path, folder, sums(20)))


def test_records_of_runs_without_rows_read_and_are_written_as_before(tmp_path: Path) -> None:
    begin(Config.model_validate({"run": {"name": "demo", "store": f"file://{tmp_path}"}}))
    written = json.loads((tmp_path / "demo" / "run.json").read_text())
    assert "data" not in written
    assert RunRecord.model_validate(written).data is None


def test_a_benchmark_brings_its_own_rows_columns_and_verifier(tmp_path: Path, models: dict[str, Path]) -> None:
    workspace: Workspace = begin(settings(tmp_path, models["qwen3"], sums(20)))
    rows = [{"q": f"Which is {n}?", "options": ["0", str(n)], "gold": 1} for n in range(1, 6)]
    path = jsonl(tmp_path / "choices.jsonl", rows)
    columns = {"prompt": "q", "answer": "gold", "choices": "options", "answer_is": "index"}
    file = BenchmarkFile.model_validate(
        {
            "name": "choices",
            "data": {"source": "jsonl", "path": str(path), "columns": columns},
            "verifier": {"kind": "choice"},
        }
    )
    opened = open_benchmark(file, workspace.config, workspace.tokens)
    try:
        assert [prompt.answer for prompt in opened.prompts] == ["B"] * 5
        assert opened.table["split"].to_pylist() == ["train"] * 5
        right, wrong = opened.verifier.judge([(opened.prompts[0], "\\boxed{B}"), (opened.prompts[0], "(A)")])
        assert (right.correct, wrong.correct) == (True, False)
    finally:
        opened.verifier.close()
    long = file.model_copy(update={"max_new_tokens": 250})
    with pytest.raises(ConfigurationError, match=r"benchmark choices: the longest prompt.* exceed the model's 256 pos"):
        open_benchmark(long, workspace.config, workspace.tokens, workspace.model_config)
    path.write_text("no row")
    with pytest.raises(ConfigurationError, match=r"benchmark choices: 1 of the 1 rows .* cannot be used"):
        open_benchmark(file, workspace.config, workspace.tokens)
