"""Checkpoints come back as they were, whole or not at all, and never through a pickle."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from npo_core.artifacts import RunArtifacts, open_run
from npo_core.checkpoints import files_digest
from npo_core.export import export_checkpoint
from npo_core.interfaces import ConfigurationError, NearFutureError
from npo_core.store import StoreError
from schemas import layout
from schemas.digest import canonical_json, digest_bytes
from schemas.records import CheckpointManifest, CheckpointRef, FileEntry
from tests.copies import copied, folder_of, leg_of
from tests.made_up import ENVIRONMENT


@pytest.fixture
def run(eight_steps: Path, tmp_path: Path) -> RunArtifacts:
    """A run of a test's own."""
    return copied(eight_steps, tmp_path)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def make_checkpoint(folder: Path) -> Path:
    for part, name in (("weights", "model"), ("optimizer", "optimizer")):
        (folder / part).mkdir(parents=True)
        save_file({"w": np.arange(4, dtype=np.float32)}, folder / part / f"{name}.safetensors")
    (folder / "weights" / "config.json").write_text("{}")
    (folder / "state.json").write_text('{"step": 9}')
    return folder


def test_a_checkpoint_comes_back_as_it_was_with_the_runs_model_files(run: RunArtifacts, tmp_path: Path) -> None:
    leg_id = leg_of(run, "scout").leg_id
    committed, same = run.commit_checkpoint(leg_id, 9, make_checkpoint(tmp_path / "in"), ENVIRONMENT)
    assert same
    assert sorted(entry.name for entry in committed.files) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    local = run.checkout(committed.ref, tmp_path / "out")
    assert (local.digest, local.step) == (committed.digest, 9)
    names = {path.relative_to(local.path).as_posix() for path in local.path.rglob("*") if path.is_file()}
    assert names == {
        "weights/model.safetensors",
        "weights/config.json",
        "weights/tokenizer.json",
        "optimizer/optimizer.safetensors",
        "state.json",
    }
    assert (local.weights / "config.json").read_text() == '{"model_type": "synthetic"}'
    np.testing.assert_array_equal(load_file(local.weights / "model.safetensors")["w"], np.arange(4))
    policy = run.checkout(committed.ref, tmp_path / "policy", weights_only=True)
    assert {path.name for path in policy.path.iterdir()} == {"weights"}


def test_equal_weights_have_equal_digests_wherever_they_are(run: RunArtifacts, tmp_path: Path) -> None:
    source, leg_id = make_checkpoint(tmp_path / "in"), leg_of(run, "scout").leg_id
    one, two = (run.commit_checkpoint(leg_id, step, source, ENVIRONMENT)[0] for step in (9, 10))
    assert (one.digest, one.weights_digest) == (two.digest, two.weights_digest)
    (source / "state.json").write_text("{}")
    three, _ = run.commit_checkpoint(leg_id, 11, source, ENVIRONMENT)
    assert three.weights_digest == one.weights_digest
    assert three.digest != one.digest


def test_a_missing_checkpoint_is_named_with_the_steps_that_there_are(run: RunArtifacts, tmp_path: Path) -> None:
    leg_id = leg_of(run, "scout").leg_id
    with pytest.raises(NearFutureError, match=f"leg {leg_id} of .*synthetic has no checkpoint at step 5 .*4, 6"):
        run.checkout(CheckpointRef(leg_id=leg_id, step=5, digest="0" * 64), tmp_path / "out")
    with pytest.raises(NearFutureError, match=r"has digest .*, not 000000000000 as it is referred to"):
        run.checkout(CheckpointRef(leg_id=leg_id, step=4, digest="0" * 64), tmp_path / "out")


def test_a_damaged_checkpoint_is_not_loaded(run: RunArtifacts, tmp_path: Path) -> None:
    manifest = run.checkpoints(leg_of(run, "scout").leg_id)[0]
    path = folder_of(run) / next(entry.key for entry in manifest.files if entry.role == "weights")
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(StoreError, match=r"model-.*safetensors was altered"):
        run.checkout(manifest.ref, tmp_path / "out")
    assert not (tmp_path / "out" / "weights" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["weights/model.safetensors", "weights/pytorch_model.bin", "optimizer/optimizer.pt"])
def test_a_pickle_is_not_committed_as_a_checkpoint(run: RunArtifacts, tmp_path: Path, name: str) -> None:
    source = make_checkpoint(tmp_path / "in")
    (source / name).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(NearFutureError, match="is refused"):
        run.commit_checkpoint(leg_of(run, "scout").leg_id, 9, source, ENVIRONMENT)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "is named as safetensors and is none"),
        ("pytorch_model.bin", "only .safetensors, .json"),
        ("../../../model.safetensors", "only .safetensors, .json"),
    ],
)
def test_a_pickle_that_a_forged_manifest_names_is_not_loaded(
    run: RunArtifacts, tmp_path: Path, name: str, message: str
) -> None:
    evil = pickle.dumps(Payload(tmp_path / "executed"))
    leg_id = leg_of(run, "scout").leg_id
    folder = layout.checkpoint(leg_id, 9)
    (folder_of(run) / folder).mkdir()
    (folder_of(run) / folder / "evil").write_bytes(evil)
    files = (FileEntry(role="weights", name=name, key=f"{folder}/evil", bytes=len(evil), sha256=digest_bytes(evil)),)
    forged = CheckpointManifest(
        files=files,
        leg_id=leg_id,
        step=9,
        digest=files_digest(files),
        weights_digest=files_digest(files),
        nonce="",
        created_at="",
    )
    (folder_of(run) / layout.manifest(folder)).write_bytes(canonical_json(forged.model_dump(mode="json")))
    with pytest.raises(NearFutureError, match=message):
        run.checkout(forged.ref, tmp_path / "a" / "b" / "out")
    assert not (tmp_path / "executed").exists()


def test_a_directory_without_weights_is_no_checkpoint(run: RunArtifacts, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(NearFutureError, match=r"holds no weights/\*\.safetensors"):
        run.commit_checkpoint("leg", 1, tmp_path / "in", ENVIRONMENT)
    with pytest.raises(NearFutureError, match=r"holds no config\.json"):
        run.put_model(tmp_path / "in")


def test_an_export_is_loaded_by_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=32, head_dim=8, num_key_value_heads=2, **sizes))
    model.save_pretrained(tmp_path / "checkpoint" / "weights")
    run = open_run(str(tmp_path / "runs" / "real"))
    run.put_model(tmp_path / "checkpoint" / "weights")
    ref = run.commit_checkpoint("leg", 1, tmp_path / "checkpoint", ENVIRONMENT)[0].ref
    (tmp_path / "export").mkdir()
    path, digest = export_checkpoint(run, ref, tmp_path / "export")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert digest == run.require_checkpoint("leg", 1).weights_digest
    with pytest.raises(ConfigurationError, match=r"export is not empty; choose a new directory"):
        export_checkpoint(run, ref, tmp_path / "export")
    assert not list(tmp_path.glob(".export*")), "scratch was left behind"
