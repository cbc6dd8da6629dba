"""Pictures in rows of the user's: every form of one is the same prompt, and one that cannot be shown is a bad row."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from npo_core.artifacts import open_run
from npo_core.begin import begin
from npo_core.interfaces import ConfigurationError, Prompt
from npo_core.pictures import PictureEncoder, load_processor, pictured_counter
from npo_core.prompts import encode
from npo_core.shapes import draw_pictures, make_prompts, model_dir
from npo_core.shapes.model import build_tokenizer
from npo_core.sources.load import Loaded, load, load_all
from npo_core.sources.split import question_of
from npo_core.tip import main_line_step
from npo_core.verify import verify_run
from npo_core.workspace import Workspace
from schemas import layout
from schemas.config import Config
from schemas.digest import digest_bytes, digest_json, short
from tests.command import last_json, npo
from tests.test_dry_run import said as told
from tests.test_dry_run import tried
from tests.test_sources import jsonl

POOL = (8, 4, 3, 6, 0)


def png(shade: int, size: int = 2) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


RED, DARK, BLACK = png(200), png(100), png(0)
REFS = [digest_bytes(data) for data in (RED, DARK, BLACK)]


def settings(path: Path, source: str = "jsonl", **data: Any) -> Config:
    data = {"columns": {"images": "image"}, **data}
    section = {"source": source, "path": str(path), **data}
    return Config.model_validate({"run": {"name": "demo"}, "data": section, "rollout": {"prompts_per_step": 1}})


def everything(path: Path, source: str = "jsonl", **data: Any) -> Loaded:
    return load_all(settings(path, source, **data), None)


def one(tmp_path: Path, row: dict[str, Any], **data: Any) -> Prompt:
    """The prompt of one row, whose pictures are files beside it."""
    for name, file in (("red", RED), ("dark", DARK), ("black", BLACK)):
        (tmp_path / f"{name}.png").write_bytes(file)
    loaded = everything(jsonl(tmp_path / "rows.jsonl", [{"answer": "1", **row}]), **data)
    assert loaded.pictures.keys() == set(loaded.train[0].image_refs)
    return loaded.train[0]


def said(prompt: Prompt) -> str:
    """The last message, a picture as the shade that it has."""
    refs = iter(prompt.image_refs)
    names = dict(zip(REFS, ("[red]", "[dark]", "[black]"), strict=True))
    content: Any = prompt.messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] if part["type"] == "text" else names[next(refs)] for part in content)


# ---- forms


def in_jsonl(tmp_path: Path) -> tuple[str, Path]:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "red.png").write_bytes(RED)
    (tmp_path / "dark.png").write_bytes(DARK)
    pictures = ["files/red.png", [str(tmp_path / "dark.png"), {"path": "files/red.png", "bytes": None}], None, []]
    rows = [{"prompt": f"{n}?", "answer": n, "image": picture} for n, picture in enumerate(pictures)]
    return "jsonl", jsonl(tmp_path / "rows.jsonl", rows)


def in_parquet(tmp_path: Path) -> tuple[str, Path]:
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    red, dark = {"bytes": RED, "path": "lost.png"}, {"bytes": DARK, "path": None}
    pictures = pa.array([[red], [dark, red], None, [None]], pa.list_(struct))
    pq.write_table(
        pa.table({"prompt": [f"{n}?" for n in range(4)], "answer": range(4), "image": pictures}),
        tmp_path / "rows.parquet",
    )
    return "parquet", tmp_path / "rows.parquet"


def in_binary_columns(tmp_path: Path) -> tuple[str, Path]:
    table = {"prompt": [f"{n}?" for n in range(4)], "answer": range(4), "image": [[RED], [DARK, RED], None, []]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    return "parquet", tmp_path / "rows.parquet"


def in_datasets(tmp_path: Path) -> tuple[str, Path]:
    datasets = pytest.importorskip("datasets")
    red, dark = (Image.open(io.BytesIO(data)) for data in (RED, DARK))
    features = {
        "prompt": datasets.Value("string"),
        "answer": datasets.Value("int64"),
        "image": datasets.List(datasets.Image()),
    }
    rows = {"prompt": [f"{n}?" for n in range(4)], "answer": range(4), "image": [[red], [dark, red], None, []]}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "saved")
    return "hf", tmp_path / "saved"


@pytest.mark.parametrize("written", [in_jsonl, in_parquet, in_binary_columns, in_datasets])
def test_a_picture_is_the_same_file_in_whatever_form_it_comes(
    written: Callable[[Path], tuple[str, Path]], tmp_path: Path
) -> None:
    source, path = written(tmp_path)
    loaded = everything(path, source)
    red, dark = REFS[:2]
    assert [prompt.image_refs for prompt in loaded.train] == [(red,), (dark, red), (), ()]
    assert loaded.pictures == {red: RED, dark: DARK}
    assert loaded.train[0].messages == ({"role": "user", "content": [{"type": "image"}, _text("0?")]},)
    assert loaded.train[2].messages == ({"role": "user", "content": "2?"},)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_one_picture_in_a_column_of_its_own_keeps_its_bytes_whatever_its_format(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    file = io.BytesIO()
    Image.new("L", (3, 3)).save(file, "JPEG")
    rows = {"prompt": ["a?"], "answer": ["1"], "image": [{"bytes": file.getvalue(), "path": None}]}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "saved")
    assert list(everything(tmp_path / "saved", "hf").pictures.values()) == [file.getvalue()]


# ---- placeholders


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("What?", "[red][dark]What?"),
        ("See <image>: what?", "[dark]See [red]: what?"),
        ("<image><image>", "[red][dark]"),
        ("See <image 2>, not <image 1>.", "See [dark], not [red]."),
        ("<image 2> and <image 2>", "[red][dark] and [dark]"),
        ("<image 2>, then <image>", "[dark], then [red]"),
        ("<image1> is no placeholder, nor <image 0>", "[red][dark]<image1> is no placeholder, nor <image 0>"),
    ],
)
def test_a_picture_stands_where_the_text_places_it(text: str, shown: str, tmp_path: Path) -> None:
    prompt = one(tmp_path, {"prompt": text, "image": ["red.png", "dark.png"]})
    assert said(prompt) == shown
    assert all(part.get("text") != "" for part in prompt.messages[0]["content"])


def test_choices_and_templates_place_pictures_of_several_columns_too(tmp_path: Path) -> None:
    row = {"prompt": "Which?", "a": "red.png", "b": None, "c": "black.png", "choices": ["<image 2>", "<image 1>"]}
    columns = {"images": ["a", "b", "c"], "choices": "choices", "answer_is": "index"}
    prompt = one(tmp_path, row, columns=columns, template="{{ prompt }}\n{{ choices }}\nAnswer:")
    assert said(prompt) == "Which?\nA. [black]\nB. [red]\nAnswer:"


def test_a_conversation_shows_pictures_where_the_user_places_them(tmp_path: Path) -> None:
    talk = [
        {"role": "system", "content": "Tags like <image> are pictures."},
        {"role": "user", "content": "<image> What?"},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "And now?"},
    ]
    prompt = one(tmp_path, {"prompt": talk, "image": ["red.png", "dark.png"]})
    assert prompt.messages == (
        talk[0],
        {"role": "user", "content": [{"type": "image"}, _text(" What?")]},
        talk[2],
        {"role": "user", "content": [{"type": "image"}, _text("And now?")]},
    )
    assert prompt.image_refs == (REFS[0], REFS[1])


# ---- rows that cannot be used


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "lost.png"}, "column image: picture lost.png cannot be read: No such file"),
        ({"image": "."}, r"column image: picture \. cannot be read: Is a directory"),
        ({"image": "text.png"}, r"column image: picture [0-9a-f]{12}, 5 bytes, cannot be read as one"),
        ({"image": "cut.png"}, "column image: picture .* cannot be read as one"),
        ({"image": "bomb.png"}, "column image: picture .* cannot be read as one .*decompression bomb"),
        ({"image": 7}, r"column image holds int, not a picture: a path, bytes, \{bytes, path\}, or a list of these"),
        ({"image": {"url": "x"}}, "column image holds dict, not a picture"),
        ({}, "it has no column image"),
        ({"image": None, "prompt": "<image>?"}, "its text names <image> 1 times .*, but it has 0 pictures"),
        ({"image": "red.png", "prompt": "<image 2>?"}, "its text names <image 2>, but it has 1 pictures"),
        ({"image": "red.png", "prompt": "<image 1><image>"}, "its text names <image> 1 times beside its numbered"),
    ],
)
def test_a_picture_that_cannot_be_shown_makes_its_row_a_bad_one(
    row: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "text.png").write_bytes(b"hello")
    (tmp_path / "cut.png").write_bytes(png(1, 8)[:50])
    (tmp_path / "bomb.png").write_bytes(png(1, 15))
    rows = [{"prompt": "a?", "answer": "1", "image": "red.png"}, {"prompt": "b?", "answer": "1", **row}]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigurationError, match=rf"rows\.jsonl:2: {reason}"):
        everything(path)
    skipped = everything(path, bad_rows="skip")
    assert skipped.report is not None
    assert (skipped.report.bad, len(skipped.train)) == (1, 1)
    assert list(skipped.pictures) == [REFS[0]]


def test_damage_of_any_kind_is_a_fault_of_the_row(tmp_path: Path) -> None:
    # A chunk whose name is no name: Pillow raises SyntaxError, once it decodes.
    whole = io.BytesIO()
    Image.effect_noise((300, 300), 90).save(whole, "PNG")
    data = whole.getvalue()
    second = data.index(b"IDAT", data.index(b"IDAT") + 1)
    (tmp_path / "broken.png").write_bytes(data[:second] + b"\x00\x01\x02\x03" + data[second + 4 :])
    rows = [{"prompt": "a?", "answer": "1", "image": "broken.png"}]
    with pytest.raises(ConfigurationError, match=r"rows\.jsonl:1: column image: picture .* cannot be read as one"):
        everything(jsonl(tmp_path / "rows.jsonl", rows))


def test_a_column_of_pictures_that_is_not_there_is_told(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "a?", "answer": "1", "image": None}])
    with pytest.raises(
        ConfigurationError, match=r"data\.columns\.images 'images' is no column .* did you mean image\?"
    ):
        everything(path, columns={"images": "images"})
    with pytest.raises(ConfigurationError, match=r"data\.columns\.images\.1 'pic' is no column"):
        everything(path, columns={"images": ["image", "pic"]})


# ---- identity


def test_the_same_question_about_another_picture_is_another_prompt(tmp_path: Path) -> None:
    for name, data in (("red", RED), ("dark", DARK)):
        (tmp_path / f"{name}.png").write_bytes(data)
    (tmp_path / "again.png").write_bytes(RED)
    pictures = ["red.png", "dark.png", "again.png", None]
    rows = [{"prompt": "What?", "answer": "1", "image": picture} for picture in pictures]
    loaded = everything(jsonl(tmp_path / "rows.jsonl", rows))
    assert loaded.report is not None
    assert loaded.report.duplicates == 1, "the same picture under another name"
    ids = [prompt.prompt_id for prompt in loaded.train]
    assert len({*ids}) == 3
    # What a row without pictures is called does not depend on whether others have some.
    assert ids[2] == short(digest_json([{"role": "user", "content": "What?"}]))
    assert everything(tmp_path / "rows.jsonl", columns={}).train[0].prompt_id == ids[2]


def test_pictures_of_prompts_that_are_left_out_are_left_out_too(tmp_path: Path) -> None:
    rows = []
    for n in range(12):
        (tmp_path / f"{n}.png").write_bytes(png(n))
        rows.append({"prompt": "What?", "answer": str(n), "image": f"{n}.png"})
    path = jsonl(tmp_path / "rows.jsonl", rows)
    loaded = load(settings(path, prompts=3, held_out=2), None)
    kept = [ref for prompt in (*loaded.train, *loaded.held_out) for ref in prompt.image_refs]
    assert len(kept) == 5
    assert loaded.pictures.keys() == {*kept}


# ---- models


def shapes_jsonl(folder: Path) -> Path:
    """Questions about shapes as rows of a user's, with their pictures beside them."""
    for ref, data in draw_pictures(*POOL).items():
        (folder / f"{ref[:8]}.png").write_bytes(data)
    rows = [
        {
            "prompt": prompt.messages[0]["content"][1]["text"],
            "answer": prompt.answer,
            "image": f"{prompt.image_refs[0][:8]}.png",
        }
        for prompts in make_prompts(*POOL)
        for prompt in prompts
    ]
    return jsonl(folder / "rows.jsonl", rows)


