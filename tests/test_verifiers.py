"""What each kind of verifier takes for a right answer."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from npo_core.interfaces import ConfigurationError, Verdict
from npo_core.verifiers import kinds
from npo_core.verifiers.extract import final_answer
from npo_core.verifiers.judges import Question, UnusableReferenceError
from npo_core.verifiers.numeric import number
from schemas.config import Config
from schemas.verifier import VerifierSection


def section(kind: str, **fields: Any) -> VerifierSection:
    return VerifierSection.model_validate({"kind": kind, **fields})


def judged(kind: str, answer: str, text: str, metadata: Any = None, **fields: Any) -> Verdict:
    return kinds.build(section(kind, **fields))(Question(answer, text, metadata=metadata))


# ---- the final answer


@pytest.mark.parametrize(
    ("text", "extract", "found"),
    [
        ("so \\boxed{4}", "auto", "4"),
        ("\\boxed{1} no, \\boxed{\\frac{1}{2}}.", "auto", "\\frac{1}{2}"),
        ("\\fbox{a}", "boxed", "a"),
        ("\\boxed{\\{1\\}}", "boxed", "\\{1\\}"),
        ("\\boxed{4", "boxed", None),
        ("\\boxed{}", "boxed", None),
        ("Answer: 7.", "auto", "7"),
        ("**Final Answer:** 7", "auto", "7"),
        ("The answer is 7 apples", "auto", "7 apples"),
        ("Answer: 1\nAnswer: 2\nbye", "answer", "2"),
        ("steps\n#### 1,234", "auto", "1,234"),
        ("<answer>a\nb</answer>", "auto", "a\nb"),
        ("<answer>\\boxed{3}</answer>", "answer", "3"),
        ("<answer>3", "answer", None),
        ("nothing said", "answer", None),
        ("nothing said", "auto", "nothing said"),
        ("  4 ", "text", "4"),
        ("from 3 to -4.5e1 m", "last-number", "-4.5e1"),
        ("none", "last-number", None),
        ("<think>\\boxed{1}</think> \\boxed{2}", "auto", "2"),
        ("\\boxed{1}</think>\n2", "auto", "2"),
        ("<think>\\boxed{1}", "auto", None),
        ("<think>a</think>", "text", None),
        ("", "auto", None),
    ],
)
def test_the_final_answer_of_a_text(text: str, extract: Any, found: str | None) -> None:
    assert final_answer(text, extract) == found


# ---- right and wrong answers


@pytest.mark.parametrize(
    ("kind", "answer", "text", "correct"),
    [
        ("exact", "Paris", "Answer: Paris", True),
        ("exact", "Paris", "\\boxed{Paris}", True),
        ("exact", "a b\nc", "a  b c", True),
        ("exact", "Paris", "paris", False),
        ("exact", "Paris", "Answer: Paris, France", False),
        ("exact", "Paris", "", False),
        ("numeric", "42", "it is 42 apples", True),
        ("numeric", "1234", "#### 1,234", True),
        ("numeric", "0.5", "\\boxed{\\frac{1}{2}}", True),
        ("numeric", "-0.5", "\\boxed{-\\dfrac{1}{2}}", True),
        ("numeric", "1/3", "Answer: 2/6", True),
        ("numeric", "−3", "-3", True),
        ("numeric", "1e3", "1000.0", True),
        ("numeric", "$10{,}000$", "10000", True),
        ("numeric", "50%", "\\boxed{50}", True),
        ("numeric", "42", "it is 42 or 43", False),
        ("numeric", "42", "\\boxed{42, 43}", False),
        ("numeric", "1000000", "1000001", False),
        ("numeric", "1", "1/0", False),
        ("numeric", "1", "\\boxed{9e999999999999999999999}", False),
        ("numeric", "1", "no idea", False),
        ("choice", "B", "Answer: B", True),
        ("choice", "(B)", "\\boxed{b}", True),
        ("choice", "B", "**Answer:** (B) the second", True),
        ("choice", "B", "\\boxed{\\text{B}}", True),
        ("choice", "A", "A dog", False),
        ("choice", "A", "B.", False),
        ("choice", "A", "All", False),
        ("math-verify", "\\frac{1}{2}", "\\boxed{0.5}", True),
        ("math-verify", "1/2", "so the answer is $\\frac12$", True),
        ("math-verify", "$x^2+2x+1$", "\\boxed{(x+1)^2}", True),
        ("math-verify", "\\{1, 2\\}", "\\boxed{\\{2, 1\\}}", True),
        ("math-verify", "(1, 2)", "Answer: (1,2)", True),
        ("math-verify", "18", "16 + 2 gives 18 dollars", True),
        ("math-verify", "18", "<think>it is \\boxed{18}</think> 17", False),
        ("math-verify", "\\sqrt{2}", "\\boxed{1.4}", False),
        ("math-verify", "2", "\\boxed{}", False),
        ("math-verify", "2", "\\boxed{2", False),
        ("math-verify", "5\\pi", "Answer: 5\\pi", True),
        ("math-verify", "5\\pi", "Answer: 5", False),
        ("math-verify", "5\\pi", "\\boxed{5\\pi \\text{ cm}}", True),
        ("math-verify", "x = 5", "Answer: 5", True),
        ("math-verify", "18", "Answer: 18 dollars", True),
        ("math-verify", "18 dollars", "#### 18", True),
        ("math-verify", "2", "I do not know", False),
    ],
)
def test_right_and_wrong_answers(kind: str, answer: str, text: str, correct: bool) -> None:
    verdict = judged(kind, answer, text)
    assert (verdict.correct, verdict.reward, verdict.failure) == (correct, float(correct), None)
    assert (verdict.reason == "correct") == correct


@pytest.mark.parametrize(("kind", "answer"), [("numeric", "two"), ("choice", "both"), ("math-verify", " ")])
def test_a_reference_that_cannot_be_compared_with_is_no_wrong_answer(kind: str, answer: str) -> None:
    with pytest.raises(UnusableReferenceError):
        judged(kind, answer, "2")


DECIMALS = st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=4)


@given(DECIMALS)
def test_a_number_is_read_as_it_is_written(value: Decimal) -> None:
    for written in (f"{value}", f"{value:f}", f"{value:,f}", f"{value:e}", f"${value:f}$", f"{value:f} m"):
        assert number(written) == value


@given(DECIMALS, st.sampled_from(["1e-6", "0.01", "0"]), st.sampled_from(["1e-6", "0.5", "0"]), st.booleans())
def test_a_number_is_right_within_the_larger_tolerance(
    value: Decimal, relative: str, absolute: str, inside: bool
) -> None:
    bound = max(Decimal(float(relative)) * abs(value), Decimal(float(absolute)))
    off = value + bound * (Decimal("0.999") if inside else Decimal("1.001"))
    tolerance = {"relative": float(relative), "absolute": float(absolute)}
    verdict = judged("numeric", f"{value}", f"\\boxed{{{off:f}}}", tolerance=tolerance)
    assert verdict.correct == (inside or not bound)


# ---- reasoning-gym


def test_reasoning_gym_scores_and_only_the_whole_score_is_correct() -> None:
    import reasoning_gym

    entry = next(iter(reasoning_gym.create_dataset("basic_arithmetic", size=1, seed=3)))
    metadata = json.loads(json.dumps({"dataset": "basic_arithmetic", "entry": entry}))
    right = judged("reasoning-gym", entry["answer"], f"<answer>{entry['answer']}</answer>", metadata)
    assert (right.reward, right.correct) == (1.0, True)
    wrong = judged("reasoning-gym", entry["answer"], f"<answer>{entry['answer']} or so</answer>", metadata)
    assert 0 <= wrong.reward < 1
    assert not wrong.correct
    for broken in (None, {}, {"dataset": "no_such", "entry": entry}):
        with pytest.raises(UnusableReferenceError, match="dataset"):
            judged("reasoning-gym", "1", "1", broken)


# ---- functions

MODULE = """
import numpy
def given(answer, text, prompt, metadata):
    return {"reward": 0.25, "correct": True, "reason": f"{answer} {text} {prompt[0]['role']} {metadata['k']}"}
