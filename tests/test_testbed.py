"""The testbed: task families, tokenizer, verifier, and the warm-started policy that ships with the package."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from npo_core import testbed
from npo_core.demonstrations import IGNORED
from npo_core.prompts import encode
from npo_core.testbed.families import FAMILIES, Problem, draw
from npo_core.testbed.tokenizer import END, VOCABULARY, build_tokenizer
from npo_core.testbed.warm_start import WarmStartRecipe, demonstrations, train
from schemas.digest import digest_bytes

FAMILY = {family.name: family for family in FAMILIES}


def problem(name: str, digits: str, counted: int | None = None) -> Problem:
    return Problem(FAMILY[name], tuple(map(int, digits)), counted)


@st.composite
def problems(draw_: st.DrawFn) -> Problem:
    family = draw_(st.sampled_from(FAMILIES))
    return draw(family, draw_(st.integers(1, 12)), np.random.default_rng(draw_(st.integers(0, 10_000))))


# --- families


@pytest.mark.parametrize(
    ("name", "digits", "counted", "right", "all_habit"),
    [
        ("sum", "4829", None, "4243", "5477"),
        ("difference", "4829", None, "6867", "4481"),
        ("maximum", "3175", None, "3377", "3175"),
        ("minimum", "5728", None, "5522", "9999"),
        ("parity", "3257", None, "1101", "1011"),
        ("count", "3133", 3, "1123", "1234"),
        ("reversal", "4821", None, "1284", "4128"),
        ("increment", "4829", None, "5930", "4829"),
    ],
)
def test_rules_and_habits_write_the_hand_computed_working(
    name: str, digits: str, counted: int | None, right: str, all_habit: str
) -> None:
    task = problem(name, digits, counted)
    assert task.working() == right
    assert task.working([True] * 4) == all_habit


@pytest.mark.parametrize(
    ("name", "digits", "counted", "working"),
    [  # one mistake, at the second step
        ("sum", "4829", None, "4354"),  # 4, 4+8+1, 3+2, 5+9
        ("difference", "4829", None, "6201"),  # -4, 8-6, 2-2, 0-9
        ("maximum", "9175", None, "9177"),
        ("minimum", "5728", None, "5722"),
        ("parity", "3257", None, "1010"),  # 1, 0 for 2, 0^1, 1^1
        ("count", "2133", 3, "0123"),
        ("reversal", "4821", None, "1184"),
        ("increment", "4829", None, "5830"),
    ],
)
def test_a_mistake_is_carried_on(name: str, digits: str, counted: int | None, working: str) -> None:
    assert problem(name, digits, counted).working([False, True, False, False]) == working


def test_counts_are_written_mod_10() -> None:
    assert problem("count", "000000000000", 0).working() == "123456789012"


def test_prompts_are_tag_input_and_equals_sign() -> None:
    prompt = problem("sum", "4821").prompt()
    assert prompt.messages == ({"role": "user", "content": "s4821="},)
    assert (prompt.task, prompt.answer, prompt.prompt_id) == ("sum", "4245", "7e79e22a7aaa")
    assert problem("count", "4821", 3).prompt().messages[0]["content"] == "c3:4821="
    assert len({family.tag for family in FAMILIES}) == len(FAMILIES) == 8


@given(problems())
def test_a_working_has_one_digit_for_each_symbol(task: Problem) -> None:
    working = task.working()
    assert len(working) == len(task.digits)
    assert working.isdecimal()


def test_habits_must_cover_every_step() -> None:
    with pytest.raises(ValueError, match="3 habits for 4 digits"):
        problem("sum", "4821").working([True] * 3)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 100), st.integers(3, 12), st.integers(3, 12), st.integers(0, 1000))
def test_pool_and_held_out_set_are_disjoint_even_and_repeatable(
    count: int, held_out: int, one: int, other: int, seed: int
) -> None:
    shortest, longest = sorted((one, other))
    splits = testbed.make_prompts(count, held_out, shortest, longest, seed)
    assert splits == testbed.make_prompts(count, held_out, shortest, longest, seed)
    assert [len(split) for split in splits] == [count, held_out]
    texts = {prompt.messages[0]["content"] for split in splits for prompt in split}
    assert len({prompt.prompt_id for split in splits for prompt in split}) == len(texts) == count + held_out
    for split in splits:
        families, lengths = Counter(prompt.task for prompt in split), Counter(len(prompt.answer) for prompt in split)
        assert set(lengths) <= set(range(shortest, longest + 1))
        assert max(families.values()) - min(families[family.name] for family in FAMILIES) <= 1
        assert max(lengths.values()) - min(lengths[n] for n in range(shortest, longest + 1)) <= 1


def test_the_held_out_set_does_not_depend_on_the_pool_but_on_the_seed() -> None:
    small, large, other = (testbed.make_prompts(n, 48, 4, 12, seed)[1] for n, seed in ((8, 0), (512, 0), (512, 1)))
    assert small == large != other


# --- tokenizer


@settings(deadline=None)
@given(st.text(alphabet=[*VOCABULARY[1:]], max_size=30))
def test_text_comes_back_from_tokens_unchanged_one_token_a_character(text: str) -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(ids) == list(text)


def test_a_character_outside_the_vocabulary_is_an_error() -> None:
    with pytest.raises(Exception, match="UNK"):
        build_tokenizer().encode("48 2")


def test_the_shipped_tokenizer_is_the_one_that_is_built() -> None:
    shipped, built = AutoTokenizer.from_pretrained(testbed.model_dir()), build_tokenizer()
    assert shipped.get_vocab() == built.get_vocab() == {symbol: n for n, symbol in enumerate(VOCABULARY)}
    assert shipped.chat_template == built.chat_template
    assert (shipped.eos_token, shipped.pad_token) == (END, "<pad>")
    for prompt in testbed.make_prompts(64, 64, 4, 12, 0)[0]:
        text = prompt.messages[0]["content"]
        assert shipped.decode(encode(shipped, prompt)) == text
        answer = shipped.encode(prompt.answer + END)
        assert shipped.decode(answer, skip_special_tokens=True) == prompt.answer
        assert shipped.encode(text) + answer == shipped.encode(text + prompt.answer + END)


# --- verifier

PROMPT = problem("sum", "4821").prompt()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("4245", "correct"),
        ("4275", "first differs at symbol 3: got 7, want 4"),
        ("424", "too short: 3 symbols, want 4"),
        ("", "too short: 0 symbols, want 4"),
        ("42455", "too long: 5 symbols, want 4"),
        ("4245 ", "too long: 5 symbols, want 4"),
        (" 4245", "first differs at symbol 1: got  , want 4"),
        ("5", "first differs at symbol 1: got 5, want 4"),
        ("s4821=4245", "first differs at symbol 1: got s, want 4"),
        ("４245", "first differs at symbol 1: got \\uff14, want 4"),
        ("42\n45", "first differs at symbol 3: got \\n, want 4"),
    ],
)
def test_only_the_whole_working_is_correct_and_the_reason_says_why(text: str, reason: str) -> None:
    verdict = testbed.TestbedVerifier().verify(PROMPT, text)
    assert verdict.reason == reason
    assert (verdict.correct, verdict.reward) == ((True, 1.0) if text == "4245" else (False, 0.0))


@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=40))
def test_hostile_text_is_judged_wrong_with_a_printable_reason(text: str) -> None:
    verdict = testbed.TestbedVerifier().verify(PROMPT, text)
    assert verdict.correct == (text == "4245")
    assert verdict.reason.isascii()
    assert verdict.reason.isprintable()
    assert verdict == testbed.TestbedVerifier().verify(PROMPT, text)


@given(problems())
def test_every_right_working_is_correct_and_a_mistake_is_not(task: Problem) -> None:
    prompt, verifier = task.prompt(), testbed.TestbedVerifier()
    assert verifier.verify(prompt, task.working()).correct
    habitual = task.working([True] * len(task.digits))
    assert verifier.verify(prompt, habitual).correct == (habitual == task.working())


# --- warm start


def test_the_shipped_weights_are_those_that_the_recipe_names() -> None:
    document = json.loads((testbed.model_dir() / "recipe.json").read_text())
    assert document["sha256"] == digest_bytes((testbed.model_dir() / "model.safetensors").read_bytes())
    assert document["recipe"] == json.loads(json.dumps(dataclasses.asdict(WarmStartRecipe())))


def test_the_shipped_policy_loads_and_has_362_thousand_parameters() -> None:
    model = AutoModelForCausalLM.from_pretrained(testbed.model_dir())
    assert sum(parameter.numel() for parameter in model.parameters()) == 362_352
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.eos_token_id == model.generation_config.eos_token_id == VOCABULARY.index(END)


def pass_rates(length: int) -> np.ndarray:
    """Probability that a sample at temperature 1 is correct, for 192 held-out prompts: only one completion is."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(testbed.model_dir()), build_tokenizer()
    rates = []
    for prompt in testbed.make_prompts(8, 192, length, length, 0)[1]:
        start = len(encode(tokenizer, prompt))
        ids_T = torch.tensor([*encode(tokenizer, prompt), *tokenizer.encode(prompt.answer + END)])
        with torch.inference_mode():
            logps_TV = model(input_ids=ids_T[None]).logits[0, :-1].log_softmax(-1)
        rates.append(logps_TV.gather(1, ids_T[1:, None])[start - 1 :].sum().exp().item())
    return np.array(rates)


