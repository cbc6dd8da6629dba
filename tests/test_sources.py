"""Rows of the user's become prompts; those that cannot are named and counted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from npo_core.interfaces import ConfigurationError, Prompt
from npo_core.sources.load import Loaded, load, load_all
from npo_core.sources.told import told
from schemas.config import Config


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """A file of one JSON value a line; a text is a line as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def sums(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"{n} + {n} = ?", "answer": 2 * n} for n in range(first, first + count)]


def words(prompt: Prompt, pictures: Mapping[str, bytes]) -> int:
    """Stands for a tokenizer."""
    return len(" ".join(message["content"] for message in prompt.messages).split())


def config(path: Path | None, source: str = "jsonl", **data: Any) -> Config:
    """A run of two prompts a step on these rows."""
    section = {"source": source, **({} if path is None else {"path": str(path)}), **data}
    return Config.model_validate({"run": {"name": "demo"}, "data": section, "rollout": {"prompts_per_step": 2}})


def loaded(path: Path | None, source: str = "jsonl", **data: Any) -> Loaded:
    return load(config(path, source, **data), words)


def texts(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.messages[-1]["content"] for prompt in prompts]


# ---- formats


@pytest.fixture(params=["jsonl", "parquet", "hf"])
def twenty(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """The same twenty rows by each source."""
    rows = [{"question": f"{n} + 1 = ?", "gold": {"value": n + 1}, "level": n % 2} for n in range(20)]
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(rows[:15]), tmp_path / "a.parquet")
        pq.write_table(pa.Table.from_pylist(rows[15:]), tmp_path / "b.parquet")
        return "parquet", tmp_path
    if request.param == "hf":
        datasets = pytest.importorskip("datasets")
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
        return "hf", tmp_path / "saved"
    jsonl(tmp_path / "a.jsonl", rows[:15])
    jsonl(tmp_path / "b.jsonl", rows[15:])
    return "jsonl", tmp_path / "*.jsonl"


def test_the_same_rows_are_the_same_prompts_in_every_format(twenty: tuple[str, Path]) -> None:
    source, path = twenty
    columns = {"prompt": "question", "answer": "gold.value", "task": "level", "metadata": ["gold"]}
    found = loaded(path, source, columns=columns, held_out=5, template="Add: {{ question }}")
    prompts = sorted((*found.train, *found.held_out), key=lambda prompt: int(prompt.answer))
    assert texts(prompts) == [f"Add: {n} + 1 = ?" for n in range(20)]
    assert [prompt.answer for prompt in prompts] == [str(n + 1) for n in range(20)]
    assert {prompt.task for prompt in prompts} == {"0", "1"}
    assert json.loads(prompts[3].metadata or "") == {"gold": {"value": 4}}
    assert len(found.held_out) == 5
    assert found.report is not None
    assert (found.report.rows, found.report.train, found.report.held_out) == (20, 15, 5)
    # Which are held out is decided by what they ask, whatever file they come from.
    assert sorted(prompt.answer for prompt in found.held_out) == ["1", "12", "17", "5", "9"]


