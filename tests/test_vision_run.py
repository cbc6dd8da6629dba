"""Runs whose prompts show pictures: stored once, replayed, resumed bit by bit, verified, refused where they must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from npo_core import views
from npo_core.artifacts import RunArtifacts, open_run
from npo_core.begin import begin
from npo_core.benchmarks import open_benchmark
from npo_core.export import export_checkpoint
from npo_core.interfaces import ConfigurationError
from npo_core.picture_files import picture_refs
from npo_core.pictures import load_processor, require_supported
from npo_core.policy import Policy
from npo_core.sources.load import load
from npo_core.store import StoreError
from npo_core.tip import main_line_step
from npo_core.verify import verify_run
from npo_core.workspace import Workspace
from schemas import layout
from schemas.benchmark import BenchmarkFile
from schemas.config import Config
from schemas.learner import LearnerSection
from schemas.model import ModelSection
from tests.command import fingerprint, last_json, npo, run_arguments, was_killed

SIZES = {"total_steps": 4, "segment_steps": 2}
MOMENT = "segment-step:4"
"""Scout and guide are done; the replay has trained its two steps, with nothing of them committed."""


def arguments(store: Path) -> list[str]:
    window = {"future__interventions": "[{start: 0, lookahead: 2, window: 2}]"}
    sizes = {f"run__{name}": size for name, size in SIZES.items()}
    return run_arguments("shapes-npo", store, "pictured", **sizes, **window, data__held_out=8, evaluation__every=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, prefect_server: dict[str, str]) -> RunArtifacts:
    """An NPO run with pictures that nobody kills."""
    result = last_json(npo(*arguments(tmp_path_factory.mktemp("store")), "--json", env=prefect_server))
    assert result["status"] == "done"
    return open_run(result["run"])


def config(store: Path, **sections: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "t", "store": f"file://{store}"},
            "model": {"path": "shapes", **sections.pop("model", {})},
            "data": {"source": "shapes", "prompts": 8, "held_out": 4},
            "rollout": {"prompts_per_step": 4},
            **sections,
        }
    )


@pytest.mark.slow
def test_killed_and_resumed_it_ends_bit_identical(
    tmp_path: Path, prefect_server: dict[str, str], run: RunArtifacts
) -> None:
    assert was_killed(npo(*arguments(tmp_path), env={**prefect_server, "NPO_FAULT": MOMENT}))
    assert open_run(str(tmp_path / "pictured")).guides()
    result = last_json(npo(*arguments(tmp_path), "--json", env=prefect_server))
    assert fingerprint(open_run(result["run"])) == fingerprint(run)


@pytest.mark.slow
def test_rows_refer_to_pictures_that_are_stored_once(run: RunArtifacts) -> None:
    prompts = run.prompts()
    assert prompts.num_rows == 24
    assert len(run.store.list(layout.PICTURES)) == 6, "four questions are asked about each"
    assert run.store.list(layout.PICTURES) == picture_refs(prompts)
    shown = dict(zip(prompts["prompt_id"].to_pylist(), prompts["image_refs"].to_pylist(), strict=True))
    rows = pl.concat([pl.DataFrame(run.table(s, "rollouts")) for leg in run.legs() for s in run.segments(leg.leg_id)])
    assert rows.height > 100
    assert all(row["image_refs"] == shown[row["prompt_id"]] for row in rows.iter_rows(named=True))
    assert "[picture]" in views.prompt_words(run)[rows["prompt_id"][0]]


@pytest.mark.slow
def test_verify_finds_a_picture_that_was_altered_or_lost(run: RunArtifacts) -> None:
    opened = Workspace.of(run)
    assert not verify_run(run, opened.verifier, opened.decode)
    ref, other = run.store.list(layout.PICTURES)[:2]
    path = Path(run.uri.removeprefix("file://"), layout.picture(ref))
    lost, data = path.with_name(other), path.read_bytes()
    kept = lost.read_bytes()
    try:
        path.write_bytes(data[:-1] + b"x")
        lost.unlink()
        found = verify_run(run, opened.verifier, opened.decode)
        with pytest.raises(StoreError, match="is not the picture that its name says"):
            run.picture(ref)
    finally:
        path.write_bytes(data)
        lost.write_bytes(kept)
    assert [(fault.key, "missing" in fault.problem) for fault in found] == [
        (layout.picture(ref), False),
        (layout.picture(other), True),
    ]


@pytest.mark.slow
def test_an_exported_checkpoint_is_a_model_that_sees(run: RunArtifacts, tmp_path: Path) -> None:
    step, leg = main_line_step(run)
    target, _ = export_checkpoint(run, run.require_checkpoint(leg.leg_id, step).ref, tmp_path / "exported")
    assert load_processor(target).images.merge_size == 2
    assert Policy(target, ModelSection(), LearnerSection(device="cpu")).vision is not None


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"vllm": {"samples": ["guide"], "url": "http://gpu"}},
            r"vllm\.url http://gpu is given token ids .*; leave it",
        ),
        ({"model": {"lora": {"rank": 2}}}, r"model\.lora trains language models alone; remove the section model\.lora"),
    ],
)
def test_engines_that_take_no_pictures_are_refused_before_a_run_begins(
    tmp_path: Path, sections: dict[str, Any], said: str
) -> None:
    wrong = config(tmp_path, **sections)
    with pytest.raises(ConfigurationError, match=said):
        begin(wrong)
    assert not list(tmp_path.iterdir())


def test_deepspeed_and_vllm_in_a_process_of_ours_take_pictures(tmp_path: Path) -> None:
    require_supported(config(tmp_path, learner={"engine": "deepspeed"}, vllm={"samples": ["rollout", "guide"]}))


def test_a_language_model_is_refused_for_pictures(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="sees none"):
        begin(config(tmp_path, model={"path": "testbed"}))
    assert not list(tmp_path.iterdir())


def test_pictures_are_those_that_the_prompts_name_and_the_same_each_time(tmp_path: Path) -> None:
    loaded = load(config(tmp_path), None)
    assert set(loaded.pictures) == {ref for prompt in (*loaded.train, *loaded.held_out) for ref in prompt.image_refs}
    assert load(config(tmp_path), None).pictures == loaded.pictures
    assert not {p.image_refs for p in loaded.train} & {p.image_refs for p in loaded.held_out}


def test_a_benchmark_brings_its_pictures_and_is_refused_by_engines_that_take_none(tmp_path: Path) -> None:
    data = {"source": "shapes", "prompts": 4, "held_out": 4, "pool_seed": 9}
    file = BenchmarkFile.model_validate({"name": "more-shapes", "data": data})
    opened = open_benchmark(file, config(tmp_path), None)
    assert sorted(opened.pictures) == picture_refs(opened.table)
    with pytest.raises(ConfigurationError, match=r"vllm\.url http://gpu is given token ids alone"):
        open_benchmark(file, config(tmp_path, vllm={"samples": ["evaluation"], "url": "http://gpu"}), None)