def flag(answer, text, prompt, metadata): return answer == text
def share(answer, text, prompt, metadata): return numpy.float32(0.5)
def words(answer, text, prompt, metadata): return "right"
def other(answer, text, prompt, metadata): return {"score": 1}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "own_rewards.py"


def test_a_function_is_given_everything_and_returns_what_it_likes(module: Path) -> None:
    def call(name: str, text: str = "a") -> Verdict:
        judge = kinds.build(section("python", function=f"own_rewards:{name}"))
        return judge(Question("a", text, ({"role": "user", "content": "q"},), {"k": 7}))

    assert call("given") == Verdict(0.25, True, "a a user 7")
    assert call("flag") == Verdict(1.0, True, "correct")
    assert call("flag", "b") == Verdict(0.0, False, "reward 0")
    assert call("share") == Verdict(0.5, False, "reward 0.5")
    for name in ("words", "other"):
        with pytest.raises(TypeError, match="the function returned"):
            call(name)


def test_a_changed_function_is_another_verifier(module: Path) -> None:
    chosen = section("python", function="own_rewards:flag")
    before = kinds.name(chosen)
    assert before.startswith("python/own_rewards:flag@")
    assert kinds.name(chosen) == before
    module.write_text(MODULE + "\n# changed\n")
    assert kinds.name(chosen) != before


@pytest.mark.parametrize("function", ["no_such_module:f", "own_rewards.inner:f", "math:sqrt"])
def test_a_function_without_a_source_file_is_refused_by_name(module: Path, function: str) -> None:
    with pytest.raises(ConfigurationError, match=f"verifier.function {function}"):
        kinds.name(section("python", function=function))


# ---- the configuration


def test_names_carry_versions() -> None:
    assert kinds.name(section("exact")) == "exact/1"
    assert kinds.name(section("math-verify")) == "math-verify/0.9.0+1"
    assert kinds.name(section("reasoning-gym")) == "reasoning-gym/0.1.25+1"


def test_what_is_not_installed_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(ConfigurationError, match=r"pip install 'near-future\[verifiers\]'"):
        kinds.name(section("math-verify"))


def test_only_what_changes_verdicts_is_of_the_recipe() -> None:
    def recipe(**fields: Any) -> dict[str, Any]:
        return Config.model_validate({"run": {"name": "demo"}, "verifier": fields}).recipe()

    assert "verifier" not in recipe()
    assert recipe(workers=7) == recipe()
    chosen = recipe(kind="numeric", workers=7)["verifier"]
    assert chosen["kind"] == "numeric"
    assert "workers" not in chosen
    assert recipe(timeout_s=3)["verifier"]["timeout_s"] == 3


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "python"}, "kind python needs function"),
        ({"kind": "exact", "function": "a:b"}, "kind exact calls no function"),
        ({"kind": "python", "function": "a:b", "extract": "boxed"}, "remove extract boxed"),
        ({"kind": "python", "function": "os.system('x')"}, "function"),
    ],
)
def test_fields_that_disagree_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        VerifierSection.model_validate(fields)


def test_a_numpy_bool_is_a_bool() -> None:
    from npo_core.verifiers.python_function import _verdict

    assert _verdict(np.bool_(True)).correct
