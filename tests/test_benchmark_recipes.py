"""The recipes of published benchmarks, on rows made by hand in the format that each is published in."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from npo_core.benchmarks import open_benchmark
from npo_core.config_file import load_benchmark
from npo_core.interfaces import Prompt
from schemas.config import Config
from tests.command import ROOT

RECIPES = ROOT / "deploy" / "benchmarks"
CONFIG = Config.model_validate({"run": {"name": "demo"}})
PICTURES = tuple(Image.new("RGB", (2, 2), (shade, 0, 0)) for shade in (0, 80, 160))
"""Tiny ones; a question shows them by their place here."""
ONE, TWO, THREE = PICTURES
ROWS: dict[str, list[dict[str, Any]]] = {
    "mmmu-pro": [
        {
            "id": "t_1",
            "question": "Which of <image 1>?",
            "options": "['$3', '<image 2>', \"it's\"]",
            "image_1": ONE,
            "image_2": TWO,
            **{f"image_{n}": None for n in range(3, 8)},
            "answer": "C",
            "subject": "Art",
        }
    ],
    "mathvista": [
        {
            "pid": "1",
            "question": "Which?",
            "decoded_image": ONE,
            "choices": ["no", "yes"],
            "answer": "yes",
            "unit": None,
            "metadata": {"task": "a"},
        },
        {
            "pid": "2",
            "question": "How far?",
            "decoded_image": TWO,
            "choices": None,
            "answer": "1.2",
            "unit": "m",
            "metadata": {"task": "b"},
        },
    ],
    "mathvision": [
        {
            "id": "1",
            "question": "<image1> Which?",
            "decoded_image": ONE,
            "options": ["A", "B", "C", "D", "E"],
            "answer": "E",
            "subject": "algebra",
        },
        {
            "id": "2",
            "question": "How many?",
            "decoded_image": TWO,
            "options": [],
            "answer": "\\frac{1}{2}",
            "subject": "counting",
        },
    ],
    "zerobench": [
        {
            "question_id": "1_1",
            "question_text": "How many?",
            "question_images_decoded": [TWO, THREE],
            "question_answer": "11",
        }
    ],
    "wemath": [
        {
            "ID": "1",
            "question": "How long?",
            "image_path": ONE,
            "option": "A. 5 ; B. 6 ; C. No correct answer",
            "answer": "B",
            "key": "1steps",
        }
    ],
    "mmbench": [
        {
            "index": "241",
            "image": ONE,
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
            "image": TWO,
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
    "mmstar": [
        {
            "index": 0,
            "question": "Which?\nOptions: A: x, B: y",
            "image": ONE,
            "answer": "B",
            "category": "coarse perception",
        }
    ],
    "mathverse": [
        {
            "sample_index": "1",
            "query_cot": "Choices:\nA:60\nB:65",
            "image": ONE,
            "answer": "B",
            "problem_version": "Text Lite",
        },
        {
            "sample_index": "2",
            "query_cot": "Find x.",
            "image": TWO,
            "answer": "2\\sqrt{3}",
            "problem_version": "Vision Only",
        },
    ],
}
"""Columns that a recipe does not name are left out."""
SAID = {
    "mmmu-pro": ["Which of [1]?\nA. $3\nB. [2]\nC. it's\nThink"],
    "mathvista": ["[1]Which?\nA. no\nB. yes\nThink", "[2]How far? (Unit: m)\nThink"],
    "mathvision": ["[1]<image1> Which?\nA. A\nB. B\nC. C\nD. D\nE. E\nThink", "[2]How many?\nThink"],
    "zerobench": ["[2][3]How many?\nThink"],
    "wemath": ["[1]How long?\nA. 5 ; B. 6 ; C. No correct answer\nThink"],
    "mmbench": ["[1]Which?\nA. x\nB. y\nThink", "[2]Look.\nWhich?\nA. x\nB. y\nC. z\nD. w\nThink"],
    "mmstar": ["[1]Which?\nOptions: A: x, B: y\nThink"],
    "mathverse": ["[1]Choices:\nA:60\nB:65\nPut the letter", "[2]Find x.\nPut the letter"],
}
"""How each question begins, `[1]` for the first picture."""
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
        texts = [shown(prompt, opened.pictures) for prompt in opened.prompts]
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


def shown(prompt: Prompt, files: Mapping[str, bytes]) -> str:
    """The question with the number of each picture where it stands."""
    refs: Iterator[str] = iter(prompt.image_refs)
    content: Any = prompt.messages[0]["content"]
    return "".join(part["text"] if part["type"] == "text" else f"[{number(files[next(refs)])}]" for part in content)


def number(file: bytes) -> int:
    """Which of the pictures a file is, from 1."""
    pixel = Image.open(io.BytesIO(file)).getpixel((0, 0))
    return 1 + [picture.getpixel((0, 0)) for picture in PICTURES].index(pixel)


def said_of(prompt: Prompt) -> tuple[str, str]:
    """A right and a wrong answer as a model writes them."""
    wrong = "C" if prompt.answer in "ABDE" else "7"
    return f"So it is \\boxed{{{prompt.answer}}}.", f"So it is \\boxed{{{wrong}}}."