def sections(folder: Path, **data: Any) -> dict[str, Any]:
    """A run of two steps on them."""
    columns = {"images": "image"}
    return {
        "run": {"name": "pictured", "store": f"file://{folder}/store", "total_steps": 2, "segment_steps": 2},
        "model": {"path": "shapes"},
        "data": {"source": "jsonl", "path": str(shapes_jsonl(folder)), "held_out": 4, "columns": columns, **data},
        "verifier": {"kind": "exact"},
        "rollout": {"group_size": 4, "prompts_per_step": 4, "max_new_tokens": 8},
        "evaluation": {"every": 2, "samples": 1},
    }


def test_prompts_are_as_long_as_the_model_finds_them_with_their_pictures(tmp_path: Path) -> None:
    workspace = begin(Config.model_validate(sections(tmp_path)))
    report = workspace.record.data
    assert report is not None
    prompts = [*workspace.prompts.batch(0), *workspace.prompts.batch(1), *workspace.prompts.held_out()]
    assert len(prompts) == 12
    longest = max(len(workspace.encode(prompt)) for prompt in prompts)
    assert report.longest == longest > max(len(encode(workspace.tokenizer, prompt)) for prompt in prompts)
    # What they ask is what the shapes ask.
    assert {*map(question_of, prompts)} == {question_of(prompt) for pool in make_prompts(*POOL) for prompt in pool}
    pictures = draw_pictures(*POOL)
    assert all(workspace.run.picture(ref) == pictures[ref] for prompt in prompts for ref in prompt.image_refs)


