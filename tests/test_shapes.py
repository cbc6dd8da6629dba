"""Questions about drawn shapes, and that the embedded policy looks at the pictures when it answers them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from npo_core import shapes
from npo_core.debris import kind_of
from npo_core.interfaces import ConfigurationError
from npo_core.shapes.families import FAMILIES, Question, grids
from npo_core.shapes.scene import CELL, Scene
from npo_core.shapes.warm_start import WarmStartRecipe, train
from schemas import layout
from schemas.digest import digest_bytes
from tests.bench.sight import measure

SCENE = Scene(1, 3, (("circle", "blue"), ("triangle", "red"), ("square", "red")), 0)
POOL = (24, 9, 3, 12, 5)


def test_workings_by_the_right_rule_and_by_the_habit() -> None:
    kinds, colours, count, lead = (Question(family, SCENE, "red" * family.names_colour) for family in FAMILIES)
    assert [q.text for q in (kinds, colours, count, lead)] == ["K=", "C=", "Nr=", "L="]
    assert [q.working() for q in (kinds, colours, count, lead)] == ["cts", "brr", "012", "<=>"]
    always = [True] * 3
    assert [q.working(always) for q in (kinds, colours, count, lead)] == ["cst", "grr", "123", ">=<"]
    assert count.working([True, False, False]) == "123", "a mistake is carried on"


def test_a_picture_shows_its_scene() -> None:
    picture = np.asarray(Image.open(io.BytesIO(SCENE.draw())).convert("RGB")).astype(int)
    assert picture.shape == (CELL, 3 * CELL, 3)
    middles = picture[CELL // 2, CELL // 2 :: CELL]
    assert middles.argmax(axis=1).tolist() == [2, 0, 0], "blue, red, red"


def test_prompts_are_even_distinct_and_the_same_each_time() -> None:
    train_pool, held_out = shapes.make_prompts(*POOL)
    assert (train_pool, held_out) == shapes.make_prompts(*POOL)
    assert len({prompt.prompt_id for prompt in (*train_pool, *held_out)}) == 33
    assert {family.name for family in FAMILIES} == {prompt.task for prompt in train_pool[:4]}
    assert {len(prompt.answer) for prompt in train_pool} == {3, 6, 9, 12}
    assert all(digest_bytes(file) == ref for ref, file in shapes.draw_pictures(*POOL).items())
    assert {kind_of(layout.picture(ref)) for ref in shapes.draw_pictures(*POOL)} == {"record"}


def test_sizes_without_a_grid_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"data\.min_length 4 and data\.max_length 5 leave no grid"):
        grids(4, 5)


def test_the_shipped_policy_is_the_one_of_its_recipe_and_small() -> None:
    folder = shapes.model_dir()
    document = json.loads((folder / "recipe.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    assert digest_bytes(weights) == document["sha256"]
    assert len(weights) < 500_000
    assert document["recipe"] == json.loads(json.dumps(document["recipe"] | WarmStartRecipe().__dict__, default=vars))


@pytest.mark.slow
def test_a_warm_start_is_the_same_each_time_and_lowers_the_loss(tmp_path: Path) -> None:
    recipe = WarmStartRecipe(steps=12, scenes=40, batch=16, warmup_steps=2, sober_steps=6)
    losses: list[float] = []
    first = train(recipe, tmp_path / "one", lambda step, loss: losses.append(loss))
    assert train(recipe, tmp_path / "two") == first
    assert losses[5] < losses[0]


@pytest.mark.slow
def test_the_shipped_policy_answers_by_the_picture_that_it_is_shown() -> None:
    """Greedy, on questions that it has not seen: with another picture of the same size it is nearly always wrong."""
    seen = measure(shapes.model_dir(), 120, 1, 0.0)
    assert seen.right > 0.65
    assert seen.swapped < 0.08
    for family in ("kinds", "colours", "lead"):
        assert seen.tasks[family][0] > 0.9
