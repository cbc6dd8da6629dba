"""The recipes of published benchmarks, on rows made by hand in the format that each is published in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from npo_core.benchmarks import open_benchmark
from npo_core.config_file import load_benchmark
from npo_core.interfaces import Prompt
from schemas.config import Config
from tests.command import ROOT

RECIPES = ROOT / "deploy" / "benchmarks"
CONFIG = Config.model_validate({"run": {"name": "demo"}})
ROWS: dict[str, list[dict[str, Any]]] = {
    "mmmu-pro": [
        {
            "id": "t_1",
            "question": "Which of <image 1>?",
            "options": "['$3', '$4', \"it's\"]",
            "answer": "C",
            "subject": "Art",
        }
    ],
    "mathvista": [
        {
            "pid": "1",
            "question": "Which?",
            "choices": ["no", "yes"],
            "answer": "yes",
            "unit": None,
            "metadata": {"task": "a"},
        },
        {"pid": "2", "question": "How far?", "choices": None, "answer": "1.2", "unit": "m", "metadata": {"task": "b"}},
    ],
    "mathvision": [
        {
            "id": "1",
            "question": "<image1> Which?",
            "options": ["A", "B", "C", "D", "E"],
            "answer": "E",
            "subject": "algebra",
        },
        {"id": "2", "question": "How many?", "options": [], "answer": "\\frac{1}{2}", "subject": "counting"},
    ],
    "zerobench": [{"question_id": "1_1", "question_text": "How many?", "question_answer": "11"}],
    "wemath": [
        {
            "ID": "1",
            "question": "How long?",
            "option": "A. 5 ; B. 6 ; C. No correct answer",
            "answer": "B",
            "key": "1steps",
        }
    ],
    "mmbench": [
        {
            "index": "241",
            "question": "Which?",
            "hint": "nan",
            "A": "x",
            "B": "y",
            "C": "nan",
            "D": "nan",
            "answer": "A",
            "category": "c",
        },
        {
            "index": "242",
            "question": "Which?",
            "hint": "Look.",
            "A": "x",
            "B": "y",
            "C": "z",
            "D": "w",
            "answer": "D",
            "category": "c",
        },
    ],
    "mmstar": [{"index": 0, "question": "Which?\nOptions: A: x, B: y", "answer": "B", "category": "coarse perception"}],
    "mathverse": [
        {"sample_index": "1", "query_cot": "Choices:\nA:60\nB:65", "answer": "B", "problem_version": "Text Lite"},
        {"sample_index": "2", "query_cot": "Find x.", "answer": "2\\sqrt{3}", "problem_version": "Vision Only"},
    ],
}
"""Columns that a recipe does not name are left out, pictures among them."""
SAID = {
    "mmmu-pro": ["Which of <image 1>?\nA. $3\nB. $4\nC. it's\nThink"],
    "mathvista": ["Which?\nA. no\nB. yes\nThink", "How far? (Unit: m)\nThink"],
    "mathvision": ["<image1> Which?\nA. A\nB. B\nC. C\nD. D\nE. E\nThink", "How many?\nThink"],
    "zerobench": ["How many?\nThink"],
    "wemath": ["How long?\nA. 5 ; B. 6 ; C. No correct answer\nThink"],
    "mmbench": ["Which?\nA. x\nB. y\nThink", "Look.\nWhich?\nA. x\nB. y\nC. z\nD. w\nThink"],
    "mmstar": ["Which?\nOptions: A: x, B: y\nThink"],
    "mathverse": ["Choices:\nA:60\nB:65\nPut the letter", "Find x.\nPut the letter"],
}
ANSWERS = {
    "mmmu-pro": ["C"],
    "mathvista": ["B", "1.2"],
    "mathvision": ["E", "\\frac{1}{2}"],
    "zerobench": ["11"],
    "wemath": ["B"],
    "mmbench": ["A", "D"],
    "mmstar": ["B"],
    "mathverse": ["B", "2\\sqrt{3}"],
}


def test_there_is_a_recipe_for_each_of_the_papers_benchmarks() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*ROWS, "testbed-long"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_rows_as_they_are_published_become_questions_with_answers_that_the_verifier_takes(
    name: str, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    file = load_benchmark(RECIPES / f"{name}.yaml")
    assert file.name == name
    # The same rows, from this disk instead of the hub.
    datasets.DatasetDict({file.data.split: datasets.Dataset.from_list(ROWS[name])}).save_to_disk(tmp_path / "rows")
    data = file.data.model_copy(update={"path": str(tmp_path / "rows")})
    opened = open_benchmark(file.model_copy(update={"data": data}), CONFIG)
    try:
        texts = [prompt.messages[0]["content"] for prompt in opened.prompts]
        assert len(texts) == len(SAID[name])
        for text, said in zip(texts, SAID[name], strict=True):
            assert text.startswith(said)
            assert text.endswith("into \\boxed{}.")
        assert [prompt.answer for prompt in opened.prompts] == ANSWERS[name]
        asked = [(prompt, answer) for prompt in opened.prompts for answer in said_of(prompt)]
        verdicts = opened.verifier.judge(asked)
        assert [verdict.correct for verdict in verdicts] == [True, False] * len(texts), verdicts
    finally:
        opened.verifier.close()


def said_of(prompt: Prompt) -> tuple[str, str]:
    """A right and a wrong answer as a model writes them."""
    wrong = "C" if prompt.answer in "ABDE" else "7"
    return f"So it is \\boxed{{{prompt.answer}}}.", f"So it is \\boxed{{{wrong}}}."