@pytest.mark.parametrize("size", [(16, 48), (64, 16), (37, 100), (640, 480), (5, 5)])
def test_the_length_is_known_without_cutting_the_pictures(size: tuple[int, int]) -> None:
    file = io.BytesIO()
    Image.new("L", size).save(file, "PNG")
    files = {"a": file.getvalue(), "b": RED}
    content = [{"type": "image"}, _text("K="), {"type": "image"}, {"type": "image"}]
    prompt = Prompt("p", "", ({"role": "user", "content": content},), "", ("a", "b", "a"))
    encoder = PictureEncoder(load_processor(model_dir()), files.__getitem__)
    assert encoder.length(build_tokenizer(), prompt) == len(encoder.encode(build_tokenizer(), prompt))


def test_a_prompt_that_is_too_long_by_its_picture_is_over_long(tmp_path: Path) -> None:
    workspace = begin(Config.model_validate(sections(tmp_path, max_prompt_tokens=9, over_long="skip", held_out=2)))
    report = workspace.record.data
    assert report is not None
    # Three cells are three tokens, six are six, with two around them and two or three of the question.
    assert (report.over_long, report.longest) == (4, 8)
    assert len(workspace.run.store.list(layout.PICTURES)) == 2


@pytest.mark.parametrize(
    ("size", "prompt", "said"),
    [
        ((16, 48), "<|image_pad|>K=", "has 1 pictures, but the chat template writes 2 placeholders"),
        ((2, 600), "K=", "absolute aspect ratio must be smaller than 200"),
    ],
)
def test_what_the_model_cannot_be_shown_is_a_bad_row(
    size: tuple[int, int], prompt: str, said: str, tmp_path: Path
) -> None:
    Image.new("RGB", size).save(tmp_path / "one.png")
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt, "answer": "1", "image": "one.png"}])
    config = settings(path)
    tokens = pictured_counter(build_tokenizer(), config.chat, lambda: load_processor(model_dir()))
    with pytest.raises(ConfigurationError, match=rf"rows\.jsonl:1: .*cannot render it .*{said}"):
        load(config, tokens)