def test_a_directory_that_datasets_reads_is_a_source(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    jsonl(tmp_path / "train.jsonl", sums(8))
    jsonl(tmp_path / "test.jsonl", sums(3, first=100))
    found = loaded(tmp_path, "hf", held_out_split="test")
    assert texts(found.train) == [row["prompt"] for row in sums(8)]
    assert texts(found.held_out) == [row["prompt"] for row in sums(3, first=100)]
    with pytest.raises(ConfigurationError, match=r"its split 'valid' cannot be loaded"):
        loaded(tmp_path, "hf", split="valid")


def test_a_conversation_is_taken_as_it_is(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": talk, "answer": "x"}, *sums(3)])
    found = loaded(path, held_out=1)
    assert tuple(talk) in [prompt.messages for prompt in (*found.train, *found.held_out)]


@pytest.mark.slow
def test_questions_of_reasoning_gym_come_with_what_its_scorer_needs() -> None:
    pytest.importorskip("reasoning_gym")
    from npo_core.verifiers.kinds import load_verifier

    tasks = [{"name": "chain_sum", "size": 12, "seed": 3, "parameters": {"min_terms": 2, "max_terms": 3}}]
    tasks.append({"name": "letter_counting", "size": 6})
    settings = config(None, "reasoning-gym", tasks=tasks, held_out=4)
    found = load(settings, None)
    assert found.report is not None
    assert found.report.origin == "reasoning-gym 12 × chain_sum, 6 × letter_counting"
    prompts = [*found.train, *found.held_out]
    assert {prompt.task for prompt in prompts} == {"chain_sum", "letter_counting"}
    verifier = load_verifier(settings)
    try:
        assert verifier.name.startswith("reasoning-gym/")
        verdicts = verifier.judge([(prompts[0], prompts[0].answer), (prompts[0], "no idea")])
        assert [verdict.correct for verdict in verdicts] == [True, False]
    finally:
        verifier.close()
    for name, parameters, said in (
        ("chain_sums", {}, "chain_sums"),
        ("chain_sum", {"min_term": 3}, "min_term"),
        ("chain_sum", {"min_terms": -3}, "min_terms"),
    ):
        task = {"name": name, "size": 3, "parameters": parameters}
        with pytest.raises(ConfigurationError, match=said):
            loaded(None, "reasoning-gym", tasks=[task])


# ---- rows that cannot be used

BROKEN = [
    *sums(6),
    "{not json",
    {"prompt": "no answer?"},
    {"prompt": "a list?", "answer": [1, 2]},
    {"prompt": "  ", "answer": 1},
    {"prompt": "null?", "answer": None},
    "[1]",
    {"prompt": "0 + 0 = ?", "answer": 0},
    {"prompt": "1 + 1 = ?", "answer": 3},
    "",
]


def test_bad_rows_are_refused_with_their_numbers_and_reasons(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", BROKEN)
    with pytest.raises(ConfigurationError) as refused:
        loaded(path)
    said = str(refused.value)
    assert f"7 of the 14 rows of jsonl {path} cannot be used" in said
    for part in (
        f"{path}:7: it is no JSON",
        f"{path}:8: it has no column answer",
        f"{path}:9: column answer holds list",
        f"{path}:10: its prompt, column prompt, is empty",
        f"{path}:11: its answer, column answer, is empty",
        "set data.bad_rows to skip",
    ):
        assert part in said


def test_skipped_rows_are_counted_each_by_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", BROKEN)
    found = loaded(path, bad_rows="skip", held_out=2)
    report = found.report
    assert report is not None
    assert (report.rows, report.bad, report.empty, report.duplicates) == (14, 5, 2, 1)
    assert (report.train, report.held_out, report.over_long, report.longest) == (4, 2, 0, 5)
    assert [fault.where for fault in report.faults] == [f"{path}:{line}" for line in (7, 8, 9, 10, 11)]
    assert sorted(texts([*found.train, *found.held_out])) == [row["prompt"] for row in sums(6)]
    lines = told(report)
    assert "14 rows" in lines[0]
    assert "left out: 5 bad, 2 empty, 1 duplicate" in lines[1]


def test_over_long_prompts_are_refused_or_left_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [*sums(5), {"prompt": "what is " + "1 + " * 9 + "1 ?", "answer": 10}])
    with pytest.raises(ConfigurationError, match=r"rows\.jsonl:6: its prompt of \d+ tokens is longer than .* 8"):
        loaded(path, max_prompt_tokens=8)
    report = loaded(path, max_prompt_tokens=8, over_long="skip", held_out=1).report
    assert report is not None
    assert (report.over_long, report.train, report.longest) == (1, 4, 5)


def test_a_prompt_that_the_chat_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", sums(5))

    def tokens(prompt: Prompt, pictures: Mapping[str, bytes]) -> int:
        if prompt.answer == "4":
            raise ValueError("no twos")
        return 1

    with pytest.raises(
        ConfigurationError, match=r"rows\.jsonl:3: the model's chat template cannot render it \(no twos"
    ):
        load(config(path), tokens)


def test_a_wrong_column_name_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    rows = [{"question": "1?", "label": "1"}, {"question": "2?", "label": "2"}]
    jsonl(tmp_path / "rows.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for source in ("jsonl", "parquet"):
        with pytest.raises(ConfigurationError) as refused:
            loaded(tmp_path / f"rows.{source}", source, columns={"prompt": "questions"}, template="{{ hint }}")
        for said in (
            "data.columns.prompt 'questions' is no column of",
            "did you mean question?",
            "data.columns.answer 'answer' is no column of",
            "its columns are question, label",
            "data.template hint 'hint'",
        ):
            assert said in str(refused.value)


@pytest.mark.parametrize(
    ("content", "source", "said"),
    [
        (None, "jsonl", "is neither a file, nor a directory, nor a pattern of .jsonl files"),
        (b'[{"prompt": 1}]', "jsonl", "is one JSON array, not JSON Lines"),
        (b"PAR1 no", "parquet", "cannot be read as Parquet"),
        (b"", "jsonl", "has no row that can be used"),
    ],
)
def test_a_file_that_is_none_is_told(tmp_path: Path, content: bytes | None, source: str, said: str) -> None:
    path = tmp_path / f"rows.{source}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=said):
        loaded(path, source)


def test_a_template_that_shows_the_answer_or_is_none_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", sums(4))
    with pytest.raises(ConfigurationError, match=r"data\.template shows the answer, column answer"):
        loaded(path, template="{{ prompt }} {{ answer }}")
    with pytest.raises(ConfigurationError, match=r"data\.template is no Jinja template"):
        loaded(path, template="{{ prompt")
    found = loaded(path, template="{{ prompt }}\nPut it into \\boxed{}.", held_out=1)
    assert all(text.endswith("= ?\nPut it into \\boxed{}.") for text in texts(found.train))


# ---- choices and marks


@pytest.mark.parametrize(
    ("columns", "row", "answer"),
    [
        ({"choices": "options", "answer_is": "letter"}, {"options": "['red', 'blue']", "answer": "b"}, "B"),
        ({"choices": "options", "answer_is": "index"}, {"options": ["red", "blue"], "answer": 1}, "B"),
        ({"choices": "options", "answer_is": "choice-text"}, {"options": ["red", "blue"], "answer": "blue"}, "B"),
        ({"choices": ["A", "B", "C"]}, {"A": "red", "B": "blue", "C": None, "answer": "B"}, "B"),
    ],
)
def test_choices_are_lettered_and_the_answer_is_a_letter(
    tmp_path: Path, columns: dict[str, Any], row: dict[str, Any], answer: str
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "Which?", **row}])
    (prompt,) = load_all(config(path, columns=columns), words).train
    assert texts([prompt]) == ["Which?\nA. red\nB. blue"]
    assert prompt.answer == answer


def test_a_row_without_choices_keeps_its_answer_and_one_that_names_none_of_them_is_bad(tmp_path: Path) -> None:
    columns = {"choices": "options", "answer_is": "choice-text"}
    free = {"prompt": "How many?", "options": None, "answer": "12"}
    path = jsonl(tmp_path / "rows.jsonl", [free, {"prompt": "Which?", "options": ["a", "b"], "answer": "c"}])
    found = load_all(config(path, columns=columns, bad_rows="skip"), words)
    assert [prompt.answer for prompt in found.train] == ["12"]
    assert found.report is not None
    assert "its answer 'c' is none of its choices" in found.report.faults[0].reason


def test_the_answer_may_follow_a_mark(tmp_path: Path) -> None:
    rows = [{"prompt": "2 + 2?", "answer": "2 and 2\n#### 4"}, {"prompt": "3?", "answer": "three"}]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    found = load_all(config(path, columns={"answer_after": "####"}, bad_rows="skip"), words)
    assert [prompt.answer for prompt in found.train] == ["4"]


# ---- the two sets


def test_under_a_share_no_prompt_changes_sides_when_rows_are_added(tmp_path: Path) -> None:
    few = loaded(jsonl(tmp_path / "few.jsonl", sums(100)), held_out=0.2)
    rows = [*reversed(sums(100, first=100)), *sums(100)]
    more = loaded(jsonl(tmp_path / "more.jsonl", rows), held_out=0.2)
    assert set(texts(few.held_out)) < set(texts(more.held_out))
    assert set(texts(few.train)) < set(texts(more.train))
    assert 10 < len(few.held_out) < 30


def test_a_held_out_file_is_held_out_and_its_prompts_are_not_trained_on(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "train.jsonl", sums(10))
    held_out = jsonl(tmp_path / "test.jsonl", sums(4, first=8))
    found = loaded(path, held_out_path=str(held_out))
    assert texts(found.train) == [row["prompt"] for row in sums(8)]
    assert texts(found.held_out) == [row["prompt"] for row in sums(4, first=8)]
    assert found.report is not None
    assert (found.report.rows, found.report.shared) == (14, 2)
    other = jsonl(tmp_path / "other.jsonl", [{"prompt": "1?", "result": "1"}])
    with pytest.raises(ConfigurationError, match=r"'answer' is no column of data\.held_out_path .*other\.jsonl"):
        loaded(path, held_out_path=str(other))
    # Not even those of the file that are not asked.
    part = loaded(path, held_out_path=str(held_out), held_out=1)
    assert (len(part.held_out), len(part.train)) == (1, 8)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"held_out": 9}, "rollout.prompts_per_step 2 exceeds the 1 prompts"),
        ({"held_out": 11}, r"data\.held_out 11 exceeds the 10 prompts"),
        ({"held_out": 1e-9}, "holds none out; give a number"),
        ({"held_out": 5, "prompts": 6}, r"data\.prompts 6 exceeds the 5 prompts"),
        ({"columns": {"id": "same"}}, r"1 ids name more than one prompt, the first 'x'"),
    ],
)
def test_sets_that_no_run_can_be_made_of_are_refused(tmp_path: Path, data: dict[str, Any], said: str) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{**row, "same": "x"} for row in sums(10)])
    with pytest.raises(ConfigurationError, match=said):
        loaded(path, **data)