def test_the_shipped_policy_is_weak_but_not_blind() -> None:
    # As measured when it was made, give or take: 0.21, 0.05 and 0.015; at 8 samples, most groups are all wrong.
    assert 0.19 < pass_rates(4).mean() < 0.25
    assert 0.04 < pass_rates(8).mean() < 0.06
    assert 0.010 < pass_rates(12).mean() < 0.022
    assert 0.70 < ((1 - pass_rates(8)) ** 8).mean() < 0.85


def test_demonstrations_teach_the_working_and_its_end_at_every_length() -> None:
    tokenizer = build_tokenizer()
    ids_BT, labels_BT = demonstrations(WarmStartRecipe(batch=400), tokenizer, np.random.default_rng(0))
    lengths = set()
    for ids, labels in zip(ids_BT.tolist(), labels_BT.tolist(), strict=True):
        prompt, working = tokenizer.decode(ids).replace("<pad>", "").split("=")
        taught = [label for label in labels if label != IGNORED]
        assert tokenizer.decode(taught) == working
        assert labels.index(taught[0]) == len(prompt) + 1
        assert working == working.rstrip(END) + END
        lengths.add(len(working) - 1)
    assert lengths == set(range(4, 13))


@pytest.mark.parametrize("habit", [0.0, 0.4, 1.0])
def test_demonstrations_follow_the_habit_as_often_as_told(habit: float) -> None:
    tokenizer = build_tokenizer()
    recipe = WarmStartRecipe(batch=1000, habit=habit)
    ids_BT, _ = demonstrations(recipe, tokenizer, np.random.default_rng(0))
    texts = [tokenizer.decode(ids, skip_special_tokens=True).split("=") for ids in ids_BT.tolist()]
    pairs = [(x, y) for prompt, working in texts if prompt[0] == "i" for x, y in zip(prompt[1:], working, strict=True)]
    assert all(int(y) in (int(x), (int(x) + 1) % 10) for x, y in pairs)
    assert np.mean([x == y for x, y in pairs]) == pytest.approx(habit, abs=0.06)


def test_the_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    rates = [WarmStartRecipe().learning_rate_at(step) for step in (0, 24, 49, 50, 1799)]
    assert rates == pytest.approx([4e-5, 1e-3, 2e-3, 2e-3, 2e-4])


def test_a_warm_start_is_bit_identical_when_it_is_repeated(tmp_path: Path) -> None:
    recipe = WarmStartRecipe(steps=10)
    losses: list[float] = []
    first = train(recipe, tmp_path / "one", lambda _, loss: losses.append(loss))
    torch.rand(3)
    second = train(recipe, tmp_path / "two")
    assert first == second == digest_bytes((tmp_path / "two" / "model.safetensors").read_bytes())
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "one" / name).read_bytes() == (testbed.model_dir() / name).read_bytes(), name


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    untrained = WarmStartRecipe(steps=0)
    assert train(untrained, tmp_path / "0") != train(dataclasses.replace(untrained, seed=1), tmp_path / "1")


def test_a_warm_start_leaves_the_random_numbers_and_threads_of_its_caller_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(5)
    train(WarmStartRecipe(steps=1, batch=2), tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