def test_a_language_model_is_refused_for_rows_with_pictures(tmp_path: Path) -> None:
    values = {**sections(tmp_path), "model": {"path": "testbed"}}
    with pytest.raises(ConfigurationError, match=r"the data hold pictures, but model\.path names a .* which sees none"):
        begin(Config.model_validate(values))
    assert not (tmp_path / "store" / "pictured").exists()


def test_a_dry_run_counts_pictures_and_tokens_and_says_if_the_model_sees_none(tmp_path: Path) -> None:
    values = sections(tmp_path)
    found = tried(tmp_path, **values)
    assert not found.faults
    assert told(found, "pictures")["ok"].startswith("3 pictures, each stored once")
    assert "8 prompts to train on, 4 held out, 11 tokens the longest" in told(found, "data")["ok"]
    blind = tried(tmp_path, **{**values, "model": {"path": "testbed"}})
    assert "the data hold 3 pictures, but model.path names a" in told(blind, "pictures")["failed"]


@pytest.mark.slow
def test_a_run_on_rows_with_pictures_trains_and_verifies(tmp_path: Path, prefect_server: dict[str, str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(sections(tmp_path)))
    result = last_json(npo("run", file, "--json", env=prefect_server))
    assert result["status"] == "done"
    run = open_run(result["run"])
    assert main_line_step(run)[0] == 2
    opened = Workspace.of(run)
    assert not verify_run(run, opened.verifier, opened.decode)
